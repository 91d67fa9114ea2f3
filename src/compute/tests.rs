//! Each operation's backward twin against finite differences of the operation itself, written anew in f64. Generic over
//! the device: every backend passes the same checks.

use crate::base::rng::{Purpose, Rng};
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::cpu::gemm::Isa;
use crate::compute::ops::{Backend, HeadLoss, HeadTarget, Heads, PAGE, RopeTable, Span};

/// Step of the central difference; its error in f64 is about its square.
const STEP: f64 = 1e-5;
/// Largest error of a gradient, relative to the largest entry of that gradient: f32 sums of a few dozen terms.
const TOLERANCE: f64 = 1e-5;

fn random(stream: u32, len: usize) -> Vec<f32> {
    let mut rng = Rng::new(5, Purpose::Test, 4, stream);
    (0..len).map(|_| rng.normal() as f32).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Compares a gradient with the slopes of a loss at `x`.
fn compare(name: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len(), "{name}: one slope per value");
    let mut at = wide(x);
    let slopes: Vec<f64> = (0..x.len())
        .map(|i| {
            let middle = at[i];
            let mut moved = |by: f64| {
                at[i] = middle + by;
                loss(&at)
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            at[i] = middle;
            slope
        })
        .collect();
    let scale = slopes.iter().fold(0.0f64, |m, s| m.max(s.abs()));
    assert!(scale > 0.0, "{name}: the loss depends on it");
    for (i, (slope, g)) in slopes.iter().zip(gradient).enumerate() {
        let error = (slope - f64::from(*g)).abs();
        assert!(error <= TOLERANCE * scale, "{name}[{i}]: gradient {g}, slope {slope}, largest slope {scale}");
    }
}

fn weigh(y: &[f64], dy: &[f32]) -> f64 {
    y.iter().zip(dy).map(|(y, d)| y * f64::from(*d)).sum()
}

fn matmul(x: &[f64], w: &[f64], bias: &[f64], n: usize, k: usize) -> Vec<f64> {
    let row = |x: &[f64], j: usize| bias[j] + x.iter().zip(&w[j * k..]).map(|(x, w)| x * w).sum::<f64>();
    x.chunks(k).flat_map(|x| (0..n).map(move |j| row(x, j))).collect()
}

fn products<B: Backend>(b: &B) {
    for (t, n, k) in [(1, 1, 1), (5, 7, 3), (34, 17, 19), (3, 40, 33)] {
        let (x, w, bias, dy) = (random(1, t * k), random(2, n * k), random(3, n), random(4, t * n));
        let linear = b.linear(&b.upload(&w), n, k, true);
        let (dy_b, x_b) = (b.upload(&dy), b.upload(&x));
        let (mut dx, mut dw, mut db) = (b.zeros(t * k), b.zeros(n * k), b.zeros(n));
        b.matmul_backward_input(&dy_b, &linear, &mut dx, false);
        b.matmul_backward_weight(&dy_b, &x_b, n, k, &mut dw);
        b.bias_backward(&dy_b, n, &mut db);
        let loss = |x: &[f64], w: &[f64], bias: &[f64]| weigh(&matmul(x, w, bias, n, k), &dy);
        let (x_64, w_64, bias_64) = (wide(&x), wide(&w), wide(&bias));
        compare("matmul x", &x, &b.download(&dx), |x| loss(x, &w_64, &bias_64));
        compare("matmul w", &w, &b.download(&dw), |w| loss(&x_64, w, &bias_64));
        compare("matmul bias", &bias, &b.download(&db), |bias| loss(&x_64, &w_64, bias));
    }
}

fn embedding<B: Backend>(b: &B) {
    let (tokens, v, d) = ([3u32, 0, 3, 3, 5], 7, 5);
    let (table, dx) = (random(1, v * d), random(2, tokens.len() * d));
    let mut dtable = b.zeros(v * d);
    b.embed_backward(&tokens, &b.upload(&dx), d, &mut dtable);
    compare("embed", &table, &b.download(&dtable), |table| {
        let rows: Vec<f64> = tokens.iter().flat_map(|t| &table[*t as usize * d..][..d]).copied().collect();
        weigh(&rows, &dx)
    });
}

fn rmsnorm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let rstd = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / w.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| x * rstd * w).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

fn norms<B: Backend>(b: &B) {
    for (t, d) in [(1, 1), (4, 19), (33, 48)] {
        let (x, w, dy, eps) = (random(1, t * d), random(2, d), random(3, t * d), 1e-3);
        let (x_b, w_b, dy_b) = (b.upload(&x), b.upload(&w), b.upload(&dy));
        let (mut y, mut rstd, mut dx, mut dw) = (b.zeros(t * d), b.zeros(t), b.zeros(t * d), b.zeros(d));
        b.rmsnorm(&x_b, &w_b, eps, &mut y, &mut rstd);
        b.rmsnorm_backward(&x_b, &w_b, &rstd, &dy_b, &mut dx, &mut dw);
        let eps = f64::from(eps);
        let (x_64, w_64) = (wide(&x), wide(&w));
        compare("rmsnorm x", &x, &b.download(&dx), |x| weigh(&rmsnorm(x, &w_64, eps), &dy));
        compare("rmsnorm w", &w, &b.download(&dw), |w| weigh(&rmsnorm(&x_64, w, eps), &dy));
    }
}

fn swiglu<B: Backend>(b: &B) {
    let (t, f) = (5, 21);
    let (x, dh) = (random(1, t * 2 * f), random(2, t * f));
    let mut d = b.zeros(t * 2 * f);
    b.swiglu_backward(&b.upload(&x), &b.upload(&dh), f, &mut d);
    compare("swiglu", &x, &b.download(&d), |x| {
        let gated = |row: &[f64]| (0..f).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[f + i]).collect::<Vec<_>>();
        weigh(&x.chunks(2 * f).flat_map(gated).collect::<Vec<_>>(), &dh)
    });
}

const HEADS: Heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 6 };
const WIDTH: usize = (4 + 2 * 2) * 6;

fn angles(positions: usize) -> RopeTable {
    let all = (0..positions).flat_map(|p| (0..HEADS.head_dim / 2).map(move |i| p as f64 * 0.7f64.powi(i as i32)));
    let all: Vec<f64> = all.collect();
    RopeTable { cos: all.iter().map(|a| a.cos() as f32).collect(), sin: all.iter().map(|a| a.sin() as f32).collect() }
}

/// Query and key norms, then rotation, of rows at positions `0..`.
fn rope(x: &[f64], norms: Option<(&[f64], &[f64])>, table: &RopeTable) -> Vec<f64> {
    let (c, half) = (HEADS.head_dim, HEADS.head_dim / 2);
    let mut out = x.to_vec();
    for (pos, row) in out.chunks_mut(WIDTH).enumerate() {
        for (h, head) in row.chunks_mut(c).take(HEADS.num_heads + HEADS.num_kv_heads).enumerate() {
            if let Some((q, k)) = norms {
                let normed = rmsnorm(head, if h < HEADS.num_heads { q } else { k }, 1e-3);
                head.copy_from_slice(&normed);
            }
            for i in 0..half {
                let (cos, sin) = (f64::from(table.cos[pos * half + i]), f64::from(table.sin[pos * half + i]));
                let (a, b) = (head[i], head[half + i]);
                head[i] = a * cos - b * sin;
                head[half + i] = b * cos + a * sin;
            }
        }
    }
    out
}

fn rotation<B: Backend>(b: &B) {
    let (t, c) = (5, HEADS.head_dim);
    let (x, dy, q, k) = (random(1, t * WIDTH), random(2, t * WIDTH), random(3, c), random(4, c));
    let (table, pages) = (angles(t), [0]);
    let spans = [Span { row: 0, len: t, pos: 0, pages: &pages }];
    let (q_64, k_64, x_64) = (wide(&q), wide(&k), wide(&x));
    let raw = b.upload(&x);

    let mut dx = b.upload(&dy);
    b.rope_backward(HEADS, &mut dx, &raw, &spans, &table, None, None);
    compare("rope", &x, &b.download(&dx), |x| weigh(&rope(x, None, &table), &dy));

    let (q_b, k_b) = (b.upload(&q), b.upload(&k));
    let (mut dx, mut dq, mut dk) = (b.upload(&dy), b.zeros(c), b.zeros(c));
    b.rope_backward(HEADS, &mut dx, &raw, &spans, &table, Some((&q_b, &k_b, 1e-3)), Some((&mut dq, &mut dk)));
    compare("normed rope x", &x, &b.download(&dx), |x| weigh(&rope(x, Some((&q_64, &k_64)), &table), &dy));
    compare("query norm", &q, &b.download(&dq), |q| weigh(&rope(&x_64, Some((q, &k_64)), &table), &dy));
    compare("key norm", &k, &b.download(&dk), |k| weigh(&rope(&x_64, Some((&q_64, k)), &table), &dy));
}

/// Causal attention of one sequence's fused rows.
fn attention(x: &[f64]) -> Vec<f64> {
    let (c, r) = (HEADS.head_dim, HEADS.group());
    let (keys, values) = (HEADS.num_heads * c, (HEADS.num_heads + HEADS.num_kv_heads) * c);
    let mut out = Vec::new();
    for t in 0..x.len() / WIDTH {
        for h in 0..HEADS.num_heads {
            let q = &x[t * WIDTH + h * c..][..c];
            let part = |j: usize, from: usize| &x[j * WIDTH + from + h / r * c..][..c];
            let score = |j: usize| q.iter().zip(part(j, keys)).map(|(q, k)| q * k).sum::<f64>() / (c as f64).sqrt();
            let weights: Vec<f64> = (0..=t).map(|j| score(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            out.extend((0..c).map(|i| (0..=t).map(|j| weights[j] * part(j, values)[i]).sum::<f64>() / sum));
        }
    }
    out
}

fn attended<B: Backend>(b: &B) {
    // Two sequences, one over a page's edge, on pages out of order.
    let lens = [1, PAGE + 3];
    let (t, hc) = (lens[0] + lens[1], HEADS.num_heads * HEADS.head_dim);
    let (x, dout) = (random(1, t * WIDTH), random(2, t * hc));
    let spans =
        [Span { row: 0, len: lens[0], pos: 0, pages: &[2] }, Span { row: 1, len: lens[1], pos: 0, pages: &[3, 0] }];
    let kv = b.new_kv(HEADS, 1, 4).expect("it fits");
    let qkv = b.upload(&x);
    let (mut out, mut lse, mut dqkv) = (b.zeros(t * hc), b.zeros(t * HEADS.num_heads), b.upload(&random(9, t * WIDTH)));
    b.write_kv(HEADS, &kv, 0, &qkv, &spans);
    b.attention(HEADS, &kv, 0, &qkv, &spans, &mut out, &mut lse);
    b.attention_backward(HEADS, &kv, 0, &qkv, &out, &lse, &b.upload(&dout), &spans, &mut dqkv);
    compare("attention", &x, &b.download(&dqkv), |x| {
        let (first, second) = x.split_at(lens[0] * WIDTH);
        weigh(&[attention(first), attention(second)].concat(), &dout)
    });
}

/// Loss of one response token from its row of logits.
fn token_loss(logits: &[f64], target: &HeadTarget) -> f64 {
    let z: Vec<f64> = logits.iter().map(|z| z * f64::from(target.inv_temperature)).collect();
    let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
    let entropy: f64 = z.iter().map(|z| -(z - log_sum).exp() * (z - log_sum)).sum();
    let logprob = z[target.token as usize] - log_sum;
    let loss = match target.kind {
        HeadLoss::Nll { weight } => -f64::from(weight) * logprob,
        HeadLoss::Clipped { advantage, old_logprob, low, high, weight } => {
            let ratio = (logprob - f64::from(old_logprob)).exp();
            let (a, low, high) = (f64::from(advantage), f64::from(low), f64::from(high));
            f64::from(weight) * (-a * ratio).max(-a * ratio.clamp(1.0 - low, 1.0 + high))
        }
    };
    loss - f64::from(target.entropy_coef) * entropy
}

fn policy_head<B: Backend>(b: &B) {
    let (t, d, v) = (6, 9, 23);
    let (x, w) = (random(1, t * d), random(2, v * d));
    // Old log-probabilities on both sides of the clip range, some far inside it.
    let clipped =
        |advantage, old_logprob| HeadLoss::Clipped { advantage, old_logprob, low: 0.2, high: 0.3, weight: 0.6 };
    let kinds = [
        HeadLoss::Nll { weight: 1.3 },
        HeadLoss::Nll { weight: -0.4 },
        clipped(1.0, -9.0),
        clipped(-1.0, -9.0),
        clipped(1.5, 0.0),
        clipped(-1.5, 0.0),
    ];
    let targets: Vec<HeadTarget> = kinds
        .into_iter()
        .enumerate()
        .map(|(i, kind)| HeadTarget { row: 5 - i, token: 3 * i as u32, inv_temperature: 0.8, kind, entropy_coef: 0.05 })
        .collect();
    let (mut dx, mut dw) = (b.zeros(t * d), b.zeros(v * d));
    let head = b.linear(&b.upload(&w), v, d, true);
    let reports = b.policy_head(&b.upload(&x), d, &head, &targets, Some((&mut dx, &mut dw)));
    let loss = |x: &[f64], w: &[f64]| -> f64 {
        let logits = matmul(x, w, &vec![0.0; v], v, d);
        targets.iter().map(|t| token_loss(&logits[t.row * v..][..v], t)).sum()
    };
    let (x_64, w_64) = (wide(&x), wide(&w));
    let total: f64 = reports.iter().map(|r| f64::from(r.loss)).sum();
    assert!((total - loss(&x_64, &w_64)).abs() < 1e-4 * total.abs().max(1.0), "{total} is the loss");
    assert!(reports.iter().any(|r| r.clipped) && reports.iter().skip(2).any(|r| !r.clipped), "both sides of the clip");
    compare("head x", &x, &b.download(&dx), |x| loss(x, &w_64));
    compare("head w", &w, &b.download(&dw), |w| loss(&x_64, w));
}

fn every_backward_is_the_slope<B: Backend>(b: &B) {
    products(b);
    embedding(b);
    norms(b);
    swiglu(b);
    rotation(b);
    attended(b);
    policy_head(b);
}

#[test]
fn every_backward_on_the_cpu_is_the_slope_of_its_operation() {
    for isa in [Isa::detect(), Isa::Portable] {
        every_backward_is_the_slope(&CpuBackend::with_isa(2, isa).expect("threads start"));
    }
}
