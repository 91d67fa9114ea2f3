//! Whole-model checks: gradients against finite differences for all families, and decode bits = training bits.

use azr_kernel_emu::{Arithmetic, Emulator, Schedule};

use crate::base::rng::{Purpose, Rng};
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::cpu::gemm::Isa;
use crate::compute::cuda::CudaBackend;
use crate::compute::ops::{Backend, Draw, HeadLoss, HeadReport, MomentPrecision, PAGE};
use crate::compute::tests::emulated_gpu;
use crate::model::forward::{Decoder, SeqRows};
use crate::model::params::ParamTable;
use crate::train::loss::{TokenTarget, TrainSeq, nll_sequence};
use crate::train::optim::{Named, OptimConfig, Trainer};
use crate::weights::spec::{Family, Llama3Rope, ModelSpec};

pub(crate) fn tiny(family: Family) -> ModelSpec {
    ModelSpec {
        family,
        vocab_size: 37,
        hidden_size: 24,
        intermediate_size: 40,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: if family == Family::Qwen3 { 10 } else { 6 },
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: (family == Family::Llama).then_some(Llama3Rope {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 32,
        }),
        tie_word_embeddings: family == Family::Qwen2,
        max_position_embeddings: 256,
    }
}

/// Weights with biases and norms that are not trivial.
fn weights(spec: &ModelSpec) -> Vec<Vec<f32>> {
    let mut rng = Rng::new(9, Purpose::Test, 0, 0);
    let mut weights = ParamTable::new(spec).init(spec, 5);
    for x in weights.iter_mut().flatten() {
        *x += 0.1 * rng.normal() as f32;
    }
    weights
}

fn tokens(spec: &ModelSpec, n: usize, stream: u32) -> Vec<u32> {
    let mut rng = Rng::new(4, Purpose::Test, 1, stream);
    (0..n).map(|_| rng.below(spec.vocab_size) as u32).collect()
}

fn trainer(spec: &ModelSpec, weights: &[Vec<f32>], threads: usize, isa: Isa) -> Trainer<CpuBackend> {
    trainer_on(CpuBackend::with_isa(threads, isa).expect("threads start"), spec, weights)
}

fn trainer_on<B: Backend>(backend: B, spec: &ModelSpec, weights: &[Vec<f32>]) -> Trainer<B> {
    let config = OptimConfig { micro_batch_tokens: 50, ..OptimConfig::default() };
    let decoder = Decoder::new(backend, spec.clone(), weights, true).expect("it fits");
    Trainer::new(decoder, config).expect("it fits")
}

fn sequences(spec: &ModelSpec) -> Vec<TrainSeq> {
    [1usize, 20, 33, 16]
        .iter()
        .enumerate()
        .map(|(i, n)| {
            let tokens = tokens(spec, n + 1, i as u32);
            let mut seq = nll_sequence(&tokens, &vec![0.1; tokens.len()]);
            for (j, t) in seq.targets.iter_mut().enumerate() {
                t.entropy_coef = 0.01;
                if j % 2 == 1 {
                    let (advantage, old_logprob) = (if j % 3 == 0 { 1.5 } else { -0.7 }, -3.6);
                    t.loss = HeadLoss::Clipped { advantage, old_logprob, low: 0.9, high: 9.0, weight: 0.2 };
                }
            }
            seq
        })
        .collect()
}

fn total_loss(trainer: &mut Trainer<CpuBackend>, seqs: &[TrainSeq]) -> f64 {
    let reports = trainer.accumulate(seqs).expect("the sequences fit");
    trainer.clear_gradients().expect("cleared");
    reports.iter().flatten().map(|r| f64::from(r.loss)).sum()
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let spec = tiny(family);
        let weights = weights(&spec);
        let seqs = sequences(&spec);
        let mut trainer = trainer(&spec, &weights, 2, Isa::detect());
        trainer.accumulate(&seqs).expect("the sequences fit");
        let grads: Vec<Vec<f32>> = trainer.gradient_buffers().iter().map(|g| g.to_vec()).collect();
        trainer.clear_gradients().expect("cleared");
        let mut rng = Rng::new(1, Purpose::Test, 2, 0);
        for (i, grad) in grads.iter().enumerate() {
            // The slope along a random direction of one tensor, against the gradient's projection.
            let direction: Vec<f32> = grad.iter().map(|_| if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect();
            let scale = 2e-3 / (grad.len() as f32).sqrt();
            let slope = |sign: f32| {
                let mut moved = weights.clone();
                moved[i].iter_mut().zip(&direction).for_each(|(w, d)| *w += sign * scale * d);
                total_loss(&mut super::tests::trainer(&spec, &moved, 1, Isa::detect()), &seqs)
            };
            let numeric = (slope(1.0) - slope(-1.0)) / (2.0 * f64::from(scale));
            let exact: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let norm: f64 = grad.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            let name = &trainer.decoder().table().tensors[i].parts[0].name;
            assert!((numeric - exact).abs() < 0.02 * norm + 2e-3, "{family:?} {name}: {numeric} against {exact}");
        }
    }
}

#[test]
fn one_update_does_not_depend_on_threads_or_instruction_set() {
    for family in [Family::Qwen2, Family::Qwen3] {
        let spec = tiny(family);
        let run = |threads, isa| {
            let mut trainer = trainer(&spec, &weights(&spec), threads, isa);
            trainer.accumulate(&sequences(&spec)).expect("the sequences fit");
            let norm = trainer.update(1e-3).expect("finite gradients");
            (norm, trainer.weights().expect("read"), trainer.moments().expect("read"))
        };
        let expected = run(1, Isa::detect());
        assert_eq!(expected, run(3, Isa::detect()));
        assert_eq!(expected, run(2, Isa::Portable));
    }
}

/// Draws `n` tokens after a prompt that is taken in in pieces of the given sizes, beside other sequences.
fn sample<B: Backend>(
    decoder: &Decoder<B>,
    prompt: &[u32],
    n: usize,
    pieces: usize,
    others: usize,
) -> Vec<(u32, u32, u32)> {
    let mut kv = decoder.new_kv(64).expect("it fits");
    let pages: Vec<u32> = (0..8).map(|p| p * 3 + 1).collect();
    let other = tokens(decoder.spec(), 40, 99);
    let mut text = prompt.to_vec();
    let (mut done, mut drawn) = (0, Vec::new());
    while drawn.len() < n {
        let left = text.len() - done;
        let take = if left > 1 { left.min(pieces) } else { 1 };
        let draw = Draw { seq: 77, temperature: 0.9, top_p: 1.0, top_k: 0 };
        let own = SeqRows {
            tokens: &text[done..done + take],
            pos0: done,
            pages: &pages,
            draw: (take == left).then_some(draw),
        };
        let tables: Vec<Vec<u32>> = (0..others as u32).map(|i| (40 + 3 * i..43 + 3 * i).collect()).collect();
        let mut rows: Vec<SeqRows<'_>> = tables
            .iter()
            .enumerate()
            .map(|(i, pages)| SeqRows { tokens: &other[..7 + i], pos0: 0, pages, draw: None })
            .collect();
        rows.insert(others / 2, own);
        let result = decoder.step(&mut kv, &rows, 123).expect("a valid batch")[others / 2];
        done += take;
        if let Some(d) = result {
            drawn.push((d.token, d.logprob.to_bits(), d.entropy.to_bits()));
            text.push(d.token);
        }
    }
    drawn
}

/// Reports of a trainer that meets drawn tokens (at temperature 0.9) in the middle of a batch, as bits.
fn trained<B: Backend>(
    trainer: &mut Trainer<B>,
    prompt: &[u32],
    drawn: &[(u32, u32, u32)],
    mut batch: Vec<TrainSeq>,
) -> Vec<(u32, u32)> {
    let response: Vec<u32> = drawn.iter().map(|d| d.0).collect();
    let targets = (0..response.len()).map(|i| TokenTarget {
        at: prompt.len() + i,
        loss: HeadLoss::Nll { weight: 1.0 },
        entropy_coef: 0.0,
    });
    let seq = TrainSeq { tokens: [prompt, &response].concat(), inv_temperature: 1.0 / 0.9, targets: targets.collect() };
    let at = batch.len() / 2;
    batch.insert(at, seq);
    let reports = trainer.accumulate(&batch).expect("the sequences fit");
    reports[at].iter().map(|r| (r.logprob.to_bits(), r.entropy.to_bits())).collect()
}

/// What was said of drawn tokens when they were drawn.
fn said(drawn: &[(u32, u32, u32)]) -> Vec<(u32, u32)> {
    drawn.iter().map(|d| (d.1, d.2)).collect()
}

#[test]
fn sampled_logprobs_are_the_trainers_whatever_the_batch() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let spec = tiny(family);
        let weights = weights(&spec);
        let decoder = |threads, isa| {
            let backend = CpuBackend::with_isa(threads, isa).expect("threads start");
            Decoder::new(backend, spec.clone(), &weights, false).expect("it fits")
        };
        let prompt = tokens(&spec, PAGE + 5, 7);
        let expected = sample(&decoder(1, Isa::detect()), &prompt, 30, 100, 0);
        for (threads, isa, pieces, others) in
            [(2, Isa::detect(), 1, 3), (3, Isa::detect(), 6, 1), (1, Isa::Portable, 17, 4), (2, Isa::detect(), 100, 5)]
        {
            assert_eq!(expected, sample(&decoder(threads, isa), &prompt, 30, pieces, others), "{family:?}");
        }
        let mut trainer = trainer(&spec, &weights, 2, Isa::detect());
        assert_eq!(trained(&mut trainer, &prompt, &expected, sequences(&spec)), said(&expected), "{family:?}");
    }
}

/// A model that the GPU's kernels run: two layers, whole eights, heads of 64.
fn for_gpu(family: Family) -> ModelSpec {
    ModelSpec { vocab_size: 72, num_heads: 2, num_kv_heads: 1, head_dim: 64, ..tiny(family) }
}

/// An emulated GPU whose tensor cores round as Hopper's do, whichever instruction is used.
fn hopper_arithmetic(capability: u32) -> CudaBackend {
    let gpu = emulated_gpu(capability);
    Emulator::get().schedule(Schedule { arithmetic: Arithmetic::Hopper, ..Schedule::PLAIN });
    gpu
}

#[test]
fn on_the_gpu_sampled_logprobs_are_the_trainers_whatever_the_batch_and_the_instructions() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let spec = for_gpu(family);
        let weights = weights(&spec);
        let prompt = tokens(&spec, PAGE + 5, 7);
        // Capability 8.0 multiplies with mma.sync, 9.0 batches of more than 64 rows with wgmma.
        let mut expected: Option<Vec<(u32, u32, u32)>> = None;
        for (capability, pieces, others) in [(90, 100, 0), (80, 6, 3), (90, 1, 8)] {
            let gpu = hopper_arithmetic(capability);
            let decoder = Decoder::new(gpu.clone(), spec.clone(), &weights, false).expect("it fits");
            let drawn = sample(&decoder, &prompt, 4, pieces, others);
            let expected = expected.get_or_insert_with(|| drawn.clone());
            assert_eq!(*expected, drawn, "{family:?}, capability {capability}, {others} others");
            let mut trainer = trainer_on(gpu, &spec, &weights);
            for batch in [Vec::new(), sequences(&spec)] {
                assert_eq!(trained(&mut trainer, &prompt, &drawn, batch), said(&drawn), "{family:?} on {capability}");
            }
        }
    }
}

#[test]
fn gpu_and_cpu_agree_on_loss_gradient_and_update() {
    let error = |ours: &[f32], theirs: &[f32]| {
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>();
        (squares(&mut ours.iter().zip(theirs).map(|(a, b)| a - b)) / squares(&mut theirs.iter().copied())).sqrt()
    };
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let spec = for_gpu(family);
        let weights = weights(&spec);
        let seqs = sequences(&spec);
        let mut cpu = trainer(&spec, &weights, 2, Isa::detect());
        let expected = cpu.accumulate(&seqs).expect("the sequences fit");
        let mut updated: Option<Vec<Named>> = None;
        for capability in [80, 90] {
            let mut gpu = trainer_on(hopper_arithmetic(capability), &spec, &weights);
            let reports = gpu.accumulate(&seqs).expect("the sequences fit");
            let logprobs =
                |reports: &[Vec<HeadReport>]| reports.iter().flatten().map(|r| r.logprob).collect::<Vec<_>>();
            let off = error(&logprobs(&reports), &logprobs(&expected));
            assert!(off < 0.01, "{family:?}: log-probabilities are off by {off}");
            for ((name, _, ours), (.., theirs)) in
                gpu.gradients().expect("read").iter().zip(cpu.gradients().expect("read"))
            {
                let off = error(ours, &theirs);
                assert!(off < 0.04, "{family:?} {name}: the gradient is off by {off}");
            }
            let norm = gpu.update(1e-3).expect("finite gradients");
            assert!(norm.is_finite() && norm > 0.0);
            assert!(gpu.gradients().expect("read").iter().all(|(.., g)| g.iter().all(|g| *g == 0.0)), "cleared");
            let weights = gpu.weights().expect("read");
            assert!(weights.iter().zip(cpu.weights().expect("read")).all(|(ours, theirs)| ours.2 != theirs.2), "moved");
            assert_eq!(
                *updated.get_or_insert_with(|| weights.clone()),
                weights,
                "{family:?}: other bits on {capability}"
            );
        }
        let cpu_norm = cpu.update(1e-3).expect("finite gradients");
        assert!(cpu_norm > 0.0);
        for ((name, _, ours), (.., theirs)) in updated.expect("two runs").iter().zip(cpu.weights().expect("read")) {
            // The first step of AdamW is about the learning rate, whichever way the gradient points.
            let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 2.1e-3, "{family:?} {name}: weights are off by {off}");
        }
    }
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    fn check<B: Backend>(backend: B) {
        let spec = for_gpu(Family::Qwen2);
        let weights = weights(&spec);
        let mut trainer = trainer_on(backend, &spec, &weights);
        let mut seqs = sequences(&spec);
        seqs[1].targets[3].loss = HeadLoss::Nll { weight: f32::INFINITY };
        trainer.accumulate(&seqs).expect("the sequences fit");
        let before = trainer.weights().expect("read");
        assert!(!trainer.update(1e-3).expect("the device works").is_finite());
        assert_eq!((trainer.weights().expect("read"), trainer.num_updates()), (before, 0));
        assert!(trainer.gradients().expect("read").iter().all(|(.., g)| g.iter().all(|g| *g == 0.0)));
        assert!(trainer.moments().expect("read").iter().all(|(.., g)| g.iter().all(|g| *g == 0.0)));
        trainer.accumulate(&sequences(&spec)).expect("the sequences fit");
        assert!(trainer.update(1e-3).expect("the device works").is_finite());
    }
    check(CpuBackend::new(2).expect("threads start"));
    check(emulated_gpu(90));
}

#[test]
fn the_final_norm_has_a_rate_of_its_own() {
    let spec = tiny(Family::Qwen2);
    let trainer = |final_norm_rate: f32| {
        let backend = CpuBackend::new(1).expect("threads start");
        let decoder = Decoder::new(backend, spec.clone(), &weights(&spec), true).expect("it fits");
        let config = OptimConfig { final_norm_rate, weight_decay: 0.0, ..OptimConfig::default() };
        Trainer::new(decoder, config).expect("it fits")
    };
    let mut trainers = [trainer(1.0), trainer(4.0)];
    let before = trainers[0].weights().expect("read");
    for trainer in &mut trainers {
        trainer.accumulate(&sequences(&spec)).expect("the sequences fit");
        trainer.update(1e-2).expect("finite");
    }
    let [one, four] = trainers.map(|t| t.weights().expect("read"));
    for (((name, _, before), (.., one)), (.., four)) in before.into_iter().zip(one).zip(four) {
        let rate = if name == "model.norm.weight" { 4.0 } else { 1.0 };
        for ((before, one), four) in before.iter().zip(&one).zip(&four) {
            assert!((four - before - rate * (one - before)).abs() < 2e-6, "{name}: {before} to {one} and {four}");
        }
        assert!(before != one, "{name} moves");
    }
}

#[test]
fn activations_computed_again_change_no_bit() {
    fn check<B: Backend + Clone>(backend: &B, spec: &ModelSpec) {
        let weights = weights(spec);
        let run = |recompute| {
            let decoder = Decoder::new(backend.clone(), spec.clone(), &weights, true).expect("it fits");
            let config = OptimConfig { micro_batch_tokens: 50, recompute, ..OptimConfig::default() };
            let mut trainer = Trainer::new(decoder, config).expect("it fits");
            trainer.accumulate(&sequences(spec)).expect("the sequences fit");
            trainer.gradients().expect("read")
        };
        let kept = run(false);
        assert!(kept.iter().any(|(.., g)| g.iter().any(|g| *g != 0.0)));
        assert_eq!(kept, run(true));
    }
    for family in [Family::Qwen2, Family::Qwen3] {
        check(&CpuBackend::new(2).expect("threads start"), &tiny(family));
        check(&emulated_gpu(90), &for_gpu(family));
    }
}

#[test]
fn bf16_moments_resume_to_the_bit_and_move_the_weights_alike() {
    let spec = for_gpu(Family::Qwen3);
    let weights = weights(&spec);
    let trainer = |weights: &[Vec<f32>], moments| {
        let decoder = Decoder::new(emulated_gpu(80), spec.clone(), weights, true).expect("it fits");
        Trainer::new(decoder, OptimConfig { moments, seed: 5, ..OptimConfig::default() }).expect("it fits")
    };
    let step = |t: &mut Trainer<CudaBackend>| {
        t.accumulate(&sequences(&spec)).expect("the sequences fit");
        t.update(1e-3).expect("finite gradients");
    };
    let mut straight = trainer(&weights, MomentPrecision::Bf16);
    (0..2).for_each(|_| step(&mut straight));
    // The same with a checkpoint between the steps.
    let mut first = trainer(&weights, MomentPrecision::Bf16);
    step(&mut first);
    let (saved, moments) = (first.weights().expect("read"), first.moments().expect("read"));
    let find = |all: &[Named], name: &str| all.iter().find(|n| n.0 == name).expect("a name of the table").2.clone();
    let table = ParamTable::new(&spec);
    let read = |i| table.read(i, |name, _| Ok(find(&saved, name))).expect("read");
    let mut resumed = trainer(&(0..table.tensors.len()).map(read).collect::<Vec<_>>(), MomentPrecision::Bf16);
    resumed.restore(1, |name, _| Ok(find(&moments, name))).expect("restored");
    step(&mut resumed);
    assert_eq!(resumed.weights().expect("read"), straight.weights().expect("read"));
    assert_eq!(resumed.moments().expect("read"), straight.moments().expect("read"));
    // Rounding is by chance, so the steps are those of f32 moments on average.
    let mut exact = trainer(&weights, MomentPrecision::F32);
    (0..2).for_each(|_| step(&mut exact));
    let flat =
        |t: &Trainer<CudaBackend>| t.weights().expect("read").into_iter().flat_map(|n| n.2).collect::<Vec<f32>>();
    let (rounded, exact) = (flat(&straight), flat(&exact));
    assert_ne!(rounded, exact);
    let mean: f64 = rounded.iter().zip(&exact).map(|(a, b)| f64::from(a - b)).sum::<f64>() / exact.len() as f64;
    assert!(mean.abs() < 1e-5, "{mean} of steps of 1e-3");
    let cpu = Decoder::new(CpuBackend::new(1).expect("a thread"), spec.clone(), &weights, true).expect("it fits");
    let config = OptimConfig { moments: MomentPrecision::Bf16, ..OptimConfig::default() };
    let refused = Trainer::new(cpu, config).err().expect("the CPU has no bf16 moments");
    assert!(refused.hint().is_some_and(|h| h.contains("train.moments=f32")));
}
