//! A step's prompts, drawn from the buffers. Every draw has a random stream of its own: (seed, step, sequence).

use std::sync::Arc;

use crate::base::rng::{Purpose, Rng};
use crate::exec::source::rename;
use crate::pipeline::generate::{Round, Rules, Shown, sequence_id};
use crate::selfplay::buffer::{Buffers, TaskSampling};
use crate::selfplay::codec::Codec;
use crate::selfplay::config::SelfPlayConfig;
use crate::selfplay::gate::GateConfig;
use crate::selfplay::prompt::{self, Format};
use crate::selfplay::task::{Config, Role, Task, TaskKind};

/// What prompts are made from.
pub struct Prompter<'a> {
    /// Text to tokens.
    pub codec: &'a Codec,
    /// Format and limits.
    pub rules: &'a Rules,
    /// The algorithm's settings.
    pub config: &'a SelfPlayConfig,
    /// Validated tasks.
    pub buffers: &'a Buffers,
    /// Seed of the run.
    pub seed: u64,
}

impl Prompter<'_> {
    /// Task types of this run, in the order of a step.
    pub fn kinds(&self) -> impl Iterator<Item = TaskKind> {
        let error = self.config.error_task;
        TaskKind::ALL.into_iter().filter(move |k| error || *k != TaskKind::Error)
    }

    fn rng(&self, step: u64, config: Config, index: usize) -> Rng {
        Rng::new(self.seed, Purpose::Prompt, step, (config.index() * (1 << 16) + index) as u32)
    }

    /// Adds `count` proposals of a type. Prompts that are too long lose references; returns how many had to be left out
    /// because not even a bare one fits.
    pub fn proposals(&self, round: &mut Round, kind: TaskKind, step: u64, count: usize) -> usize {
        let config = Config { kind, role: Role::Propose };
        let mut left_out = 0;
        for index in 0..count {
            let mut rng = self.rng(step, config, index);
            let mut shown = self.shown(kind, step, &mut rng);
            let prompt = loop {
                let references: Vec<&Task> = shown.references.iter().map(Arc::as_ref).collect();
                let pieces = prompt::proposer(self.rules.format, kind, &references, &shown.composites);
                let tokens = self.codec.encode(&pieces);
                let must_keep = usize::from(kind == TaskKind::Induction);
                if self.rules.room(config, tokens.len()).is_some() {
                    break Some(tokens);
                } else if shown.references.len() > must_keep {
                    drop_longest(&mut shown.references, !self.rules.ground.is_empty());
                } else {
                    break None;
                }
            };
            match prompt {
                Some(tokens) => round.propose(sequence_id(step, config, index, 0), config, shown, tokens.into()),
                None => left_out += 1,
            }
        }
        left_out
    }

    fn shown(&self, kind: TaskKind, step: u64, rng: &mut Rng) -> Shown {
        if kind == TaskKind::Induction {
            let source = self.buffers.induction_source(rng, self.config.reference_sampling);
            return Shown { references: source.into_iter().collect(), composites: Vec::new() };
        }
        let buffer = self.buffers.of(kind);
        let mut references = buffer.references(rng, self.config.num_references, self.config.reference_sampling);
        let composites = self.composites(kind, step, rng);
        if !self.rules.ground.is_empty() {
            // First, so that it is the last to go from a prompt that is too long. By chance, as likeness to the references
            // would narrow what proposals are about.
            references.insert(0, rng.choose(&self.rules.ground).clone());
        }
        Shown { references, composites }
    }

    /// Definitions of `g_0`, `g_1`, ... from simple programs of the buffer; none unless this prompt is to compose.
    fn composites(&self, kind: TaskKind, step: u64, rng: &mut Rng) -> Vec<String> {
        let config = &self.config.composite;
        let off = config.chance == 0.0 || step < config.start_step || self.rules.format == Format::Compact;
        if off || rng.unit() >= config.chance {
            return Vec::new();
        }
        let simple: Vec<&Arc<Task>> =
            self.buffers.of(kind).iter().filter(|t| t.num_composites == 0 && is_one_function(&t.program)).collect();
        let count = (1 + rng.below(config.max_functions.max(1))).min(simple.len());
        let picked = rng.distinct(simple.len(), count);
        picked
            .into_iter()
            .enumerate()
            .filter_map(|(i, at)| rename(&simple[at].program, "f", &format!("g_{i}")))
            .collect()
    }

    /// Adds `count` solver tasks of a type, curated ones at their share (a fraction of a task by chance); tasks whose prompt is too long are left out, and counted.
    pub fn solves(&self, round: &mut Round, kind: TaskKind, step: u64, count: usize) -> usize {
        let config = Config { kind, role: Role::Solve };
        let mut rng = self.rng(step, config, 0);
        let curated = self.rules.edge_cases.of(kind);
        let share = if curated.is_empty() { 0.0 } else { self.config.edge_share * count as f64 };
        let num_curated = if share > 0.0 { share as usize + usize::from(rng.unit() < share.fract()) } else { 0 };
        let (sampling, gate) = (self.config.task_sampling, &self.config.gate);
        let own = self.buffers.of(kind).solver_tasks(&mut rng, count - num_curated, sampling, step, gate);
        let curated = curated.solver_tasks(&mut rng, num_curated, TaskSampling::Uniform, step, &GateConfig::default());
        let tasks = own.into_iter().map(|t| (t, false)).chain(curated.into_iter().map(|t| (t, true)));
        let mut left_out = 0;
        for (index, (task, edge_case)) in tasks.enumerate() {
            let tokens = self.codec.encode(&prompt::solver(self.rules.format, &task));
            if self.rules.room(config, tokens.len()).is_some() {
                let prompt: Arc<[u32]> = tokens.into();
                for answer in 0..self.config.num_answers {
                    let id = sequence_id(step, config, index, answer);
                    round.solve(id, config, task.clone(), edge_case, prompt.clone());
                }
            } else {
                left_out += 1;
            }
        }
        left_out
    }
}

/// Drops the longest reference: one that is too long by itself must not cost all others. The first, where it is to stay, goes
/// last.
fn drop_longest(references: &mut Vec<Arc<Task>>, first_stays: bool) {
    let len = |t: &Task| t.program.len() + t.pairs.iter().map(|p| p.input.len() + p.output.len()).sum::<usize>();
    let from = usize::from(first_stays && references.len() > 1);
    if let Some(longest) = (from..references.len()).max_by_key(|i| len(&references[*i])) {
        references.remove(longest);
    }
}

/// Whether the program defines its `f` and no other function, so that renaming `f` leaves nothing to clash.
fn is_one_function(program: &str) -> bool {
    program.lines().filter(|l| l.starts_with("def ") || l.starts_with("class ")).count() == 1
}
