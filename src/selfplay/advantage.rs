//! Task-relative REINFORCE++: rewards are whitened within each configuration, by the statistics of that one alone.

use serde::{Deserialize, Serialize};

/// Added to the variance.
const EPS: f64 = 1e-8;

/// What mean and variance are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Response tokens, each with its sequence's reward: long responses weigh more (the reference as run).
    Token,
    /// Sequences (the paper's equation 8).
    Sequence,
    /// As `Sequence`, but an answer that has siblings, which answer the same task, is measured against their mean, so
    /// that how hard the task is does not look like merit (neither paper nor code; for trained probes).
    Task,
    /// Sequences of all configurations together, as plain REINFORCE++ has it: what the paper's baselines are there to
    /// improve on.
    Global,
}

/// Advantage of each response of one configuration: `(R - mean) / sqrt(var + 1e-8)`, variance with Bessel's correction.
/// `lens` are response lengths in tokens, end of text included. Equal rewards give exactly 0.
///
/// # Panics
/// When the lengths are not one per reward.
pub fn whiten(rewards: &[f64], lens: &[usize], baseline: Baseline) -> Vec<f64> {
    assert_eq!(rewards.len(), lens.len(), "a length per reward");
    let weight = |i: usize| if baseline == Baseline::Token { lens[i] as f64 } else { 1.0 };
    let total: f64 = (0..rewards.len()).map(weight).sum();
    if total < 2.0 || rewards.iter().all(|r| *r == rewards[0]) {
        return vec![0.0; rewards.len()];
    }
    let mean = rewards.iter().enumerate().map(|(i, r)| weight(i) * r).sum::<f64>() / total;
    let sum = rewards.iter().enumerate().map(|(i, r)| weight(i) * (r - mean) * (r - mean)).sum::<f64>();
    let std = (sum / (total - 1.0) + EPS).sqrt();
    rewards.iter().map(|r| (r - mean) / std).collect()
}

/// As [`whiten`] over sequences, but each reward is measured against the others' mean of its run of equal `tasks`.
/// Rewards that are alone in their run are measured against the mean of all such. One scale for the whole configuration:
/// tasks that are nearly always solved, or hardly ever, do not weigh more for it.
///
/// # Panics
/// When the tasks are not one per reward.
pub fn whiten_by_task(rewards: &[f64], tasks: &[u64]) -> Vec<f64> {
    assert_eq!(rewards.len(), tasks.len(), "a task per reward");
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let mut left = rewards.to_vec();
    let mut alone = Vec::new();
    let mut start = 0;
    for run in tasks.chunk_by(|a, b| a == b) {
        let (end, n) = (start + run.len(), run.len() as f64);
        if n == 1.0 {
            alone.push(start);
        } else {
            let others = mean(&rewards[start..end]);
            left[start..end].iter_mut().for_each(|r| *r = (*r - others) * n / (n - 1.0));
        }
        start = end;
    }
    let values: Vec<f64> = alone.iter().map(|i| rewards[*i]).collect();
    for i in alone {
        left[i] -= mean(&values);
    }
    let std = (left.iter().map(|r| r * r).sum::<f64>() / left.len().max(2) as f64 + EPS).sqrt();
    left.iter().map(|r| r / std).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_statistics_weigh_long_responses() {
        // Tokens: 1, 1, 1, -1: mean 0.5, variance 3 / 3 = 1.
        let token = whiten(&[1.0, -1.0], &[3, 1], Baseline::Token);
        assert!((token[0] - 0.5).abs() < 1e-7 && (token[1] + 1.5).abs() < 1e-7, "{token:?}");
        let sequence = whiten(&[1.0, -1.0], &[3, 1], Baseline::Sequence);
        assert!((sequence[0] - 0.5f64.sqrt()).abs() < 1e-7 && (sequence[0] + sequence[1]).abs() < 1e-12);
    }

    #[test]
    fn siblings_are_measured_against_each_other_alone() {
        // Deviations from the others: 1, -1 in the first run; none in the second; 0.5, -0.5 of those alone.
        let found = whiten_by_task(&[1.0, 0.0, 1.0, 1.0, 1.0, 0.0], &[1, 1, 2, 2, 3, 4]);
        let scale = (2.5f64 / 6.0).sqrt();
        for (found, expected) in found.iter().zip([1.0, -1.0, 0.0, 0.0, 0.5, -0.5]) {
            assert!((found - expected / scale).abs() < 1e-6, "{found} is not {expected} / {scale}");
        }
    }

    #[test]
    fn equal_rewards_teach_nothing() {
        assert_eq!(whiten_by_task(&[0.3, 0.3, 1.0, 1.0], &[1, 1, 2, 2]), [0.0; 4]);
        assert!(whiten_by_task(&[], &[]).is_empty());
        assert_eq!(whiten(&[0.3, 0.3, 0.3], &[1, 5, 9], Baseline::Token), [0.0; 3]);
        assert!(whiten(&[], &[], Baseline::Token).is_empty());
        assert_eq!(whiten(&[1.0], &[1], Baseline::Sequence), [0.0]);
    }
}
