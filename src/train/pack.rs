//! Micro-batches: runs of whole sequences under a token budget, in the order given.

use crate::train::loss::TrainSeq;

/// Cuts sequences into runs of at most `budget` tokens; a longer sequence is a run of its own.
pub fn micro_batches(seqs: &[TrainSeq], budget: usize) -> Vec<&[TrainSeq]> {
    let (mut runs, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (i, seq) in seqs.iter().enumerate() {
        if i > start && tokens + seq.tokens.len() > budget {
            runs.push(&seqs[start..i]);
            (start, tokens) = (i, 0);
        }
        tokens += seq.tokens.len();
    }
    if start < seqs.len() {
        runs.push(&seqs[start..]);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_keep_the_order_and_the_budget() {
        let seq = |n: usize| TrainSeq { tokens: vec![0; n], inv_temperature: 1.0, targets: Vec::new() };
        let seqs: Vec<TrainSeq> = [3, 4, 9, 1, 1].map(seq).into();
        let lens: Vec<Vec<usize>> =
            micro_batches(&seqs, 8).iter().map(|run| run.iter().map(|s| s.tokens.len()).collect()).collect();
        assert_eq!(lens, [vec![3, 4], vec![9], vec![1, 1]]);
    }
}
