//! The temperature that samples are drawn and trained at, raised as the model becomes surer of itself.
//!
//! Reinforcement sharpens a policy until all samples of a task agree: then none is better than the others, and there is
//! nothing left to learn from, right or wrong. A temperature that rises as entropy falls keeps samples as varied as they
//! were, while the model as it is, at its own temperature, goes on becoming surer. Pure. Not here: who samples (`pipeline`).

use serde::{Deserialize, Serialize};

/// Steps whose mean entropy is the reference.
const REFERENCE_STEPS: u64 = 10;
/// Change of the temperature in a step, as a share of the entropy that is missing.
const GAIN: f64 = 0.1;
/// Most of a step's entropy that may be missing or too much, as a share of the reference.
const MAX_ERROR: f64 = 1.0;
/// Greatest factor of the temperature.
const MAX_FACTOR: f64 = 64.0;

/// The temperature so far, as a factor of the configured one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Warmth {
    num_steps: u64,
    /// Sum of the entropies of the first steps.
    reference: f64,
    factor: f64,
}

impl Default for Warmth {
    fn default() -> Self {
        Warmth { num_steps: 0, reference: 0.0, factor: 1.0 }
    }
}

impl Warmth {
    /// Factor of the configured temperature, 1 or more.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// Takes a step's mean entropy in, and changes the factor so that the next ones' become `hold` times the first ones'; 0
    /// changes nothing, and neither does an entropy that is no number.
    pub fn observe(&mut self, entropy: f64, hold: f64) {
        if !entropy.is_finite() {
            return;
        }
        self.num_steps += 1;
        if self.num_steps <= REFERENCE_STEPS {
            self.reference += entropy;
            return;
        }
        let wanted = hold * self.reference / REFERENCE_STEPS as f64;
        if wanted > 0.0 {
            let missing = (1.0 - entropy / wanted).clamp(-MAX_ERROR, MAX_ERROR);
            self.factor = (self.factor * (1.0 + GAIN * missing)).clamp(1.0, MAX_FACTOR);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_temperature_rises_while_entropy_is_missing_and_falls_back_with_it() {
        let after = |entropies: &[f64], hold: f64| {
            let mut warmth = Warmth::default();
            (0..REFERENCE_STEPS).for_each(|_| warmth.observe(0.8, hold));
            assert_eq!(warmth.factor(), 1.0, "the first steps are the reference");
            entropies.iter().for_each(|e| warmth.observe(*e, hold));
            warmth.factor()
        };
        assert_eq!(after(&[0.1, 0.0], 0.0), 1.0, "nothing is held");
        assert_eq!(after(&[0.5, 0.7], 0.5), 1.0, "there is enough");
        let (once, twice) = (after(&[0.3], 0.5), after(&[0.3, 0.3], 0.5));
        assert!(1.0 < once && once < twice, "{once} {twice}");
        assert!(after(&[0.3, 0.3, 0.6], 0.5) < twice, "enough again");
        assert_eq!(after(&[0.3, 0.6, 0.6, 0.6], 0.5), 1.0, "never below the configured one");
        assert_eq!(after(&[0.0; 1000], 1.0), MAX_FACTOR);
        assert_eq!(after(&[f64::NAN, 0.3], 0.5), once, "no number is no entropy");
    }

    /// A model whose entropy at a temperature is the temperature's share of its sharpness, which grows.
    #[test]
    fn entropy_is_held_where_it_is_wanted() {
        let mut warmth = Warmth::default();
        let mut entropy = 0.0;
        for step in 0..400 {
            let sharpness = 1.0 + f64::from(step) / 100.0;
            entropy = warmth.factor() / sharpness;
            warmth.observe(entropy, 0.8);
        }
        assert!((entropy - 0.8).abs() < 0.1, "{entropy} at {}", warmth.factor());
    }
}
