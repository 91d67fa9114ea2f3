//! The rollout engine: the scheduler's plans, run on a decoder.

use crate::compute::ops::{Backend, PAGE};
use crate::error::Result;
use crate::model::forward::{Decoder, SeqRows};
pub use crate::rollout::scheduler::{Completion, Finish, SampleRequest};
use crate::rollout::scheduler::{Limits, Scheduler};

/// Continuous batching on a device.
pub struct Engine<B: Backend> {
    scheduler: Scheduler,
    kv: Option<B::Kv>,
    num_pages: usize,
    seed: u64,
}

impl<B: Backend> Engine<B> {
    /// An idle engine for decoders of this one's shape.
    ///
    /// # Errors
    /// When the KV cache does not fit.
    pub fn new(decoder: &Decoder<B>, limits: Limits, seed: u64) -> Result<Self> {
        // Room is taken at once, so that what does not fit is known before any work.
        let kv = Some(decoder.new_kv(limits.num_pages)?);
        Ok(Engine { scheduler: Scheduler::new(limits), kv, num_pages: limits.num_pages, seed })
    }

    /// Limits for sequences of at most `max_tokens`: `max_running` at once, in the pages that these can need.
    pub fn limits(max_running: usize, max_tokens: usize, kv_tokens: usize) -> Limits {
        let longest = max_tokens.div_ceil(PAGE) + 1;
        let num_pages = if kv_tokens > 0 { (kv_tokens / PAGE).max(longest) } else { longest * max_running };
        Limits { max_running, max_rows: 1024, num_pages }
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// When it could never fit.
    pub fn submit(&mut self, request: SampleRequest) -> Result<()> {
        self.scheduler.submit(request)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.scheduler.clear();
    }

    /// Gives an idle engine's memory back, for training to use, until the next step.
    pub fn rest(&mut self) {
        if self.is_idle() {
            self.kv = None;
        }
    }

    /// One forward pass over the batch. Returns the samples that ended.
    ///
    /// # Errors
    /// When a token or position does not fit the model.
    pub fn step(&mut self, decoder: &Decoder<B>) -> Result<Vec<Completion>> {
        let plan = self.scheduler.plan();
        let kv = match &mut self.kv {
            Some(kv) => kv,
            none => none.insert(decoder.new_kv(self.num_pages)?),
        };
        for (from, to) in &plan.copies {
            decoder.copy_page(kv, *from, *to)?;
        }
        let rows: Vec<SeqRows<'_>> = plan
            .rows
            .iter()
            .map(|row| {
                let (tokens, pos0, pages, draw) = self.scheduler.row(*row);
                SeqRows { tokens, pos0, pages, draw }
            })
            .collect();
        let drawn = decoder.step(kv, &rows, self.seed)?;
        Ok(self.scheduler.apply(&plan, &drawn))
    }

    /// Runs all that was submitted to its end; completions in the order of their ids.
    ///
    /// # Errors
    /// When a token or position does not fit the model.
    pub fn finish(&mut self, decoder: &Decoder<B>) -> Result<Vec<Completion>> {
        let mut all = Vec::new();
        while !self.is_idle() {
            all.extend(self.step(decoder)?);
        }
        all.sort_by_key(|c| c.id);
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::{Purpose, Rng};
    use crate::compute::cpu::backend::CpuBackend;
    use crate::model::params::ParamTable;
    use crate::weights::spec::{Family, ModelSpec};
    use std::sync::Arc;

    fn decoder(family: Family, threads: usize) -> Decoder<CpuBackend> {
        let spec = ModelSpec {
            family,
            vocab_size: 50,
            hidden_size: 32,
            intermediate_size: 48,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 8,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_word_embeddings: false,
            max_position_embeddings: 128,
        };
        let weights: Vec<Vec<f32>> = ParamTable::new(&spec)
            .init(&spec, 5)
            .into_iter()
            .map(|w| w.into_iter().map(|x| if x == 1.0 { x } else { 3.0 * x }).collect())
            .collect();
        Decoder::new(CpuBackend::new(threads).expect("threads"), spec, &weights, false).expect("it fits")
    }

    fn requests(rng: &mut Rng) -> Vec<SampleRequest> {
        let mut all = Vec::new();
        for group in 0..6u64 {
            let prompt: Arc<[u32]> = (0..1 + rng.below(45)).map(|_| rng.below(50) as u32).collect();
            for member in 0..1 + rng.below(4) as u64 {
                all.push(SampleRequest {
                    id: group << 8 | member,
                    prompt: prompt.clone(),
                    max_new: 1 + rng.below(30),
                    stop: Arc::new([7, 8]),
                    temperature: if rng.below(4) == 0 { 0.0 } else { 1.0 },
                    top_p: 1.0,
                    top_k: 0,
                });
            }
        }
        all
    }

    #[test]
    fn company_order_and_threads_change_no_bit() {
        for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
            let mut rng = Rng::new(8, Purpose::Test, family as u64, 0);
            let mut all = requests(&mut rng);
            let alone: Vec<Completion> = {
                let decoder = decoder(family, 1);
                let run = |r: &SampleRequest| {
                    let mut engine = Engine::new(&decoder, Engine::<CpuBackend>::limits(1, 80, 0), 9).expect("room");
                    engine.submit(r.clone()).expect("fits");
                    engine.finish(&decoder).expect("runs").remove(0)
                };
                all.iter().map(run).collect()
            };
            for (threads, max_running, max_rows) in [(1, 3, 4), (2, 64, 1024), (3, 5, 17)] {
                rng.shuffle(&mut all);
                let decoder = decoder(family, threads);
                let limits = Limits { max_rows, ..Engine::<CpuBackend>::limits(max_running, 80, 0) };
                let mut engine = Engine::new(&decoder, limits, 9).expect("room");
                all.iter().for_each(|r| engine.submit(r.clone()).expect("fits"));
                let together = engine.finish(&decoder).expect("runs");
                let mut alone = alone.clone();
                alone.sort_by_key(|c| c.id);
                assert_eq!(together, alone, "{family:?} with {threads} threads");
            }
        }
    }
}
