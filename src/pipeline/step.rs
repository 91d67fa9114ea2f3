//! One step of self-play, from prompts to update and records.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use azr_tokenizer::Tokenizer;

use crate::base::stop::StopFlag;
use crate::compute::ops::Backend;
use crate::error::{Error, Result};
use crate::exec::pool::Pool;
use crate::observe::records::{ConfigMetrics, StepMetrics, TraceRecord};
use crate::pipeline::carry::Carried;
use crate::pipeline::config::{Config as RunConfig, PromptFormat};
use crate::pipeline::generate::{Attempt, Context, DUPLICATE, Proposal, Round, Rules, sequence_id};
use crate::pipeline::inputs;
use crate::pipeline::prompts::Prompter;
use crate::pipeline::update::{Sample, UpdateStats, samples, update};
use crate::rollout::engine::{Completion, Engine, Finish};
use crate::selfplay::alarm::{Alarms, Vitals};
use crate::selfplay::buffer::{Answers, Buffers};
use crate::selfplay::codec::Codec;
use crate::selfplay::config::{Duplicates, SolverTasks};
use crate::selfplay::constraint::{Constraints, Hits};
use crate::selfplay::gate::MISLEADING;
use crate::selfplay::intrinsic::Seen;
use crate::selfplay::monitor::variety;
use crate::selfplay::parse;
use crate::selfplay::prompt::{self, Format, SPECIAL_TOKENS};
use crate::selfplay::task::{Config, Role, Task, TaskKind};
use crate::selfplay::warmth::Warmth;
use crate::train::optim::Trainer;
use crate::weights::model_files::ModelFiles;

/// Characters of a rejection by which it is counted.
const REASON_LEN: usize = 40;

/// A run in memory.
pub struct Run<B: Backend> {
    /// Settings.
    pub config: RunConfig,
    /// Model and optimiser.
    pub trainer: Trainer<B>,
    /// Rollout engine.
    pub engine: Engine<B>,
    /// Executors.
    pub pool: Pool,
    /// Text to tokens and back.
    pub codec: Codec,
    /// Tokenizer, for the trace.
    pub tokenizer: Arc<Tokenizer>,
    /// Rules of generation.
    pub rules: Rules,
    /// Validated tasks.
    pub buffers: Buffers,
    /// What the last step left to the next.
    pub carried: Carried,
    /// Answers seen so far.
    pub seen: Seen,
    /// Signs of a collapse so far.
    pub alarms: Alarms,
    /// The temperature so far.
    pub warmth: Warmth,
    /// Whether a step has begun to change all this and has not come to its end.
    pub is_updating: bool,
    /// Set by a signal.
    pub stop: StopFlag,
}

/// Prompt format of a run: as configured, or by what the tokenizer knows.
pub fn format(config: &RunConfig, tokenizer: &Tokenizer) -> Format {
    match config.prompt_format {
        PromptFormat::Azr => Format::Azr,
        PromptFormat::Compact => Format::Compact,
        PromptFormat::Auto if SPECIAL_TOKENS.iter().all(|t| tokenizer.token_id(t).is_some()) => Format::Compact,
        PromptFormat::Auto => Format::Azr,
    }
}

/// Rules of generation for a model, as far as the configuration itself has them: not what stands in files that it names.
pub fn rules(config: &RunConfig, model: &ModelFiles, format: Format, codec: &Codec) -> Rules {
    let stops = |which: Config| {
        let names = prompt::stops(format, which);
        let mut ids: Vec<u32> = codec.special_ids(&names).chain(model.eos.iter().copied()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.into()
    };
    Rules {
        format,
        parse: parse::Rules { function_rule: config.selfplay.function_rule, seeding: false },
        num_probes: config.selfplay.num_probes,
        temperature: config.rollout.temperature as f32,
        max_prompt: config.rollout.max_prompt,
        context: model.spec.max_position_embeddings,
        max_response: [config.rollout.max_propose, config.rollout.max_solve],
        straggler_tokens: config.rollout.straggler_tokens,
        stop_tokens: Config::ALL.map(stops).into(),
        duplicates: config.selfplay.duplicates,
        gate: config.selfplay.gate.clone(),
        edge_cases: Buffers::new(1),
        ground: Vec::new(),
        constraints: Constraints::default(),
        induction_reward: config.selfplay.induction_reward,
        check_shown: config.selfplay.check_shown,
    }
}

impl<B: Backend> Run<B> {
    /// Runs step number `step`, changes model and buffers, and returns what there is to report; completions only if `traced`.
    ///
    /// # Errors
    /// When a part fails, or on a stop signal before the update: then nothing has changed.
    pub fn step(&mut self, step: u64, traced: bool) -> Result<(StepMetrics, Vec<TraceRecord>)> {
        let start = Instant::now();
        let temperature = self.config.rollout.temperature * self.warmth.factor();
        self.rules.temperature = temperature as f32;
        let (mut round, carried, left_out) = self.generate(step)?;
        round.refuse_misleading(&self.config.selfplay.gate);
        self.refuse_repeats(&mut round);
        self.watch(&mut round)?;
        let samples = samples(&round, &self.seen, &self.config.selfplay);
        if samples.is_empty() && carried.is_empty() {
            return Err(Error::config(format!("step {step} has no sample to train on"))
                .with_hint("the model's context is too short for the prompts, or rollout.max_prompt is"));
        }
        self.engine.rest();
        let rollout_end = Instant::now();
        self.is_updating = true;
        let stats = update(&mut self.trainer, &samples, &self.config.train, temperature)?;
        let update_s = rollout_end.elapsed().as_secs_f64();
        let mut trace = if traced { self.trace(step, &round, &samples) } else { Vec::new() };
        let mut metrics = self.metrics(step, &round, &samples, stats);
        drop(samples);
        self.carried = carried;
        metrics.carried = self.carried.len();
        let gate = self.config.selfplay.gate.clone();
        for id in self.store(&round) {
            if let Ok(at) = trace.binary_search_by_key(&id, |r| r.id) {
                trace[at].note = Some(format!("gate: right in {} samplings running, no longer drawn", gate.too_easy));
            }
        }
        if gate.too_easy > 0 {
            let count = |k: &TaskKind| (k.name().to_owned(), self.buffers.of(*k).num_too_easy(&gate));
            metrics.too_easy = TaskKind::ALL.iter().map(count).collect();
        }
        metrics.buffers = TaskKind::ALL.iter().map(|k| (k.name().to_owned(), self.buffers.of(*k).len())).collect();
        metrics.prompts_left_out = left_out;
        let vitals = vitals(&metrics);
        let entropy = vitals.entropy;
        // Where samples take several steps, only short ones end in the first.
        let rollout = &self.config.rollout;
        let longest = rollout.max_propose.max(rollout.max_solve) as u64;
        let first_whole = longest.checked_div(rollout.straggler_tokens as u64).unwrap_or(0);
        if !metrics.configs.is_empty() && step > first_whole {
            metrics.alarms = self.alarms.observe(&vitals, self.config.alarm.patience);
        }
        metrics.alarms.extend(self.alarms.observe_hits(metrics.constraints.keys()));
        metrics.alarms.extend(self.alarms.observe_numbers(metrics.grad_norm, entropy)?);
        metrics.temperature = temperature;
        if !metrics.configs.is_empty() {
            self.warmth.observe(entropy, rollout.hold_entropy);
        }
        metrics.update_s = update_s;
        metrics.step_s = start.elapsed().as_secs_f64();
        metrics.device_idle_share = metrics.device_idle_s / metrics.step_s;
        metrics.tokens_per_s = metrics.sampled_tokens as f64 / metrics.step_s;
        metrics.steps_per_hour = 3600.0 / metrics.step_s;
        self.is_updating = false;
        Ok((metrics, trace))
    }

    /// Samples and grades all that the step needs. Returns what it leaves to the next and the prompts that did not fit, too.
    fn generate(&mut self, step: u64) -> Result<(Round, Carried, usize)> {
        let (count, num_probes) = (self.config.selfplay.batch_size, self.config.selfplay.num_probes);
        let prompter = Prompter {
            codec: &self.codec,
            rules: &self.rules,
            config: &self.config.selfplay,
            buffers: &self.buffers,
            seed: self.config.seed,
        };
        let mut cx = Context {
            decoder: self.trainer.decoder(),
            engine: &mut self.engine,
            pool: &self.pool,
            codec: &self.codec,
            rules: &self.rules,
            buffers: &self.buffers,
            stop: &self.stop,
        };
        let same_step = self.config.selfplay.solver_tasks == SolverTasks::SameStep;
        let first_of = |step| sequence_id(step, Config::ALL[0], 0, 0);
        // Solutions to a step's own tasks have the next step's ids, as they come after all that it has drawn.
        let solves_at = step + u64::from(same_step);
        // A step that fails, or that a signal stops, leaves what was carried as it is.
        let (mut round, mut left_out) = self.carried.clone().into_round(&self.rules, first_of(solves_at));
        let drawn_ahead = round.proposals.last().is_some_and(|p| p.id >= first_of(step));
        for kind in prompter.kinds() {
            if !drawn_ahead {
                left_out += prompter.proposals(&mut round, kind, step, count);
            }
            if !same_step {
                left_out += prompter.solves(&mut round, kind, solves_at, count);
            }
        }
        if self.config.rollout.max_lag > 0 {
            round.ahead_from = Some(first_of(step + 1));
            for kind in prompter.kinds() {
                left_out += prompter.proposals(&mut round, kind, step + 1, count);
            }
        }
        round.run(&mut cx)?;
        let mut carried = Carried::take(&mut round, num_probes);
        round.record_probes(step);
        if same_step {
            // The new tasks are pushed onto a copy of the buffers, from which `max_new` takes them first.
            let mut buffers = self.buffers.clone();
            round.proposals.iter().filter_map(|p| p.task.clone()).for_each(|t| buffers.push(t));
            let prompter = Prompter { buffers: &buffers, ..prompter };
            for kind in prompter.kinds() {
                left_out += prompter.solves(&mut round, kind, solves_at, count);
            }
            round.run(&mut cx)?;
            carried.extend(Carried::take(&mut round, num_probes));
        }
        Ok((round, carried, left_out))
    }

    /// Looks for hits of the constraints in every completion.
    fn watch(&self, round: &mut Round) -> Result<()> {
        let text = |c: &Completion| self.tokenizer.decode(&c.tokens, true);
        match &self.rules.constraints {
            Constraints::Patterns(patterns) if patterns.is_empty() => {}
            Constraints::Patterns(patterns) => {
                round.completions().for_each(|(completion, hits)| *hits = Hits::of(patterns, &text(completion)));
            }
            Constraints::Program { name, source } => {
                let texts: Vec<String> = round.completions().map(|(completion, _)| text(completion)).collect();
                let found = inputs::score(name, source, &texts, &self.pool)?;
                round.completions().zip(found).for_each(|((_, hits), found)| *hits = found);
            }
        }
        Ok(())
    }

    /// Refuses proposals that repeat an earlier one of the step, and carried ones that repeat what was stored since.
    fn refuse_repeats(&self, round: &mut Round) {
        if self.config.selfplay.duplicates != Duplicates::Refuse {
            return;
        }
        let mut known: HashSet<(TaskKind, String)> = HashSet::new();
        for p in &mut round.proposals {
            let stored = |t: &Task| p.earlier.stale > 0 && self.buffers.of(t.kind).has(t);
            if p.task.as_ref().is_some_and(|t| stored(t) || !known.insert((t.kind, t.likeness()))) {
                p.task = None;
                p.rejection = Some(DUPLICATE.to_owned());
            }
        }
    }

    /// Puts the step's tasks into the buffers, in the order of their ids, and the answers to tasks of the buffers into
    /// their records. Returns ids of proposals and answers by which a task became too easy to be drawn again.
    fn store(&mut self, round: &Round) -> Vec<u64> {
        let mut answers = Answers::new();
        let drawn = || round.solves.iter().filter(|s| s.is_recorded());
        for s in drawn() {
            let (tries, right) = answers.entry(Arc::as_ptr(&s.task)).or_default();
            *tries += 1;
            *right += u32::from(s.attempt.is_right());
        }
        let gate = &self.config.selfplay.gate;
        let mut last_drawn = Vec::new();
        for p in &round.proposals {
            if let (Some(task), Some(rate)) = (&p.task, p.success_rate()) {
                if self.config.selfplay.intrinsic.needs_counts() {
                    self.seen.add(task);
                }
                if self.config.selfplay.accept.accepts(rate) {
                    self.buffers.push(task.clone());
                    last_drawn.extend(gate.is_too_easy(&task.record).then_some(p.id));
                }
            }
        }
        for s in drawn() {
            let (mut record, (tries, right)) = (s.task.record, answers[&Arc::as_ptr(&s.task)]);
            record.observe(tries, right);
            let newly = gate.is_too_easy(&record) && !gate.is_too_easy(&s.task.record);
            last_drawn.extend(newly.then_some(s.attempt.id));
        }
        self.buffers.observe(&answers);
        last_drawn
    }

    fn metrics(&self, step: u64, round: &Round, samples: &[Sample<'_>], stats: UpdateStats) -> StepMetrics {
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            let (sum, n) = values.fold((0.0, 0), |(s, n), v| (s + v, n + 1));
            sum / f64::from(n.max(1))
        };
        let mut configs = BTreeMap::new();
        for which in Config::ALL {
            let group: Vec<&Sample<'_>> = samples.iter().filter(|s| s.config == which).collect();
            if group.is_empty() {
                continue;
            }
            let of = |value: &dyn Fn(&Sample<'_>) -> f64| mean(&mut group.iter().map(|s| value(s)));
            let flag = |b: bool| f64::from(u8::from(b));
            configs.insert(
                which.to_string(),
                ConfigMetrics {
                    num_samples: group.len(),
                    reward: of(&|s| s.reward),
                    format_ok: of(&|s| flag(s.format_ok)),
                    accuracy: of(&|s| s.accuracy),
                    response_tokens: of(&|s| s.completion.tokens.len() as f64),
                    entropy: of(&|s| s.completion.entropy),
                    truncated: of(&|s| flag(s.completion.finish == Finish::Length)),
                },
            );
        }
        let mut rejections = BTreeMap::new();
        for reason in round.proposals.iter().filter_map(|p| p.rejection.as_ref()) {
            *rejections.entry(reason.chars().take(REASON_LEN).collect::<String>()).or_insert(0) += 1;
        }
        let kinds = TaskKind::ALL.iter().filter(|k| round.proposals.iter().any(|p| p.config.kind == **k));
        let variety = kinds.map(|kind| {
            let tasks = round.proposals.iter().filter(|p| p.config.kind == *kind);
            let tasks: Vec<_> = tasks.filter_map(|p| Some((p.task.as_deref()?, p.success_rate()?))).collect();
            let found = variety(&tasks, self.config.selfplay.num_probes);
            (kind.name().to_owned(), serde_json::to_value(found).expect("plain data"))
        });
        let mut constraints = BTreeMap::new();
        let attempts = round.proposals.iter().flat_map(|p| &p.probes).chain(round.solves.iter().map(|s| &s.attempt));
        let hits = round.proposals.iter().map(|p| &p.hits).chain(attempts.map(|a| &a.hits));
        for name in hits.flat_map(|h| &h.names) {
            *constraints.entry(name.clone()).or_insert(0) += 1;
        }
        StepMetrics {
            step,
            edge_cases: round.solves.iter().filter(|s| s.edge_case && s.attempt.id & 0xff == 0).count(),
            configs,
            reward: mean(&mut samples.iter().map(|s| s.reward)),
            valid: mean(&mut round.proposals.iter().map(|p| f64::from(u8::from(p.task.is_some())))),
            variety: variety.collect(),
            rejections,
            constraints,
            num_probes: round.proposals.iter().map(|p| p.probes.len()).sum(),
            loss: stats.loss,
            grad_norm: stats.grad_norm,
            learning_rate: self.config.train.learning_rate,
            clip_fraction: stats.clip_fraction,
            logprob_gap: stats.logprob_gap,
            stale_tokens: stats.stale_tokens,
            sampled_tokens: round.stats.sampled_tokens,
            trained_tokens: stats.num_tokens,
            rollout_s: round.stats.model_s,
            executor_wait_s: round.stats.executor_wait_s,
            device_idle_s: round.stats.device_idle_s,
            num_programs: round.stats.num_requests,
            ..StepMetrics::default()
        }
    }

    fn trace(&self, step: u64, round: &Round, samples: &[Sample<'_>]) -> Vec<TraceRecord> {
        let text = |tokens: &[u32]| self.tokenizer.decode(tokens, true);
        let base = |id: u64, config: Config, completion: &Completion, hits: &Hits| {
            let trained = samples.iter().find(|s| s.id == id);
            TraceRecord {
                step,
                id,
                config: config.to_string(),
                completion: text(&completion.tokens),
                num_tokens: completion.tokens.len(),
                logprob: completion.logprobs.iter().map(|l| f64::from(*l)).sum(),
                constraints: hits.names.clone(),
                penalty: hits.penalty,
                intrinsic: trained.map(|s| s.intrinsic.clone()).unwrap_or_default(),
                reward: trained.map(|s| s.reward),
                advantage: trained.map(|s| s.advantage),
                ..TraceRecord::default()
            }
        };
        let judged = |attempt: &Attempt, config: Config, gold: Option<&str>| {
            let completion = attempt.completion.as_ref().expect("the round has ended");
            TraceRecord {
                format_ok: attempt.format_ok,
                verdict: attempt.grade.as_ref().map(|g| g.detail.clone()).unwrap_or_default(),
                gold: gold.map(str::to_owned),
                accuracy: Some(attempt.accuracy()),
                ..base(attempt.id, config, completion, &attempt.hits)
            }
        };
        let mut records = Vec::new();
        for p in &round.proposals {
            let completion = p.completion.as_ref().expect("the round has ended");
            records.push(TraceRecord {
                prompt: Some(text(&p.prompt)),
                format_ok: p.format_ok,
                verdict: p.rejection.clone().unwrap_or_else(|| "valid".to_owned()),
                gold: p.task.as_ref().map(|t| outputs(t)),
                success_rate: p.success_rate(),
                ..base(p.id, p.config, completion, &p.hits)
            });
            records.extend(self.probes(p, &judged, &text));
        }
        for s in &round.solves {
            let gold = outputs(&s.task);
            let record = judged(&s.attempt, s.config, Some(&gold));
            let note = s.misleading.then(|| MISLEADING.to_owned());
            records.push(TraceRecord { prompt: Some(text(&s.prompt)), edge_case: s.edge_case, note, ..record });
        }
        records.sort_by_key(|r| r.id);
        records
    }

    fn probes(
        &self,
        p: &Proposal,
        judged: &dyn Fn(&Attempt, Config, Option<&str>) -> TraceRecord,
        text: &dyn Fn(&[u32]) -> String,
    ) -> Vec<TraceRecord> {
        let config = Config { kind: p.config.kind, role: Role::Solve };
        let prompt = |first: bool| p.probe_prompt.as_ref().filter(|_| first).map(|t| text(t));
        let record = |(i, attempt): (usize, &Attempt)| TraceRecord {
            probe_of: Some(p.id),
            prompt: prompt(i == 0),
            ..judged(attempt, config, None)
        };
        p.probes.iter().enumerate().map(record).collect()
    }
}

/// A step's metrics as the alarms see them.
fn vitals(m: &StepMetrics) -> Vitals {
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
    // Types without a valid proposal have no variety, and lower the validity.
    let kinds = || m.variety.values().filter(|v| v["num_valid"].as_u64() > Some(0));
    let of = |name: &str| {
        if kinds().next().is_none() { 1.0 } else { mean(kinds().filter_map(|v| v[name].as_f64()).collect()) }
    };
    let (mut mixed, mut all) = (0, 0);
    for histogram in kinds().filter_map(|v| v["success_histogram"].as_array()) {
        let counts: Vec<u64> = histogram.iter().filter_map(serde_json::Value::as_u64).collect();
        all += counts.iter().sum::<u64>();
        mixed += counts.iter().skip(1).rev().skip(1).sum::<u64>();
    }
    let configs = || m.configs.values();
    Vitals {
        unique_programs: of("unique_programs"),
        unique_answers: of("unique_answers"),
        valid: m.valid,
        informative: if all == 0 { 1.0 } else { mixed as f64 / all as f64 },
        entropy: mean(configs().map(|c| c.entropy).collect()),
        response_tokens: mean(configs().map(|c| c.response_tokens).collect()),
    }
}

/// Outputs of a task, as one text.
fn outputs(task: &Task) -> String {
    task.pairs.iter().map(|p| p.output.as_str()).collect::<Vec<_>>().join("; ")
}
