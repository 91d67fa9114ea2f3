//! The trainer: gradient accumulation, clipping, AdamW, and the state that a resumed run needs.

use crate::compute::ops::{AdamW, Backend, HeadReport};
use crate::error::{Error, Result};
use crate::model::forward::Decoder;
use crate::train::backward::micro_batch;
use crate::train::loss::TrainSeq;
use crate::train::pack::micro_batches;

/// Constants of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimConfig {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, on matrices and vectors alike.
    pub weight_decay: f32,
    /// Largest global gradient norm; 0 does not clip.
    pub grad_clip: f32,
    /// Tokens of one micro-batch.
    pub micro_batch_tokens: usize,
}

/// A decoder that learns.
pub struct Trainer<B: Backend> {
    decoder: Decoder<B>,
    config: OptimConfig,
    grads: Vec<B::Buf>,
    first_moments: Vec<B::Buf>,
    second_moments: Vec<B::Buf>,
    step: u64,
}

impl<B: Backend> Trainer<B> {
    /// A trainer at step 0.
    pub fn new(decoder: Decoder<B>, config: OptimConfig) -> Self {
        let zeros = || decoder.table().tensors.iter().map(|t| decoder.backend().zeros(t.len())).collect();
        let (grads, first_moments, second_moments) = (zeros(), zeros(), zeros());
        Trainer { decoder, config, grads, first_moments, second_moments, step: 0 }
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder<B> {
        &self.decoder
    }

    /// Number of updates made.
    pub fn num_updates(&self) -> u64 {
        self.step
    }

    /// Adds the gradients of the sequences' losses. Returns each sequence's reports, one per target.
    ///
    /// # Errors
    /// When a sequence does not fit the model.
    pub fn accumulate(&mut self, seqs: &[TrainSeq]) -> Result<Vec<Vec<HeadReport>>> {
        let mut reports = Vec::with_capacity(seqs.len());
        for run in micro_batches(seqs, self.config.micro_batch_tokens) {
            let mut flat = micro_batch(&self.decoder, run, &mut self.grads)?.into_iter();
            reports.extend(run.iter().map(|s| flat.by_ref().take(s.targets.len()).collect()));
        }
        Ok(reports)
    }

    /// Global norm of the accumulated gradients.
    pub fn grad_norm(&self) -> f64 {
        let b = self.decoder.backend();
        b.scope(|| self.grads.iter().map(|g| b.sum_of_squares(g)).sum::<f64>()).sqrt()
    }

    /// One AdamW step on the accumulated gradients, which are then zero. Returns their norm before clipping. Gradients
    /// that are not finite change nothing.
    ///
    /// # Errors
    /// When the gradient norm is not finite.
    pub fn update(&mut self, learning_rate: f32) -> Result<f64> {
        let norm = self.grad_norm();
        let Trainer { decoder, config, grads, first_moments, second_moments, step } = self;
        if !norm.is_finite() {
            grads.iter_mut().for_each(|g| decoder.backend().clear(g));
            return Err(Error::failure(format!("the gradient norm is {norm}")).with_hint("lower train.learning_rate"));
        }
        *step += 1;
        let clip = f64::from(config.grad_clip);
        let grad_scale = if clip > 0.0 && norm > clip { (clip / (norm + 1e-6)) as f32 } else { 1.0 };
        let hyper = AdamW {
            learning_rate,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: config.weight_decay,
            step: *step,
            grad_scale,
        };
        decoder.update(|b, params| {
            for (i, p) in params.iter_mut().enumerate() {
                b.adamw(p, &grads[i], &mut first_moments[i], &mut second_moments[i], &hyper);
                b.clear(&mut grads[i]);
            }
        });
        Ok(norm)
    }

    /// Gradients by Hugging Face name: (name, shape, values).
    pub fn gradients(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        self.by_name("", &self.grads)
    }

    /// Gradients in the table's order.
    pub fn gradient_buffers(&self) -> &[B::Buf] {
        &self.grads
    }

    /// Sets the gradients to zero.
    pub fn clear_gradients(&mut self) {
        let b = self.decoder.backend();
        self.grads.iter_mut().for_each(|g| b.clear(g));
    }

    /// Weights by Hugging Face name.
    pub fn weights(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        self.by_name("", &self.decoder.params)
    }

    /// Optimiser state by name: `m.` and `v.` before the parameter's name.
    pub fn moments(&self) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut named = self.by_name("m.", &self.first_moments);
        named.extend(self.by_name("v.", &self.second_moments));
        named
    }

    /// Takes the optimiser state back in.
    ///
    /// # Errors
    /// What the source reports of a missing or misshapen tensor.
    pub fn restore(&mut self, step: u64, mut source: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>) -> Result<()> {
        for (prefix, state) in [("m.", &mut self.first_moments), ("v.", &mut self.second_moments)] {
            let values = self.decoder.table().read(|name, shape| source(&format!("{prefix}{name}"), shape))?;
            for (buf, values) in state.iter_mut().zip(values) {
                self.decoder.backend().write(buf, &values);
            }
        }
        self.step = step;
        Ok(())
    }

    fn by_name(&self, prefix: &str, bufs: &[B::Buf]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut named = Vec::new();
        for (tensor, buf) in self.decoder.table().tensors.iter().zip(bufs) {
            let values = self.decoder.backend().download(buf);
            for part in &tensor.parts {
                let values = values[part.offset..][..part.len()].to_vec();
                named.push((format!("{prefix}{}", part.name), part.shape.clone(), values));
            }
        }
        named
    }
}
