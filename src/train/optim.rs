//! The trainer: gradient accumulation, clipping, AdamW, and the state that a resumed run needs.

use std::cell::RefCell;
use std::rc::Rc;

use crate::compute::ops::{AdamW, Backend, HeadReport, MomentPrecision};
use crate::error::Result;
use crate::model::forward::Decoder;
use crate::train::backward::micro_batch;
use crate::train::loss::TrainSeq;
use crate::train::pack::micro_batches;
use crate::weights::safetensors::Later;

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
    /// Factor of the learning rate for the norm before the head, the logits' scale.
    pub final_norm_rate: f32,
    /// Largest global gradient norm; 0 does not clip.
    pub grad_clip: f32,
    /// Tokens of one micro-batch.
    pub micro_batch_tokens: usize,
    /// How moments are kept.
    pub moments: MomentPrecision,
    /// Whether a layer's activations are computed again for its backward pass, instead of being kept.
    pub recompute: bool,
    /// Seed of the noise that rounds bf16 moments.
    pub seed: u64,
}

impl Default for OptimConfig {
    fn default() -> Self {
        OptimConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            final_norm_rate: 1.0,
            grad_clip: 1.0,
            micro_batch_tokens: 8192,
            moments: MomentPrecision::F32,
            recompute: false,
            seed: 1,
        }
    }
}

/// A tensor of a checkpoint: name, shape, values.
pub type Named = (String, Vec<usize>, Vec<f32>);

/// A decoder that learns.
pub struct Trainer<B: Backend> {
    decoder: Decoder<B>,
    config: OptimConfig,
    grads: Vec<B::Buf>,
    moments: Vec<B::Moments>,
    step: u64,
}

impl<B: Backend> Trainer<B> {
    /// A trainer at step 0.
    ///
    /// # Errors
    /// When gradients and moments do not fit.
    pub fn new(decoder: Decoder<B>, config: OptimConfig) -> Result<Self> {
        let (b, tensors) = (decoder.backend(), &decoder.table().tensors);
        let grads = tensors.iter().map(|t| b.zeros(t.len())).collect::<Result<_>>()?;
        let moments = tensors.iter().map(|t| b.moments(t.len(), config.moments)).collect::<Result<_>>()?;
        Ok(Trainer { decoder, config, grads, moments, step: 0 })
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
    /// When a sequence does not fit the model, or the device fails.
    pub fn accumulate(&mut self, seqs: &[TrainSeq]) -> Result<Vec<Vec<HeadReport>>> {
        // Reports are waited for only when all work has been handed to the device.
        let mut pending = Vec::new();
        for run in micro_batches(seqs, self.config.micro_batch_tokens) {
            pending.push((run, micro_batch(&self.decoder, run, &mut self.grads, self.config.recompute)?));
        }
        let mut reports = Vec::with_capacity(seqs.len());
        for (run, flat) in pending {
            let mut flat = self.decoder.backend().reports(flat)?.into_iter();
            reports.extend(run.iter().map(|s| flat.by_ref().take(s.targets.len()).collect()));
        }
        Ok(reports)
    }

    /// One AdamW step on the accumulated gradients, which are then zero. Returns their norm before clipping. Where that is
    /// not finite, there is no step: weights and moments are as they were.
    ///
    /// # Errors
    /// When the device fails.
    pub fn update(&mut self, learning_rate: f32) -> Result<f64> {
        let Trainer { decoder, config, grads, moments, step } = self;
        let hyper = AdamW {
            learning_rate,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: config.weight_decay,
            step: *step + 1,
            seed: config.seed,
            parameter: 0,
        };
        let clip = decoder.backend().clip(grads, config.grad_clip)?;
        let final_norm = decoder.table().norm;
        decoder.update(|b, params| {
            for (i, p) in params.iter_mut().enumerate() {
                let rate = if i == final_norm { config.final_norm_rate } else { 1.0 };
                let hyper = AdamW { parameter: i as u32, learning_rate: learning_rate * rate, ..hyper };
                b.adamw(p, &mut grads[i], &mut moments[i], &clip, &hyper)?;
            }
            Ok(())
        })?;
        let norm = decoder.backend().norm(&clip)?;
        *step += u64::from(norm.is_finite());
        Ok(norm)
    }

    /// Gradients by Hugging Face name: (name, shape, values).
    ///
    /// # Errors
    /// When the device fails.
    pub fn gradients(&self) -> Result<Vec<Named>> {
        read_all(self.by_name("", &self.grads, B::download))
    }

    /// Gradients in the table's order.
    pub fn gradient_buffers(&self) -> &[B::Buf] {
        &self.grads
    }

    /// Sets the gradients to zero.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear_gradients(&mut self) -> Result<()> {
        let b = self.decoder.backend();
        self.grads.iter_mut().try_for_each(|g| b.clear(g))
    }

    /// Weights by Hugging Face name.
    ///
    /// # Errors
    /// When the device fails.
    pub fn weights(&self) -> Result<Vec<Named>> {
        read_all(self.later_weights())
    }

    /// Optimiser state by name: `m.` and `v.` before the parameter's name.
    ///
    /// # Errors
    /// When the device fails.
    pub fn moments(&self) -> Result<Vec<Named>> {
        read_all(self.later_moments())
    }

    /// [`Trainer::weights`], one by one.
    pub fn later_weights(&self) -> Vec<Later<'_>> {
        self.by_name("", &self.decoder.params, B::master)
    }

    /// [`Trainer::moments`], one by one.
    pub fn later_moments(&self) -> Vec<Later<'_>> {
        let of = |which| move |b: &B, moments: &B::Moments| b.read_moments(moments, which);
        let (first, second) = (self.by_name("m.", &self.moments, of(0)), self.by_name("v.", &self.moments, of(1)));
        first.into_iter().chain(second).collect()
    }

    /// Takes the optimiser state back in.
    ///
    /// # Errors
    /// What the source reports of a missing or misshapen tensor.
    pub fn restore(&mut self, step: u64, mut source: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>) -> Result<()> {
        for (i, moments) in self.moments.iter_mut().enumerate() {
            let table = self.decoder.table();
            let mut read = |prefix| table.read(i, |name, shape| source(&format!("{prefix}{name}"), shape));
            let (m, v) = (read("m.")?, read("v.")?);
            self.decoder.backend().write_moments(moments, [&m, &v])?;
        }
        self.step = step;
        Ok(())
    }

    fn by_name<'a, T>(
        &'a self,
        prefix: &str,
        arrays: &'a [T],
        values: impl Fn(&B, &T) -> Result<Vec<f32>> + Copy + 'a,
    ) -> Vec<Later<'a>> {
        let mut named = Vec::new();
        // The array that was read last: its other parts often come next.
        let last = Rc::new(RefCell::new((usize::MAX, Vec::new())));
        for (i, (tensor, array)) in self.decoder.table().tensors.iter().zip(arrays).enumerate() {
            for part in &tensor.parts {
                let last = last.clone();
                let read = move || {
                    let mut last = last.borrow_mut();
                    if last.0 != i {
                        *last = (usize::MAX, Vec::new());
                        *last = (i, values(self.decoder.backend(), array)?);
                    }
                    Ok(last.1[part.offset..][..part.len()].to_vec())
                };
                named.push(Later {
                    name: format!("{prefix}{}", part.name),
                    shape: part.shape.clone(),
                    read: Box::new(read),
                });
            }
        }
        named
    }
}

fn read_all(tensors: Vec<Later<'_>>) -> Result<Vec<Named>> {
    tensors.into_iter().map(|t| Ok((t.name, t.shape, (t.read)()?))).collect()
}
