//! The rollout engine: the scheduler's plans, run on a decoder.
//!
//! Where the device has seats, a step launches its rows and then takes in what the step before has drawn: the device
//! always has work, and a sample's end becomes known a step late. Elsewhere, and for samples with more stop tokens than a
//! seat knows, a step waits for its own draws. Both give the same bits.

use std::time::Instant;

use crate::compute::ops::{Backend, PAGE};
use crate::error::Result;
use crate::model::forward::{Decoder, Seats, SeqRows};
pub use crate::rollout::scheduler::{Completion, Finish, SampleRequest};
use crate::rollout::scheduler::{Flight, Limits, Plan, Row, Scheduler};

/// Seats are made for sequences of a multiple of so many tokens, lest they be made again for every longer one.
const SEAT_TOKENS: usize = 1024;

/// Continuous batching on a device.
pub struct Engine<B: Backend> {
    scheduler: Scheduler,
    kv: Option<B::Kv>,
    seats: Option<Seated<B>>,
    limits: Limits,
    seed: u64,
    waited_s: f64,
    device_idle_s: f64,
}

/// Seats, what most tokens they are for, and the step on its way.
struct Seated<B: Backend> {
    seats: Seats<B>,
    max_tokens: usize,
    flight: Option<Flight>,
}

impl<B: Backend> Engine<B> {
    /// An idle engine for decoders of this one's shape.
    ///
    /// # Errors
    /// When the KV cache does not fit.
    pub fn new(decoder: &Decoder<B>, limits: Limits, seed: u64) -> Result<Self> {
        // Room is taken at once, so that what does not fit is known before any work.
        let kv = Some(decoder.new_kv(limits.num_pages)?);
        Ok(Engine {
            scheduler: Scheduler::new(limits),
            kv,
            seats: None,
            limits,
            seed,
            waited_s: 0.0,
            device_idle_s: 0.0,
        })
    }

    /// Limits for sequences of at most `max_tokens`: `max_running` at once, in the pages that these can need.
    pub fn limits(max_running: usize, max_tokens: usize, kv_tokens: usize) -> Limits {
        let longest = max_tokens.div_ceil(PAGE) + 1;
        let num_pages = if kv_tokens > 0 { (kv_tokens / PAGE).max(longest) } else { longest * max_running };
        Limits { max_running, max_rows: B::MAX_ROWS, num_pages }
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
        self.seats = None;
    }

    /// Number of samples that are being drawn.
    pub fn num_running(&self) -> usize {
        self.scheduler.num_running()
    }

    /// Seconds that the host has waited for draws of seats: in the rest of its steps it worked.
    pub fn waited_s(&self) -> f64 {
        self.waited_s
    }

    /// Seconds in which the device waited for the host between steps of seats, as far as draws have been taken in. What
    /// training does between steps is not among them.
    pub fn device_idle_s(&self) -> f64 {
        self.device_idle_s
    }

    /// Gives an idle engine's memory back, for training to use, until the next step.
    pub fn rest(&mut self) {
        if self.is_idle() {
            // Graphs know where the cache lies.
            self.seats = None;
            self.kv = None;
        }
    }

    /// One forward pass over the batch. Returns samples that ended, in this step or the one before.
    ///
    /// # Errors
    /// When a token or position does not fit the model.
    pub fn step(&mut self, decoder: &Decoder<B>) -> Result<Vec<Completion>> {
        let mut ended = Vec::new();
        if self.scheduler.all_usual() && self.have_seats(decoder, &mut ended)? {
            self.step_seats(decoder, &mut ended)?;
            return Ok(ended);
        }
        self.land(decoder, &mut ended)?;
        self.scheduler.unseat();
        if !self.is_idle() {
            ended.extend(self.step_rows(decoder)?);
        }
        Ok(ended)
    }

    /// Takes in the draws of the step on its way.
    fn land(&mut self, decoder: &Decoder<B>, ended: &mut Vec<Completion>) -> Result<()> {
        let Some(seated) = &mut self.seats else { return Ok(()) };
        let Some(flight) = seated.flight.take() else { return Ok(()) };
        let count = flight.last().map_or(0, |(seat, _)| seat + 1);
        let start = Instant::now();
        let (drawn, idle_s) = decoder.seats_drew(&mut seated.seats, count)?;
        self.device_idle_s += idle_s;
        self.waited_s += start.elapsed().as_secs_f64();
        ended.extend(self.scheduler.landed(&flight, |seat| drawn[seat]));
        Ok(())
    }

    /// Makes seats for the samples' lengths where the device has any.
    fn have_seats(&mut self, decoder: &Decoder<B>, ended: &mut Vec<Completion>) -> Result<bool> {
        if self.seats.as_ref().is_some_and(|s| s.max_tokens >= self.scheduler.longest()) {
            return Ok(true);
        }
        self.land(decoder, ended)?;
        self.scheduler.unseat();
        self.seats = None;
        // The larger first: seats must not lie where only the cache would fit.
        self.have_kv(decoder)?;
        let max_tokens = self.scheduler.longest().next_multiple_of(SEAT_TOKENS);
        let seats = decoder.seats(self.limits.max_running, max_tokens)?;
        self.seats = seats.map(|seats| Seated { seats, max_tokens, flight: None });
        Ok(self.seats.is_some())
    }

    fn step_seats(&mut self, decoder: &Decoder<B>, ended: &mut Vec<Completion>) -> Result<()> {
        if self.scheduler.is_sparse() {
            self.land(decoder, ended)?;
            self.scheduler.close_up();
        }
        if let Some(seated) = &mut self.seats {
            decoder.begin_seats(&mut seated.seats)?;
        }
        let plan = self.plan(decoder)?;
        let (scheduler, Some(kv), Some(seated)) = (&mut self.scheduler, &mut self.kv, &mut self.seats) else {
            unreachable!("both are made before")
        };
        let prompts = plan.rows.iter().filter(|row| matches!(row, Row::Prefill { .. }));
        let rows: Vec<SeqRows<'_>> = prompts.map(|row| seq_rows(scheduler, *row)).collect();
        decoder.fill(kv, &rows)?;
        let new = scheduler.new_seats();
        if !new.is_empty() {
            let new: Vec<_> = new.into_iter().map(|seat| scheduler.seat(seat)).collect();
            decoder.take_seats(&mut seated.seats, &new, &scheduler.prefixes())?;
        }
        let (count, longest) = scheduler.extent(&plan);
        if count > 0 {
            decoder.step_seats(kv, &mut seated.seats, count, longest, self.seed)?;
        }
        let flight = scheduler.launched(&plan);
        self.land(decoder, ended)?;
        if let Some(seated) = &mut self.seats {
            seated.flight = (count > 0).then_some(flight);
        }
        // Nobody steps an idle engine: what is on its way, for samples that have ended, would be taken for a later one's.
        if self.is_idle() {
            self.land(decoder, ended)?;
        }
        Ok(())
    }

    /// The next step, its pages copied.
    fn plan(&mut self, decoder: &Decoder<B>) -> Result<Plan> {
        let plan = self.scheduler.plan();
        decoder.copy_pages(self.have_kv(decoder)?, &plan.copies)?;
        Ok(plan)
    }

    fn have_kv(&mut self, decoder: &Decoder<B>) -> Result<&mut B::Kv> {
        Ok(match &mut self.kv {
            Some(kv) => kv,
            none => none.insert(decoder.new_kv(self.limits.num_pages)?),
        })
    }

    /// A step whose draws are waited for.
    fn step_rows(&mut self, decoder: &Decoder<B>) -> Result<Vec<Completion>> {
        let plan = self.plan(decoder)?;
        let kv = self.kv.as_mut().expect("made by the plan");
        let rows: Vec<SeqRows<'_>> = plan.rows.iter().map(|row| seq_rows(&self.scheduler, *row)).collect();
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

fn seq_rows(scheduler: &Scheduler, row: Row) -> SeqRows<'_> {
    let (tokens, pos0, pages, draw) = scheduler.row(row);
    SeqRows { tokens, pos0, pages, draw }
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
