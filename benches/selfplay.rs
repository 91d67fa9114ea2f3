//! Tokens per second of the two heavy jobs on the CPU, sampling and training, each beside its yardstick in the same run:
//! the speed of one large matrix product (the roofline), and a PyTorch program at the same shapes if `AZR_PEER` names
//! one. Shapes and protocol are those of README.md beside this file.

use std::collections::BTreeMap;
use std::process::Command;

use azr::base::rng::{Purpose, Rng};
use azr::compute::cpu::backend::CpuBackend;
use azr::compute::ops::{Backend, HeadLoss, Weight};
use azr::model::forward::Decoder;
use azr::model::params::ParamTable;
use azr::pretrain::embedded_spec;
use azr::rollout::engine::{Engine, SampleRequest};
use azr::train::loss::{TokenTarget, TrainSeq};
use azr::train::optim::{OptimConfig, Trainer};
use azr::weights::spec::ModelSpec;
use criterion::{BatchSize, Criterion, Throughput};

#[global_allocator]
static ALLOCATOR: azr::exec::sandbox::CountingAllocator = azr::exec::sandbox::CountingAllocator;

/// Threads of every measurement.
const THREADS: usize = 2;
/// Rollout: sequences, prompt tokens and new tokens of each; training: sequences and tokens of each.
const BATCH: usize = 64;
const PROMPT: usize = 128;
const NEW: usize = 128;
const SEQS: usize = 64;
const SEQ: usize = 256;
/// Rows, columns and depth of the product that the others are measured by.
const PRODUCT: [usize; 3] = [4096, 1024, 256];
/// Tokens of one micro-batch.
const MICRO: usize = 16 * SEQ;

/// The peer's smallest preset: 2.56 M parameters.
fn peer_spec() -> ModelSpec {
    ModelSpec {
        hidden_size: 192,
        intermediate_size: 512,
        num_layers: 6,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 32,
        rope_theta: 1e6,
        ..embedded_spec()
    }
}

fn decoder(spec: &ModelSpec, trainable: bool) -> Decoder<CpuBackend> {
    let weights = ParamTable::new(spec).init(spec, 1);
    let backend = CpuBackend::new(THREADS).expect("threads start");
    Decoder::new(backend, spec.clone(), &weights, trainable).expect("it fits")
}

fn tokens(spec: &ModelSpec, n: usize, stream: u32) -> Vec<u32> {
    let mut rng = Rng::new(1, Purpose::Test, 0, stream);
    (0..n).map(|_| rng.below(spec.vocab_size) as u32).collect()
}

/// Operations of the forward pass per token: products with all weights (the embedding as head), and attention over a
/// mean context.
fn forward_flops(spec: &ModelSpec, context: f64) -> f64 {
    let attention = 4.0 * context * (spec.num_layers * spec.num_heads * spec.head_dim) as f64;
    2.0 * ParamTable::new(spec).num_params() as f64 + attention
}

fn product(c: &mut Criterion) {
    let [t, n, k] = PRODUCT;
    let b = CpuBackend::new(THREADS).expect("threads start");
    let mut rng = Rng::new(1, Purpose::Test, 1, 0);
    let mut random = |len: usize| (0..len).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
    let (x, w) = (b.upload(&random(t * k)).expect("it fits"), b.param(&random(n * k)).expect("it fits"));
    let (layout, mut y) = (b.linear(&w, n, k, false).expect("it fits"), b.act(t * n).expect("it fits"));
    let w = Weight { param: &w, layout: &layout };
    let mut group = c.benchmark_group("product");
    group.throughput(Throughput::Elements((2 * t * n * k) as u64));
    group.bench_function("flops", |bench| {
        bench.iter(|| b.scope(|| b.matmul(&x, w, None, &mut y, false)));
    });
    group.finish();
}

fn rollout(c: &mut Criterion, name: &str, spec: &ModelSpec) {
    let decoder = decoder(spec, false);
    let request = |i: usize| SampleRequest {
        id: i as u64,
        prompt: tokens(spec, PROMPT, i as u32).into(),
        max_new: NEW,
        stop: [].into(),
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
    };
    let requests: Vec<SampleRequest> = (0..BATCH).map(request).collect();
    let limits = Engine::<CpuBackend>::limits(BATCH, PROMPT + NEW, 0);
    let mut engine = Engine::new(&decoder, limits, 1).expect("it fits");
    let mut group = c.benchmark_group("rollout");
    group.sample_size(10).throughput(Throughput::Elements((BATCH * NEW) as u64));
    group.bench_function(name, |bench| {
        bench.iter(|| {
            requests.iter().for_each(|r| engine.submit(r.clone()).expect("it fits"));
            let done = engine.finish(&decoder).expect("it runs");
            assert_eq!(done.iter().map(|c| c.tokens.len()).sum::<usize>(), BATCH * NEW);
        });
    });
    group.finish();
}

fn training(c: &mut Criterion, name: &str, spec: &ModelSpec) {
    let config = OptimConfig { micro_batch_tokens: MICRO, ..OptimConfig::default() };
    let mut trainer = Trainer::new(decoder(spec, true), config).expect("it fits");
    let weight = 1.0 / (SEQS * (SEQ - 1)) as f32;
    let seqs: Vec<TrainSeq> = (0..SEQS)
        .map(|i| {
            let mut rng = Rng::new(1, Purpose::Test, 2, i as u32);
            let mut target = |at| {
                let advantage = rng.normal() as f32;
                let loss = HeadLoss::Clipped { advantage, old_logprob: -6.9, low: 0.2, high: 0.2, weight };
                TokenTarget { at, loss, entropy_coef: 0.0 }
            };
            TrainSeq {
                tokens: tokens(spec, SEQ, i as u32),
                inv_temperature: 1.0,
                targets: (1..SEQ).map(&mut target).collect(),
            }
        })
        .collect();
    let mut group = c.benchmark_group("train");
    group.sample_size(10).throughput(Throughput::Elements((SEQS * SEQ) as u64));
    group.bench_function(name, |bench| {
        bench.iter_batched(
            || (),
            |()| {
                trainer.accumulate(&seqs).expect("they fit");
                trainer.update(1e-6).expect("finite gradients")
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// Median seconds of a benchmark of this run, as criterion keeps it.
fn median_s(name: &str) -> Option<f64> {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let file = std::path::Path::new(&target).join("criterion").join(name).join("new/estimates.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    Some(json["median"]["point_estimate"].as_f64()? * 1e-9)
}

/// Runs the peer and returns its median tokens per second by job.
fn peer(command: &str, dtype: &str) -> BTreeMap<String, f64> {
    let mut words = command.split_whitespace();
    let program = words.next().expect("AZR_PEER names a command");
    let output = Command::new(program)
        .args(words)
        .args(["--model", "tiny", "--device", "cpu", "--threads", &THREADS.to_string(), "--dtype", dtype])
        .args(if dtype == "float32" { &["--reps", "5"][..] } else { &["--reps", "1", "--warmup", "1"] })
        .output()
        .unwrap_or_else(|e| panic!("cannot start {program}: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let line = |l: &str| {
        let json: serde_json::Value = serde_json::from_str(l).ok()?;
        Some((json["what"].as_str()?.to_owned(), json["tokens_per_s"]["median"].as_f64()?))
    };
    text.lines().filter_map(line).collect()
}

fn summary() {
    let flops = median_s("product/flops").map(|s| 2.0 * PRODUCT.iter().product::<usize>() as f64 / s);
    let mut own = BTreeMap::new();
    println!("\n{:<18} {:>12} {:>22}", "job, model", "tokens/s", "share of one product");
    for (model, spec) in [("embedded", embedded_spec()), ("peer", peer_spec())] {
        let sampled = forward_flops(&spec, (PROMPT + NEW / 2) as f64)
            + forward_flops(&spec, PROMPT as f64 / 2.0) * (PROMPT / NEW) as f64;
        let trained = 3.0 * forward_flops(&spec, SEQ as f64 / 2.0);
        for (job, count, per_token) in [("rollout", BATCH * NEW, sampled), ("train", SEQS * SEQ, trained)] {
            let Some(seconds) = median_s(&format!("{job}/{model}")) else { continue };
            let rate = count as f64 / seconds;
            let share = flops.map_or("-".to_owned(), |f| format!("{:.0} %", 100.0 * rate * per_token / f));
            println!("{:<18} {rate:>12.0} {share:>22}", format!("{job}, {model}"));
            own.insert(format!("{job}/{model}"), rate);
        }
    }
    let Ok(command) = std::env::var("AZR_PEER") else {
        println!("peer: SKIPPED, AZR_PEER names no command (see benches/README.md)");
        return;
    };
    for dtype in ["float32", "bfloat16"] {
        for (job, rate) in peer(&command, dtype) {
            if let Some(own) = own.get(&format!("{job}/peer")) {
                println!("{job}: azr f32 {own:.0} tokens/s, PyTorch {dtype} {rate:.0}: ratio {:.2}", own / rate);
            }
        }
    }
}

fn main() {
    let mut c = Criterion::default().configure_from_args();
    product(&mut c);
    for (name, spec) in [("embedded", embedded_spec()), ("peer", peer_spec())] {
        rollout(&mut c, name, &spec);
        training(&mut c, name, &spec);
    }
    c.final_summary();
    if std::env::args().any(|a| a == "--bench") {
        summary();
    }
}
