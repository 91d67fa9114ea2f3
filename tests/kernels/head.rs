//! The LM head: drawing, policy reports and gradients, whole logits. The three shapes of the forward pass,
//! head_forward_16, head_forward_64 and head_forward_128, are chosen by the number of rows.

use azr::base::rng::{Purpose, open_unit_f32, philox4x32_10, stream_key};
use azr::compute::cpu::gemm::Isa;
use azr::compute::cpu::{head as cpu, math};
use azr::compute::launch::device::Device;
use azr::compute::launch::head::{
    Blocks, DrawnRow, HeadInput, HeadRow, HeadScratch, PolicyReport, PolicyRow, RowSlope, draw_kept, head_draw,
    head_forward, head_gradient, head_logits, head_policy,
};
use azr::compute::ops::{Draw, Drawn, HeadLoss, HeadReport, HeadTarget};
use azr_kernel_emu::{Arithmetic, Emulator, Schedule};
use half::bf16;

use crate::harness::{Outcome, bytes, compare, device, finds, holds, on_gpu, random_bf16, random_f32, wide};

const SEED: u64 = 0x0123_4567_89ab_cdef;
/// Rows, vocabulary, width: one row, primes, edges of tiles and of blocks of every shape.
const SHAPES: &[(usize, usize, usize)] =
    &[(1, 37, 8), (1, 1000, 24), (13, 1029, 64), (16, 64, 136), (17, 257, 40), (67, 131, 72), (130, 200, 32)];

fn fail(e: azr::Error) -> String {
    e.to_string()
}

/// A batch: hidden rows, weight, and the hidden row of each row of the batch.
struct Batch {
    x: Vec<bf16>,
    w: Vec<bf16>,
    at: Vec<usize>,
    v: usize,
    d: usize,
}

impl Batch {
    /// Random numbers; logits are of the order of 3.
    fn new((t, v, d): (usize, usize, usize)) -> Self {
        let size = 3.0 / (d as f32).sqrt();
        let w = random_bf16(v * d, 2).iter().map(|w| bf16::from_f32(w.to_f32() * size)).collect();
        Batch { x: random_bf16((t + 3) * d, 1), w, at: (0..t).map(|i| (i * 7 + 2) % (t + 3)).collect(), v, d }
    }

    /// Small integers, whose logits are exact in any order and often equal.
    fn exact((t, v, d): (usize, usize, usize)) -> Self {
        let whole = |x: Vec<bf16>| x.iter().map(|x| bf16::from_f32(x.to_f32().round().clamp(-2.0, 2.0))).collect();
        let Batch { x, at, .. } = Batch::new((t, v, d));
        Batch { x: whole(x), w: whole(random_bf16(v * d, 2)), at, v, d }
    }

    /// Logits of a row of the batch in f64.
    fn logits(&self, row: usize) -> Vec<f64> {
        let x = wide(&self.x[self.at[row] * self.d..][..self.d]);
        self.w.chunks(self.d).map(|w| w.iter().zip(&x).map(|(w, x)| w.to_f64() * x).sum()).collect()
    }

    /// Runs something with the batch on the device.
    fn run<T>(
        &self,
        device: &Device,
        rows: &[HeadRow],
        f: impl FnOnce(&HeadInput<'_>) -> azr::Result<T>,
    ) -> Result<T, String> {
        let run = || {
            let (x, w, rows) = (device.upload(&self.x)?, device.upload(&self.w)?, device.upload(rows)?);
            f(&HeadInput { x_td: x.view(), rows: rows.view(), w_vd: w.view(), d: self.d })
        };
        run().map_err(fail)
    }
}

/// log(sum of exp), and entropy.
fn softmax(z: &[f64]) -> (f64, f64) {
    let max = z.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let sum: f64 = z.iter().map(|z| (z - max).exp()).sum();
    let log_sum = max + sum.ln();
    (log_sum, log_sum - z.iter().map(|z| (z - log_sum).exp() * z).sum::<f64>())
}

/// How each row is drawn: hot, cold and greedy.
fn how(row: usize) -> (Draw, u32) {
    let temperature = [1.0, 0.5, 0.0, 2.0][row % 4];
    (Draw { seq: 77 * row as u64 + (5 << 32), temperature, top_p: 1.0, top_k: 0 }, 100 + row as u32)
}

/// The same with top-k, top-p, both, or neither.
fn how_kept(row: usize) -> (Draw, u32) {
    let (how, position) = how(row);
    let (top_k, top_p) = [(0, 0.6), (3, 1.0), (0, 1.0), (20, 0.9), (5, 0.999), (1 << 40, 0.05)][row % 6];
    (Draw { top_k, top_p, ..how }, position)
}

fn draw(device: &Device, batch: &Batch, hows: &[(Draw, u32)]) -> Result<Vec<Drawn>, String> {
    let rows: Vec<HeadRow> =
        batch.at.iter().zip(hows).map(|(at, (how, position))| HeadRow::draw(*at as u32, how, *position)).collect();
    batch.run(device, &rows, |input| {
        let mut scratch = HeadScratch::new(device, rows.len() + 1, batch.v, true)?;
        head_forward(device, input, SEED, &mut scratch)?;
        let mut drawn = device.alloc::<DrawnRow>(rows.len())?;
        head_draw(device, &scratch, &mut drawn.view_mut())?;
        if hows.iter().any(|(how, _)| !how.is_full()) {
            scratch.hold_logits(device)?;
            draw_kept(device, input, SEED, &mut scratch, &mut drawn.view_mut())?;
        }
        Ok(device.download(&drawn.view())?.into_iter().map(Drawn::from).collect())
    })
}

fn drawn_bytes(drawn: &[Drawn]) -> Vec<u8> {
    drawn.iter().flat_map(|d| [d.token, d.logprob.to_bits(), d.entropy.to_bits()]).flat_map(u32::to_le_bytes).collect()
}

/// Gumbel noise of a token, as the CPU has it.
fn noise(how: &Draw, position: u32, token: usize) -> f64 {
    let counter = [token as u32 / 4, position, how.seq as u32, (how.seq >> 32) as u32];
    let word = philox4x32_10(counter, stream_key(SEED, Purpose::Sample))[token % 4];
    f64::from(-math::ln(-math::ln(open_unit_f32(word))))
}

/// Smallest scaled logit that a row keeps, and whether another floor would be as right, but for rounding.
fn floor(z: &[f64], how: &Draw, log_sum: f64) -> (f64, bool) {
    if how.is_full() || how.temperature == 0.0 {
        return (f64::NEG_INFINITY, false);
    }
    let mut sorted = z.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut mass, mut near) = (0.0, false);
    let most = if how.top_k == 0 { z.len() } else { how.top_k.min(z.len()) };
    let by_mass = sorted.iter().take(most).position(|z| {
        mass += (z - log_sum).exp();
        near |= (mass - f64::from(how.top_p)).abs() < 1e-4;
        mass >= f64::from(how.top_p)
    });
    let last = by_mass.filter(|_| how.top_p < 1.0).unwrap_or(most - 1);
    near |= sorted.get(last + 1).is_some_and(|next| sorted[last] - next < 1e-4);
    (sorted[last], near)
}

fn check_draw(device: &Device, shape: (usize, usize, usize)) -> Outcome {
    check_draw_of(device, shape, how)
}

fn check_draw_of(device: &Device, shape: (usize, usize, usize), how: fn(usize) -> (Draw, u32)) -> Outcome {
    let batch = Batch::new(shape);
    let hows: Vec<(Draw, u32)> = (0..shape.0).map(how).collect();
    let drawn = draw(device, &batch, &hows)?;
    for (row, ((how, position), drawn)) in hows.iter().zip(&drawn).enumerate() {
        let factor = if how.temperature > 0.0 { 1.0 / f64::from(how.temperature) } else { 1.0 };
        let z: Vec<f64> = batch.logits(row).iter().map(|z| z * factor).collect();
        let (log_sum, entropy) = softmax(&z);
        let score = |v: usize| z[v] + if how.temperature > 0.0 { noise(how, *position, v) } else { 0.0 };
        let (floor, near) = floor(&z, how, log_sum);
        if near {
            continue;
        }
        let best = (0..z.len()).filter(|v| z[*v] >= floor).map(score).fold(f64::NEG_INFINITY, f64::max);
        let token = drawn.token as usize;
        if z.get(token).is_some_and(|z| *z < floor) {
            return Err(format!("row {row}: token {token} is not kept"));
        }
        if token >= z.len() || score(token) < best - 1e-4 {
            return Err(format!("row {row}: token {token} is not the best"));
        }
        compare(&format!("log-probability of row {row}"), &[drawn.logprob], &[z[token] - log_sum], 3e-5)?;
        compare(&format!("entropy of row {row}"), &[drawn.entropy], &[entropy], 3e-5)?;
    }
    Ok(drawn_bytes(&drawn))
}

/// With exact logits the token is the CPU's, equals included.
fn check_exact_draw(device: &Device, shape: (usize, usize, usize), how: fn(usize) -> (Draw, u32)) -> Outcome {
    let batch = Batch::exact(shape);
    let hows: Vec<(Draw, u32)> = (0..shape.0).map(how).collect();
    let drawn = draw(device, &batch, &hows)?;
    for (row, ((how, position), drawn)) in hows.iter().zip(&drawn).enumerate() {
        let mut logits: Vec<f32> = batch.logits(row).iter().map(|z| *z as f32).collect();
        let want = cpu::draw(Isa::detect(), &mut logits, how, *position, SEED);
        if drawn.token != want.token {
            return Err(format!("row {row}: token {} for the CPU's {}", drawn.token, want.token));
        }
        compare("log-probability", &[drawn.logprob], &[f64::from(want.logprob)], 3e-5)?;
        compare("entropy", &[drawn.entropy], &[f64::from(want.entropy)], 3e-5)?;
    }
    Ok(drawn_bytes(&drawn))
}

/// A target for each row: likelihood losses, clipped and unclipped ratios of both signs.
fn target(batch: &Batch, row: usize) -> HeadTarget {
    let inv_temperature = [1.0, 0.8, 1.25][row % 3];
    let token = (row * row * 5 + row + batch.v - 1) % batch.v;
    let z: Vec<f64> = batch.logits(row).iter().map(|z| z * f64::from(inv_temperature)).collect();
    let logprob = (z[token] - softmax(&z).0) as f32;
    let advantage = random_f32(row + 1, 5)[row];
    // Ratios of 0.5, 0.9, 1.1 and 2 with clips at 0.8 and 1.3.
    let old_logprob = logprob - [-0.7f32, -0.1, 0.1, 0.7][row / 2 % 4];
    let kind = match row % 5 {
        1 => HeadLoss::Nll { weight: 0.6 },
        _ => HeadLoss::Clipped { advantage, old_logprob, low: 0.2, high: 0.3, weight: 0.4 },
    };
    HeadTarget { row: batch.at[row], token: token as u32, inv_temperature, kind, entropy_coef: [0.0, 0.05][row % 2] }
}

/// Report and gradient of a row in f64.
fn policy_reference(batch: &Batch, row: usize, target: &HeadTarget) -> (HeadReport, Vec<f64>) {
    let inv = f64::from(target.inv_temperature);
    let z: Vec<f64> = batch.logits(row).iter().map(|z| z * inv).collect();
    let (log_sum, entropy) = softmax(&z);
    let logprob = z[target.token as usize] - log_sum;
    let (loss, slope, clipped) = match target.kind {
        HeadLoss::Nll { weight } => (-f64::from(weight) * logprob, -f64::from(weight), false),
        HeadLoss::Clipped { advantage, old_logprob, low, high, weight } => {
            let (advantage, weight) = (f64::from(advantage), f64::from(weight));
            let ratio = (logprob - f64::from(old_logprob)).exp();
            let plain = -advantage * ratio;
            let bounded = -advantage * ratio.clamp(1.0 - f64::from(low), 1.0 + f64::from(high));
            if bounded > plain { (weight * bounded, 0.0, true) } else { (weight * plain, weight * plain, false) }
        }
    };
    let bonus = f64::from(target.entropy_coef);
    let grad = z.iter().enumerate().map(|(v, z)| {
        let log_p = z - log_sum;
        let of_entropy = log_p.exp() * (log_p + entropy);
        (slope * (f64::from(u8::from(v == target.token as usize)) - log_p.exp()) + bonus * of_entropy) * inv
    });
    let loss = loss - bonus * entropy;
    let report = HeadReport { logprob: logprob as f32, entropy: entropy as f32, loss: loss as f32, clipped };
    (report, grad.collect())
}

/// Reports, and gradients in chunks of `width` tokens put side by side, with what lies past the vocabulary's end.
fn policy(
    device: &Device,
    batch: &Batch,
    targets: &[HeadTarget],
    width: usize,
) -> Result<(Vec<HeadReport>, Vec<Vec<bf16>>), String> {
    let rows: Vec<HeadRow> = targets.iter().map(HeadRow::target).collect();
    let losses: Vec<PolicyRow> = targets.iter().map(PolicyRow::new).collect();
    batch.run(device, &rows, |input| {
        let (t, losses) = (rows.len(), device.upload(&losses)?);
        let mut scratch = HeadScratch::new(device, t, batch.v, false)?;
        head_forward(device, input, SEED, &mut scratch)?;
        let (mut reports, mut slopes) = (device.alloc::<PolicyReport>(t)?, device.alloc::<RowSlope>(t)?);
        head_policy(device, &scratch, &losses.view(), &mut reports.view_mut(), &mut slopes.view_mut())?;
        let mut grads = vec![Vec::new(); t];
        for token0 in (0..batch.v).step_by(width) {
            // The last chunk is as wide as it must be.
            let width = width.min((batch.v - token0).next_multiple_of(8));
            let mut dz = device.alloc::<bf16>(t * width)?;
            head_gradient(device, input, &slopes.view(), (token0, width), &mut dz.view_mut())?;
            let dz = device.download(&dz.view())?;
            grads.iter_mut().zip(dz.chunks(width)).for_each(|(grad, dz)| grad.extend_from_slice(dz));
        }
        Ok((device.download(&reports.view())?.into_iter().map(HeadReport::from).collect(), grads))
    })
}

fn check_policy(device: &Device, shape: (usize, usize, usize), width: usize) -> Outcome {
    let batch = Batch::new(shape);
    let targets: Vec<HeadTarget> = (0..shape.0).map(|row| target(&batch, row)).collect();
    let (reports, grads) = policy(device, &batch, &targets, width)?;
    let mut bits = Vec::new();
    for (row, ((target, report), grad)) in targets.iter().zip(&reports).zip(&grads).enumerate() {
        let (want, mut want_grad) = policy_reference(&batch, row, target);
        if report.clipped != want.clipped {
            return Err(format!("row {row}: clipped {} for {}", report.clipped, want.clipped));
        }
        let numbers = |r: &HeadReport| [r.logprob, r.entropy, r.loss];
        compare(&format!("report of row {row}"), &numbers(report), &numbers(&want).map(f64::from), 3e-5)?;
        want_grad.resize(grad.len(), 0.0);
        compare(&format!("gradient of row {row}"), grad, &want_grad, 1e-5)?;
        bits.extend([bytes(&numbers(report)), bytes(grad)].concat());
    }
    Ok(bits)
}

fn check_logits(device: &Device, (t, v, d): (usize, usize, usize)) -> Outcome {
    let batch = Batch::new((t, v, d));
    let rows: Vec<HeadRow> = batch.at.iter().map(|at| HeadRow::logits(*at as u32)).collect();
    let logits = batch.run(device, &rows, |input| {
        let mut logits = device.alloc::<f32>(t * v)?;
        head_logits(device, input, &mut logits.view_mut())?;
        device.download(&logits.view())
    })?;
    let want: Vec<f64> = (0..t).flat_map(|row| batch.logits(row)).collect();
    compare("logits", &logits, &want, 2e-5)?;
    Ok(bytes(&logits))
}

#[test]
fn head_forward_and_head_draw_are_right() {
    let names: Vec<&str> = [16, 64, 128].map(|rows| Blocks::of(rows).name).to_vec();
    assert_eq!(names, ["head_forward_16", "head_forward_64", "head_forward_128"]);
    for shape in SHAPES {
        holds(|device| check_draw(device, *shape).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
}

#[test]
fn head_draw_takes_the_token_of_the_cpu() {
    for shape in [(5, 37, 8), (3, 1029, 16), (65, 200, 8)] {
        holds(|device| check_exact_draw(device, shape, how).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
}

#[test]
fn draw_kept_is_right_and_takes_the_token_of_the_cpu() {
    for shape in [(1, 37, 8), (6, 600, 24), (66, 70, 16)] {
        holds(|device| check_draw_of(device, shape, how_kept).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
    for shape in [(66, 37, 8), (6, 700, 8)] {
        holds(|device| check_exact_draw(device, shape, how_kept).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
}

#[test]
fn head_policy_and_head_gradient_are_right() {
    for shape in SHAPES {
        let width = [64, 136, 1000][shape.2 % 3];
        holds(|device| check_policy(device, *shape, width).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
}

#[test]
fn head_logits_are_right() {
    for shape in SHAPES {
        holds(|device| check_logits(device, *shape).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
}

#[test]
fn batches_without_rows_launch_nothing() {
    holds(|device| {
        check_draw(device, (0, 64, 8))?;
        check_policy(device, (0, 64, 8), 64)?;
        check_logits(device, (0, 64, 8))
    });
}

/// What the rollout reports of a token has the bits of what the training forward computes of it, whatever stands beside
/// the row in either batch.
#[test]
fn rollout_and_training_have_the_same_bits_in_any_batch() {
    let device = device();
    let all = Batch::new((131, 301, 88));
    let hows: Vec<(Draw, u32)> =
        (0..131).map(how).map(|(h, p)| (Draw { temperature: h.temperature.max(0.25), ..h }, p)).collect();
    let part = |rows: &[usize]| Batch {
        x: all.x.clone(),
        w: all.w.clone(),
        at: rows.iter().map(|r| all.at[*r]).collect(),
        v: all.v,
        d: all.d,
    };
    for arithmetic in [Arithmetic::Plain, Arithmetic::Hopper, Arithmetic::Ampere] {
        if !on_gpu() {
            Emulator::get().schedule(Schedule { arithmetic, ..Schedule::PLAIN });
        }
        let drawn = draw(&device, &all, &hows).expect("a draw");
        let ask = |rows: &[usize]| {
            let again = draw(&device, &part(rows), &rows.iter().map(|r| hows[*r]).collect::<Vec<_>>());
            let targets: Vec<HeadTarget> = rows
                .iter()
                .map(|r| HeadTarget {
                    row: all.at[*r],
                    token: drawn[*r].token,
                    inv_temperature: 1.0 / hows[*r].0.temperature,
                    kind: HeadLoss::Nll { weight: 1.0 },
                    entropy_coef: 0.1,
                })
                .collect();
            let (reports, grads) = policy(&device, &part(rows), &targets, 304).expect("a policy");
            (again.expect("a draw"), reports, grads)
        };
        let everything: Vec<usize> = (0..131).collect();
        let (_, _, all_grads) = ask(&everything);
        for rows in [&[5][..], &[130, 7], &everything[3..20], &everything[40..105], &everything] {
            let (again, reports, grads) = ask(rows);
            for (i, row) in rows.iter().enumerate() {
                let bits = |logprob: f32, entropy: f32| (logprob.to_bits(), entropy.to_bits());
                let want = bits(drawn[*row].logprob, drawn[*row].entropy);
                assert_eq!(again[i].token, drawn[*row].token, "row {row} of {rows:?} under {arithmetic:?}");
                assert_eq!(
                    bits(again[i].logprob, again[i].entropy),
                    want,
                    "row {row} of {rows:?} under {arithmetic:?}"
                );
                assert_eq!(bits(reports[i].logprob, reports[i].entropy), want, "training row {row} of {rows:?}");
                assert_eq!(grads[i], all_grads[*row], "gradient of row {row} of {rows:?} under {arithmetic:?}");
            }
        }
        if on_gpu() {
            break;
        }
    }
}

#[test]
fn loads_of_matrices_have_no_bank_conflicts() {
    if on_gpu() {
        return;
    }
    let (device, emulator) = (device(), Emulator::get());
    emulator.schedule(Schedule::PLAIN);
    for shape in [(3, 300, 64), (40, 300, 64), (129, 300, 64)] {
        emulator.take_stats();
        check_draw(&device, shape).expect("a right draw");
        let stats = emulator.take_stats();
        assert!(stats.mmas > 0 && stats.bank_replays == 0, "{stats:?} for {shape:?}");
    }
}

#[test]
fn planted_faults_are_found() {
    for fault in ["head_no_wait", "head_no_barrier", "head_vocabulary_end", "head_noise_counter"] {
        finds(fault, |device| check_draw(device, (13, 301, 200)));
    }
    // With one stage, logits overwrite the one being read.
    finds("head_no_last_barrier", |device| check_draw(device, (13, 301, 8)));
    finds("head_last_of_equals", |device| check_exact_draw(device, (5, 200, 8), how));
    finds("keep_either", |device| check_draw_of(device, (12, 300, 8), how_kept));
    for fault in ["keep_no_equals", "keep_no_barrier"] {
        finds(fault, |device| check_exact_draw(device, (6, 700, 8), how_kept));
    }
    finds("head_merge_no_barrier", |device| check_draw(device, (2, 301, 8)));
    for fault in ["head_no_share_sync", "head_no_reuse_sync"] {
        finds(fault, |device| check_draw(device, (67, 64, 8)));
    }
    finds("head_logits_index", |device| check_logits(device, (2, 100, 8)));
    for fault in ["head_never_clips", "head_no_target", "head_gradient_end"] {
        finds(fault, |device| check_policy(device, (13, 37, 8), 64));
    }
}
