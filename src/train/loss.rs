//! What is trained on: sequences with a loss on some of their tokens, and how token losses add up to one number.

use serde::{Deserialize, Serialize};

use crate::compute::ops::HeadLoss;

/// Loss of one token of a sequence.
#[derive(Debug, Clone, Copy)]
pub struct TokenTarget {
    /// Index of the token in its sequence, at least 1.
    pub at: usize,
    /// The loss.
    pub loss: HeadLoss,
    /// Weight of the entropy bonus.
    pub entropy_coef: f32,
}

/// A sequence to train on.
#[derive(Debug, Clone)]
pub struct TrainSeq {
    /// Prompt and response.
    pub tokens: Vec<u32>,
    /// 1 / sampling temperature.
    pub inv_temperature: f32,
    /// Tokens with a loss, in order.
    pub targets: Vec<TokenTarget>,
}

/// How token losses are averaged (each sequence counts its response tokens only).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossAggregation {
    /// Mean over all tokens of the step.
    TokenMean,
    /// Mean over sequences of their token means (the paper's equation 9).
    SequenceMean,
    /// Mean over runs of 16 sequences of their token means (the reference as run).
    MicroBatchMean,
}

/// Sequences of one run of [`LossAggregation::MicroBatchMean`].
const MICRO_BATCH: usize = 16;

/// Weight of every token of each sequence, given the sequences' token counts; all tokens' weights sum to 1.
pub fn token_weights(aggregation: LossAggregation, counts: &[usize]) -> Vec<f32> {
    let total = |counts: &[usize]| counts.iter().sum::<usize>().max(1) as f64;
    match aggregation {
        LossAggregation::TokenMean => vec![(1.0 / total(counts)) as f32; counts.len()],
        LossAggregation::SequenceMean => {
            counts.iter().map(|n| (1.0 / (*n).max(1) as f64 / counts.len() as f64) as f32).collect()
        }
        LossAggregation::MicroBatchMean => {
            let runs = counts.len().div_ceil(MICRO_BATCH) as f64;
            let weights = |run: &[usize]| vec![(1.0 / total(run) / runs) as f32; run.len()];
            counts.chunks(MICRO_BATCH).flat_map(weights).collect()
        }
    }
}

/// Constants of the clipped policy-gradient loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyLoss {
    /// Clip range below a ratio of 1.
    pub clip_low: f32,
    /// Clip range above a ratio of 1.
    pub clip_high: f32,
    /// Weight of the entropy bonus.
    pub entropy_coef: f32,
    /// Sampling temperature.
    pub temperature: f32,
}

/// A sampled response as a training sequence: every response token has the response's advantage.
pub fn policy_sequence(
    loss: &PolicyLoss,
    prompt: &[u32],
    response: &[u32],
    old_logprobs: &[f32],
    advantage: f32,
    weight: f32,
) -> TrainSeq {
    assert_eq!(response.len(), old_logprobs.len(), "a log-probability per sampled token");
    let targets = old_logprobs
        .iter()
        .enumerate()
        .map(|(i, old_logprob)| TokenTarget {
            at: prompt.len() + i,
            loss: HeadLoss::Clipped {
                advantage,
                old_logprob: *old_logprob,
                low: loss.clip_low,
                high: loss.clip_high,
                weight,
            },
            entropy_coef: loss.entropy_coef * weight,
        })
        .collect();
    TrainSeq { tokens: [prompt, response].concat(), inv_temperature: 1.0 / loss.temperature, targets }
}

/// A text with a weight per token (0: no loss); the first token has no prediction and its weight is not used.
pub fn nll_sequence(tokens: &[u32], weights: &[f32]) -> TrainSeq {
    assert_eq!(tokens.len(), weights.len(), "a weight per token");
    let targets = weights
        .iter()
        .enumerate()
        .skip(1)
        .filter(|(_, w)| **w != 0.0)
        .map(|(at, weight)| TokenTarget { at, loss: HeadLoss::Nll { weight: *weight }, entropy_coef: 0.0 })
        .collect();
    TrainSeq { tokens: tokens.to_vec(), inv_temperature: 1.0, targets }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_weights_sum_to_one_and_weigh_as_named() {
        let counts: Vec<usize> = (1..=20).collect();
        for aggregation in [LossAggregation::TokenMean, LossAggregation::SequenceMean, LossAggregation::MicroBatchMean]
        {
            let weights = token_weights(aggregation, &counts);
            let sum: f64 = weights.iter().zip(&counts).map(|(w, n)| f64::from(*w) * *n as f64).sum();
            assert!((sum - 1.0).abs() < 1e-6, "{aggregation:?}: {sum}");
        }
        let runs = token_weights(LossAggregation::MicroBatchMean, &counts);
        assert!((runs[0] - 0.5 / 136.0).abs() < 1e-9 && (runs[19] - 0.5 / 74.0).abs() < 1e-9);
    }
}
