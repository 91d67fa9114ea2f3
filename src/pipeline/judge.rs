//! Grading of answers: which need the executor, which requests they share, and what a verdict means.
//!
//! Answers to one abduction task share a child process (one program, many inputs); equal answers are run once.
//! Everything that is not a clear "equal" is wrong: an exception, a timeout, an unreadable value.

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

enum Waiting {
    /// Ids of the answers behind each call.
    Calls(Vec<Vec<u64>>),
    /// Ids of the answers that are this same program.
    Program(Vec<u64>),
}

/// Turns answers into executor requests and their verdicts into grades.
pub struct Judge {
    waiting: HashMap<u64, Waiting>,
    induction_reward: InductionReward,
    check_shown: bool,
}

impl Judge {
    /// A judge without work. With `check_shown` an answer to an induction task must also keep to the pairs that it was shown.
    pub fn new(induction_reward: InductionReward, check_shown: bool) -> Self {
        Judge { waiting: HashMap::new(), induction_reward, check_shown }
    }

    /// Grades the answers to one task. Those that need no execution are graded at once; requests for the others go to
    /// `outbox`, tagged with the id of one of their answers.
    pub fn submit(
        &mut self,
        task: &Task,
        answers: &[(u64, Option<String>)],
        outbox: &mut VecDeque<(u64, Request)>,
    ) -> Vec<Grade> {
        let mut grades = Vec::new();
        let mut distinct: Vec<(&str, Vec<u64>)> = Vec::new();
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
                Some(answer) => match distinct.iter_mut().find(|(text, _)| *text == answer.as_str()) {
                    Some((_, ids)) => ids.push(*id),
                    None => distinct.push((answer.as_str(), vec![*id])),
                },
            }
        }
        match task.kind {
            TaskKind::Abduction if !distinct.is_empty() => {
                let calls = distinct.iter().map(|(input, _)| call(input, task.gold_output())).collect();
                let tag = distinct[0].1[0];
                let ids = distinct.into_iter().map(|(_, ids)| ids).collect();
                self.waiting.insert(tag, Waiting::Calls(ids));
                outbox.push_back((tag, Request { program: task.program.clone(), calls, profile: Profile::Answer }));
            }
            TaskKind::Induction => {
                let pairs = if self.check_shown { &task.pairs } else { task.hidden_pairs() };
                for (program, ids) in distinct {
                    let calls = pairs.iter().map(|p| call(&p.input, &p.output)).collect();
                    let tag = ids[0];
                    self.waiting.insert(tag, Waiting::Program(ids));
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
        if let Some(rejection) = &verdict.rejection {
            let ids = match waiting {
                Waiting::Calls(calls) => calls.concat(),
                Waiting::Program(ids) => ids,
            };
            let detail = rejection.to_string();
            return ids.into_iter().map(|id| Grade { id, accuracy: 0.0, detail: detail.clone() }).collect();
        }
        match waiting {
            Waiting::Calls(calls) => calls
                .into_iter()
                .zip(&verdict.calls)
                .flat_map(|(ids, outcome)| {
                    let accuracy = if outcome.matches() { 1.0 } else { 0.0 };
                    let detail = outcome.to_string();
                    ids.into_iter().map(move |id| Grade { id, accuracy, detail: detail.clone() })
                })
                .collect(),
            Waiting::Program(ids) => {
                let passed = verdict.calls.iter().filter(|o| o.matches()).count();
                let share = passed as f64 / verdict.calls.len().max(1) as f64;
                let accuracy = self.induction_reward.accuracy(share);
                let failure = verdict.calls.iter().find(|o| !o.matches());
                let detail = failure.map_or_else(|| "all pairs equal".to_owned(), Outcome::to_string);
                ids.into_iter().map(|id| Grade { id, accuracy, detail: detail.clone() }).collect()
            }
        }
    }
}

fn call(args: &str, expect: &str) -> Call {
    Call { args: args.to_owned(), expect: Some(expect.to_owned()) }
}

fn at_once(id: u64, equal: bool) -> Grade {
    Grade { id, accuracy: if equal { 1.0 } else { 0.0 }, detail: if equal { "equal" } else { "not equal" }.to_owned() }
}
