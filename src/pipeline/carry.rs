//! What a step leaves to the next: samples that grew too long for it, and proposals drawn ahead.
//!
//! A proposal goes on as one with its probes, a solution by itself. They are trained in the step in which they end, with
//! the log-probabilities that they were drawn with; tokens of earlier steps are stale, and the clipped ratio of the loss
//! accounts for that. Which samples go on depends on their lengths alone, never on time.

use serde::{Deserialize, Serialize};

use crate::pipeline::generate::{Attempt, Earlier, Proposal, Round, Rules, Solve};
use crate::rollout::engine::Completion;
use crate::selfplay::task::{Config, Role};

/// Sequences between two steps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Carried {
    proposals: Vec<Proposal>,
    solves: Vec<Solve>,
}

impl Carried {
    /// Takes out of a round what has not ended in it.
    pub fn take(round: &mut Round, num_probes: usize) -> Self {
        let proposals = std::mem::take(&mut round.proposals);
        let solves = std::mem::take(&mut round.solves);
        let ahead: Vec<bool> = proposals.iter().map(|p| round.is_ahead(p)).collect();
        let mut carried = Carried::default();
        for (mut p, ahead) in proposals.into_iter().zip(ahead) {
            if p.has_ended(num_probes) && !ahead {
                round.proposals.push(p);
                continue;
            }
            age(&mut p.earlier, p.completion.as_ref());
            p.probes.iter_mut().for_each(age_attempt);
            carried.proposals.push(p);
        }
        for mut s in solves {
            if s.attempt.grade.is_some() {
                round.solves.push(s);
                continue;
            }
            age_attempt(&mut s.attempt);
            carried.solves.push(s);
        }
        carried
    }

    /// Adds what another part of the step has left.
    pub fn extend(&mut self, more: Carried) {
        self.proposals.extend(more.proposals);
        self.solves.extend(more.solves);
    }

    /// A round that goes on with these, and the number of those that had to be dropped because they no longer fit: after a
    /// resumption with shorter limits, or with solver tasks of another step, whose ids, from `first_solve` on, some have.
    pub fn into_round(self, rules: &Rules, first_solve: u64) -> (Round, usize) {
        let num_carried = self.len();
        let Carried { mut proposals, mut solves } = self;
        // What has ended must fit as it is; what has begun needs room for more.
        let fits = |config: Config, prompt: &[u32], earlier: &Earlier, whole: &Option<Completion>| {
            let least = match whole {
                Some(whole) => whole.tokens.len(),
                None => 1 + earlier.begun.as_ref().map_or(0, |c| c.tokens.len()),
            };
            rules.room(config, prompt.len()).is_some_and(|room| least <= room)
        };
        proposals.retain(|p| {
            let solver = Config { role: Role::Solve, ..p.config };
            let probes = || p.probe_prompt.iter().flat_map(|prompt| p.probes.iter().map(move |a| (prompt, a)));
            // Those drawn a step ahead are probed only now.
            let probed = p.probe_prompt.as_ref().is_none_or(|prompt| rules.room(solver, prompt.len()).is_some());
            fits(p.config, &p.prompt, &p.earlier, &p.completion)
                && probed
                && probes().all(|(prompt, a)| fits(solver, prompt, &a.earlier, &a.completion))
        });
        solves.retain(|Solve { config, prompt, attempt, .. }| {
            attempt.id < first_solve && fits(*config, prompt, &attempt.earlier, &attempt.completion)
        });
        let num_dropped = num_carried - proposals.len() - solves.len();
        (Round { proposals, solves, ..Round::default() }, num_dropped)
    }

    /// Number of proposals and solutions.
    pub fn len(&self) -> usize {
        self.proposals.len() + self.solves.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn age_attempt(attempt: &mut Attempt) {
    age(&mut attempt.earlier, attempt.completion.as_ref());
}

/// What has been drawn so far is stale from now on.
fn age(earlier: &mut Earlier, completion: Option<&Completion>) {
    earlier.stale = completion.or(earlier.begun.as_ref()).map_or(0, |c| c.tokens.len());
}
