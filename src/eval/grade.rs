//! Whether answers are right. Programs and inputs are run in the sandboxed executor; everything else is compared here.
//!
//! Anything but a clean pass is wrong: no answer, an exception, a timeout, a value that cannot be read.

use std::collections::VecDeque;

use super::math;
use super::suites::{Code, Item, Question};
use super::words::drop_scores;
use crate::error::Result;
use crate::exec::literal::answers_equal;
use crate::exec::pool::Pool;
use crate::exec::protocol::{Call, Outcome, Profile, Request, Verdict};
use crate::exec::source::{is_allowed, is_one_call};
use crate::exec::value::Value;
use crate::pipeline::judge::Judge;
use crate::selfplay::reward::InductionReward;
use crate::selfplay::task::{Task, TaskKind};

/// An answer's grade.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// 1 or 0.
    pub right: f64,
    /// F1, where the suite has it.
    pub f1: Option<f64>,
    /// What happened.
    pub detail: String,
}

impl Score {
    fn of(right: bool) -> Score {
        let detail = if right { "equal" } else { "not equal" };
        Score { right: f64::from(u8::from(right)), f1: None, detail: detail.to_owned() }
    }
}

/// Grades the answers to each item, in order. Returns the number of calls that the executor made for it, too.
///
/// # Errors
/// When the executor stops.
pub fn grade(pool: &Pool, work: &[(&Item, Vec<Option<String>>)]) -> Result<(Vec<Vec<Score>>, usize)> {
    let mut scores: Vec<Vec<Score>> = work.iter().map(|(_, answers)| vec![Score::default(); answers.len()]).collect();
    let (mut judge, mut outbox) = (Judge::new(InductionReward::Binary, false), VecDeque::new());
    // A tag is the place of an answer: item and number.
    let tag = |i: usize, j: usize| (i as u64) << 32 | j as u64;
    let mut grades = Vec::new();
    for (i, (item, answers)) in work.iter().enumerate() {
        match &item.question {
            Question::Task(task) if takes_expressions(task) => {
                for (j, answer) in answers.iter().enumerate() {
                    match answer.as_ref().map(|a| expression_call(task, a)) {
                        Some(Some(request)) => outbox.push_back((tag(i, j), request)),
                        Some(None) => scores[i][j] = Score { detail: "no arguments".to_owned(), ..Score::default() },
                        None => scores[i][j] = no_answer(),
                    }
                }
            }
            Question::Task(task) => {
                let answers: Vec<_> = answers.iter().enumerate().map(|(j, a)| (tag(i, j), a.clone())).collect();
                grades.extend(judge.submit(i as u64, task, &answers, &mut outbox));
            }
            Question::Code(code) => {
                for (j, answer) in answers.iter().enumerate() {
                    match answer {
                        Some(answer) => outbox.push_back((tag(i, j), tests(code, answer))),
                        None => scores[i][j] = no_answer(),
                    }
                }
            }
            question => {
                for (j, answer) in answers.iter().enumerate() {
                    scores[i][j] = answer.as_ref().map_or_else(no_answer, |a| compare(question, a));
                }
            }
        }
    }
    let num_calls = outbox.iter().map(|(_, r)| r.calls.len()).sum();
    let (tags, requests): (Vec<u64>, Vec<Request>) = outbox.into_iter().unzip();
    for (tag, verdict) in tags.into_iter().zip(pool.run(requests)?) {
        if judge.expects(tag) {
            grades.extend(judge.on_verdict(tag, &verdict));
        } else {
            scores[(tag >> 32) as usize][tag as u32 as usize] = passed(&verdict);
        }
    }
    for grade in grades {
        let score = Score { right: grade.accuracy, f1: None, detail: grade.detail };
        scores[(grade.id >> 32) as usize][grade.id as u32 as usize] = score;
    }
    Ok((scores, num_calls))
}

fn no_answer() -> Score {
    Score { detail: "no answer".to_owned(), ..Score::default() }
}

fn compare(question: &Question, answer: &str) -> Score {
    match question {
        Question::Math { golds, tolerance, .. } => {
            Score::of(golds.iter().any(|gold| math::same(gold, answer, *tolerance)))
        }
        Question::YesNo { gold, .. } => Score::of(answer == if *gold { "yes" } else { "no" }),
        Question::Spans { golds, .. } => {
            let (exact, f1) = drop_scores(golds, answer);
            Score { f1: Some(f1), ..Score::of(exact == 1.0) }
        }
        _ => Score { detail: "nothing to compare with".to_owned(), ..Score::default() },
    }
}

fn passed(verdict: &Verdict) -> Score {
    if let Some(rejection) = &verdict.rejection {
        return Score { detail: rejection.to_string(), ..Score::default() };
    }
    let failed = verdict.calls.iter().find(|o| !matches!(o, Outcome::Value { matches, .. } if *matches != Some(false)));
    match failed {
        Some(Outcome::Value { .. }) => Score::of(false),
        Some(outcome) => Score { detail: outcome.to_string(), ..Score::default() },
        None => Score { detail: "all tests passed".to_owned(), ..Score::of(true) },
    }
}

/// Whether a task asks for an input that self-play's rules cannot judge: its own is no list of literals, or its program is not
/// within the policy. Public suites have a few, and run them all.
fn takes_expressions(task: &Task) -> bool {
    task.kind == TaskKind::Abduction && (Value::parse_args(&task.pairs[0].input).is_err() || !is_allowed(&task.program))
}

/// A run of such a task's program on an answer, or none where the answer is more than arguments.
fn expression_call(task: &Task, answer: &str) -> Option<Request> {
    let args = format!("f({})", answer.trim());
    let call = Call { args: args.clone(), expect: Some(task.gold_output().to_owned()) };
    let request = Request { program: task.program.clone(), calls: vec![call], profile: Profile::Run };
    is_one_call(&args, "f").then_some(request)
}

/// The answer as a whole program: a completion follows the stub, a program of its own stands after it.
fn whole_program(code: &Code, answer: &str) -> String {
    let defines = answer.lines().any(|l| {
        let name = l.strip_prefix("def ").map(str::trim_start);
        name.and_then(|n| n.strip_prefix(&code.entry)).is_some_and(|rest| rest.trim_start().starts_with('('))
    });
    let body = match (code.stub.is_empty(), defines) {
        (true, _) => answer.to_owned(),
        // Helpers and imports of the stub stay; its function, which may be a docstring alone, is defined anew.
        (false, true) => format!("{}\n    pass\n\n{answer}", code.stub.trim_end()),
        (false, false) if answer.starts_with([' ', '\t']) => format!("{}\n{answer}", code.stub.trim_end()),
        (false, false) => {
            let indented: Vec<String> = answer.lines().map(|l| format!("    {l}")).collect();
            format!("{}\n{}", code.stub.trim_end(), indented.join("\n"))
        }
    };
    if code.setup.is_empty() { body } else { format!("{}\n{body}", code.setup) }
}

fn tests(code: &Code, answer: &str) -> Request {
    let calls = code.tests.iter().map(|t| Call { args: t.clone(), expect: None }).collect();
    Request { program: whole_program(code, answer), calls, profile: Profile::Run }
}

/// A run of the answer on what the question shows; with `compare`, against what it shows as right. None where a question
/// shows nothing that can be run.
pub fn on_visible(question: &Question, answer: &str, compare: bool) -> Option<Request> {
    let call = |args: &str, expect: Option<&str>| Call {
        args: args.to_owned(),
        expect: expect.filter(|_| compare).map(str::to_owned),
    };
    let request = match question {
        Question::Task(task) if takes_expressions(task) => {
            let mut request = expression_call(task, answer)?;
            request.calls[0].expect = request.calls[0].expect.take().filter(|_| compare);
            request
        }
        Question::Task(task) if task.kind == TaskKind::Abduction => Request {
            program: task.program.clone(),
            calls: vec![call(answer, Some(task.gold_output()))],
            profile: Profile::Answer,
        },
        Question::Task(task) if task.kind == TaskKind::Induction => Request {
            program: answer.to_owned(),
            calls: task.shown_pairs().iter().map(|p| call(&p.input, Some(&p.output))).collect(),
            profile: Profile::Program,
        },
        Question::Code(code) => Request {
            program: whole_program(code, answer),
            calls: code.visible.iter().map(|(e, value)| call(e, value.as_deref())).collect(),
            profile: Profile::Run,
        },
        _ => return None,
    };
    Some(request).filter(|r| !r.calls.is_empty())
}

/// Whether a run of [`on_visible`] with comparison went well: every value is as shown.
pub fn visible_is_right(verdict: &Verdict, request: &Request) -> bool {
    verdict.rejection.is_none()
        && verdict.calls.iter().zip(&request.calls).all(|(outcome, call)| match outcome {
            Outcome::Value { matches, .. } => call.expect.is_none() || *matches == Some(true),
            _ => false,
        })
}

/// Whether two answers to a question say the same.
pub fn same(question: &Question, a: &str, b: &str) -> bool {
    if a == b {
        return true;
    }
    match question {
        Question::Task(Task { kind: TaskKind::Deduction, .. }) => answers_equal(a, b),
        Question::Task(Task { kind: TaskKind::Abduction, .. }) => {
            let args = |text| Value::parse_args(text).map(Value::List);
            matches!((args(a), args(b)), (Ok(a), Ok(b)) if a.py_eq(&b))
        }
        Question::Math { .. } | Question::Open(_) => math::same(a, b, None),
        Question::Spans { .. } => drop_scores(&[vec![a.to_owned()]], b).0 == 1.0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(stub: &str) -> Code {
        Code {
            text: String::new(),
            stub: stub.to_owned(),
            entry: "g".to_owned(),
            setup: "import re".to_owned(),
            tests: vec!["assert g(1)".to_owned()],
            visible: vec![("g(1)".to_owned(), Some("2".to_owned())), ("g(2)".to_owned(), None)],
        }
    }

    #[test]
    fn completions_and_programs_become_whole_programs() {
        let stub = "def h(x):\n    return x\ndef g(x):\n    \"\"\"Doc.\"\"\"\n";
        for (stub, answer, program) in [
            ("", "def g(x): return 1", "import re\ndef g(x): return 1".to_owned()),
            (stub, "    return 1", format!("import re\n{}\n    return 1", stub.trim_end())),
            (stub, "return 1", format!("import re\n{}\n    return 1", stub.trim_end())),
            (stub, "def g (x): return 1", format!("import re\n{}\n    pass\n\ndef g (x): return 1", stub.trim_end())),
        ] {
            assert_eq!(whole_program(&code(stub), answer), program);
        }
    }

    #[test]
    fn visible_cases_are_what_the_question_shows() {
        let question = Question::Code(code(""));
        let request = on_visible(&question, "p", true).expect("two cases");
        let expects: Vec<Option<&str>> = request.calls.iter().map(|c| c.expect.as_deref()).collect();
        assert_eq!(expects, [Some("2"), None]);
        assert!(on_visible(&question, "p", false).expect("two cases").calls.iter().all(|c| c.expect.is_none()));
        let value = |matches| Outcome::Value { text: "2".into(), matches };
        let verdict = |calls| Verdict {
            rejection: None,
            calls,
            unstable: Vec::new(),
            normal_form: None,
            cpu_us: 0,
            memory_bytes: 0,
        };
        assert!(visible_is_right(&verdict(vec![value(Some(true)), value(None)]), &request));
        assert!(!visible_is_right(&verdict(vec![value(Some(false)), value(None)]), &request));
        assert!(!visible_is_right(&verdict(vec![value(Some(true)), Outcome::Crash]), &request));
        let induction = Task::identity(TaskKind::Induction);
        let shown = induction.shown_pairs().len();
        assert_eq!(on_visible(&Question::Task(induction), "p", true).expect("pairs").calls.len(), shown);
        assert!(on_visible(&Question::Task(Task::identity(TaskKind::Deduction)), "1", true).is_none());
    }

    #[test]
    fn equal_answers_vote_together() {
        let task = |kind| Question::Task(Task::identity(kind));
        let math = Question::Math { problem: String::new(), golds: vec![], tolerance: None };
        assert!(same(&task(TaskKind::Deduction), "[1, 2]", "[1,2]") && !same(&task(TaskKind::Deduction), "1", "2"));
        assert!(
            same(&task(TaskKind::Abduction), "'a', 1", "\"a\",1") && !same(&task(TaskKind::Abduction), "1", "1, 2")
        );
        assert!(same(&math, "1/2", "0.5") && !same(&math, "1", "2"));
    }
}
