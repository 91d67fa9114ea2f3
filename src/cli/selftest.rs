//! `azr selftest`: every operation of a device against the CPU on random shapes, twice for the same bits, whose hash is
//! printed so that two devices can be compared; draws against their distribution; and two-layer models whose log-probabilities at sampling are the trainer's, bit for bit.

use std::sync::Arc;

use crate::base::rng::{Purpose, Rng};
use crate::cli::args::SelftestArgs;
use crate::cli::output::print;
use crate::cli::selftest_ops::{
    Round, Values, decoding_attention, gates, head, products, rows, training_attention, updates,
};
use crate::cli::train::gpu;
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::cpu::gemm::Isa;
use crate::compute::ops::{Backend, Draw, HeadLoss, Weight};
use crate::error::{Error, Result};
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::rollout::engine::{Completion, Engine, SampleRequest};
use crate::train::loss::{TokenTarget, TrainSeq};
use crate::train::optim::{OptimConfig, Trainer};
use crate::weights::spec::{Family, ModelSpec};

/// Largest error of a GPU's values, as a share of their norm: a few roundings to 8 bits.
const GPU_TOLERANCE: f64 = 1.5e-2;
/// Of another CPU path: none, the bits are the same.
const CPU_TOLERANCE: f64 = 0.0;
/// Largest chi-square of draws from 64 tokens: exceeded once in a million.
const MAX_CHI2: f64 = 130.0;

/// Tests a device.
///
/// # Errors
/// When there is no such device, or a check fails.
pub fn selftest(args: &SelftestArgs) -> Result<()> {
    let reference = CpuBackend::new(0)?;
    match gpu(args.device)? {
        Some(gpu) => Selftest { b: gpu, cpu: reference, tolerance: GPU_TOLERANCE, quick: args.quick }.run(),
        None => {
            let b = CpuBackend::with_isa(1, Isa::Portable)?;
            Selftest { b, cpu: reference, tolerance: CPU_TOLERANCE, quick: args.quick }.run()
        }
    }
}

struct Selftest<B: Backend> {
    b: B,
    cpu: CpuBackend,
    tolerance: f64,
    quick: bool,
}

impl<B: Backend + Clone> Selftest<B> {
    fn run(&self) -> Result<()> {
        print(&format!("testing {} against {}\n", self.b.describe(), self.cpu.describe()))?;
        let rounds: Vec<Round> = if self.quick {
            (0..3).map(|number| Round { number, rows: 70, eights: 10 }).collect()
        } else {
            (0..6).map(|number| Round { number, rows: 150 << number.min(3), eights: 260 }).collect()
        };
        let mut failed = 0;
        let mut report = |name: &str, outcome: Result<String, String>| match outcome {
            Ok(text) => print(&format!("ok     {name}: {text}\n")),
            Err(text) => {
                failed += 1;
                print(&format!("WRONG  {name}: {text}\n"))
            }
        };
        macro_rules! operations {
            ($($name:ident),*) => {$(
                let outcome = self.same(&rounds, |round| $name(&self.b, round), |round| $name(&self.cpu, round))?;
                report(stringify!($name), outcome)?;
            )*};
        }
        operations!(products, gates, rows, training_attention, decoding_attention, head, updates);
        report("draws", self.draws()?)?;
        for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
            report(&format!("model of family {family:?}"), self.model(family)?)?;
        }
        if failed > 0 {
            return Err(Error::failure(format!("{failed} checks of the self-test failed"))
                .with_hint("results of this device cannot be trusted; use --device cpu, and report the lines above"));
        }
        Ok(())
    }

    /// Runs an operation on both devices, and twice on the tested one.
    fn same(
        &self,
        rounds: &[Round],
        tested: impl Fn(Round) -> Result<Values>,
        reference: impl Fn(Round) -> Result<Values>,
    ) -> Result<Result<String, String>> {
        let (mut worst, mut hasher) = ((0.0, "nothing"), blake3::Hasher::new());
        for round in rounds {
            let (values, again, expected) = (tested(*round)?, tested(*round)?, reference(*round)?);
            for (((name, ours), (_, again)), (_, theirs)) in values.iter().zip(&again).zip(&expected) {
                let bits = |x: &[f32]| x.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect::<Vec<u8>>();
                hasher.update(&bits(ours));
                if bits(ours) != bits(again) {
                    return Ok(Err(format!("{name} has other bits in a second run, round {}", round.number)));
                }
                let error = relative_error(ours, theirs);
                if error.is_nan() || error > self.tolerance {
                    let n = round.number;
                    return Ok(Err(format!("{name} is off by {error:.1e} of its norm in round {n}")));
                }
                if error >= worst.0 {
                    worst = (error, name);
                }
            }
        }
        let bits = &hasher.finalize().to_hex()[..16];
        Ok(Ok(format!("bits {bits}, {} rounds, largest error {:.1e} ({})", rounds.len(), worst.0, worst.1)))
    }

    /// Draws follow the softmax of the CPU's logits, and are reported with its log-probabilities.
    fn draws(&self) -> Result<Result<String, String>> {
        let (d, v, n) = (32, 64, if self.quick { 1000 } else { 20_000 });
        let mut rng = Rng::new(1, Purpose::Test, 8, 0);
        let mut random =
            |len: usize| (0..len).map(|_| half::bf16::from_f64(rng.normal() * 0.5).to_f32()).collect::<Vec<_>>();
        let (x, w) = (random(d), random(v * d));
        let draw = |seq| Draw { seq, temperature: 1.0, top_p: 1.0, top_k: 0 };
        let draws: Vec<(usize, Draw, u32)> = (0..n as u64).map(|seq| (0, draw(seq), 9)).collect();
        let param = self.b.param(&w)?;
        let layout = self.b.linear(&param, v, d, false)?;
        let drawn = self.b.draw(&self.b.upload(&x)?, d, Weight { param: &param, layout: &layout }, &draws, 5)?;
        let logits: Vec<f64> =
            w.chunks(d).map(|w| w.iter().zip(&x).map(|(w, x)| f64::from(w * x)).sum::<f64>()).collect();
        let log_sum = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
        let mut counts = vec![0.0; v];
        for drawn in &drawn {
            let exact = logits[drawn.token as usize] - log_sum;
            if (f64::from(drawn.logprob) - exact).abs() > 1e-4 {
                return Ok(Err(format!("token {} has log-probability {}, not {exact}", drawn.token, drawn.logprob)));
            }
            counts[drawn.token as usize] += 1.0;
        }
        let expected = |i: usize| (logits[i] - log_sum).exp() * n as f64;
        let chi2: f64 = (0..v).map(|i| (counts[i] - expected(i)).powi(2) / expected(i)).sum();
        let text = format!("{n} draws of {v} tokens, chi-square {chi2:.0}");
        Ok(if chi2 < MAX_CHI2 { Ok(text) } else { Err(text) })
    }

    /// Completions do not depend on company, and the trainer sees the log-probabilities that they were drawn with.
    fn model(&self, family: Family) -> Result<Result<String, String>> {
        let spec = spec(family);
        let weights: Vec<Vec<f32>> = ParamTable::new(&spec).init(&spec, 3);
        let (count, new) = if self.quick { (4, 5) } else { (48, 60) };
        let requests = requests(count, new);
        let decoder = Decoder::new(self.b.clone(), spec, &weights, true)?;
        let mut drawn: Option<Vec<Completion>> = None;
        for running in [count, 1 + count / 3] {
            let mut engine = Engine::new(&decoder, Engine::<B>::limits(running, 40 + new, 0), 7)?;
            requests.iter().try_for_each(|r| engine.submit(r.clone()))?;
            let completions = engine.finish(&decoder)?;
            if *drawn.get_or_insert_with(|| completions.clone()) != completions {
                return Ok(Err("completions depend on what is decoded beside them".to_owned()));
            }
        }
        let drawn = drawn.expect("two runs");
        let seqs: Vec<TrainSeq> = requests.iter().zip(&drawn).map(|(r, c)| to_train(r, c)).collect();
        let optim = OptimConfig { micro_batch_tokens: 150, ..OptimConfig::default() };
        let mut trainer = Trainer::new(decoder, optim)?;
        let reports = trainer.accumulate(&seqs)?;
        let mut tokens = 0;
        for (c, reports) in drawn.iter().zip(&reports) {
            tokens += c.tokens.len();
            let trained = reports.iter().map(|r| r.logprob.to_bits());
            if !c.logprobs.iter().map(|l| l.to_bits()).eq(trained) {
                return Ok(Err(format!("sample {} was drawn with other log-probabilities than it trains with", c.id)));
            }
        }
        let norm = trainer.update(1e-3)?;
        if !norm.is_finite() {
            return Ok(Err(format!("the gradient norm is {norm}")));
        }
        Ok(Ok(format!("{tokens} tokens drawn with the trainer's bits, gradient norm {norm:.3}")))
    }
}

/// Error of values as a share of their norm.
fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "both devices give as many values");
    let difference: f64 = ours.iter().zip(theirs).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| f64::from(*b).powi(2)).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// A model of two layers.
fn spec(family: Family) -> ModelSpec {
    ModelSpec {
        family,
        vocab_size: 96,
        hidden_size: 64,
        intermediate_size: 96,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: if family == Family::Llama { 32 } else { 64 },
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_word_embeddings: family == Family::Qwen2,
        max_position_embeddings: 128,
    }
}

/// Prompts of up to 40 tokens, each for two samples.
fn requests(count: usize, new: usize) -> Vec<SampleRequest> {
    let mut rng = Rng::new(2, Purpose::Test, 8, 1);
    let mut all = Vec::new();
    let mut prompt: Arc<[u32]> = Arc::new([]);
    for id in 0..count as u64 {
        if id % 2 == 0 {
            prompt = (0..1 + rng.below(40)).map(|_| rng.below(96) as u32).collect();
        }
        let (stop, max_new) = (Arc::new([5]), 1 + rng.below(new));
        all.push(SampleRequest { id, prompt: prompt.clone(), max_new, stop, temperature: 0.9, top_p: 1.0, top_k: 0 });
    }
    all
}

fn to_train(request: &SampleRequest, completion: &Completion) -> TrainSeq {
    let first = request.prompt.len();
    let target = |(i, l): (usize, &f32)| {
        let loss = HeadLoss::Clipped { advantage: 1.0, old_logprob: *l, low: 0.2, high: 0.2, weight: 0.01 };
        TokenTarget { at: first + i, loss, entropy_coef: 0.0 }
    };
    TrainSeq {
        tokens: [&request.prompt[..], &completion.tokens].concat(),
        inv_temperature: 1.0 / request.temperature,
        targets: completion.logprobs.iter().enumerate().map(target).collect(),
    }
}
