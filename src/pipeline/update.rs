//! From a finished round to one optimiser step: rewards, one baseline per configuration, packed sequences, update.
//!
//! Samples are gathered in the order of their ids before anything is summed.

use std::sync::Arc;

use crate::compute::ops::Backend;
use crate::error::Result;
use crate::pipeline::config::TrainConfig;
use crate::pipeline::generate::{Attempt, Proposal, Round};
use crate::rollout::engine::Completion;
use crate::selfplay::advantage::{Baseline, whiten, whiten_by_task};
use crate::selfplay::config::SelfPlayConfig;
use crate::selfplay::intrinsic::{Seen, terms};
use crate::selfplay::reward;
use crate::selfplay::task::{Config, Role};
use crate::train::loss::{PolicyLoss, TrainSeq, policy_sequence, token_weights};
use crate::train::optim::Trainer;

/// One trained sample: whose it is, what it earned, and how much better that is than its configuration's baseline.
#[derive(Debug, Clone)]
pub struct Sample<'a> {
    /// Id of the sequence.
    pub id: u64,
    /// Task type and role.
    pub config: Config,
    /// Prompt tokens.
    pub prompt: &'a Arc<[u32]>,
    /// What was sampled.
    pub completion: &'a Completion,
    /// Tokens at its start that were drawn with earlier weights.
    pub stale: usize,
    /// Whether it keeps to the format.
    pub format_ok: bool,
    /// Proposals: whether it became a task. Solutions: accuracy.
    pub accuracy: f64,
    /// Intrinsic reward terms.
    pub intrinsic: Vec<f64>,
    /// Reward of the response.
    pub reward: f64,
    /// Advantage of every response token.
    pub advantage: f64,
}

impl Sample<'_> {
    /// What the probes of one proposal have in common, or the answers to one task, and nothing else has: the id without
    /// their number.
    fn task(&self) -> u64 {
        self.id >> 8
    }
}

/// Trained samples of a round with rewards and advantages, configuration after configuration.
pub fn samples<'a>(round: &'a Round, seen: &Seen, config: &SelfPlayConfig) -> Vec<Sample<'a>> {
    let mut all = Vec::new();
    for which in Config::ALL {
        let mut group: Vec<Sample<'a>> = match which.role {
            Role::Propose if config.train_proposer => {
                round.proposals.iter().filter(|p| p.config == which).map(|p| proposed(p, seen, config)).collect()
            }
            Role::Propose => Vec::new(),
            Role::Solve => {
                let solves =
                    round.solves.iter().filter(|s| s.config == which && !s.misleading).map(|s| (&s.attempt, &s.prompt));
                let probes = round
                    .proposals
                    .iter()
                    .filter(|p| config.train_on_probes && p.config.kind == which.kind && p.task.is_some())
                    .flat_map(|p| p.probes.iter().zip(std::iter::repeat(&p.probe_prompt)))
                    .filter_map(|(attempt, prompt)| Some((attempt, prompt.as_ref()?)));
                solves.chain(probes).map(|(attempt, prompt)| solved(attempt, prompt, which)).collect()
            }
        };
        group.sort_by_key(|s| s.id);
        if config.baseline != Baseline::Global {
            compare(&mut group, config.baseline);
        }
        all.extend(group);
    }
    if config.baseline == Baseline::Global {
        compare(&mut all, config.baseline);
    }
    for sample in all.iter_mut().filter(|s| s.config.role == Role::Solve && s.advantage < 0.0) {
        sample.advantage *= config.negative_weight;
    }
    all
}

/// Gives samples their advantages over each other.
fn compare(group: &mut [Sample<'_>], baseline: Baseline) {
    let rewards: Vec<f64> = group.iter().map(|s| s.reward).collect();
    let advantages = if baseline == Baseline::Task {
        whiten_by_task(&rewards, &group.iter().map(Sample::task).collect::<Vec<_>>())
    } else {
        let lens: Vec<usize> = group.iter().map(|s| s.completion.tokens.len()).collect();
        whiten(&rewards, &lens, baseline)
    };
    for (sample, advantage) in group.iter_mut().zip(advantages) {
        sample.advantage = advantage;
    }
}

fn proposed<'a>(p: &'a Proposal, seen: &Seen, config: &SelfPlayConfig) -> Sample<'a> {
    let references: Vec<_> = p.references.iter().map(Arc::as_ref).collect();
    let intrinsic = p.task.as_ref().map_or_else(Vec::new, |t| terms(t, &references, seen, &config.intrinsic));
    let reward =
        reward::proposer(p.format_ok, p.success_rate(), config.propose_reward, &intrinsic, config.intrinsic.combine);
    Sample {
        id: p.id,
        config: p.config,
        prompt: &p.prompt,
        completion: p.completion.as_ref().expect("the round has ended"),
        stale: p.earlier.stale,
        format_ok: p.format_ok,
        accuracy: f64::from(u8::from(p.task.is_some())),
        intrinsic,
        reward: reward - p.hits.penalty,
        advantage: 0.0,
    }
}

fn solved<'a>(attempt: &'a Attempt, prompt: &'a Arc<[u32]>, config: Config) -> Sample<'a> {
    Sample {
        id: attempt.id,
        config,
        prompt,
        completion: attempt.completion.as_ref().expect("the round has ended"),
        stale: attempt.earlier.stale,
        format_ok: attempt.format_ok,
        accuracy: attempt.accuracy(),
        intrinsic: Vec::new(),
        reward: reward::solver(attempt.format_ok, attempt.accuracy()) - attempt.hits.penalty,
        advantage: 0.0,
    }
}

/// Numbers of one update.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct UpdateStats {
    /// Loss.
    pub loss: f64,
    /// Gradient norm before clipping. Where it is not finite, the weights are as they were.
    pub grad_norm: f64,
    /// Share of response tokens where the clip decided.
    pub clip_fraction: f64,
    /// Largest difference between log-probabilities at sampling and here, of tokens that these weights have drawn.
    pub logprob_gap: f64,
    /// Response tokens that earlier weights have drawn.
    pub stale_tokens: u64,
    /// Tokens that ran, prompts included.
    pub num_tokens: u64,
}

/// Samples that are the same in all that their gradients depend on.
pub(super) struct Merged<'a> {
    /// The first of them.
    pub sample: &'a Sample<'a>,
    /// How many there are.
    pub count: usize,
    /// Sum of their weights.
    pub weight: f32,
}

/// Runs siblings that say the same once, with the sum of their weights: many of the short answers to one task are alike.
pub(super) fn merge<'a>(samples: impl Iterator<Item = (&'a Sample<'a>, f32)>) -> Vec<Merged<'a>> {
    let mut kept: Vec<Merged<'a>> = Vec::new();
    for (s, weight) in samples {
        let of = |s: &Sample<'_>| (s.config, s.task());
        let mut siblings = kept.iter_mut().rev().take_while(|k| of(k.sample) == of(s));
        let alike = |k: &&mut Merged<'a>| {
            let (a, b) = (k.sample, s);
            (a.prompt, a.advantage, a.stale) == (b.prompt, b.advantage, b.stale)
                && (&a.completion.tokens, &a.completion.logprobs) == (&b.completion.tokens, &b.completion.logprobs)
        };
        match siblings.find(alike) {
            Some(same) => {
                same.count += 1;
                same.weight += weight;
            }
            None => kept.push(Merged { sample: s, count: 1, weight }),
        }
    }
    kept
}

/// One optimiser step on all samples; none where there are no samples.
///
/// # Errors
/// When the device fails.
pub fn update<B: Backend>(
    trainer: &mut Trainer<B>,
    samples: &[Sample<'_>],
    config: &TrainConfig,
    temperature: f64,
) -> Result<UpdateStats> {
    if samples.is_empty() {
        return Ok(UpdateStats::default());
    }
    let counts: Vec<usize> = samples.iter().map(|s| s.completion.tokens.len()).collect();
    let weights = token_weights(config.loss_aggregation, &counts);
    let loss = PolicyLoss {
        clip_low: config.clip_low as f32,
        clip_high: config.clip_high as f32,
        entropy_coef: config.entropy_coef as f32,
        temperature: temperature as f32,
    };
    // A sample without advantage and bonus has no gradient, and the step is the same without it.
    let teaches = |s: &Sample<'_>| s.advantage != 0.0 || config.entropy_coef != 0.0;
    let taught = samples.iter().zip(weights).filter(|(s, _)| teaches(s));
    let kept = merge(taught);
    let seqs: Vec<TrainSeq> = kept
        .iter()
        .map(|Merged { sample: s, weight, .. }| {
            let c = s.completion;
            policy_sequence(&loss, s.prompt, &c.tokens, &c.logprobs, s.advantage as f32, *weight)
        })
        .collect();
    let mut stats =
        UpdateStats { num_tokens: seqs.iter().map(|s| s.tokens.len() as u64).sum(), ..UpdateStats::default() };
    let reports = trainer.accumulate(&seqs)?;
    let (mut clipped, mut total) = (0usize, 0usize);
    for (Merged { sample, count, .. }, reports) in kept.iter().zip(&reports) {
        stats.stale_tokens += (sample.stale * count) as u64;
        for (i, (report, sampled)) in reports.iter().zip(&sample.completion.logprobs).enumerate() {
            stats.loss += f64::from(report.loss);
            if i >= sample.stale {
                stats.logprob_gap = stats.logprob_gap.max(f64::from((report.logprob - sampled).abs()));
            }
            clipped += usize::from(report.clipped) * count;
            total += count;
        }
    }
    stats.clip_fraction = clipped as f64 / total.max(1) as f64;
    stats.grad_norm = trainer.update(config.learning_rate as f32)?;
    Ok(stats)
}
