//! What every run proves before its first step: the trainer computes the log-probabilities that tokens are drawn with, bit
//! for bit, for these weights on this device.

use std::sync::Arc;

use crate::base::rng::{Purpose, Rng};
use crate::compute::ops::{Backend, HeadReport};
use crate::error::{Error, Result};
use crate::rollout::engine::{Completion, Engine, SampleRequest};
use crate::train::loss::{PolicyLoss, policy_sequence};
use crate::train::optim::Trainer;

/// Samples of one prompt, and tokens of each.
const SAMPLES: u64 = 2;
const TOKENS: usize = 6;
/// Tokens of the prompt: of more than one block of attention, and so many rows that products run as they do in training.
const PROMPT: usize = 300;

/// Draws a few tokens and trains on them with no advantage, which changes nothing.
///
/// # Errors
/// When a log-probability differs, or the device fails.
pub fn same_bits<B: Backend>(trainer: &mut Trainer<B>, engine: &mut Engine<B>, temperature: f64) -> Result<()> {
    let spec = trainer.decoder().spec();
    let (vocabulary, context) = (spec.vocab_size, spec.max_position_embeddings);
    let mut rng = Rng::new(1, Purpose::Test, 12, 0);
    let len = PROMPT.min(context.saturating_sub(TOKENS)).max(1);
    let prompt: Arc<[u32]> = (0..len).map(|_| rng.below(vocabulary) as u32).collect();
    for id in 0..SAMPLES {
        engine.submit(SampleRequest {
            id,
            prompt: prompt.clone(),
            max_new: TOKENS.min(context.saturating_sub(len)).max(1),
            stop: Arc::new([]),
            temperature: temperature as f32,
            top_p: 1.0,
            top_k: 0,
        })?;
    }
    let drawn = engine.finish(trainer.decoder())?;
    engine.rest();
    let loss = PolicyLoss { clip_low: 0.2, clip_high: 0.2, entropy_coef: 0.0, temperature: temperature as f32 };
    let seqs: Vec<_> =
        drawn.iter().map(|c| policy_sequence(&loss, &prompt, &c.tokens, &c.logprobs, 0.0, 0.0)).collect();
    let reports = trainer.accumulate(&seqs)?;
    trainer.clear_gradients()?;
    compare(&drawn, &reports)
}

fn compare(drawn: &[Completion], reports: &[Vec<HeadReport>]) -> Result<()> {
    for (completion, reports) in drawn.iter().zip(reports) {
        for (i, (drawn, trained)) in completion.logprobs.iter().zip(reports).enumerate() {
            if drawn.to_bits() != trained.logprob.to_bits() {
                return Err(Error::failure(format!(
                    "token {i} was drawn with log-probability {drawn} and trains with {}: this device does not compute \
                     the same bits twice",
                    trained.logprob
                ))
                .with_hint("azr selftest tells which operation it is"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::engine::Finish;

    #[test]
    fn one_bit_is_enough() {
        let logprob = -1.5f32;
        let drawn =
            [Completion { id: 0, tokens: vec![3], logprobs: vec![logprob], entropy: 0.0, finish: Finish::Length }];
        let report = |logprob| vec![vec![HeadReport { logprob, ..HeadReport::default() }]];
        assert!(compare(&drawn, &report(logprob)).is_ok());
        let error = compare(&drawn, &report(f32::from_bits(logprob.to_bits() + 1))).expect_err("other bits");
        assert!(error.hint().is_some_and(|h| h.contains("selftest")), "{error}");
    }
}
