//! The LM head's rows: softmax statistics, sampling, and the policy-gradient loss with its gradient.

use crate::base::rng::{Purpose, open_unit_f32, philox4x32_10, stream_key};
use crate::compute::cpu::math::{LANES, exp, ln, tree_sum};
use crate::compute::cpu::rows::multiversion;
use crate::compute::ops::{Draw, Drawn, HeadLoss, HeadReport, HeadTarget};

/// Maximum, sum of `exp(z - max)` and sum of `exp(z - max) z` of a row.
#[derive(Debug, Clone, Copy)]
pub struct Softmax {
    max: f32,
    sum: f32,
    weighted: f32,
}

impl Softmax {
    fn log_sum(self) -> f32 {
        self.max + ln(self.sum)
    }

    fn logprob(self, z: f32) -> f32 {
        z - self.log_sum()
    }

    fn entropy(self) -> f32 {
        self.log_sum() - self.weighted / self.sum
    }
}

#[inline(always)]
fn softmax(z: &[f32]) -> Softmax {
    let mut max = [f32::NEG_INFINITY; LANES];
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let chunks = z.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks.clone() {
        for lane in 0..LANES {
            max[lane] = larger(max[lane], chunk[lane]);
        }
    }
    let max = max.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(a, *b));
    let (mut sum, mut weighted) = ([0.0f32; LANES], [0.0f32; LANES]);
    for chunk in chunks {
        for lane in 0..LANES {
            let e = exp(chunk[lane] - max);
            sum[lane] += e;
            weighted[lane] = e.mul_add(chunk[lane], weighted[lane]);
        }
    }
    for (lane, z) in rest.iter().enumerate() {
        let e = exp(z - max);
        sum[lane] += e;
        weighted[lane] = e.mul_add(*z, weighted[lane]);
    }
    Softmax { max, sum: tree_sum(sum), weighted: tree_sum(weighted) }
}

#[inline(always)]
fn scale(z: &mut [f32], factor: f32) {
    for z in z {
        *z *= factor;
    }
}

multiversion! {
    /// Draws a token from a row of logits, which it overwrites.
    pub fn draw(logits: &mut [f32], how: &Draw, position: u32, seed: u64) -> Drawn = draw_body
}

#[inline(always)]
fn draw_body(logits: &mut [f32], how: &Draw, position: u32, seed: u64) -> Drawn {
    if how.temperature > 0.0 {
        scale(logits, 1.0 / how.temperature);
    }
    let stats = softmax(logits);
    let floor = if how.temperature > 0.0 { support_floor(logits, stats, how) } else { f32::NEG_INFINITY };
    let token =
        if how.temperature > 0.0 { gumbel_argmax(logits, floor, how.seq, position, seed) } else { argmax(logits) };
    Drawn { token: token as u32, logprob: stats.logprob(logits[token]), entropy: stats.entropy() }
}

fn argmax(z: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in z.iter().enumerate() {
        if *value > z[best] {
            best = i;
        }
    }
    best
}

/// Index of the largest `z + Gumbel noise`; the noise of entry v is a pure function of (seed, sequence, position, v).
#[inline(always)]
fn gumbel_argmax(z: &[f32], floor: f32, seq: u64, position: u32, seed: u64) -> usize {
    let key = stream_key(seed, Purpose::Sample);
    let (mut best, mut best_at) = (f32::NEG_INFINITY, 0);
    for (b, chunk) in z.chunks(LANES).enumerate() {
        let mut noise = [0.0f32; LANES];
        for q in 0..LANES / 4 {
            let words = philox4x32_10([(b * (LANES / 4) + q) as u32, position, seq as u32, (seq >> 32) as u32], key);
            for (i, word) in words.iter().enumerate() {
                noise[q * 4 + i] = open_unit_f32(*word);
            }
        }
        for x in &mut noise {
            *x = -ln(-ln(*x));
        }
        for (i, (z, g)) in chunk.iter().zip(&noise).enumerate() {
            if *z >= floor && z + g > best {
                (best, best_at) = (z + g, b * LANES + i);
            }
        }
    }
    best_at
}

/// Smallest logit that top-k and top-p keep.
fn support_floor(z: &[f32], stats: Softmax, how: &Draw) -> f32 {
    if how.is_full() {
        return f32::NEG_INFINITY;
    }
    let mut sorted: Vec<f32> = z.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut keep = if how.top_k == 0 { sorted.len() } else { how.top_k.min(sorted.len()) };
    let mut mass = 0.0;
    for (i, z) in sorted.iter().take(keep).enumerate() {
        mass += exp(z - stats.max) / stats.sum;
        if mass >= how.top_p {
            keep = i + 1;
            break;
        }
    }
    sorted[keep - 1]
}

multiversion! {
    /// Report of one token from its row of logits; with `gradient` the row becomes the loss's gradient.
    pub fn policy(logits: &mut [f32], target: &HeadTarget, gradient: bool) -> HeadReport = policy_body
}

#[inline(always)]
fn policy_body(logits: &mut [f32], target: &HeadTarget, gradient: bool) -> HeadReport {
    scale(logits, target.inv_temperature);
    let stats = softmax(logits);
    let (logprob, entropy) = (stats.logprob(logits[target.token as usize]), stats.entropy());
    let (loss, slope, clipped) = match target.kind {
        HeadLoss::Nll { weight } => (-weight * logprob, -weight, false),
        HeadLoss::Clipped { advantage, old_logprob, low, high, weight } => {
            let ratio = exp(logprob - old_logprob);
            let plain = -advantage * ratio;
            let bounded = -advantage * ratio.clamp(1.0 - low, 1.0 + high);
            if bounded > plain { (weight * bounded, 0.0, true) } else { (weight * plain, weight * plain, false) }
        }
    };
    if gradient {
        let (log_sum, bonus) = (stats.log_sum(), target.entropy_coef);
        for z in logits.iter_mut() {
            let log_p = *z - log_sum;
            // d(logprob)/dz = onehot - p; d(entropy)/dz = -p (log p + entropy).
            *z = exp(log_p) * (-slope + bonus * (log_p + entropy)) * target.inv_temperature;
        }
        logits[target.token as usize] += slope * target.inv_temperature;
    }
    HeadReport { logprob, entropy, loss: loss - target.entropy_coef * entropy, clipped }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;
    use crate::compute::cpu::gemm::Isa;

    fn how(temperature: f32, top_p: f32, top_k: usize, seq: u64) -> Draw {
        Draw { seq, temperature, top_p, top_k }
    }

    #[test]
    fn samples_follow_the_softmax() {
        let logits = [0.0f32, 1.0, -1.0, 0.5, 2.0, -0.5];
        let total: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        let n = 20_000;
        let mut counts = [0u32; 6];
        for seq in 0..n {
            let mut row = logits;
            let drawn = draw(Isa::detect(), &mut row, &how(1.0, 1.0, 0, seq), 3, 11);
            counts[drawn.token as usize] += 1;
            let exact = f64::from(logits[drawn.token as usize]) - total.ln();
            assert!((f64::from(drawn.logprob) - exact).abs() < 1e-6);
        }
        let chi2: f64 = (0..6)
            .map(|i| {
                let expected = f64::from(logits[i]).exp() / total * n as f64;
                (f64::from(counts[i]) - expected).powi(2) / expected
            })
            .sum();
        assert!(chi2 < 20.5, "chi-square {chi2} of 5 degrees of freedom, {counts:?}");
    }

    #[test]
    fn greedy_top_k_and_top_p_keep_the_likeliest() {
        let logits = [0.0f32, 3.0, 3.0, -4.0];
        for seq in 0..200 {
            let token = |how| draw(Isa::detect(), &mut logits.clone(), &how, 0, 5).token;
            assert_eq!(token(how(0.0, 1.0, 0, seq)), 1, "the first of equals");
            assert!([1, 2].contains(&token(how(1.0, 1.0, 2, seq))));
            assert!([1, 2].contains(&token(how(1.0, 0.9, 0, seq))));
        }
    }

    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let mut rng = Rng::new(3, Purpose::Test, 0, 0);
        let logits: Vec<f32> = (0..19).map(|_| rng.normal() as f32).collect();
        let clipped =
            |advantage, old_logprob| HeadLoss::Clipped { advantage, old_logprob, low: 0.2, high: 0.2, weight: 0.7 };
        for kind in [HeadLoss::Nll { weight: 1.3 }, clipped(1.0, -2.9), clipped(-2.0, -3.1), clipped(3.0, -9.0)] {
            let target = HeadTarget { row: 0, token: 4, inv_temperature: 0.8, kind, entropy_coef: 0.05 };
            let mut grad = logits.clone();
            policy(Isa::detect(), &mut grad, &target, true);
            for i in 0..logits.len() {
                let at = |delta: f32| {
                    let mut row = logits.clone();
                    row[i] += delta;
                    f64::from(policy(Isa::Portable, &mut row, &target, false).loss)
                };
                let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!((numeric - f64::from(grad[i])).abs() < 2e-4, "{kind:?}: {numeric} against {}", grad[i]);
            }
        }
    }
}
