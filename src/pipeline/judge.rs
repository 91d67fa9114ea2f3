//! Grading of answers: which need the executor, which requests they share, and what a verdict means.
//!
//! Equal answers to a task are run once, whenever they come in. Everything that is not a clear "equal" is wrong: an exception, a
//! timeout, an unreadable value.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::exec::literal::answers_equal;
use crate::exec::protocol::{Call, Outcome, Profile, Request, Verdict};
use crate::selfplay::parse::names_error;
use crate::selfplay::reward::InductionReward;
use crate::selfplay::task::{Task, TaskKind};

/// One answer's grade.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grade {
    /// The answer's id.
    pub id: u64,
    /// 0 to 1; induction has several checks, and the configured rule makes one number of them.
    pub accuracy: f64,
    /// What happened, for the trace.
    pub detail: String,
}

/// An answer that the executor decides on, or has decided on.
struct Case {
    /// Those who gave it and wait.
    ids: Vec<u64>,
    /// Accuracy and detail, once known.
    outcome: Option<(f64, String)>,
}

/// What a request is about.
enum Waiting {
    /// A call for each of these cases.
    Calls(Vec<usize>),
    /// All calls for one program.
    Program(usize),
}

/// Turns answers into executor requests and their verdicts into grades.
pub struct Judge {
    cases: Vec<Case>,
    /// Cases by group and answer.
    known: HashMap<(u64, String), usize>,
    waiting: HashMap<u64, Waiting>,
    induction_reward: InductionReward,
    check_shown: bool,
}

impl Judge {
    /// A judge without work. With `check_shown` an answer to an induction task must also keep to the pairs that it was shown.
    pub fn new(induction_reward: InductionReward, check_shown: bool) -> Self {
        Judge { cases: Vec::new(), known: HashMap::new(), waiting: HashMap::new(), induction_reward, check_shown }
    }

    /// Grades answers to one task, whose answers all have the same `group`. Those that need no execution are graded at once,
    /// and those that have been executed; requests for the others go to `outbox`, tagged with the id of one of their answers.
    pub fn submit(
        &mut self,
        group: u64,
        task: &Task,
        answers: &[(u64, Option<String>)],
        outbox: &mut VecDeque<(u64, Request)>,
    ) -> Vec<Grade> {
        let mut grades = Vec::new();
        let mut new: Vec<(usize, &str)> = Vec::new();
        for (id, answer) in answers {
            match answer {
                None => grades.push(Grade { id: *id, accuracy: 0.0, detail: "no answer".into() }),
                Some(answer) if task.kind == TaskKind::Deduction => {
                    let equal = answers_equal(task.gold_output(), answer);
                    grades.push(at_once(*id, equal));
                }
                Some(answer) if task.kind == TaskKind::Error => {
                    grades.push(at_once(*id, names_error(task.gold_output(), answer)));
                }
                Some(answer) => {
                    let at = *self.known.entry((group, answer.clone())).or_insert_with(|| {
                        new.push((self.cases.len(), answer));
                        self.cases.push(Case { ids: Vec::new(), outcome: None });
                        self.cases.len() - 1
                    });
                    match &self.cases[at].outcome {
                        Some((accuracy, detail)) => {
                            grades.push(Grade { id: *id, accuracy: *accuracy, detail: detail.clone() });
                        }
                        None => self.cases[at].ids.push(*id),
                    }
                }
            }
        }
        match task.kind {
            TaskKind::Abduction if !new.is_empty() => {
                let calls = new.iter().map(|(_, input)| call(input, task.gold_output())).collect();
                let tag = self.cases[new[0].0].ids[0];
                self.waiting.insert(tag, Waiting::Calls(new.into_iter().map(|(at, _)| at).collect()));
                outbox.push_back((tag, Request { program: task.program.clone(), calls, profile: Profile::Answer }));
            }
            TaskKind::Induction => {
                let pairs = if self.check_shown { &task.pairs } else { task.hidden_pairs() };
                for (at, program) in new {
                    let calls = pairs.iter().map(|p| call(&p.input, &p.output)).collect();
                    let tag = self.cases[at].ids[0];
                    self.waiting.insert(tag, Waiting::Program(at));
                    outbox.push_back((tag, Request { program: program.to_owned(), calls, profile: Profile::Program }));
                }
            }
            _ => {}
        }
        grades
    }

    /// Whether a tag belongs to a request of this judge.
    pub fn expects(&self, tag: u64) -> bool {
        self.waiting.contains_key(&tag)
    }

    /// Grades what a verdict decides.
    ///
    /// # Panics
    /// When no request has this tag.
    pub fn on_verdict(&mut self, tag: u64, verdict: &Verdict) -> Vec<Grade> {
        let waiting = self.waiting.remove(&tag).expect("a verdict answers a request of this judge");
        let rejected = verdict.rejection.as_ref().map(|rejection| (0.0, rejection.to_string()));
        let decided: Vec<(usize, (f64, String))> = match waiting {
            Waiting::Calls(cases) => match rejected {
                Some(outcome) => cases.into_iter().map(|at| (at, outcome.clone())).collect(),
                None => {
                    let outcomes = verdict.calls.iter().map(|o| (f64::from(u8::from(o.matches())), o.to_string()));
                    cases.into_iter().zip(outcomes).collect()
                }
            },
            Waiting::Program(at) => vec![(at, rejected.unwrap_or_else(|| self.of_program(verdict)))],
        };
        let mut grades = Vec::new();
        for (at, (accuracy, detail)) in decided {
            let case = &mut self.cases[at];
            let ids = std::mem::take(&mut case.ids);
            grades.extend(ids.into_iter().map(|id| Grade { id, accuracy, detail: detail.clone() }));
            case.outcome = Some((accuracy, detail));
        }
        grades
    }

    fn of_program(&self, verdict: &Verdict) -> (f64, String) {
        let passed = verdict.calls.iter().filter(|o| o.matches()).count();
        let share = passed as f64 / verdict.calls.len().max(1) as f64;
        let failure = verdict.calls.iter().find(|o| !o.matches());
        let detail = failure.map_or_else(|| "all pairs equal".to_owned(), Outcome::to_string);
        (self.induction_reward.accuracy(share), detail)
    }
}

fn call(args: &str, expect: &str) -> Call {
    Call { args: args.to_owned(), expect: Some(expect.to_owned()) }
}

fn at_once(id: u64, equal: bool) -> Grade {
    Grade { id, accuracy: if equal { 1.0 } else { 0.0 }, detail: if equal { "equal" } else { "not equal" }.to_owned() }
}
