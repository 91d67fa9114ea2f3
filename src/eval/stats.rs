//! Statistics of evaluations: pass@k, intervals, and the test between two models. Pure.

use crate::base::rng::{Purpose, Rng};

/// Quantile of the standard normal distribution that leaves 2.5 % on either side.
const Z: f64 = 1.959_963_984_540_054;
/// Resamples of the bootstrap.
const NUM_RESAMPLES: usize = 2000;

/// An interval that holds the true mean with 95 % confidence, and how it was found.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// `wilson` or `bootstrap`.
    pub method: &'static str,
}

/// Unbiased estimate of pass@k from `n` samples of which `c` are right: 1 - C(n-c, k) / C(n, k) (Chen et al., 2021), as a
/// product that neither overflows nor cancels.
///
/// # Panics
/// Unless `1 <= k <= n` and `c <= n`.
pub fn pass_at_k(n: usize, c: usize, k: usize) -> f64 {
    assert!(1 <= k && k <= n && c <= n, "pass@{k} of {n} samples, {c} right");
    if n - c < k {
        return 1.0;
    }
    1.0 - (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

/// Mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Standard error of the mean; 0 of fewer than two values.
pub fn standard_error(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if values.len() < 2 {
        return 0.0;
    }
    let m = mean(values);
    (values.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / (n - 1.0) / n).sqrt()
}

/// Interval of a mean over items: Wilson's score interval where every value is 0 or 1, else percentiles of a bootstrap
/// over the items.
pub fn interval(values: &[f64], seed: u64) -> Interval {
    if values.iter().all(|v| *v == 0.0 || *v == 1.0) { wilson(values) } else { bootstrap(values, seed) }
}

fn wilson(values: &[f64]) -> Interval {
    let (n, p) = (values.len().max(1) as f64, mean(values));
    let scale = 1.0 + Z * Z / n;
    let centre = (p + Z * Z / (2.0 * n)) / scale;
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt() / scale;
    Interval { low: (centre - half).max(0.0), high: (centre + half).min(1.0), method: "wilson" }
}

fn bootstrap(values: &[f64], seed: u64) -> Interval {
    let mut rng = Rng::new(seed, Purpose::Eval, values.len() as u64, u32::MAX);
    let mut means: Vec<f64> = (0..NUM_RESAMPLES)
        .map(|_| (0..values.len()).map(|_| *rng.choose(values)).sum::<f64>() / values.len() as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((NUM_RESAMPLES - 1) as f64 * share).round() as usize];
    Interval { low: at(0.025), high: at(0.975), method: "bootstrap" }
}

/// Two-sided exact McNemar test: the probability of a split at least as uneven as `b` to `c` among the items on which two
/// models differ, if neither is better.
pub fn mcnemar(b: usize, c: usize) -> f64 {
    let n = b + c;
    let (mut log_choose, mut tail) = (0.0f64, 0.0f64);
    for i in 0..=b.min(c) {
        tail += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
        log_choose += ((n - i) as f64 / (i + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_at_k_is_the_share_of_subsets_with_a_right_sample() {
        // Every subset, counted.
        for n in 1..=8usize {
            for c in 0..=n {
                for k in 1..=n {
                    let subsets = (0u32..1 << n).filter(|s| s.count_ones() as usize == k);
                    let (hit, all) = subsets.fold((0, 0), |(h, a), s| (h + u32::from(s & ((1 << c) - 1) != 0), a + 1));
                    assert!((pass_at_k(n, c, k) - f64::from(hit) / f64::from(all)).abs() < 1e-12, "{n} {c} {k}");
                }
            }
        }
        assert!((pass_at_k(100_000, 1, 1) - 1e-5).abs() < 1e-15);
    }

    #[test]
    fn intervals_are_those_of_the_literature() {
        // Newcombe (1998), table 1: 81 of 263, and 0 of 20.
        let of = |right: usize, n: usize| {
            let values: Vec<f64> = (0..n).map(|i| f64::from(u8::from(i < right))).collect();
            interval(&values, 1)
        };
        let (a, b) = (of(81, 263), of(0, 20));
        assert!((a.low - 0.2553).abs() < 5e-5 && (a.high - 0.3662).abs() < 5e-5, "{a:?}");
        assert!(b.low == 0.0 && (b.high - 0.1611).abs() < 5e-5, "{b:?}");
        let halves: Vec<f64> = (0..400).map(|i| f64::from(i % 3) / 2.0).collect();
        let c = interval(&halves, 1);
        let normal = Z * standard_error(&halves);
        assert_eq!((c.method, c), ("bootstrap", interval(&halves, 1)));
        assert!(
            (mean(&halves) - c.low - normal).abs() < 0.01 && (c.high - mean(&halves) - normal).abs() < 0.01,
            "{c:?}"
        );
    }

    #[test]
    fn mcnemar_is_the_binomial_test() {
        for (b, c, p) in [(0, 0, 1.0), (1, 1, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (2, 8, 0.109_375), (3, 3, 1.0)] {
            assert!((mcnemar(b, c) - p).abs() < 1e-12, "{b} {c} {}", mcnemar(b, c));
        }
        assert!(mcnemar(4000, 6000) > 0.0 && mcnemar(4000, 6000) < 1e-80);
    }
}
