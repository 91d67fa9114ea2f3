//! Whole-model checks: gradients against finite differences for all families, and decode bits = training bits.

use crate::base::rng::{Purpose, Rng};
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::cpu::gemm::Isa;
use crate::compute::ops::{Draw, HeadLoss, PAGE};
use crate::model::forward::{Decoder, SeqRows};
use crate::model::params::ParamTable;
use crate::train::loss::{TokenTarget, TrainSeq, nll_sequence};
use crate::train::optim::{OptimConfig, Trainer};
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
    let backend = CpuBackend::with_isa(threads, isa).expect("threads start");
    let config =
        OptimConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, grad_clip: 1.0, micro_batch_tokens: 50 };
    Trainer::new(Decoder::new(backend, spec.clone(), weights, true), config)
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
    trainer.clear_gradients();
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
        trainer.clear_gradients();
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
            (norm, trainer.weights(), trainer.moments())
        };
        let expected = run(1, Isa::detect());
        assert_eq!(expected, run(3, Isa::detect()));
        assert_eq!(expected, run(2, Isa::Portable));
    }
}

/// Draws `n` tokens after a prompt that is taken in in pieces of the given sizes, beside other sequences.
fn sample(
    decoder: &Decoder<CpuBackend>,
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

#[test]
fn sampled_logprobs_are_the_trainers_whatever_the_batch() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let spec = tiny(family);
        let weights = weights(&spec);
        let decoder = |threads, isa| {
            Decoder::new(CpuBackend::with_isa(threads, isa).expect("threads start"), spec.clone(), &weights, false)
        };
        let prompt = tokens(&spec, PAGE + 5, 7);
        let expected = sample(&decoder(1, Isa::detect()), &prompt, 30, 100, 0);
        for (threads, isa, pieces, others) in
            [(2, Isa::detect(), 1, 3), (3, Isa::detect(), 6, 1), (1, Isa::Portable, 17, 4), (2, Isa::detect(), 100, 5)]
        {
            assert_eq!(expected, sample(&decoder(threads, isa), &prompt, 30, pieces, others), "{family:?}");
        }
        let response: Vec<u32> = expected.iter().map(|d| d.0).collect();
        let targets = (0..response.len()).map(|i| TokenTarget {
            at: prompt.len() + i,
            loss: HeadLoss::Nll { weight: 1.0 },
            entropy_coef: 0.0,
        });
        let seq = TrainSeq {
            tokens: [prompt.clone(), response].concat(),
            inv_temperature: 1.0 / 0.9,
            targets: targets.collect(),
        };
        let mut batch = sequences(&spec);
        batch.insert(2, seq);
        let reports = trainer(&spec, &weights, 2, Isa::detect()).accumulate(&batch).expect("the sequences fit");
        let trained: Vec<(u32, u32)> = reports[2].iter().map(|r| (r.logprob.to_bits(), r.entropy.to_bits())).collect();
        assert_eq!(trained, expected.iter().map(|d| (d.1, d.2)).collect::<Vec<_>>(), "{family:?}");
    }
}
