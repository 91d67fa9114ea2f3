//! Intrinsic rewards of the proposer: complexity, Halstead, edit distance, and the surprise of answers. All are off
//! by default, and none is computed unless its coefficient is set.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::exec::source::complexity;
use crate::selfplay::config::IntrinsicConfig;
use crate::selfplay::task::{Task, TaskKind};

/// How often each answer text occurred among all valid proposals so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerCounts {
    counts: BTreeMap<String, u64>,
    total: u64,
}

/// Most answer texts that are counted; beyond, all counts are halved, and what is left with none is forgotten.
const MAX_ANSWERS: usize = 1 << 16;
/// Longest answer text that is kept as it is, in bytes; of longer ones a hash is.
const MAX_TEXT: usize = 64;
/// Tokens of a program that are compared: the time grows with their square and more.
const MAX_COMPARED: usize = 512;

impl AnswerCounts {
    /// Takes an answer in.
    pub fn add(&mut self, answer: &str) {
        *self.counts.entry(key(answer).into_owned()).or_insert(0) += 1;
        self.total += 1;
        if self.counts.len() > MAX_ANSWERS {
            self.counts.values_mut().for_each(|n| *n /= 2);
            self.counts.retain(|_, n| *n > 0);
            self.total = self.counts.values().sum();
        }
    }

    /// `1 - share of equal answers` so far; 1 for the first.
    pub fn surprise(&self, answer: &str) -> f64 {
        let count = self.counts.get(key(answer).as_ref()).copied().unwrap_or(0);
        1.0 - count as f64 / self.total.max(1) as f64
    }
}

/// What an answer is counted under.
fn key(answer: &str) -> Cow<'_, str> {
    if answer.len() <= MAX_TEXT { answer.into() } else { blake3::hash(answer.as_bytes()).to_string().into() }
}

/// Answer counts by what they are answers to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    abduction_inputs: AnswerCounts,
    deduction_outputs: AnswerCounts,
    errors: AnswerCounts,
    induction_inputs: AnswerCounts,
    induction_outputs: AnswerCounts,
}

impl Seen {
    /// Takes a valid task's answers in.
    pub fn add(&mut self, task: &Task) {
        match task.kind {
            TaskKind::Abduction => self.abduction_inputs.add(task.input()),
            TaskKind::Deduction => self.deduction_outputs.add(task.gold_output()),
            TaskKind::Error => self.errors.add(task.gold_output()),
            TaskKind::Induction => {
                for pair in &task.pairs {
                    self.induction_inputs.add(&pair.input);
                    self.induction_outputs.add(&pair.output);
                }
            }
        }
    }

    fn surprise(&self, task: &Task) -> f64 {
        match task.kind {
            TaskKind::Abduction => self.abduction_inputs.surprise(task.input()),
            TaskKind::Deduction => self.deduction_outputs.surprise(task.gold_output()),
            _ => self.errors.surprise(task.gold_output()),
        }
    }
}

/// The terms of a valid task, weighted and capped; empty when all are off. `seen` does not hold this step's tasks yet.
pub fn terms(task: &Task, references: &[&Task], seen: &Seen, config: &IntrinsicConfig) -> Vec<f64> {
    let mut terms = Vec::new();
    let mut term = |coefficient: f64, value: &dyn Fn() -> f64| {
        if coefficient != 0.0 {
            terms.push((coefficient * value()).min(config.max));
        }
    };
    if task.kind == TaskKind::Induction {
        let mean = |counts: &AnswerCounts, part: fn(&crate::selfplay::task::Pair) -> &str| {
            task.pairs.iter().map(|p| counts.surprise(part(p))).sum::<f64>() / task.pairs.len() as f64
        };
        term(config.input_diversity, &|| mean(&seen.induction_inputs, |p| &p.input));
        term(config.output_diversity, &|| mean(&seen.induction_outputs, |p| &p.output));
        return terms;
    }
    term(config.complexity, &|| complexity(&task.program).map_or(0.0, |c| c.cognitive / 15.0));
    term(config.halstead, &|| complexity(&task.program).map_or(0.0, |c| halstead(&c)));
    term(config.edit_distance, &|| {
        let sum: f64 = references.iter().map(|r| edit_distance(&task.normal_form, &r.normal_form)).sum();
        sum / references.len().max(1) as f64
    });
    term(config.answer_diversity, &|| seen.surprise(task));
    terms
}

fn halstead(c: &crate::exec::source::Complexity) -> f64 {
    0.5 * (c.effort / 10_000.0).min(1.0) + 0.3 * (c.cyclomatic / 10.0).min(1.0) + 0.2 * (c.volume / 500.0).min(1.0)
}

/// `1 - 2 M / (a + b)` over the tokens of two normal forms, M matched by Ratcliff and Obershelp's longest blocks.
pub fn edit_distance(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<&str>, Vec<&str>) = (tokens(a).collect(), tokens(b).collect());
    if a.is_empty() && b.is_empty() {
        return 0.0;
    }
    1.0 - 2.0 * matched(&a, &b) as f64 / (a.len() + b.len()) as f64
}

fn tokens(text: &str) -> impl Iterator<Item = &str> {
    text.split_whitespace().take(MAX_COMPARED)
}

fn matched(a: &[&str], b: &[&str]) -> usize {
    let mut places: HashMap<&str, Vec<usize>> = HashMap::new();
    for (j, word) in b.iter().enumerate() {
        places.entry(word).or_default().push(j);
    }
    let (mut todo, mut total) = (vec![(0, a.len(), 0, b.len())], 0);
    while let Some((a0, a1, b0, b1)) = todo.pop() {
        let (mut best, mut lens) = ((a0, b0, 0), HashMap::new());
        for (i, word) in a.iter().enumerate().take(a1).skip(a0) {
            let mut new = HashMap::new();
            for &j in places.get(word).into_iter().flatten().filter(|j| (b0..b1).contains(*j)) {
                let len = if j > b0 { lens.get(&(j - 1)).copied().unwrap_or(0) } else { 0 } + 1;
                new.insert(j, len);
                if len > best.2 {
                    best = (i + 1 - len, j + 1 - len, len);
                }
            }
            lens = new;
        }
        let (i, j, len) = best;
        if len > 0 {
            total += len;
            todo.push((a0, i, b0, j));
            todo.push((i + len, a1, j + len, b1));
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_is_one_minus_the_ratio_of_difflib() {
        assert_eq!(edit_distance("a b c d", "a b c d"), 0.0);
        assert_eq!(edit_distance("a b", "c d"), 1.0);
        // difflib.SequenceMatcher(None, list("abxcd"), list("abcd")).ratio() is 8 / 9.
        assert!((edit_distance("a b x c d", "a b c d") - 1.0 / 9.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_counted_stays_bounded() {
        let mut counts = AnswerCounts::default();
        let long = "9".repeat(4000);
        (0..8).for_each(|_| counts.add(&long));
        (0..=2 * MAX_ANSWERS).for_each(|i| counts.add(&i.to_string()));
        assert!(counts.counts.len() <= MAX_ANSWERS && counts.counts.keys().all(|k| k.len() <= MAX_TEXT));
        assert!(counts.surprise(&long) < 1.0, "the commonest are not forgotten");
        // Nor does one long program take seconds: its end does not count.
        let program = "1 + ".repeat(100_000);
        assert_eq!(edit_distance(&program, &format!("{program} 2")), 0.0);
    }

    #[test]
    fn terms_are_off_by_default_and_capped_when_on() {
        let task = Task::identity(TaskKind::Deduction);
        let seen = Seen::default();
        assert!(terms(&task, &[&task], &seen, &IntrinsicConfig::default()).is_empty());
        let config = IntrinsicConfig { answer_diversity: 2.0, edit_distance: 1.0, ..IntrinsicConfig::default() };
        assert_eq!(terms(&task, &[&task], &seen, &config), [0.0, 0.5]);
        let mut seen = Seen::default();
        seen.add(&task);
        assert_eq!(terms(&task, &[&task], &seen, &config), [0.0, 0.0]);
    }

    #[test]
    fn induction_has_its_own_terms() {
        let task = Task::identity(TaskKind::Induction);
        let config = IntrinsicConfig { input_diversity: 0.25, complexity: 1.0, ..IntrinsicConfig::default() };
        assert_eq!(terms(&task, &[], &Seen::default(), &config), [0.25]);
    }
}
