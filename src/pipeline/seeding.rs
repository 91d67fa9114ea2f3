//! Seeding: the buffers grow from the identity task by proposals of the untrained model, without updates.
//!
//! One pool of seeds serves abduction and deduction, without exact duplicates, cleaned of comments and of top-level
//! statements other than imports and definitions. Induction seeds are written over those. Ids of seeding passes use
//! steps from the top half of the 32-bit range, so that no draw is shared with training.

use std::collections::HashSet;
use std::sync::Arc;

use crate::compute::ops::Backend;
use crate::error::Result;
use crate::pipeline::generate::{Context, Round};
use crate::pipeline::prompts::Prompter;
use crate::selfplay::buffer::Buffers;
use crate::selfplay::config::SelfPlayConfig;
use crate::selfplay::task::{Task, TaskKind};

/// First step number of seeding passes.
const FIRST_PASS: u64 = 1 << 31;

/// Seeds per buffer that are wanted.
pub fn target(config: &SelfPlayConfig) -> usize {
    config.batch_size * config.seed_factor
}

/// Buffers with seeds: as many as wanted, or as many as came about in the allowed passes. `report` gets the numbers of
/// seeds so far: shared by abduction and deduction, and of induction.
///
/// # Errors
/// When sampling or the executor fails, or on a stop signal.
pub fn seed<B: Backend>(
    config: &SelfPlayConfig,
    run_seed: u64,
    cx: &mut Context<'_, B>,
    mut report: impl FnMut(usize, usize, usize),
) -> Result<Buffers> {
    let wanted = target(config);
    let mut seeds: Vec<Task> = vec![Task::identity(TaskKind::Deduction)];
    let mut known: HashSet<(String, String)> = seeds.iter().map(key).collect();
    let mut pass = FIRST_PASS;
    let last_pass = |from: u64| from + config.max_seed_passes;
    let end = last_pass(pass);
    while seeds.len() < wanted && pass < end {
        // References come from one and the same pool of seeds.
        let mut buffers = Buffers::new(config.buffer_size);
        for kind in [TaskKind::Abduction, TaskKind::Deduction] {
            seeds.iter().for_each(|s| buffers.push(of_kind(s, kind)));
        }
        let mut round = Round::default();
        let prompter = Prompter { codec: cx.codec, rules: cx.rules, config, buffers: &buffers, seed: run_seed };
        for kind in [TaskKind::Abduction, TaskKind::Deduction] {
            prompter.proposals(&mut round, kind, pass, config.batch_size);
        }
        round.run(cx)?;
        for task in round.proposals.iter().filter_map(|p| p.task.as_deref()) {
            if known.insert(key(task)) {
                seeds.push(task.clone());
            }
        }
        pass += 1;
        report(seeds.len().min(wanted), 0, wanted);
    }
    seeds.truncate(wanted);
    let mut buffers = Buffers::new(config.buffer_size);
    for kind in [TaskKind::Abduction, TaskKind::Deduction] {
        seeds.iter().for_each(|s| buffers.push(of_kind(s, kind)));
    }
    if config.error_task {
        buffers.push(Arc::new(Task::identity(TaskKind::Error)));
    }
    buffers.push(Arc::new(Task::identity(TaskKind::Induction)));
    let mut num_induction = 1;
    let end = last_pass(pass);
    while num_induction < wanted && pass < end {
        let mut round = Round::default();
        let prompter = Prompter { codec: cx.codec, rules: cx.rules, config, buffers: &buffers, seed: run_seed };
        prompter.proposals(&mut round, TaskKind::Induction, pass, config.batch_size);
        round.run(cx)?;
        for task in round.proposals.iter().filter_map(|p| p.task.as_deref()).take(wanted - num_induction) {
            buffers.push(of_kind(task, TaskKind::Induction));
            num_induction += 1;
        }
        pass += 1;
        report(seeds.len(), num_induction, wanted);
    }
    Ok(buffers)
}

fn key(task: &Task) -> (String, String) {
    (task.program.clone(), task.input().to_owned())
}

fn of_kind(task: &Task, kind: TaskKind) -> Arc<Task> {
    Arc::new(Task { kind, step: 0, ..task.clone() })
}
