//! The data gate: proposals that run but teach nothing are refused before they enter a buffer, by rules that look at what
//! the program gives for its own input and for varied ones. A proposer is paid for tasks that are solved half of the
//! time, and programs that ignore their input, or whose answer is guessed, look just like that.
//!
//! Every rule can be switched; a refusal counts among the step's rejections and stands in the trace. Pure: the executor
//! runs the varied inputs together with the proposal's own.

use std::collections::HashMap;

use malachite_bigint::BigInt;
use serde::{Deserialize, Serialize};

use crate::exec::value::Value;
use crate::selfplay::task::{Record, Task, TaskKind};

/// Varied inputs of a proposal.
const NUM_VARIED: usize = 4;
/// Values without which nothing is refused: the proposal's own, and two varied ones.
const MIN_VALUES: usize = 3;
/// Answers without which no message is taken to mislead.
const MIN_TRIES: u32 = 4;
/// Why a proposal is refused, or an answer not trained on, whose task's message misleads.
pub const MISLEADING: &str = "gate: the message misleads";

/// Rules of the gate; all off by default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateConfig {
    /// Refuses programs that return their input.
    pub identity: bool,
    /// Refuses programs that return the same whatever the input.
    pub constant: bool,
    /// Refuses programs that return only Booleans or None.
    pub coin_flips: bool,
    /// Refuses programs whose commonest output has a larger share than this; 1 is off.
    pub max_guess: f64,
    /// Keeps tasks from the solver once every answer was right in so many samplings running, where the probes of a
    /// proposal are one sampling and the draws of a step another. They stay in the buffer as references, and their
    /// repeats are known. 0 is off.
    pub too_easy: u32,
    /// Induction: success rate of the solver below which a task's message is taken to mislead. Such a proposal is refused
    /// as invalid, and such a task of the buffer is neither trained on nor drawn again. Curated tasks are trusted. 0 is off.
    pub misleading: f64,
}

impl Default for GateConfig {
    fn default() -> Self {
        GateConfig { identity: false, constant: false, coin_flips: false, max_guess: 1.0, too_easy: 0, misleading: 0.0 }
    }
}

impl GateConfig {
    /// Whether a rule is on that looks at what a proposal gives for varied inputs.
    pub fn is_on(&self) -> bool {
        self.identity || self.constant || self.coin_flips || self.max_guess < 1.0
    }

    /// Whether a task with this record is too easy for the solver.
    pub fn is_too_easy(&self, record: &Record) -> bool {
        self.too_easy > 0 && record.streak >= self.too_easy
    }

    /// Whether a task's message misleads, as far as its record tells.
    pub fn is_misleading(&self, kind: TaskKind, record: &Record) -> bool {
        let right = f64::from(record.right) < self.misleading * f64::from(record.tries);
        right && kind == TaskKind::Induction && record.tries >= MIN_TRIES
    }

    /// Whether a task of a buffer is kept from the solver.
    pub fn withholds(&self, task: &Task) -> bool {
        self.is_too_easy(&task.record) || self.is_misleading(task.kind, &task.record)
    }

    /// Why a program is refused that gave these outputs for these inputs, if it is.
    pub fn refuses(&self, values: &[(&str, &str)]) -> Option<&'static str> {
        if values.len() < MIN_VALUES {
            return None;
        }
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for (_, output) in values {
            *counts.entry(output).or_default() += 1;
        }
        let commonest = counts.values().copied().max().unwrap_or(0);
        let same = |(input, output): &(&str, &str)| matches!((Value::parse(input), Value::parse(output)), (Ok(i), Ok(o)) if i.py_eq(&o));
        if self.constant && counts.len() == 1 {
            Some("gate: the output ignores the input")
        } else if self.identity && values.iter().all(same) {
            Some("gate: the program returns its input")
        } else if self.coin_flips && counts.keys().all(|o| matches!(*o, "True" | "False" | "None")) {
            Some("gate: the output is a coin flip")
        } else if commonest as f64 > self.max_guess * values.len() as f64 {
            Some("gate: the output can be guessed")
        } else {
            None
        }
    }
}

/// Inputs of the same types with other values, all different.
pub fn varied(input: &str) -> Vec<String> {
    let Ok(arguments) = Value::parse_args(input) else { return Vec::new() };
    let repr = |values: &[Value]| values.iter().map(Value::repr).collect::<Vec<_>>().join(", ");
    let mut found = vec![repr(&arguments)];
    for i in 0..NUM_VARIED {
        let text = repr(&arguments.iter().map(|a| vary(a, i)).collect::<Vec<_>>());
        if !found.contains(&text) {
            found.push(text);
        }
    }
    found.split_off(1)
}

/// Variation number `i` of a value.
fn vary(value: &Value, i: usize) -> Value {
    let step = [1, -2, 7, 13][i % NUM_VARIED];
    let each = |items: &[Value]| -> Vec<Value> {
        let mut items: Vec<Value> = items.iter().enumerate().map(|(at, item)| vary(item, i + at)).collect();
        match (i % NUM_VARIED, items.first().cloned()) {
            (1, Some(_)) if items.len() > 1 => drop(items.pop()),
            (2, Some(first)) => items.push(first),
            _ => {}
        }
        items
    };
    match value {
        Value::Bool(b) => Value::Bool(*b ^ i.is_multiple_of(2)),
        Value::Int(n) => Value::Int(n + BigInt::from(step)),
        Value::Float(x) => Value::Float(x + f64::from(step)),
        Value::Str(s) => Value::Str(match i % NUM_VARIED {
            0 => format!("{s}a"),
            1 if s.chars().count() > 1 => s.chars().skip(1).collect(),
            2 => s.chars().rev().chain(['c']).collect(),
            _ => format!("b{s}{i}"),
        }),
        Value::List(items) => Value::List(each(items)),
        // A tuple's length is part of what it is.
        Value::Tuple(items) => Value::Tuple(items.iter().enumerate().map(|(at, item)| vary(item, i + at)).collect()),
        Value::Dict(pairs) => Value::Dict(pairs.iter().map(|(k, v)| (k.clone(), vary(v, i))).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: GateConfig =
        GateConfig { identity: true, constant: true, coin_flips: true, max_guess: 0.7, too_easy: 0, misleading: 0.5 };

    #[test]
    fn what_teaches_nothing_is_refused_by_its_own_rule() {
        type Values = &'static [(&'static str, &'static str)];
        type Off = fn(&mut GateConfig);
        let cases: [(Values, &str, Off); 4] = [
            (&[("1", "7"), ("2", "7"), ("3", "7")], "ignores", |g| g.constant = false),
            (&[("1", "1"), ("'a'", "\"a\""), ("[1]", "[1]")], "returns its input", |g| g.identity = false),
            (&[("1", "True"), ("2", "False"), ("3", "None")], "coin flip", |g| g.coin_flips = false),
            (&[("1", "0"), ("2", "0"), ("3", "0"), ("4", "1")], "guessed", |g| g.max_guess = 1.0),
        ];
        for (values, says, off) in cases {
            assert!(ALL.refuses(values).is_some_and(|why| why.contains(says)), "{says}");
            let mut others = GateConfig { max_guess: 1.0, ..ALL };
            if says == "guessed" {
                others.max_guess = ALL.max_guess;
            }
            off(&mut others);
            assert_eq!(others.refuses(values), None, "{says} is switched off");
            assert_eq!(GateConfig::default().refuses(values), None);
        }
        assert_eq!(ALL.refuses(&[("1", "2"), ("2", "3"), ("3", "4")]), None);
        assert_eq!(ALL.refuses(&[("1", "7"), ("2", "7")]), None, "too little is known");
        assert!(ALL.is_on() && !GateConfig::default().is_on());
    }

    #[test]
    fn messages_mislead_where_few_answers_are_right() {
        let record = |tries, right| Record { tries, right, streak: 0 };
        let off = GateConfig::default();
        for (tries, right, misleading) in [(8, 3, true), (8, 4, false), (4, 1, true), (3, 0, false), (0, 0, false)] {
            let record = record(tries, right);
            assert_eq!(ALL.is_misleading(TaskKind::Induction, &record), misleading, "{right} of {tries}");
            assert!(
                !ALL.is_misleading(TaskKind::Deduction, &record) && !off.is_misleading(TaskKind::Induction, &record)
            );
            let task = Task { record, ..Task::identity(TaskKind::Induction) };
            assert_eq!((ALL.withholds(&task), off.withholds(&task)), (misleading, false));
        }
    }

    #[test]
    fn varied_inputs_keep_their_types_and_differ() {
        for input in ["1", "'ab', [1, 2]", "{'a': 1}, (1, 'x'), True", "-0.5", "''", "[]"] {
            let found = varied(input);
            let expected = if input == "[]" { 0 } else { 3 };
            assert!(found.len() >= expected, "{input}: {found:?}");
            let mut distinct = found.clone();
            distinct.push(input.to_owned());
            distinct.sort();
            distinct.dedup();
            assert_eq!(distinct.len(), found.len() + 1, "{found:?}");
            let kinds = |text: &str| -> Vec<_> {
                Value::parse_args(text).expect("literals").iter().map(std::mem::discriminant).collect()
            };
            assert!(found.iter().all(|f| kinds(f) == kinds(input)), "{found:?}");
        }
        assert!(varied("f(").is_empty());
        assert_eq!(varied("3"), ["4", "1", "10", "16"]);
    }
}
