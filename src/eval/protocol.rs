//! Reasoning protocols: from a question to an answer in one or more turns of the model and the executor.
//!
//! An [`Attempt`] is a state machine without a model or an executor of its own: it says what it wants next, and is told what
//! came of it, so that many attempts share batches and a test can play the model. Every token counts against the
//! attempt's budget; where it is used up, the best answer so far stands.

use super::grade::{on_visible, same, visible_is_right};
use super::suites::{Item, Question};
use super::template::{Prompt, Template, words_of};
use crate::exec::protocol::{Call, Outcome, Profile, Request, Verdict};
use crate::selfplay::prompt::Piece;

/// Characters of an observation that the model is shown.
const MAX_OBSERVATION: usize = 1000;

/// How a question is worked on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// One completion.
    Direct,
    /// Majority of several completions; programs by their outputs on what the question shows.
    Vote,
    /// An answer, a critique of it, and a revision.
    Critique,
    /// Thought, code for the executor, observation, and again (Yao et al., 2023).
    React,
    /// Attempts, with a written reflection on each failure kept for the next (Shinn et al., 2023).
    Reflexion,
}

impl Protocol {
    /// Protocols by name.
    pub const NAMED: [(&'static str, Protocol); 5] = [
        ("direct", Protocol::Direct),
        ("vote", Protocol::Vote),
        ("critique", Protocol::Critique),
        ("react", Protocol::React),
        ("reflexion", Protocol::Reflexion),
    ];

    /// Whether it needs a model that reads and writes English.
    pub fn needs_english(self) -> bool {
        matches!(self, Protocol::Critique | Protocol::React)
    }
}

/// Settings of attempts.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Template of prompts.
    pub template: Template,
    /// Protocol.
    pub protocol: Protocol,
    /// Sampling temperature; 0 is greedy. Votes, and what comes after a failure, take at least [`Settings::VARIED`].
    pub temperature: f32,
    /// Longest completion, in tokens.
    pub max_new: usize,
    /// Tokens that an attempt may sample in all.
    pub budget: usize,
    /// Completions of a vote.
    pub num_paths: usize,
    /// Turns of ReAct, attempts of Reflexion.
    pub num_rounds: usize,
    /// Whether what was said is kept.
    pub keep_trace: bool,
}

impl Settings {
    /// Temperature at which completions of one prompt differ.
    pub const VARIED: f32 = 0.7;

    fn varied(&self) -> f32 {
        if self.temperature > 0.0 { self.temperature } else { Self::VARIED }
    }
}

/// A completion to sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Decides what is drawn, with the seed.
    pub id: u64,
    /// The prompt.
    pub pieces: Vec<Piece>,
    /// Longest completion, in tokens.
    pub max_new: usize,
    /// Temperature.
    pub temperature: f32,
}

/// A sampled completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// What was sampled, without the token that ended it where the template has words alone.
    pub pieces: Vec<Piece>,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Whether it ended by itself.
    pub finished: bool,
}

/// What an attempt wants.
#[derive(Debug)]
pub enum Next {
    /// Completions, all at once.
    Say(Vec<Line>),
    /// Runs of programs, all at once.
    Run(Vec<Request>),
    /// Nothing more.
    Done,
}

/// One turn, for the trace.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Turn {
    /// prompt, completion, action, observation or note.
    pub role: &'static str,
    /// What was said.
    pub text: String,
}

/// What the next thing that comes back is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Answers,
    Critique,
    Revision,
    Thought,
    Judgement,
    Reflection,
    Outputs,
    Observation,
    Check,
    Nothing,
}

/// One attempt at one question.
pub struct Attempt<'a> {
    item: &'a Item,
    settings: Settings,
    id: u64,
    num_lines: u64,
    waiting: Waiting,
    opened: String,
    candidates: Vec<String>,
    requests: Vec<Request>,
    notes: Vec<String>,
    round: usize,
    /// The answer, once there is one.
    pub answer: Option<String>,
    /// Tokens sampled.
    pub num_tokens: usize,
    /// Calls of the executor.
    pub num_calls: usize,
    /// Completions that did not end by themselves.
    pub num_cut: usize,
    /// What was said, where that is kept.
    pub trace: Vec<Turn>,
}

impl<'a> Attempt<'a> {
    /// An attempt whose completions have the ids from `id` on; it may take 4096 of them.
    pub fn new(item: &'a Item, settings: Settings, id: u64) -> Self {
        Attempt {
            item,
            settings,
            id,
            num_lines: 0,
            waiting: Waiting::Nothing,
            opened: String::new(),
            candidates: Vec::new(),
            requests: Vec::new(),
            notes: Vec::new(),
            round: 0,
            answer: None,
            num_tokens: 0,
            num_calls: 0,
            num_cut: 0,
            trace: Vec::new(),
        }
    }

    /// The question.
    pub fn item(&self) -> &'a Item {
        self.item
    }

    /// What it wants first.
    pub fn begin(&mut self) -> Next {
        let s = self.settings;
        match s.protocol {
            Protocol::React => self.think(),
            Protocol::Vote => {
                let prompt = self.prompt("");
                self.say(prompt, Waiting::Answers, s.num_paths.max(1), s.varied())
            }
            _ => self.attempt(),
        }
    }

    /// Takes completions, in the order of the lines.
    pub fn heard(&mut self, replies: Vec<Reply>) -> Next {
        for reply in &replies {
            self.num_tokens += reply.num_tokens;
            self.num_cut += usize::from(!reply.finished);
            self.note("completion", words_of(&reply.pieces));
        }
        let first = replies.first().map(|r| words_of(&r.pieces)).unwrap_or_default();
        match self.waiting {
            Waiting::Answers => {
                let read =
                    |r: &Reply| self.settings.template.read(&self.item.question, &self.opened, &r.pieces, r.finished);
                let found: Vec<String> = replies.iter().filter_map(read).collect();
                self.answered(found)
            }
            Waiting::Critique => {
                let draft = self.answer.clone().unwrap_or_else(|| "none".to_owned());
                let after = format!(
                    "\n\nAn earlier answer was:\n{draft}\nA critique of it:\n{}\nAnswer again; keep what is right in the \
                     earlier answer and correct what is not.",
                    first.trim()
                );
                let prompt = self.prompt(&after);
                self.say(prompt, Waiting::Revision, 1, self.settings.temperature)
            }
            Waiting::Revision => {
                let read =
                    |r: &Reply| self.settings.template.read(&self.item.question, &self.opened, &r.pieces, r.finished);
                let revised = replies.first().and_then(read);
                self.answer = revised.or(self.answer.take());
                self.done()
            }
            Waiting::Thought => self.thought(&replies[0], &first),
            Waiting::Judgement => {
                let judgement = first.rsplit_once("</think>").map_or(first.as_str(), |(_, after)| after);
                match super::words::yes_or_no(judgement) {
                    Some(false) => self.failed("The answer was judged wrong."),
                    _ => self.done(),
                }
            }
            Waiting::Reflection => {
                let reflection = first.rsplit_once("</think>").map_or(first.as_str(), |(_, after)| after);
                self.notes.push(reflection.replace("<answer>", "").replace("</answer>", "").trim().to_owned());
                self.attempt()
            }
            _ => self.done(),
        }
    }

    /// Takes verdicts, in the order of the requests.
    pub fn ran(&mut self, verdicts: &[Verdict]) -> Next {
        self.num_calls += self.requests.iter().map(|r| r.calls.len()).sum::<usize>();
        match self.waiting {
            Waiting::Outputs => {
                let outputs: Vec<Option<Vec<String>>> = verdicts.iter().map(values).collect();
                self.answer = majority(&self.candidates, |i, j| outputs[i].is_some() && outputs[i] == outputs[j]);
                self.done()
            }
            Waiting::Observation => {
                let said = verdicts.first().map(observation).unwrap_or_default();
                self.note("observation", said.clone());
                self.notes.push(format!("Observation: {said}"));
                self.think()
            }
            Waiting::Check => {
                let right = verdicts.iter().zip(&self.requests).all(|(v, r)| visible_is_right(v, r));
                let said = verdicts.first().map(observation).unwrap_or_default();
                self.note("observation", said.clone());
                if right { self.done() } else { self.failed(&format!("On what the question shows it gave: {said}")) }
            }
            _ => self.done(),
        }
    }

    /// What follows the answers of direct, vote, critique and Reflexion.
    fn answered(&mut self, mut found: Vec<String>) -> Next {
        let question = &self.item.question;
        match self.settings.protocol {
            Protocol::Vote => {
                let runs: Option<Vec<Request>> = found.iter().map(|a| on_visible(question, a, false)).collect();
                let is_program = !matches!(question, Question::Task(t) if t.kind.name() == "abduction");
                self.answer = majority(&found, |i, j| same(question, &found[i], &found[j]));
                self.candidates = found;
                match runs.filter(|r| is_program && !r.is_empty()) {
                    Some(requests) => self.run(requests, Waiting::Outputs),
                    None => self.done(),
                }
            }
            Protocol::Critique => {
                self.answer = found.pop();
                let draft = self.answer.clone().unwrap_or_else(|| "none".to_owned());
                let text = format!(
                    "{}\n\nSomeone answered:\n{draft}\n\nCheck this answer step by step. Say what is wrong with it, or that \
                     nothing is.",
                    super::template::question_text(question)
                );
                let prompt = self.settings.template.framed(&text, String::new());
                self.say(prompt, Waiting::Critique, 1, self.settings.temperature)
            }
            Protocol::Reflexion => {
                self.answer = found.pop().or(self.answer.take());
                match self.answer.as_ref().map(|a| on_visible(question, a, true)) {
                    None => self.failed("There was no answer."),
                    Some(Some(request)) => self.run(vec![request], Waiting::Check),
                    Some(None) if self.settings.template == Template::Compact => self.done(),
                    Some(None) => {
                        let answer = self.answer.clone().unwrap_or_default();
                        let text = format!(
                            "{}\n\nSomeone answered:\n{answer}\n\nIs this answer right? Say yes or no.",
                            super::template::question_text(question)
                        );
                        let prompt = self.settings.template.framed(&text, String::new());
                        self.say(prompt, Waiting::Judgement, 1, self.settings.temperature)
                    }
                }
            }
            _ => {
                self.answer = found.pop();
                self.done()
            }
        }
    }

    /// An attempt of direct, critique or Reflexion, with what earlier ones left.
    fn attempt(&mut self) -> Next {
        self.round += 1;
        let lessons: String = self.notes.iter().map(|n| format!("\n- {n}")).collect();
        let after = match lessons.is_empty() {
            true => String::new(),
            false => format!("\n\nEarlier attempts failed. What was learnt from them:{lessons}"),
        };
        let temperature = if self.round > 1 { self.settings.varied() } else { self.settings.temperature };
        let prompt = self.prompt(&after);
        self.say(prompt, Waiting::Answers, 1, temperature)
    }

    /// A failed attempt of Reflexion: reflect and try again, while rounds are left.
    fn failed(&mut self, why: &str) -> Next {
        if self.round >= self.settings.num_rounds {
            return self.done();
        }
        if self.settings.template == Template::Compact {
            // It has no words to reflect in: another draw.
            return self.attempt();
        }
        let answer = self.answer.clone().unwrap_or_else(|| "none".to_owned());
        let text = format!(
            "{}\n\nYour answer was:\n{answer}\n{why}\n\nIn two or three sentences: what went wrong, and what to do \
             differently next time? Do not answer the question itself.",
            super::template::question_text(&self.item.question)
        );
        let prompt = self.settings.template.framed(&text, String::new());
        self.say(prompt, Waiting::Reflection, 1, self.settings.temperature)
    }

    /// A turn of ReAct.
    fn think(&mut self) -> Next {
        self.round += 1;
        let last = self.round >= self.settings.num_rounds;
        let rule = if last {
            "\n\nGive the final answer now, between <answer> and </answer>."
        } else {
            "\n\nYou may run Python before you answer: write a block that starts with ```run and ends with ```, and stop. \
             The value of its last line comes back as an observation; printing shows nothing. When you know the answer, \
             write it between <answer> and </answer>."
        };
        let so_far: String = self.notes.iter().map(|n| format!("\n{n}")).collect();
        let so_far = if so_far.is_empty() { so_far } else { format!("\n\nSo far:{so_far}") };
        let prompt = self.prompt(&format!("{rule}{so_far}"));
        self.say(prompt, Waiting::Thought, 1, self.settings.temperature)
    }

    fn thought(&mut self, reply: &Reply, text: &str) -> Next {
        let action = text.split_once("```run").and_then(|(before, rest)| {
            let code = rest.split("```").next()?.trim_matches(['\n', '\r']).to_owned();
            // What follows the block was made up before anything ran.
            (!before.contains("<answer>") && !code.trim().is_empty()).then_some((before.to_owned(), code))
        });
        match action.filter(|_| self.round < self.settings.num_rounds) {
            Some((before, code)) => {
                self.note("action", code.clone());
                self.notes.push(format!("{}\n```run\n{code}\n```", before.trim()));
                self.run(vec![tool(&code)], Waiting::Observation)
            }
            None => {
                let question = &self.item.question;
                self.answer = self.settings.template.read(question, &self.opened, &reply.pieces, reply.finished);
                self.done()
            }
        }
    }

    fn prompt(&self, after: &str) -> Prompt {
        self.settings.template.prompt(&self.item.question, after)
    }

    /// Asks for completions of a prompt, or ends where the budget is used up.
    fn say(&mut self, prompt: Prompt, waiting: Waiting, count: usize, temperature: f32) -> Next {
        let left = self.settings.budget.saturating_sub(self.num_tokens) / count;
        if left == 0 {
            self.note("note", "the budget is used up".to_owned());
            return self.done();
        }
        self.note("prompt", words_of(&prompt.pieces));
        (self.waiting, self.opened) = (waiting, prompt.opened);
        let first = self.num_lines;
        self.num_lines += count as u64;
        let line = |i: u64| Line {
            id: self.id + i,
            pieces: prompt.pieces.clone(),
            max_new: self.settings.max_new.min(left),
            temperature,
        };
        Next::Say((first..self.num_lines).map(line).collect())
    }

    fn run(&mut self, requests: Vec<Request>, waiting: Waiting) -> Next {
        self.waiting = waiting;
        self.requests.clone_from(&requests);
        Next::Run(requests)
    }

    fn done(&mut self) -> Next {
        self.waiting = Waiting::Nothing;
        Next::Done
    }

    fn note(&mut self, role: &'static str, text: String) {
        if self.settings.keep_trace {
            self.trace.push(Turn { role, text });
        }
    }
}

/// A request that runs a tool's code and gives the value of its last line.
fn tool(code: &str) -> Request {
    let (program, last) = match code.trim_end().rsplit_once('\n') {
        Some((program, last)) if !last.starts_with([' ', '\t', ')', ']', '}']) => (program, last),
        _ if code.contains('\n') => (code, "None"),
        _ => ("", code.trim()),
    };
    let calls = vec![Call { args: last.to_owned(), expect: None }];
    Request { program: program.to_owned(), calls, profile: Profile::Run }
}

fn observation(verdict: &Verdict) -> String {
    let said = match &verdict.rejection {
        Some(rejection) => rejection.to_string(),
        None => verdict.calls.iter().map(outcome_text).collect::<Vec<_>>().join("; "),
    };
    said.chars().take(MAX_OBSERVATION).collect()
}

fn outcome_text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Value { text, .. } => text.clone(),
        Outcome::Exception { class, message } => format!("{class}: {message}"),
        other => other.to_string(),
    }
}

/// Values of all calls; none where one did not give a value.
fn values(verdict: &Verdict) -> Option<Vec<String>> {
    let value = |o: &Outcome| match o {
        Outcome::Value { text, .. } => Some(text.clone()),
        _ => None,
    };
    if verdict.rejection.is_some() { None } else { verdict.calls.iter().map(value).collect() }
}

/// The first member of the largest class of candidates; among equal classes, the one that begins first. A candidate that
/// is not even equal to itself is in none; without a class, the first candidate.
fn majority(candidates: &[String], equal: impl Fn(usize, usize) -> bool) -> Option<String> {
    let mut classes: Vec<(usize, usize)> = Vec::new();
    for i in (0..candidates.len()).filter(|i| equal(*i, *i)) {
        match classes.iter_mut().find(|(first, _)| equal(*first, i)) {
            Some((_, size)) => *size += 1,
            None => classes.push((i, 1)),
        }
    }
    let best = classes.iter().max_by_key(|(first, size)| (*size, std::cmp::Reverse(*first)));
    candidates.get(best.map_or(0, |(first, _)| *first)).cloned()
}
