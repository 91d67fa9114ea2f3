//! From a finished round to one optimiser step: rewards, one baseline per configuration, packed sequences, update.
//!
//! The samples are gathered in id order before anything is summed, so that the order in which work finished is gone.

use crate::compute::ops::Backend;
use crate::error::Result;
use crate::pipeline::generate::{Proposal, Round, Solve};
use crate::rollout::engine::Completion;
use crate::selfplay::advantage::{self, Baseline};
use crate::selfplay::config::SelfPlayConfig;
use crate::selfplay::reward;
use crate::selfplay::task::{Config, TaskKind};
use crate::train::loss::{PolicyLoss, TrainSeq};
use crate::train::optim::{StepStats, Trainer};

/// One trained sample: whose it is, what it earned, and how much better than its configuration's baseline.
#[derive(Debug, Clone)]
pub struct Sample<'a> {
    /// Id of the sequence.
    pub id: u64,
    /// Task type and role.
    pub config: Config,
    /// Prompt tokens.
    pub prompt: &'a [u32],
    /// What was sampled.
    pub completion: &'a Completion,
    /// Reward of the response.
    pub reward: f64,
    /// Advantage of every response token.
    pub advantage: f64,
}

/// Rewards and advantages of a round's trained samples, in id order.
pub fn samples<'a>(round: &'a Round, rewards: &Rewards, config: &SelfPlayConfig) -> Vec<Sample<'a>> {
    let mut samples: Vec<Sample<'a>> = Vec::new();
    for (proposal, reward) in round.proposals.iter().zip(&rewards.proposals) {
        if config.train_proposer {
            samples.extend(sample(proposal.id, proposal.config, &proposal.prompt, proposal.completion.as_ref(), *reward));
        }
    }
    samples
}
