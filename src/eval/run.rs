//! Running a suite: attempts at every question, in batches of the model and of the executor, and a record of each.
//!
//! Whatever finishes first, records are in the order of the items, and draws depend on seed and place alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use azr_tokenizer::{Specials, Tokenizer};
use serde::{Deserialize, Serialize};

use super::grade::grade;
use super::protocol::{Attempt, Line, Next, Reply, Settings, Turn};
use super::suites::Item;
use super::template::Template;
use crate::base::stop::StopFlag;
use crate::compute::ops::Backend;
use crate::error::{Error, Kind, Result};
use crate::exec::pool::Pool;
use crate::exec::protocol::Request;
use crate::model::forward::Decoder;
use crate::rollout::engine::{Completion, Engine, Finish, SampleRequest};
use crate::selfplay::codec::Codec;
use crate::selfplay::prompt::{self, Format, Piece};
use crate::selfplay::task::{Config, Role, TaskKind};

/// Who completes prompts.
pub trait Voice {
    /// Completions of the lines, in their order.
    ///
    /// # Errors
    /// When the model fails, or on a stop signal.
    fn say(&mut self, lines: &[Line]) -> Result<Vec<Reply>>;
}

/// A model as a voice.
pub struct Model<'a, B: Backend> {
    /// The model.
    pub decoder: &'a Decoder<B>,
    /// Its rollout engine, idle.
    pub engine: &'a mut Engine<B>,
    /// Text to tokens and back.
    pub codec: &'a Codec,
    /// The tokenizer, for special tokens that are not the codec's.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that end a completion.
    pub stop_tokens: Arc<[u32]>,
    /// Nucleus: each token is drawn from the likeliest ones that have this probability together.
    pub top_p: f32,
    /// Each token is drawn from so many of the likeliest; 0 for all.
    pub top_k: usize,
    /// Set by a signal.
    pub stop: &'a StopFlag,
}

/// Tokens that end a completion under a template.
pub fn stop_tokens(template: Template, codec: &Codec, eos: &[u32]) -> Arc<[u32]> {
    let format = if template == Template::Compact { Format::Compact } else { Format::Azr };
    let names = prompt::stops(format, Config { kind: TaskKind::Deduction, role: Role::Solve });
    // A base model's own end of text is not the end of a chat's turn.
    let turn: &[&str] = template.turn_ends();
    let mut ids: Vec<u32> =
        codec.special_ids(&names).chain(codec.special_ids(turn)).chain(eos.iter().copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into()
}

impl<B: Backend> Model<'_, B> {
    fn encode(&self, pieces: &[Piece]) -> Result<Vec<u32>> {
        let mut tokens = self.codec.encode(&[]);
        for piece in pieces {
            match piece {
                Piece::Text(text) => tokens.extend(self.tokenizer.encode(text, Specials::AsText)),
                Piece::Special(name) => tokens.push(self.tokenizer.token_id(name).ok_or_else(|| {
                    Error::config(format!("the tokenizer has no token {name}")).with_hint("name another --template")
                })?),
            }
        }
        Ok(tokens)
    }

    fn complete(&mut self) -> Result<BTreeMap<u64, Completion>> {
        let mut done = BTreeMap::new();
        while !self.engine.is_idle() {
            if self.stop.is_set() {
                self.engine.clear();
                return Err(Error::new(Kind::Interrupted, "stopped by a signal"));
            }
            done.extend(self.engine.step(self.decoder)?.into_iter().map(|c| (c.id, c)));
        }
        Ok(done)
    }
}

impl<B: Backend> Voice for Model<'_, B> {
    fn say(&mut self, lines: &[Line]) -> Result<Vec<Reply>> {
        let context = self.decoder.spec().max_position_embeddings;
        for line in lines {
            let tokens = self.encode(&line.pieces)?;
            // A prompt that leaves no room is answered with nothing.
            if tokens.is_empty() || tokens.len() >= context {
                continue;
            }
            self.engine.submit(SampleRequest {
                id: line.id,
                max_new: line.max_new.min(context - tokens.len()),
                prompt: tokens.into(),
                stop: self.stop_tokens.clone(),
                temperature: line.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
            })?;
        }
        let mut done = self.complete()?;
        let reply = |line: &Line| match done.remove(&line.id) {
            Some(c) => Reply {
                pieces: self.codec.decode(&c.tokens),
                num_tokens: c.tokens.len(),
                finished: c.finish == Finish::Stop,
            },
            None => Reply { pieces: Vec::new(), num_tokens: 0, finished: false },
        };
        Ok(lines.iter().map(reply).collect())
    }
}

/// One item's samples: a line of the records' file. Lists have one entry per sample.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Suite.
    pub suite: String,
    /// Id in the suite.
    pub id: String,
    /// Whether the answer is right: 1 or 0.
    pub right: Vec<f64>,
    /// F1, where the suite has it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub f1: Vec<f64>,
    /// The answer that was read, if any.
    pub answers: Vec<Option<String>>,
    /// What the grader said.
    pub details: Vec<String>,
    /// Tokens sampled.
    pub tokens: Vec<usize>,
    /// Calls that the protocol, not the grader, made of the executor.
    pub executor_calls: Vec<usize>,
    /// Completions that were cut off at their longest length.
    pub cut: Vec<usize>,
    /// What was said, where that is wanted.
    #[serde(skip_serializing, skip_deserializing)]
    pub traces: Vec<Vec<Turn>>,
}

/// Works on every item `num_samples` times. Completions have ids from `first_id` on; with the engine's seed they decide
/// what is drawn.
///
/// # Errors
/// When the model or the executor fails, or on a stop signal.
pub fn run(
    items: &[Item],
    settings: Settings,
    num_samples: usize,
    first_id: u64,
    voice: &mut dyn Voice,
    pool: &Pool,
) -> Result<Vec<Record>> {
    let id = |i: usize, j: usize| first_id + ((i as u64) << 24 | (j as u64) << 12);
    let mut attempts: Vec<Attempt<'_>> = items
        .iter()
        .enumerate()
        .flat_map(|(i, item)| (0..num_samples).map(move |j| (i, j, item)))
        .map(|(i, j, item)| Attempt::new(item, settings, id(i, j)))
        .collect();
    work(&mut attempts, voice, pool)?;
    let answers = |of: &[Attempt<'_>]| of.iter().map(|a| a.answer.clone()).collect::<Vec<_>>();
    let groups: Vec<&[Attempt<'_>]> = attempts.chunks(num_samples.max(1)).collect();
    let answered: Vec<(&Item, Vec<Option<String>>)> = groups.iter().map(|g| (g[0].item(), answers(g))).collect();
    let (scores, _) = grade(pool, &answered)?;
    let record = |((group, (item, answers)), scores): ((&&[Attempt<'_>], _), Vec<super::grade::Score>)| {
        let item: &Item = item;
        Record {
            suite: item.suite.clone(),
            id: item.id.clone(),
            right: scores.iter().map(|s| s.right).collect(),
            f1: scores.iter().filter_map(|s| s.f1).collect(),
            answers,
            details: scores.into_iter().map(|s| s.detail).collect(),
            tokens: group.iter().map(|a| a.num_tokens).collect(),
            executor_calls: group.iter().map(|a| a.num_calls).collect(),
            cut: group.iter().map(|a| a.num_cut).collect(),
            traces: group.iter().map(|a| a.trace.clone()).collect(),
        }
    };
    Ok(groups.iter().zip(answered).zip(scores).map(record).collect())
}

/// Drives attempts to their ends: what all of them want of the model goes into one batch, then what they want of the
/// executor.
///
/// # Errors
/// When the model or the executor fails, or on a stop signal.
pub fn work(attempts: &mut [Attempt<'_>], voice: &mut dyn Voice, pool: &Pool) -> Result<()> {
    let mut wants: Vec<Next> = attempts.iter_mut().map(Attempt::begin).collect();
    loop {
        let (mut lines, mut requests): (Vec<Line>, Vec<Request>) = Default::default();
        for want in &mut wants {
            match want {
                Next::Say(own) => lines.extend(own.iter().cloned()),
                Next::Run(own) => requests.append(&mut own.clone()),
                Next::Done => {}
            }
        }
        if lines.is_empty() && requests.is_empty() {
            return Ok(());
        }
        let mut replies = voice.say(&lines)?.into_iter();
        let mut verdicts = pool.run(requests)?.into_iter();
        for (attempt, want) in attempts.iter_mut().zip(&mut wants) {
            *want = match want {
                Next::Say(own) => attempt.heard(replies.by_ref().take(own.len()).collect()),
                Next::Run(own) => attempt.ran(&verdicts.by_ref().take(own.len()).collect::<Vec<_>>()),
                Next::Done => Next::Done,
            };
        }
    }
}
