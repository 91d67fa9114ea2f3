//! `azr bench`: decoding, training and whole steps of a model with random weights, each beside the roofline of this
//! machine, whose bandwidth and rate of products are measured in the same run. Nothing is timed on zeros.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::base::rng::{Purpose, Rng};
use crate::base::run_dir::publish;
use crate::cli::args::{BenchArgs, BenchPart, BenchWorkload};
use crate::cli::bench_report::{compare, table};
use crate::cli::exec_bench;
use crate::cli::output::print;
use crate::cli::plan;
use crate::cli::train::gpu;
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::ops::{Backend, HeadLoss, MomentPrecision, Weight};
use crate::error::{Error, Result};
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::model::plan::{Gpu, PAPER, StepShape, decode_s, training_flops};
use crate::pipeline::config::{ExecutorConfig, cores};
use crate::pipeline::proof::same_bits;
use crate::rollout::engine::{Engine, SampleRequest};
use crate::rollout::scheduler::Limits;
use crate::train::loss::{TokenTarget, TrainSeq};
use crate::train::optim::{OptimConfig, Trainer};
use crate::weights::model_files::ModelFiles;
use crate::weights::spec::ModelSpec;

/// Random numbers that weights are made of, over and over.
const POOL: usize = 1 << 20;
/// Rows that are run at once to fill contexts.
const FILL_ROWS: usize = 4096;
/// Copies and products of a sample, so that starting and waiting do not count.
const AT_ONCE: usize = 8;
/// Steps before those that are timed: a GPU records graphs in them.
const WARM_STEPS: usize = 4;
/// Sequences of the proof that drawn and trained log-probabilities are the same.
const PROOF_SAMPLES: usize = 2;
/// Spread of lengths: the standard deviation of their logarithm.
const LENGTH_SPREAD: f64 = 0.6;

/// A step that a small machine does in seconds.
const SHORT: StepShape = StepShape { trained: 24, probes: 48, prompt: 96, response: 64, probes_per_prompt: 8 };

/// Sizes that suit a device.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    context: usize,
    sequences: usize,
    length: usize,
    copy: usize,
    product: usize,
    element_bytes: f64,
    workload: BenchWorkload,
}

const ON_GPU: Sizes = Sizes {
    batch: 256,
    context: 2048,
    sequences: 16,
    length: 2048,
    copy: 1 << 28,
    product: 8192,
    element_bytes: 2.0,
    workload: BenchWorkload::Paper,
};
const ON_CPU: Sizes = Sizes {
    batch: 32,
    context: 256,
    sequences: 16,
    length: 256,
    copy: 1 << 24,
    product: 768,
    element_bytes: 4.0,
    workload: BenchWorkload::Short,
};

/// Measures what is asked for.
///
/// # Errors
/// When the device or the model cannot be had, or a file cannot be read or written.
pub fn bench(args: &BenchArgs) -> Result<()> {
    if let [old, new] = args.compare.as_slice() {
        return print(&compare(old, new)?);
    }
    let mut results = Results::default();
    if args.part != BenchPart::Executor {
        let threads = args.threads.unwrap_or(0);
        match gpu(args.device)? {
            Some(b) => Bench::new(b, args, ON_GPU)?.run(&mut results)?,
            None => Bench::new(CpuBackend::new(threads)?, args, ON_CPU)?.run(&mut results)?,
        }
    }
    if matches!(args.part, BenchPart::Executor | BenchPart::All) {
        executor(args.threads)?.into_iter().for_each(|result| results.push(result));
    }
    let unix_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let report = json!({"azr": env!("CARGO_PKG_VERSION"), "unix_s": unix_s, "results": results.0});
    print(&table(&report))?;
    match &args.json {
        Some(path) => publish(path, format!("{report:#}\n").as_bytes()),
        None => Ok(()),
    }
}

/// What has been measured. Each result is shown as it comes: a later one may run out of time.
#[derive(Default)]
struct Results(Vec<Value>);

impl Results {
    fn push(&mut self, result: Value) {
        eprintln!("{result}");
        self.0.push(result);
    }
}

/// Rates of the executor, one result a workload.
fn executor(threads: Option<usize>) -> Result<Vec<Value>> {
    let config = ExecutorConfig::default().pool(threads.unwrap_or_else(cores));
    let report = exec_bench::report(&config)?;
    let rates = report["rates_with_one_executor"].as_array().cloned().unwrap_or_default();
    let named = rates.into_iter().map(|mut rate| {
        rate["name"] = json!(format!("executor, {}", rate["workload"].as_str().unwrap_or("?")));
        rate
    });
    let mut results: Vec<Value> = named.collect();
    let mut latency = report["latency_one_program_us"].clone();
    latency["name"] = json!("executor, microseconds of one program");
    let mut peer = json!({"name": "executor, beside CPython with one fork per program"});
    match report["cpython_fork_per_program"].as_object() {
        Some(fields) => fields.iter().for_each(|(key, value)| peer[key] = value.clone()),
        None => peer["cpython"] = report["cpython_fork_per_program"].clone(),
    }
    results.extend([latency, peer]);
    Ok(results)
}

struct Bench<'a, B: Backend> {
    b: B,
    args: &'a BenchArgs,
    spec: ModelSpec,
    sizes: Sizes,
    machine: Gpu,
}

impl<'a, B: Backend + Clone> Bench<'a, B> {
    fn new(b: B, args: &'a BenchArgs, mut sizes: Sizes) -> Result<Self> {
        let spec = match &args.model {
            Some(name) => plan::model(name)?,
            None => ModelFiles::embedded()?.spec,
        };
        if args.small {
            sizes = Sizes { batch: 4, context: 40, sequences: 2, length: 40, copy: 1 << 16, product: 64, ..sizes };
        }
        sizes.batch = args.batch.unwrap_or(sizes.batch);
        sizes.context = args.context.unwrap_or(sizes.context).min(spec.max_position_embeddings - 1);
        // A prompt and a response.
        sizes.length = args.length.unwrap_or(sizes.length).clamp(2, spec.max_position_embeddings.max(2));
        sizes.sequences = args.sequences.unwrap_or(sizes.sequences);
        let mut bench = Bench { b, args, spec, sizes, machine: Gpu { memory_bytes: 0.0, bandwidth: 0.0, flops: 0.0 } };
        bench.machine.bandwidth = bench.bandwidth()?;
        bench.machine.flops = bench.products()?;
        Ok(bench)
    }

    fn run(&self, results: &mut Results) -> Result<()> {
        let (part, all) = (self.args.part, self.args.part == BenchPart::All);
        results.push(json!({
            "name": "machine",
            "device": self.b.describe(),
            "model": self.args.model.as_deref().unwrap_or("embedded"),
            "parameters": ParamTable::new(&self.spec).num_params(),
            "copy_gb_per_s": self.machine.bandwidth / 1e9,
            "products_tflop_per_s": self.machine.flops / 1e12,
        }));
        if all || part == BenchPart::Decode {
            self.decode(results)?;
        }
        if all || part == BenchPart::Train {
            self.train(results)?;
        }
        if all || part == BenchPart::Step {
            self.step(results)?;
        }
        Ok(())
    }

    /// Median seconds of runs of `f`, of which `at_once` are waited for together; the first are not timed.
    fn time(&self, runs: usize, at_once: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut seconds = Vec::with_capacity(runs);
        for i in 0..=runs {
            self.b.finish()?;
            let start = Instant::now();
            (0..at_once).try_for_each(|_| f())?;
            self.b.finish()?;
            if i > 0 {
                seconds.push(start.elapsed().as_secs_f64() / at_once as f64);
            }
        }
        Ok(median(&mut seconds))
    }

    fn random(&self, len: usize) -> Result<B::Act> {
        let mut rng = Rng::new(1, Purpose::Test, 9, 0);
        let pool: Vec<f32> = (0..len.min(POOL)).map(|_| rng.normal() as f32).collect();
        self.b.upload(&pool.iter().copied().cycle().take(len).collect::<Vec<f32>>())
    }

    /// Bytes per second that a copy reads and writes.
    fn bandwidth(&self) -> Result<f64> {
        let x = self.random(self.sizes.copy)?;
        let mut y = self.b.act(self.sizes.copy)?;
        let seconds = self.b.scope(|| self.time(5, AT_ONCE, || self.b.copy(&mut y, &x)))?;
        Ok(2.0 * self.sizes.element_bytes * self.sizes.copy as f64 / seconds)
    }

    /// Operations per second of a large product.
    fn products(&self) -> Result<f64> {
        let n = self.sizes.product;
        let (x, mut y) = (self.random(n * n)?, self.b.act(n * n)?);
        let param = self.b.param(&self.b.values(&self.random(n * n)?)?)?;
        let layout = self.b.linear(&param, n, n, false)?;
        let w = Weight { param: &param, layout: &layout };
        let seconds = self.b.scope(|| self.time(5, AT_ONCE, || self.b.matmul(&x, w, None, &mut y, false)))?;
        Ok(2.0 * (n as f64).powi(3) / seconds)
    }

    /// A decoder with random weights, and as many positions as are needed.
    fn decoder(&self, positions: usize, trainable: bool) -> Result<Decoder<B>> {
        let mut rng = Rng::new(1, Purpose::Init, 9, 0);
        let pool: Vec<f32> = (0..POOL).map(|_| rng.normal() as f32).collect();
        let spec = ModelSpec { max_position_embeddings: positions, ..self.spec.clone() };
        Decoder::load(self.b.clone(), spec, trainable, |table, i, sink| {
            let tensor = &table.tensors[i];
            let scale = if tensor.rows == 1 { 0.1 } else { 0.7 / (tensor.cols as f32).sqrt() };
            let middle = if tensor.parts[0].name.ends_with("norm.weight") { 1.0 } else { 0.0 };
            let values: Vec<f32> = pool.iter().map(|x| middle + scale * x).collect();
            let (mut from, mut left) = (i * 7919 % POOL, tensor.len());
            while left > 0 {
                let piece = left.min(POOL - from);
                sink(&values[from..from + piece])?;
                (from, left) = (0, left - piece);
            }
            Ok(())
        })
    }

    fn tokens(&self, len: usize, stream: u32) -> Vec<u32> {
        let mut rng = Rng::new(1, Purpose::Test, 10, stream);
        (0..len).map(|_| rng.below(self.spec.vocab_size) as u32).collect()
    }

    fn decode(&self, results: &mut Results) -> Result<()> {
        let Sizes { batch, context, .. } = self.sizes;
        let points: Vec<(usize, usize)> = if self.args.curves {
            let batches = [1, 4, 16, 64, 256, 512].into_iter().filter(|b| *b < batch).chain([batch]);
            let contexts = [256, 1024, 4096, 8192].into_iter().filter(|c| *c < context);
            batches.map(|b| (b, context)).chain(contexts.map(|c| (batch, c))).collect()
        } else {
            vec![(batch, context)]
        };
        let steps = self.args.steps;
        let longest = points.iter().map(|(b, c)| c + Self::fill_steps(*b, *c)).max().unwrap_or(0);
        let decoder = self.decoder(longest + steps + WARM_STEPS + 2, false)?;
        for (batch, context) in points {
            let [seconds, host_s, fill_s] = self.decode_point(&decoder, batch, context, steps)?;
            let machine = Gpu { bandwidth: self.machine.bandwidth * 2.0 / self.sizes.element_bytes, ..self.machine };
            let mean = context + (Self::fill_steps(batch, context) + steps) / 2;
            let roofline = decode_s(&self.spec, batch, mean, &machine);
            results.push(json!({
                "name": format!("decode, batch {batch}, context {context}"),
                "tokens_per_s": batch as f64 / seconds,
                "step_ms": 1e3 * seconds,
                "host_us_per_step": 1e6 * host_s,
                "roofline_tokens_per_s": batch as f64 / roofline,
                "share_of_roofline": roofline / seconds,
                "prefill_tokens_per_s": (batch * context) as f64 / fill_s,
            }));
        }
        Ok(())
    }

    /// Steps in which the contexts are filled: rows of prompts beside those that decode already.
    fn fill_steps(batch: usize, context: usize) -> usize {
        (batch * context).div_ceil(FILL_ROWS - batch.min(FILL_ROWS / 2)) + 4
    }

    /// Seconds of a decoding step, those in which the host worked, and those of filling the contexts before.
    fn decode_point(&self, decoder: &Decoder<B>, batch: usize, context: usize, steps: usize) -> Result<[f64; 3]> {
        let max_new = Self::fill_steps(batch, context) + steps + WARM_STEPS + 2;
        let limits = Limits { max_rows: FILL_ROWS, ..Engine::<B>::limits(batch, context + max_new, 0) };
        let mut engine = Engine::new(decoder, limits, 1)?;
        let start = Instant::now();
        for i in 0..batch {
            let (prompt, stop) = (self.tokens(context, i as u32).into(), Arc::new([]));
            let id = i as u64;
            engine.submit(SampleRequest { id, prompt, max_new, stop, temperature: 1.0, top_p: 1.0, top_k: 0 })?;
        }
        while engine.num_running() < batch {
            engine.step(decoder)?;
        }
        self.b.finish()?;
        let fill_s = start.elapsed().as_secs_f64();
        for _ in 0..WARM_STEPS {
            engine.step(decoder)?;
        }
        self.b.finish()?;
        let (start, waited_s) = (Instant::now(), engine.waited_s());
        for _ in 0..steps {
            engine.step(decoder)?;
        }
        let host_s = start.elapsed().as_secs_f64() - (engine.waited_s() - waited_s);
        self.b.finish()?;
        Ok([start.elapsed().as_secs_f64() / steps as f64, host_s / steps as f64, fill_s])
    }

    fn optim(&self) -> OptimConfig {
        let moments = if self.args.bf16_moments { MomentPrecision::Bf16 } else { MomentPrecision::F32 };
        let micro_batch_tokens = self.args.micro_batch_tokens.unwrap_or(8192);
        OptimConfig { moments, recompute: self.args.recompute, micro_batch_tokens, ..OptimConfig::default() }
    }

    fn train(&self, results: &mut Results) -> Result<()> {
        let Sizes { sequences, length, .. } = self.sizes;
        let mut trainer = Trainer::new(self.decoder(length, true)?, self.optim())?;
        let mut engine = Engine::new(trainer.decoder(), Engine::<B>::limits(PROOF_SAMPLES, length, 0), 1)?;
        same_bits(&mut trainer, &mut engine, 1.0)?;
        drop(engine);
        let prompt = self.args.prompt.unwrap_or(length / 2).clamp(1, length - 1);
        let seqs: Vec<TrainSeq> = (0..sequences).map(|i| self.sequence(prompt, length - prompt, i)).collect();
        let seconds = self.time(3, 1, || {
            trainer.accumulate(&seqs)?;
            updated(&mut trainer)
        })?;
        let rate = (sequences * length) as f64 / seconds;
        let flops = training_flops(&self.spec, length, (length - prompt) as f64 / length as f64);
        results.push(json!({
            "name": format!("train, {sequences} sequences of {length}, {prompt} of a prompt"),
            "tokens_per_s": rate,
            "step_s": seconds,
            "tflop_per_s": rate * flops / 1e12,
            "share_of_roofline": rate * flops / self.machine.flops,
        }));
        Ok(())
    }

    /// A random sequence whose response has the policy-gradient loss.
    fn sequence(&self, prompt: usize, response: usize, number: usize) -> TrainSeq {
        let mut rng = Rng::new(1, Purpose::Test, 11, number as u32);
        let mut target = |at| {
            let (advantage, old_logprob) = (rng.normal() as f32, -(self.spec.vocab_size as f32).ln());
            let loss = HeadLoss::Clipped { advantage, old_logprob, low: 0.2, high: 0.2, weight: 1e-4 };
            TokenTarget { at, loss, entropy_coef: 0.0 }
        };
        TrainSeq {
            tokens: self.tokens(prompt + response, number as u32),
            inv_temperature: 1.0,
            targets: (prompt.max(1)..prompt + response).map(&mut target).collect(),
        }
    }

    fn step(&self, results: &mut Results) -> Result<()> {
        let workload = self.args.workload.unwrap_or(self.sizes.workload);
        let mut shape = if workload == BenchWorkload::Paper { PAPER } else { SHORT };
        if self.args.small {
            shape = StepShape { trained: 2, probes: 2, prompt: 12, response: 6, probes_per_prompt: 2 };
        }
        let longest = (self.spec.max_position_embeddings / 2).min(4 * shape.prompt.max(shape.response));
        let lengths = Lengths { rng: Rng::new(1, Purpose::Test, 12, 0), longest };
        let requests = self.requests(&shape, lengths);
        let positions = requests.iter().map(|r| r.prompt.len() + r.max_new).max().unwrap_or(1);
        let decoder = self.decoder(positions, true)?;
        let running = self.args.batch.unwrap_or_else(|| self.b.num_running());
        let mut engine = Engine::new(&decoder, Engine::<B>::limits(running, positions, 0), 1)?;
        let start = Instant::now();
        requests.iter().try_for_each(|r| engine.submit(r.clone()))?;
        let completions = engine.finish(&decoder)?;
        let rollout_s = start.elapsed().as_secs_f64();
        engine.rest();
        let mut trainer = Trainer::new(decoder, self.optim())?;
        let seqs: Vec<TrainSeq> = requests
            .iter()
            .zip(&completions)
            .take(shape.trained)
            .enumerate()
            .map(|(i, (r, c))| self.sequence(r.prompt.len(), c.tokens.len(), i))
            .collect();
        let start = Instant::now();
        trainer.accumulate(&seqs)?;
        updated(&mut trainer)?;
        let train_s = start.elapsed().as_secs_f64();
        let drawn: usize = completions.iter().map(|c| c.tokens.len()).sum();
        results.push(json!({
            "name": format!("step, {} trained and {} probes", shape.trained, shape.probes),
            "rollout_s": rollout_s,
            "train_s": train_s,
            "drawn_tokens_per_s": drawn as f64 / rollout_s,
            "trained_tokens_per_s": seqs.iter().map(|s| s.tokens.len()).sum::<usize>() as f64 / train_s,
            "steps_per_hour": 3600.0 / (rollout_s + train_s),
        }));
        Ok(())
    }

    /// Samples of a step; probes of one task share their prompt. Trained ones come first.
    fn requests(&self, shape: &StepShape, mut lengths: Lengths) -> Vec<SampleRequest> {
        let mut requests = Vec::new();
        let mut prompt: Arc<[u32]> = Arc::new([]);
        for i in 0..shape.trained + shape.probes {
            let own = i < shape.trained || (i - shape.trained).is_multiple_of(shape.probes_per_prompt);
            if own {
                prompt = self.tokens(lengths.draw(shape.prompt), i as u32).into();
            }
            requests.push(SampleRequest {
                id: i as u64,
                prompt: prompt.clone(),
                max_new: lengths.draw(shape.response),
                stop: Arc::new([]),
                temperature: 1.0,
                top_p: 1.0,
                top_k: 0,
            });
        }
        requests
    }
}

/// Lengths with a given mean, log-normal: most are shorter, a few much longer.
struct Lengths {
    rng: Rng,
    longest: usize,
}

impl Lengths {
    fn draw(&mut self, mean: usize) -> usize {
        let middle = (mean as f64).ln() - LENGTH_SPREAD * LENGTH_SPREAD / 2.0;
        let length = (middle + LENGTH_SPREAD * self.rng.normal()).exp() as usize;
        length.clamp(1, self.longest.max(1))
    }
}

/// An update, which is none where a gradient is no number: then nothing was worth timing.
fn updated<B: Backend>(trainer: &mut Trainer<B>) -> Result<()> {
    let norm = trainer.update(1e-6)?;
    if !norm.is_finite() {
        return Err(
            Error::failure(format!("the gradient's norm is {norm}")).with_hint("azr selftest tells what is wrong")
        );
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_their_mean_and_their_bound() {
        let mut lengths = Lengths { rng: Rng::new(1, Purpose::Test, 0, 0), longest: 3200 };
        let all: Vec<usize> = (0..20_000).map(|_| lengths.draw(800)).collect();
        let mean = all.iter().sum::<usize>() as f64 / all.len() as f64;
        assert!((mean / 800.0 - 1.0).abs() < 0.03, "{mean}");
        assert!(all.iter().all(|n| (1..=3200).contains(n)) && all.iter().any(|n| *n > 2400));
    }

    #[test]
    fn a_median_is_the_one_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert!(median(&mut []).is_nan());
    }
}
