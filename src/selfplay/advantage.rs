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
    fn equal_rewards_teach_nothing() {
        assert_eq!(whiten(&[0.3, 0.3, 0.3], &[1, 5, 9], Baseline::Token), [0.0; 3]);
        assert!(whiten(&[], &[], Baseline::Token).is_empty());
        assert_eq!(whiten(&[1.0], &[1], Baseline::Sequence), [0.0]);
    }
}
