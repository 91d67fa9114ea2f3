//! The reward table.

use serde::{Deserialize, Serialize};

/// Reward of a response that does not keep to the format, or of an invalid proposal.
pub const BAD_FORMAT: f64 = -1.0;
/// Reward of a wrong answer in good format.
pub const WRONG: f64 = -0.5;

/// How an induction answer's share of passed hidden pairs becomes its reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InductionReward {
    /// 1 when all pass, else 0.
    Binary,
    /// The share itself.
    Accuracy,
    /// 1 when one passes.
    AnyCorrect,
}

impl InductionReward {
    /// Accuracy from the share of passed pairs.
    pub fn accuracy(self, share: f64) -> f64 {
        match self {
            InductionReward::Binary => f64::from(u8::from(share == 1.0)),
            InductionReward::Accuracy => share,
            InductionReward::AnyCorrect => f64::from(u8::from(share > 0.0)),
        }
    }
}

/// Reward of a valid proposal that no probe solves, or all do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extremes {
    /// 0 (the paper).
    Zero,
    /// -0.5 (the code).
    MinusHalf,
}

/// Which valid proposals enter the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceptProposals {
    /// All, whatever their reward (paper and code).
    All,
    /// All but those that every probe solves.
    NonOne,
    /// All but those that every probe or none solves.
    NonExtremes,
}

impl AcceptProposals {
    /// Whether a valid task of this success rate is stored.
    pub fn accepts(self, success_rate: f64) -> bool {
        match self {
            AcceptProposals::All => true,
            AcceptProposals::NonOne => success_rate < 1.0,
            AcceptProposals::NonExtremes => success_rate > 0.0 && success_rate < 1.0,
        }
    }
}

/// How intrinsic terms join the learnability r.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// r + sum of terms.
    Sum,
    /// r x product of terms.
    Multiply,
    /// r + product of terms.
    SumMultiply,
    /// r x sum of terms.
    MultiplySum,
}

/// `1 - p` for a success rate p above 0, else 0: hard but solvable is worth most.
pub fn learnability(success_rate: f64) -> f64 {
    if success_rate > 0.0 { 1.0 - success_rate } else { 0.0 }
}

/// Reward of a solver's response: -1 in bad format, -0.5 when wrong, else its accuracy.
pub fn solver(format_ok: bool, accuracy: f64) -> f64 {
    match (format_ok, accuracy) {
        (false, _) => BAD_FORMAT,
        (true, 0.0) => WRONG,
        (true, accuracy) => accuracy,
    }
}

/// Reward of a proposal. `success_rate` is the mean accuracy of its probes, none when the task is invalid; `terms` are
/// the weighted and capped intrinsic rewards that are switched on.
pub fn proposer(
    format_ok: bool,
    success_rate: Option<f64>,
    extremes: Extremes,
    terms: &[f64],
    combine: Combine,
) -> f64 {
    let Some(rate) = success_rate.filter(|_| format_ok) else { return BAD_FORMAT };
    let r = learnability(rate);
    if r == 0.0 {
        return if extremes == Extremes::MinusHalf { WRONG } else { 0.0 };
    }
    if terms.is_empty() {
        return r;
    }
    let (sum, product) = (terms.iter().sum::<f64>(), terms.iter().product::<f64>());
    match combine {
        Combine::Sum => r + sum,
        Combine::Multiply => r * product,
        Combine::SumMultiply => r + product,
        Combine::MultiplySum => r * sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_solver_table() {
        assert_eq!(
            [solver(false, 1.0), solver(true, 0.0), solver(true, 1.0), solver(true, 0.4)],
            [-1.0, -0.5, 1.0, 0.4]
        );
        let share = 0.8;
        assert_eq!(
            [InductionReward::Binary, InductionReward::Accuracy, InductionReward::AnyCorrect]
                .map(|r| r.accuracy(share)),
            [0.0, 0.8, 1.0]
        );
    }

    #[test]
    fn the_proposer_table() {
        let plain = |ok, rate, extremes| proposer(ok, rate, extremes, &[], Combine::Sum);
        assert_eq!(plain(true, None, Extremes::Zero), -1.0);
        assert_eq!(plain(false, Some(0.5), Extremes::Zero), -1.0);
        // The cliff at 0: an unsolvable task is worth nothing, one solved once in eight the most.
        assert_eq!(plain(true, Some(0.0), Extremes::Zero), 0.0);
        assert_eq!(plain(true, Some(0.125), Extremes::Zero), 0.875);
        assert_eq!(plain(true, Some(1.0), Extremes::Zero), 0.0);
        assert_eq!(plain(true, Some(0.0), Extremes::MinusHalf), -0.5);
        assert_eq!(plain(true, Some(1.0), Extremes::MinusHalf), -0.5);
    }

    #[test]
    fn intrinsic_terms_join_as_named_and_never_save_a_worthless_task() {
        let with = |combine| proposer(true, Some(0.5), Extremes::Zero, &[0.5, 0.25], combine);
        assert_eq!(
            [Combine::Sum, Combine::Multiply, Combine::SumMultiply, Combine::MultiplySum].map(with),
            [1.25, 0.0625, 0.625, 0.375]
        );
        assert_eq!(proposer(true, Some(1.0), Extremes::Zero, &[0.5], Combine::Sum), 0.0);
    }
}
