//! The optimiser: gradient norm, clip factor, AdamW.

use azr::base::rng::{Purpose, philox4x32_10, stream_key};
use azr::compute::cpu::gemm::Isa;
use azr::compute::cpu::rows;
use azr::compute::launch::device::Device;
use azr::compute::launch::optim::{
    ClipState, Parameter, Rounding, adamw_bf16, adamw_f32, clip_factor, join_master, norm_blocks, norm_partials,
    split_master,
};
use azr::compute::ops::AdamW;
use half::bf16;

use crate::harness::{Outcome, bytes, finds, holds, random_f32};

/// Lengths: nothing, the smallest, eights of primes, just over a block of an update or of a norm.
const LENGTHS: &[usize] = &[0, 8, 8 * 13, 8 * 257, 32_768 + 8];
const CLIP: f32 = 1.5;
/// Clip factor of steps with bf16 moments.
const SCALE: f32 = 0.5;

fn fail(e: azr::Error) -> String {
    e.to_string()
}

fn hyper(step: u64) -> AdamW {
    AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step, seed: 0, parameter: 0 }
}

/// Sums of squares and clip factor of some gradients.
fn norm(device: &Device, grads: &[Vec<f32>], max_norm: f32) -> azr::Result<(Vec<f64>, ClipState)> {
    let mut partial = device.alloc::<f64>(grads.iter().map(|g| norm_blocks(g.len())).sum())?;
    let mut at = 0;
    for grad in grads {
        let (g, blocks) = (device.upload(grad)?, norm_blocks(grad.len()));
        norm_partials(device, &g.view(), &mut partial.view_mut().part(at, blocks))?;
        at += blocks;
    }
    let mut clip = device.alloc::<ClipState>(1)?;
    clip_factor(device, &partial.view(), max_norm, &mut clip.view_mut())?;
    Ok((device.download(&partial.view())?, device.download(&clip.view())?[0]))
}

fn check_norm(device: &Device) -> Outcome {
    let mut grads: Vec<Vec<f32>> = (0u32..).zip(LENGTHS).map(|(i, n)| random_f32(*n, i)).collect();
    let (partial, clip) = norm(device, &grads, CLIP).map_err(fail)?;
    let want = grads.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let scale = (f64::from(CLIP) / (want + 1e-6)) as f32;
    if (clip.norm - want).abs() > 1e-12 * want || (clip.scale - scale).abs() > 1e-7 * scale || clip.broken != 0 {
        return Err(format!("{clip:?} for a norm of {want} and a factor of {scale}"));
    }
    let (_, free) = norm(device, &grads, 0.0).map_err(fail)?;
    let (_, loose) = norm(device, &grads, 1e9).map_err(fail)?;
    if (free.scale, loose.scale) != (1.0, 1.0) {
        return Err(format!("a short gradient is clipped: {free:?}, {loose:?}"));
    }
    for wrong in [f32::NAN, f32::INFINITY] {
        grads[2][5] = wrong;
        let (_, clip) = norm(device, &grads, CLIP).map_err(fail)?;
        if clip.broken != 1 || clip.norm.is_finite() {
            return Err(format!("{wrong} gives {clip:?}"));
        }
    }
    Ok([bytes(&partial), bytes(&[clip])].concat())
}

/// Weights, gradients and moments of `n` elements.
struct State {
    p: Vec<f32>,
    g: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl State {
    fn new(n: usize) -> Self {
        let v = random_f32(n, 14).iter().map(|x| x * x).collect();
        State { p: random_f32(n, 11), g: random_f32(n, 12), m: random_f32(n, 13), v }
    }

    fn parts(&self) -> (Vec<bf16>, Vec<u16>) {
        self.p.iter().map(|p| split_master(*p)).unzip()
    }
}

/// The master weights; the working weights must be the nearest bf16.
fn masters(weight: &[bf16], tail: &[u16]) -> Result<Vec<f32>, String> {
    let joined: Vec<f32> = weight.iter().zip(tail).map(|(w, t)| join_master(*w, *t)).collect();
    for (w, p) in weight.iter().zip(&joined) {
        if (w.to_f32() - p).abs() > (bf16::from_f32(*p).to_f32() - p).abs() {
            return Err(format!("{w} is not the nearest to {p}"));
        }
    }
    Ok(joined)
}

fn same(what: &str, got: &[f32], want: &[f32]) -> Result<(), String> {
    match got.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(i) => Err(format!("{what}: element {i} is {}, the CPU has {}", got[i], want[i])),
    }
}

/// What the f64 update makes of an element.
fn reference(state: &State, i: usize, scale: f32, h: &AdamW) -> f64 {
    let (g, b1, b2) = (f64::from(state.g[i]) * f64::from(scale), f64::from(h.beta1), f64::from(h.beta2));
    let m = b1 * f64::from(state.m[i]) + (1.0 - b1) * g;
    let v = b2 * f64::from(state.v[i]) + (1.0 - b2) * g * g;
    let (m, v) = (m / (1.0 - b1.powi(h.step as i32)), v / (1.0 - b2.powi(h.step as i32)));
    let rate = f64::from(h.learning_rate);
    let p = f64::from(state.p[i]);
    p - rate * f64::from(h.weight_decay) * p - rate * m / (v.sqrt() + f64::from(h.eps))
}

/// Three steps against the CPU, to the bit, and the first against f64.
fn check_f32(device: &Device, n: usize) -> Outcome {
    let mut state = State::new(n);
    let scale = 0.37f32;
    let clip = device.upload(&[ClipState { norm: 1.0, scale, broken: 0 }]).map_err(fail)?;
    let (weight, tail) = state.parts();
    let start =
        || Ok((device.upload(&weight)?, device.upload(&tail)?, device.upload(&state.m)?, device.upload(&state.v)?));
    let (mut weight, mut tail, mut m, mut v) = start().map_err(fail)?;
    for step in 1..=3 {
        let h = hyper(step);
        let mut run = || {
            let mut g = device.upload(&state.g)?;
            let (weight, tail, grad) = (weight.view_mut(), tail.view_mut(), g.view_mut());
            let moments = (&mut m.view_mut(), &mut v.view_mut());
            adamw_f32(device, &mut Parameter { weight, tail, grad }, moments, &clip.view(), &h)?;
            device.download(&g.view())
        };
        let cleared: Vec<f32> = run().map_err(fail)?;
        if cleared.iter().any(|g| g.to_bits() != 0) {
            return Err("the gradient is not zero afterwards".to_owned());
        }
        let wide: Vec<f64> = (0..n).map(|i| reference(&state, i, scale, &h)).collect();
        rows::adamw(Isa::detect(), &mut state.p, &state.g, &mut state.m, &mut state.v, scale, &h);
        let read = || Ok((device.download(&weight.view())?, device.download(&tail.view())?));
        let (new_weight, new_tail) = read().map_err(fail)?;
        let p = masters(&new_weight, &new_tail)?;
        same("weights", &p, &state.p)?;
        if let Some(i) = (0..n).find(|i| (f64::from(p[*i]) - wide[*i]).abs() > 1e-6 * (1.0 + wide[*i].abs())) {
            return Err(format!("weight {i} is {}, not {}", p[i], wide[i]));
        }
    }
    let (m, v) = (device.download(&m.view()).map_err(fail)?, device.download(&v.view()).map_err(fail)?);
    same("first moments", &m, &state.m)?;
    same("second moments", &v, &state.v)?;
    Ok([bytes(&state.p), bytes(&m), bytes(&v)].concat())
}

/// Masters, first and second moments.
type Stepped = (Vec<f32>, Vec<bf16>, Vec<bf16>);

/// What a step with bf16 moments makes of a state.
fn step_bf16(device: &Device, state: &State, h: &AdamW, rounding: Rounding, broken: u32) -> Result<Stepped, String> {
    let narrow = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (weight, tail) = state.parts();
    let run = || {
        let clip = device.upload(&[ClipState { norm: 1.0, scale: SCALE, broken }])?;
        let (mut weight, mut tail, mut g) = (device.upload(&weight)?, device.upload(&tail)?, device.upload(&state.g)?);
        let (mut m, mut v) = (device.upload(&narrow(&state.m))?, device.upload(&narrow(&state.v))?);
        let mut parameter = Parameter { weight: weight.view_mut(), tail: tail.view_mut(), grad: g.view_mut() };
        let moments = (&mut m.view_mut(), &mut v.view_mut());
        adamw_bf16(device, &mut parameter, moments, &clip.view(), h, rounding)?;
        let moments = (device.download(&m.view())?, device.download(&v.view())?);
        Ok((device.download(&weight.view())?, device.download(&tail.view())?, device.download(&g.view())?, moments))
    };
    let (weight, tail, g, (m, v)) = run().map_err(fail)?;
    if g.iter().any(|g| g.to_bits() != 0) {
        return Err("the gradient is not zero afterwards".to_owned());
    }
    Ok((masters(&weight, &tail)?, m, v))
}

/// Stochastic rounding by the counter, element by element.
fn rounded(x: &[f32], rounding: Rounding, step: u64, moment: u32) -> Vec<f32> {
    let key = stream_key(rounding.seed, Purpose::Round);
    let one = |(i, x): (usize, &f32)| {
        let counter = [(i / 8) as u32, rounding.parameter * 2 + moment, step as u32, (step >> 32) as u32];
        let noise = philox4x32_10(counter, key)[i % 8 / 2] >> (i % 2 * 16) & 0xffff;
        f32::from_bits((x.to_bits() + noise) & 0xffff_0000)
    };
    x.iter().enumerate().map(one).collect()
}

fn check_bf16(device: &Device, n: usize) -> Outcome {
    let mut state = State::new(n);
    for x in state.m.iter_mut().chain(&mut state.v) {
        *x = bf16::from_f32(*x).to_f32();
    }
    let (h, rounding) = (hyper(7), Rounding { seed: 0x1234_5678_9abc, parameter: 3 });
    let (p, m, v) = step_bf16(device, &state, &h, rounding, 0)?;
    let (before_m, before_p, before_v) = (state.m.clone(), state.p.clone(), state.v.clone());
    rows::adamw(Isa::detect(), &mut state.p, &state.g, &mut state.m, &mut state.v, SCALE, &h);
    let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    same("weights", &p, &state.p)?;
    same("first moments", &wide(&m), &rounded(&state.m, rounding, 7, 0))?;
    same("second moments", &wide(&v), &rounded(&state.v, rounding, 7, 1))?;
    if n > 1000 {
        // Each error is uniform within a unit of the last place, at most 2^-7 of the value.
        let error: f64 = wide(&v).iter().zip(&state.v).map(|(a, b)| f64::from((a - b) / b.max(1e-30))).sum();
        if (error / n as f64).abs() > 5.0 / 128.0 / (12.0 * n as f64).sqrt() {
            return Err(format!("rounding is biased by {}", error / n as f64));
        }
    }
    let bits = [bytes(&p), bytes(&m), bytes(&v)].concat();
    let untouched = State { p: before_p, m: before_m, v: before_v, g: state.g };
    let (p, m, v) = step_bf16(device, &untouched, &h, rounding, 1)?;
    same("weights after a broken gradient", &p, &untouched.p)?;
    same("first moments after a broken gradient", &wide(&m), &untouched.m)?;
    same("second moments after a broken gradient", &wide(&v), &untouched.v)?;
    Ok(bits)
}

#[test]
fn norm_partials_and_clip_factor_are_right() {
    holds(check_norm);
}

#[test]
fn adamw_f32_has_the_bits_of_the_cpu() {
    for n in LENGTHS {
        holds(|device| check_f32(device, *n));
    }
}

#[test]
fn adamw_bf16_rounds_moments_by_chance_and_without_bias() {
    for n in LENGTHS {
        holds(|device| check_bf16(device, *n));
    }
}

#[test]
fn planted_faults_are_found() {
    finds("norm_no_barrier", check_norm);
    finds("clip_no_flag", check_norm);
    finds("adamw_no_carry", |device| check_f32(device, 104));
    finds("adamw_keeps_gradient", |device| check_f32(device, 104));
    finds("adamw_same_noise", |device| check_bf16(device, 104));
}
