//! How good a pre-trained model is: valid proposals at temperature 1, and accuracy on held-out programs of the generator.
//! Not here: programs of other structure ([`super::builtin`]).

use std::path::Path;
use std::sync::Arc;

use azr_tokenizer::Tokenizer;
use serde::Serialize;

use super::protocol::{Protocol, Settings};
use super::run::{Model, run, stop_tokens};
use super::stats::mean;
use super::suites::{Item, Question};
use super::template::Template;
use crate::base::rng::{Purpose, Rng};
use crate::base::stop::StopFlag;
use crate::compute::cpu::backend::CpuBackend;
use crate::error::Result;
use crate::exec::pool::Pool;
use crate::exec::protocol::{Call, Outcome, Profile, Request};
use crate::exec::source::FunctionRule;
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::pretrain::PretrainConfig;
use crate::pretrain::corpus::{HELD_OUT_EVERY, compact_codec, execute};
use crate::rollout::engine::{Completion, Engine, Finish, SampleRequest};
use crate::selfplay::codec::Codec;
use crate::selfplay::parse;
use crate::selfplay::prompt::{self, Format, NUM_INDUCTION_INPUTS};
use crate::selfplay::task::{Config, Role, Task, TaskKind};
use crate::weights::model_files::ModelFiles;

/// Tasks of each kind.
const NUM_TASKS: usize = 512;
/// Longest answer, in tokens.
const MAX_NEW: usize = 128;

/// Shares of right answers and valid proposals, of 512 each (standard error about 2 points).
#[derive(Debug, Clone, Default, Serialize)]
pub struct Evaluation {
    /// Valid proposals with six references, temperature 1: abduction and deduction prompts.
    pub valid_proposals: f64,
    /// Valid induction proposals, temperature 1.
    pub valid_induction_proposals: f64,
    /// Greedy accuracy.
    pub deduction: f64,
    /// Greedy accuracy.
    pub abduction: f64,
    /// Greedy accuracy: all five hidden pairs.
    pub induction: f64,
    /// Accuracy at temperature 1.
    pub deduction_sampled: f64,
    /// Accuracy at temperature 1.
    pub abduction_sampled: f64,
    /// Accuracy at temperature 1.
    pub induction_sampled: f64,
}

struct Evaluator {
    decoder: Decoder<CpuBackend>,
    codec: Codec,
    tokenizer: Tokenizer,
    pool: Pool,
    seed: u64,
}

/// Evaluates the model in a folder.
///
/// # Errors
/// When the model cannot be read or the executor stops.
pub fn evaluate(folder: &Path, config: &PretrainConfig) -> Result<Evaluation> {
    let model = ModelFiles::open(folder)?;
    let weights = ParamTable::new(&model.spec).load(&model.tensors)?;
    let decoder = Decoder::new(CpuBackend::new(config.num_threads)?, model.spec, &weights, false)?;
    let pool = Pool::start(&config.pool)?;
    let codec = compact_codec(model.tokenizer.clone())?;
    let evaluator = Evaluator { decoder, codec, tokenizer: model.tokenizer, pool, seed: config.seed };
    let held_out = (0..NUM_TASKS as u64 * 2).map(|i| i * HELD_OUT_EVERY);
    let mut programs = execute(&evaluator.pool, config.seed, held_out)?;
    programs.retain(|p| p.pairs.len() == NUM_INDUCTION_INPUTS);
    programs.truncate(NUM_TASKS);
    let tasks = |kind| -> Vec<Task> { programs.iter().map(|p| p.task(kind)).collect() };
    let mut found = Evaluation::default();
    for (kind, greedy, sampled) in [
        (TaskKind::Deduction, &mut found.deduction, &mut found.deduction_sampled),
        (TaskKind::Abduction, &mut found.abduction, &mut found.abduction_sampled),
        (TaskKind::Induction, &mut found.induction, &mut found.induction_sampled),
    ] {
        *greedy = evaluator.solve(&tasks(kind), 0.0)?;
        *sampled = evaluator.solve(&tasks(kind), 1.0)?;
    }
    found.valid_proposals = evaluator.propose(&tasks(TaskKind::Deduction), TaskKind::Deduction)?;
    found.valid_induction_proposals = evaluator.propose(&tasks(TaskKind::Induction), TaskKind::Induction)?;
    Ok(found)
}

impl Evaluator {
    fn sample(&self, prompts: Vec<Vec<u32>>, config: Config, temperature: f32) -> Result<Vec<Completion>> {
        let names = prompt::stops(Format::Compact, config);
        let stop: Arc<[u32]> = self.codec.special_ids(&names).collect();
        let context = self.decoder.spec().max_position_embeddings;
        let mut engine = self.engine()?;
        for (i, prompt) in prompts.into_iter().enumerate() {
            engine.submit(SampleRequest {
                id: (config.index() as u64) << 32 | i as u64,
                max_new: MAX_NEW.min(context.saturating_sub(prompt.len()).max(1)),
                prompt: prompt.into(),
                stop: stop.clone(),
                temperature,
                top_p: 1.0,
                top_k: 0,
            })?;
        }
        engine.finish(&self.decoder)
    }

    /// Share of the tasks that are solved.
    fn solve(&self, tasks: &[Task], temperature: f32) -> Result<f64> {
        let item = |(i, task): (usize, &Task)| Item {
            suite: task.kind.name().to_owned(),
            id: i.to_string(),
            question: Question::Task(task.clone()),
        };
        let items: Vec<Item> = tasks.iter().enumerate().map(item).collect();
        let template = Template::Compact;
        let settings = Settings {
            template,
            protocol: Protocol::Direct,
            temperature,
            max_new: MAX_NEW,
            budget: usize::MAX,
            num_paths: 1,
            num_rounds: 1,
            keep_trace: false,
        };
        let mut model = Model {
            decoder: &self.decoder,
            engine: &mut self.engine()?,
            codec: &self.codec,
            tokenizer: &self.tokenizer,
            stop_tokens: stop_tokens(template, &self.codec, &[]),
            top_p: 1.0,
            top_k: 0,
            stop: &StopFlag::default(),
        };
        let records = run(&items, settings, 1, 0, &mut model, &self.pool)?;
        let right: Vec<f64> = records.iter().flat_map(|r| r.right.iter().copied()).collect();
        Ok(mean(&right))
    }

    fn engine(&self) -> Result<Engine<CpuBackend>> {
        let context = self.decoder.spec().max_position_embeddings;
        Engine::new(&self.decoder, Engine::<CpuBackend>::limits(64, context, 0), self.seed)
    }

    fn propose(&self, tasks: &[Task], kind: TaskKind) -> Result<f64> {
        let mut rng = Rng::new(self.seed, Purpose::Eval, 0, kind as u32);
        let count = if kind == TaskKind::Induction { 1 } else { 6 };
        let mut prompts = Vec::new();
        let mut sources = Vec::new();
        for _ in 0..NUM_TASKS {
            let references: Vec<&Task> = (0..count).map(|_| rng.choose(tasks)).collect();
            prompts.push(self.codec.encode(&prompt::proposer(Format::Compact, kind, &references, &[])));
            sources.push(references[0]);
        }
        let completions = self.sample(prompts, Config { kind, role: Role::Propose }, 1.0)?;
        let rules = parse::Rules { function_rule: FunctionRule::Any, seeding: false };
        let mut requests = Vec::new();
        for (c, source) in completions.iter().zip(sources) {
            let pieces = self.codec.decode(&c.tokens);
            let finished = c.finish == Finish::Stop;
            let read = parse::proposal(Format::Compact, kind, &pieces, finished, Some(source), &[], rules);
            if let Ok(draft) = read.draft {
                let calls = draft.inputs.iter().map(|args| Call { args: args.clone(), expect: None }).collect();
                requests.push(Request { program: draft.program, calls, profile: Profile::Propose });
            }
        }
        let verdicts = self.pool.run(requests)?;
        let is_value = |o: &Outcome| matches!(o, Outcome::Value { .. });
        let valid = verdicts.iter().filter(|v| !v.calls.is_empty() && v.calls.iter().all(is_value)).count();
        Ok(valid as f64 / NUM_TASKS as f64)
    }
}
