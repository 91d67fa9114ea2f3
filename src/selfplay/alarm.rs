//! Alarms: signs of a collapse, watched from step to step. Self-play that collapses does so quietly, with rising rewards:
//! programs become near-identical, answers few, and every probe agrees.
//!
//! A sign that lasts for some steps on end is an alarm. Shares are judged as they are; entropy, length and validity against
//! their own means over the first steps, which the state carries through a resumption. A hit of a constraint and a gradient that is
//! not finite are alarms at once. Pure. Not here: what is done about an alarm (`pipeline`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Steps whose means later ones are compared with.
const REFERENCE_STEPS: u64 = 10;
/// Lowest share of valid proposals that differ from others of their step, in program and in answer.
const MIN_UNIQUE: [f64; 2] = [0.5, 0.25];
/// Lowest share of valid tasks that some probes solve and some do not: the others teach the proposer nothing.
const MIN_INFORMATIVE: f64 = 0.05;
/// Lowest entropy and validity, and greatest length, as multiples of those of the first steps.
const MIN_ENTROPY: f64 = 0.3;
const MIN_VALID: f64 = 0.5;
const MAX_LENGTH: f64 = 2.5;
/// Most steps on end that change no weight, whatever is done about alarms.
const MAX_SKIPPED: u64 = 20;

/// What is done about an alarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnCollapse {
    /// It is reported.
    Warn,
    /// The run saves and ends.
    Stop,
    /// The run ends, and its checkpoints since the first sign go.
    Rollback,
}

/// A step in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Vitals {
    /// Share of valid proposals with a program of their own, mean over task types.
    pub unique_programs: f64,
    /// Share of valid proposals with an answer of their own, mean over task types.
    pub unique_answers: f64,
    /// Share of proposals that became tasks.
    pub valid: f64,
    /// Share of tasks that some probes solve and some do not.
    pub informative: f64,
    /// Mean entropy of the sampled distributions, in nats.
    pub entropy: f64,
    /// Mean length of a response, in tokens.
    pub response_tokens: f64,
}

/// The signs so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Alarms {
    num_steps: u64,
    /// Sums over the first steps: valid, entropy, response tokens.
    reference: [f64; 3],
    /// Steps that each sign has lasted for.
    lasting: BTreeMap<String, u64>,
    /// Steps on end with a hit, by constraint.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    hits: BTreeMap<String, u64>,
    /// Steps on end whose gradient or distributions were not finite.
    #[serde(skip_serializing_if = "is_zero")]
    skipped: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Alarms {
    /// Steps that the oldest of the present signs has lasted for, alarm or not yet.
    pub fn longest(&self) -> u64 {
        self.lasting.values().chain(self.hits.values()).copied().max().unwrap_or(0).max(self.skipped)
    }

    /// Takes a step's hits of constraints in, by name. Returns alarms with the number of steps on end that had such hits.
    pub fn observe_hits<'a>(&mut self, names: impl Iterator<Item = &'a String>) -> BTreeMap<String, u64> {
        let lasting = |name: &String| (name.clone(), self.hits.get(name).copied().unwrap_or(0) + 1);
        self.hits = names.map(lasting).collect();
        self.hits.iter().map(|(name, steps)| (format!("constraint {name}"), *steps)).collect()
    }

    /// Takes a step's gradient norm and entropy in. Returns an alarm with the number of steps on end that taught nothing,
    /// since one of the two was not finite: the gradient, or logits, with which all samples are in bad format alike.
    ///
    /// # Errors
    /// When there were so many that no other is to be expected.
    pub fn observe_numbers(&mut self, norm: f64, entropy: f64) -> Result<Option<(String, u64)>> {
        self.skipped = if norm.is_finite() && entropy.is_finite() { 0 } else { self.skipped + 1 };
        match self.skipped {
            0 => Ok(None),
            MAX_SKIPPED.. => Err(Error::failure(format!(
                "the gradient, or the entropy of the samples, was not finite in {MAX_SKIPPED} steps on end"
            ))
            .with_hint("go on from an earlier checkpoint with a lower train.learning_rate, or with other weights")),
            n => Ok(Some(("gradient".to_owned(), n))),
        }
    }

    /// Takes a step in. Returns the signs that have lasted for `patience` steps or more, with the number of steps.
    pub fn observe(&mut self, v: &Vitals, patience: u64) -> BTreeMap<String, u64> {
        if !v.entropy.is_finite() {
            return BTreeMap::new();
        }
        self.num_steps += 1;
        if self.num_steps <= REFERENCE_STEPS {
            for (sum, x) in self.reference.iter_mut().zip([v.valid, v.entropy, v.response_tokens]) {
                *sum += x;
            }
            return BTreeMap::new();
        }
        let [valid, entropy, length] = self.reference.map(|sum| sum / REFERENCE_STEPS as f64);
        let signs = [
            ("unique_programs", v.unique_programs < MIN_UNIQUE[0]),
            ("unique_answers", v.unique_answers < MIN_UNIQUE[1]),
            ("success_rates", v.informative < MIN_INFORMATIVE),
            ("validity", v.valid < MIN_VALID * valid),
            ("entropy", v.entropy < MIN_ENTROPY * entropy),
            ("length", v.response_tokens > MAX_LENGTH * length),
        ];
        for (name, shows) in signs {
            let lasting = self.lasting.entry(name.to_owned()).or_default();
            *lasting = if shows { *lasting + 1 } else { 0 };
        }
        self.lasting.iter().filter(|(_, n)| **n >= patience.max(1)).map(|(name, n)| (name.clone(), *n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEALTHY: Vitals = Vitals {
        unique_programs: 0.9,
        unique_answers: 0.8,
        valid: 0.7,
        informative: 0.5,
        entropy: 0.6,
        response_tokens: 40.0,
    };

    fn seasoned() -> Alarms {
        let mut alarms = Alarms::default();
        for _ in 0..REFERENCE_STEPS {
            // However bad the beginning is, there is nothing to compare it with.
            assert!(alarms.observe(&HEALTHY, 1).is_empty());
        }
        alarms
    }

    #[test]
    fn numbers_that_are_not_finite_are_an_alarm_and_many_are_the_end() {
        let mut alarms = Alarms::default();
        assert_eq!(alarms.observe_numbers(1.0, 0.5).expect("finite"), None);
        for n in 1..MAX_SKIPPED {
            let numbers = if n % 2 == 0 { (f64::NAN, 0.5) } else { (0.0, f64::NAN) };
            let alarm = alarms.observe_numbers(numbers.0, numbers.1).expect("there may be some");
            assert_eq!((alarm, alarms.longest()), (Some(("gradient".to_owned(), n)), n));
        }
        assert!(alarms.clone().observe_numbers(f64::INFINITY, 0.5).is_err());
        assert!(alarms.clone().observe_numbers(0.0, f64::NAN).is_err());
        assert_eq!(alarms.observe_numbers(0.0, 0.5).expect("finite"), None);
        assert!(alarms.observe_numbers(f64::INFINITY, 0.5).is_ok(), "it counts steps on end");
    }

    #[test]
    fn every_sign_is_seen_once_it_lasts() {
        type Worsen = fn(&mut Vitals);
        let cases: [(&str, Worsen); 6] = [
            ("unique_programs", |v| v.unique_programs = 0.4),
            ("unique_answers", |v| v.unique_answers = 0.2),
            ("success_rates", |v| v.informative = 0.0),
            ("validity", |v| v.valid = 0.3),
            ("entropy", |v| v.entropy = 0.1),
            ("length", |v| v.response_tokens = 120.0),
        ];
        for (name, worsen) in cases {
            let (mut alarms, mut bad) = (seasoned(), HEALTHY);
            worsen(&mut bad);
            assert!(alarms.observe(&bad, 3).is_empty() && alarms.observe(&bad, 3).is_empty(), "{name}");
            assert_eq!(alarms.observe(&bad, 3), BTreeMap::from([(name.to_owned(), 3)]));
            assert!(alarms.observe(&HEALTHY, 3).is_empty() && alarms.observe(&bad, 3).is_empty(), "{name} begins anew");
        }
    }

    #[test]
    fn a_hit_of_a_constraint_is_an_alarm_at_once() {
        let (mut alarms, names) = (Alarms::default(), ["a".to_owned(), "b".to_owned()]);
        assert_eq!(alarms.observe_hits(names.iter()).values().collect::<Vec<_>>(), [&1, &1]);
        let text = serde_json::to_string(&alarms).expect("plain data");
        let mut resumed: Alarms = serde_json::from_str(&text).expect("the same");
        assert_eq!(resumed.observe_hits(names[1..].iter()), BTreeMap::from([("constraint b".to_owned(), 2)]));
        assert_eq!(resumed.observe_hits(names[..1].iter()), BTreeMap::from([("constraint a".to_owned(), 1)]));
        assert!(resumed.observe_hits([].iter()).is_empty());
    }

    #[test]
    fn signs_go_on_through_a_resumption() {
        let bad = Vitals { entropy: 0.0, ..HEALTHY };
        let mut alarms = seasoned();
        alarms.observe(&bad, 2);
        let text = serde_json::to_string(&alarms).expect("plain data");
        let mut resumed: Alarms = serde_json::from_str(&text).expect("the same");
        assert_eq!(resumed, alarms);
        assert_eq!(resumed.observe(&bad, 2), BTreeMap::from([("entropy".to_owned(), 2)]));
    }
}
