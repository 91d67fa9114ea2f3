//! What self-play is about: task types, roles, and tasks.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the solver must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// An input that gives the output.
    Abduction,
    /// The output of an input.
    Deduction,
    /// The class of the exception that an input raises, or `NoError`. Off by default.
    Error,
    /// The program behind pairs of input and output.
    Induction,
}

impl TaskKind {
    /// Every type, in the order of a step.
    pub const ALL: [TaskKind; 4] = [TaskKind::Abduction, TaskKind::Deduction, TaskKind::Error, TaskKind::Induction];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            TaskKind::Abduction => "abduction",
            TaskKind::Deduction => "deduction",
            TaskKind::Error => "error",
            TaskKind::Induction => "induction",
        }
    }
}

/// Who answers a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Makes a task.
    Propose,
    /// Solves one.
    Solve,
}

/// Task type and role: what has a prompt form, a reward rule and a baseline of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Config {
    /// Task type.
    pub kind: TaskKind,
    /// Role.
    pub role: Role,
}

impl Config {
    /// Every configuration, in the order of a step.
    pub const ALL: [Config; 8] = {
        let mut all = [Config { kind: TaskKind::Abduction, role: Role::Propose }; 8];
        let mut i = 0;
        while i < 8 {
            let role = if i % 2 == 0 { Role::Propose } else { Role::Solve };
            all[i] = Config { kind: TaskKind::ALL[i / 2], role };
            i += 1;
        }
        all
    };

    /// Place in [`Config::ALL`].
    pub fn index(self) -> usize {
        self.kind as usize * 2 + self.role as usize
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = if self.role == Role::Propose { "propose" } else { "solve" };
        write!(f, "{role}_{}", self.kind.name())
    }
}

/// One execution: arguments as comma-separated literals, and the repr of the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Arguments.
    pub input: String,
    /// Result; for error tasks the exception's class or `NoError`.
    pub output: String,
}

/// How the solver has fared with a task. A sampling is all answers that are drawn together: the probes of the proposal,
/// or the draws of one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Answers.
    pub tries: u32,
    /// Answers that are right.
    pub right: u32,
    /// Samplings running, up to the last one, in which every answer was right.
    pub streak: u32,
}

impl Record {
    /// Takes a sampling in: its number of answers, and of right ones.
    pub fn observe(&mut self, tries: u32, right: u32) {
        if tries > 0 {
            self.tries += tries;
            self.right += right;
            self.streak = if right == tries { self.streak + 1 } else { 0 };
        }
    }

    /// Share of wrong answers, as estimated from one right and one wrong answer more; above 0 for every task.
    pub fn failure(&self) -> f64 {
        f64::from(self.tries - self.right + 1) / f64::from(self.tries + 2)
    }

    /// `p^2 (1 - p)` for the success rate p by the same estimate: largest for a task of which two thirds of the answers are
    /// right, little less for one that nobody has answered, above 0 for every task. Uncertain tasks teach most, and among
    /// them those whose commonest answer is right: the others teach to doubt what is likely.
    pub fn learnability(&self) -> f64 {
        self.failure() * (1.0 - self.failure()).powi(2)
    }

    fn is_empty(&self) -> bool {
        self.tries == 0
    }
}

/// A validated task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Task type.
    pub kind: TaskKind,
    /// Python source that defines `f`.
    pub program: String,
    /// One execution, or for induction as many as there are inputs.
    pub pairs: Vec<Pair>,
    /// What the program does, in words (induction).
    pub message: String,
    /// Step in which it was proposed; seeds have 0.
    pub step: u64,
    /// The program up to renaming, by which duplicates are known.
    pub normal_form: String,
    /// Number of programs of the buffer that it is composed of.
    pub num_composites: usize,
    /// How the solver has fared with it.
    #[serde(default, skip_serializing_if = "Record::is_empty")]
    pub record: Record,
}

impl Task {
    /// The task from which a run starts: the identity function on a greeting (induction: on six values).
    pub fn identity(kind: TaskKind) -> Task {
        let same = |text: &str| Pair { input: text.to_owned(), output: text.to_owned() };
        let pairs = match kind {
            TaskKind::Induction => {
                ["'Hello world'", "1", "{'a': 1, 'b': 2}", "(1.1, 1.2, 1.3)", "'[[1, 0], [0, 1]]'", "1001101100010001"]
                    .map(same)
                    .into()
            }
            TaskKind::Error => vec![Pair { input: "'Hello world'".into(), output: "NoError".into() }],
            _ => vec![same("'Hello world'")],
        };
        let message = match kind {
            TaskKind::Induction => "The function returns its argument.",
            _ => "",
        };
        Task {
            kind,
            program: "def f(x):\n    return x".to_owned(),
            pairs,
            message: message.to_owned(),
            step: 0,
            normal_form: "def v0 ( v1 ) : ;{ return v1 ;} ".to_owned(),
            num_composites: 0,
            record: Record::default(),
        }
    }

    /// What two tasks share that are one and the same: the program up to renaming. Induction tasks are written over
    /// programs of the buffers, so there the inputs count too.
    pub fn likeness(&self) -> String {
        let mut likeness = self.normal_form.clone();
        if self.kind == TaskKind::Induction {
            self.pairs.iter().for_each(|p| likeness.extend(["\n", p.input.as_str()]));
        }
        likeness
    }

    /// The input of a task with one execution.
    pub fn input(&self) -> &str {
        &self.pairs[0].input
    }

    /// The output of a task with one execution.
    pub fn gold_output(&self) -> &str {
        &self.pairs[0].output
    }

    /// Pairs that the solver of an induction task sees: the first half.
    pub fn shown_pairs(&self) -> &[Pair] {
        &self.pairs[..self.pairs.len() / 2]
    }

    /// Pairs that its program is judged by: the rest.
    pub fn hidden_pairs(&self) -> &[Pair] {
        &self.pairs[self.pairs.len() / 2..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_numbered_in_the_order_of_a_step() {
        for (i, config) in Config::ALL.iter().enumerate() {
            assert_eq!(config.index(), i);
        }
        assert_eq!(Config::ALL[7].to_string(), "solve_induction");
    }

    #[test]
    fn induction_tasks_over_one_program_differ_by_their_inputs() {
        for (kind, same) in [(TaskKind::Deduction, true), (TaskKind::Induction, false)] {
            let (mut a, b) = (Task::identity(kind), Task::identity(kind));
            assert_eq!(a.likeness(), b.likeness());
            a.pairs[0].input = "2".to_owned();
            assert_eq!(a.likeness() == b.likeness(), same, "{kind:?}");
        }
    }

    #[test]
    fn a_record_counts_samplings_that_are_right_throughout() {
        let mut record = Record::default();
        for (tries, right, streak) in [(8, 8, 1), (0, 0, 1), (1, 1, 2), (2, 1, 0), (2, 2, 1)] {
            record.observe(tries, right);
            assert_eq!(record.streak, streak);
        }
        assert_eq!((record.tries, record.right, record.failure()), (13, 12, 2.0 / 15.0));
        assert!((record.learnability() - 338.0 / 3375.0).abs() < 1e-12 && Record::default().learnability() == 0.125);
    }

    #[test]
    fn shown_and_hidden_pairs_are_the_halves() {
        let mut task = Task::identity(TaskKind::Induction);
        assert_eq!((task.shown_pairs().len(), task.hidden_pairs().len()), (3, 3));
        task.pairs.extend(task.pairs.clone());
        task.pairs.truncate(10);
        assert_eq!((task.shown_pairs().len(), task.hidden_pairs().len()), (5, 5));
        assert_eq!(task.hidden_pairs(), &task.pairs[5..]);
    }
}
