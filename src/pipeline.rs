//! The self-play loop.
//!
//! A step: prompts from the buffers as they are; one continuous batch of proposals, solutions and probes; rewards and
//! one baseline per task type and role; one update; tasks into the buffers; events. Whatever finishes first, every join
//! goes through its records in the order of their ids before anything is summed.

pub mod carry;
pub mod config;
pub mod generate;
pub mod inputs;
pub mod judge;
pub mod prompts;
pub mod proof;
pub mod seeding;
pub mod state;
pub mod step;
pub mod update;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use azr_tokenizer::Tokenizer;

use crate::base::run_dir::{RunDir, publish};
use crate::base::stop::StopFlag;
use crate::compute::ops::Backend;
use crate::error::{Error, Kind, Result};
use crate::exec::pool::Pool;
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::observe::console::Console;
use crate::observe::sinks::Sinks;
use crate::pipeline::carry::Carried;
use crate::pipeline::config::Config;
use crate::pipeline::generate::{Context, Rules};
use crate::pipeline::state::Counters;
use crate::pipeline::step::Run;
use crate::rollout::engine::Engine;
use crate::selfplay::alarm::{Alarms, OnCollapse};
use crate::selfplay::buffer::Buffers;
use crate::selfplay::codec::Codec;
use crate::selfplay::config::Duplicates;
use crate::selfplay::intrinsic::Seen;
use crate::selfplay::parse;
use crate::selfplay::prompt::Format;
use crate::selfplay::task::TaskKind;
use crate::selfplay::warmth::Warmth;
use crate::train::optim::Trainer;
use crate::weights::model_files::ModelFiles;

/// Where a run starts.
pub enum Start {
    /// From the weights, with seeding.
    Fresh,
    /// From a checkpoint's folder, which the model files were opened from.
    Checkpoint(PathBuf),
}

/// What an examination may look at. The engine is idle before and after it.
pub struct Exam<'a, B: Backend> {
    /// The model.
    pub decoder: &'a Decoder<B>,
    /// Its rollout engine.
    pub engine: &'a mut Engine<B>,
    /// The executor.
    pub pool: &'a Pool,
    /// Text to tokens and back.
    pub codec: &'a Codec,
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Format of the run's prompts.
    pub format: Format,
    /// Tokens that end a text.
    pub eos: &'a [u32],
    /// Set by a signal: an examination then ends with [`Kind::Interrupted`].
    pub stop: &'a StopFlag,
}

/// Measures the model between steps, without a way to change it: scores by name.
pub type Examiner<'a, B> = &'a mut dyn FnMut(Exam<'_, B>) -> Result<BTreeMap<String, f64>>;

/// What a run meets from outside.
pub struct Outside<'a, B: Backend> {
    /// Set by a signal.
    pub stop: StopFlag,
    /// Where progress goes.
    pub console: &'a Console,
    /// Who evaluates the model.
    pub examine: Examiner<'a, B>,
}

/// Trains until the configured step, or until a signal. Ends with a checkpoint in either case.
///
/// # Errors
/// When a part fails; of kind `Interrupted` after a signal.
pub fn train<B: Backend>(
    backend: B,
    config: &Config,
    mut model: ModelFiles,
    dir: &RunDir,
    start: &Start,
    outside: Outside<'_, B>,
) -> Result<()> {
    let Outside { stop, console, examine } = outside;
    let pool = Pool::start(&config.executor.pool(config.num_executors()))?;
    for layer in pool.missing_layers() {
        console.note(&format!("warning: the sandbox lacks {layer}"));
    }
    let layers = serde_json::to_vec_pretty(pool.layers()).map_err(|e| Error::failure(e.to_string()))?;
    publish(&dir.file("sandbox.json"), &layers)?;
    let tokenizer = Arc::new(model.tokenizer.clone());
    let format = step::format(config, &tokenizer);
    let codec = Codec::new(tokenizer.clone(), format, model.bos.filter(|_| format == Format::Azr))?;
    // Positions that no sequence can reach need no angles.
    let longest = config.rollout.max_prompt + config.rollout.max_propose.max(config.rollout.max_solve);
    model.spec.max_position_embeddings = model.spec.max_position_embeddings.min(longest);
    let mut rules = step::rules(config, &model, format, &codec);
    if let Some(path) = named(&config.selfplay.edge_cases) {
        rules.edge_cases = inputs::edge_cases(path, &rules, &codec, &pool)?;
    }
    if let Some(dir) = named(&config.selfplay.ground) {
        rules.ground = inputs::ground(dir, &rules, &codec)?;
    }
    if let Some(path) = named(&config.selfplay.constraints) {
        rules.constraints = inputs::constraints(path, &pool)?;
    }
    ParamTable::new(&model.spec).check(&model.tensors)?;
    let decoder =
        Decoder::load(backend, model.spec.clone(), true, |table, i, sink| table.stream(i, &model.tensors, sink))?;
    let running = match config.rollout.max_running {
        0 => decoder.backend().num_running(),
        n => n,
    };
    let limits = Engine::<B>::limits(running, model.spec.max_position_embeddings, config.rollout.kv_tokens);
    let mut engine = Engine::new(&decoder, limits, config.seed)?;
    let mut trainer = Trainer::new(decoder, config.train.optim(config.seed))?;
    proof::same_bits(&mut trainer, &mut engine, config.rollout.temperature)?;
    let restored = match start {
        Start::Fresh => None,
        Start::Checkpoint(path) => Some(state::load(path, &mut trainer, config.selfplay.buffer_size)?),
    };
    let mut run = Run {
        config: config.clone(),
        trainer,
        engine,
        pool,
        codec,
        tokenizer,
        rules,
        buffers: Buffers::new(config.selfplay.buffer_size),
        carried: Carried::default(),
        seen: Seen::default(),
        alarms: Alarms::default(),
        warmth: Warmth::default(),
        is_updating: false,
        stop,
    };
    let mut step = 0;
    match restored {
        Some((buffers, carried, counters)) => {
            step = counters.step;
            (run.buffers, run.carried) = (buffers, carried);
            (run.seen, run.alarms, run.warmth) = (counters.seen, counters.alarms, counters.warmth);
            console.note(&format!("resuming after step {step}"));
        }
        None => {
            run.buffers = seeds(&mut run, console)?;
            save(&run, dir, &model, 0)?;
        }
    }
    let every = config.eval.every_steps;
    let is_examined = |step: u64| every > 0 && (step.is_multiple_of(every) || step == config.steps);
    let mut sinks = Sinks::open(dir, step)?;
    // Before the first step, or what a signal broke off.
    if is_examined(step) && !sinks.has_eval() {
        let scores = examined(&mut run, &model, examine)?;
        sinks.eval(step, &scores)?;
        console.eval(step, &scores);
    }
    let mut saved = (step, Instant::now());
    while step < config.steps {
        let traced = config.trace_every > 0 && (step + 1).is_multiple_of(config.trace_every);
        let advanced = run.step(step + 1, traced).and_then(|(mut metrics, trace)| {
            step += 1;
            let (start, mut failed) = (Instant::now(), None);
            if is_examined(step) {
                metrics.eval = examined(&mut run, &model, examine).unwrap_or_else(|e| {
                    failed = Some(e);
                    BTreeMap::new()
                });
                metrics.eval_s = start.elapsed().as_secs_f64();
            }
            sinks.step(&metrics, &trace)?;
            console.step(&metrics);
            failed.map_or(Ok(metrics.alarms), Err)
        });
        let mut interrupted = false;
        match advanced {
            Err(e) if e.kind() == Kind::Interrupted => interrupted = true,
            Err(e) => {
                // What the finished steps have learnt is not lost with what failed after them.
                if step > saved.0 && !run.is_updating {
                    sinks.sync();
                    match save(&run, dir, &model, step) {
                        Ok(()) => console.note(&format!("step {step} is saved")),
                        Err(lost) => console.note(&format!("warning: step {step} is lost: {lost}")),
                    }
                }
                console.finish();
                return Err(e);
            }
            // A hit of a constraint is an alarm at once, but a run does not end by one.
            Ok(alarms) => {
                if let Some(lasting) = alarms.values().max().filter(|n| **n >= config.alarm.patience) {
                    sinks.sync();
                    on_alarm(&run, dir, &model, step, *lasting)?;
                }
            }
        }
        let c = &config.checkpoint;
        let by_step = c.every_steps > 0 && step % c.every_steps == 0;
        let by_time = c.every_minutes > 0.0 && saved.1.elapsed() >= Duration::from_secs_f64(60.0 * c.every_minutes);
        let stopped = interrupted || run.stop.is_set();
        if step > saved.0 && (by_step || by_time || stopped || step == config.steps) {
            sinks.sync();
            save(&run, dir, &model, step)?;
            dir.prune(c.keep, step.saturating_sub(run.alarms.longest()));
            saved = (step, Instant::now());
        }
        if stopped && (step < config.steps || is_examined(step) && !sinks.has_eval()) {
            console.finish();
            return Err(Error::new(Kind::Interrupted, format!("stopped after step {step}; all of it is saved"))
                .with_hint(format!("go on with: azr --resume {}", dir.root().display())));
        }
    }
    console.finish();
    Ok(())
}

/// A file or folder that the configuration names, if it names one.
fn named(path: &str) -> Option<&Path> {
    (!path.is_empty()).then(|| Path::new(path))
}

/// Scores of the model as it is; none after a signal, which the loop sees next.
fn examined<B: Backend>(
    run: &mut Run<B>,
    model: &ModelFiles,
    examine: Examiner<'_, B>,
) -> Result<BTreeMap<String, f64>> {
    let scores = examine(Exam {
        decoder: run.trainer.decoder(),
        engine: &mut run.engine,
        pool: &run.pool,
        codec: &run.codec,
        tokenizer: &run.tokenizer,
        format: run.rules.format,
        eos: &model.eos,
        stop: &run.stop,
    });
    // What is done until the next step is not the device's waiting.
    run.engine.rest();
    match scores {
        Err(e) if e.kind() == Kind::Interrupted => Ok(BTreeMap::new()),
        scores => scores,
    }
}

/// Ends a run that collapses, where the configuration wants that.
fn on_alarm<B: Backend>(run: &Run<B>, dir: &RunDir, model: &ModelFiles, step: u64, lasting: u64) -> Result<()> {
    let from = match run.config.alarm.on_collapse {
        OnCollapse::Warn => return Ok(()),
        OnCollapse::Stop => {
            save(run, dir, model, step)?;
            step
        }
        OnCollapse::Rollback => {
            let healthy = step.saturating_sub(lasting);
            let (keep, go): (Vec<u64>, Vec<u64>) = dir.checkpoints().into_iter().partition(|s| *s <= healthy);
            // Without a healthy one, the oldest is the best there is.
            for old in go.iter().skip(usize::from(keep.is_empty())) {
                dir.delete(*old);
            }
            keep.last().or(go.first()).copied().unwrap_or(0)
        }
    };
    // Going on by itself would repeat the same steps: something has to change.
    Err(Error::failure(format!("the run collapses: an alarm has lasted for {lasting} steps at step {step}")).with_hint(
        format!(
            "see the alarms in metrics.jsonl; go on from step {from} with other settings: azr --resume {} --set \
             selfplay.gate.max_guess=0.7 --set alarm.on_collapse=\"warn\"",
            dir.root().display()
        ),
    ))
}

fn save<B: Backend>(run: &Run<B>, dir: &RunDir, model: &ModelFiles, step: u64) -> Result<()> {
    let (seen, alarms, warmth) = (run.seen.clone(), run.alarms.clone(), run.warmth.clone());
    let counters = Counters::new(step, run.trainer.num_updates(), seen, alarms, warmth);
    state::save(dir, &model.companions, &run.trainer, &run.buffers, &run.carried, &counters)
}

/// Seeds from the cache file that the configuration names, or fresh ones, which are then cached there.
fn seeds<B: Backend>(run: &mut Run<B>, console: &Console) -> Result<Buffers> {
    let cache = (!run.config.seeds.is_empty()).then(|| PathBuf::from(&run.config.seeds));
    if let Some(path) = cache.as_ref().filter(|p| p.exists()) {
        let buffers = state::read_tasks(path, run.config.selfplay.buffer_size)?;
        if TaskKind::ALL.iter().all(|kind| buffers.of(*kind).is_empty()) {
            return Err(Error::config(format!("{} holds no task", path.display()))
                .with_hint("delete it, and the run fills it with seeds of its own"));
        }
        return Ok(buffers);
    }
    if let Some(folder) = cache.as_ref().and_then(|p| p.parent()).filter(|p| !p.is_dir()) {
        return Err(Error::config(format!("seeds: there is no folder {}", folder.display()))
            .with_hint("seeds names a file to be written"));
    }
    let rules = Rules {
        parse: parse::Rules { seeding: true, ..run.rules.parse },
        num_probes: 0,
        straggler_tokens: 0,
        duplicates: Duplicates::Allow,
        ..run.rules.clone()
    };
    let nothing = Buffers::new(1);
    let mut cx = Context {
        decoder: run.trainer.decoder(),
        engine: &mut run.engine,
        pool: &run.pool,
        codec: &run.codec,
        rules: &rules,
        buffers: &nothing,
        stop: &run.stop,
    };
    let (selfplay, seed) = (&run.config.selfplay, run.config.seed);
    let buffers = seeding::seed(selfplay, seed, &mut cx, |shared, induction, wanted| {
        console.seeding(shared, induction, wanted);
    })?;
    if let Some(path) = cache {
        publish(&path, &state::task_lines(&buffers)?)?;
    }
    Ok(buffers)
}
