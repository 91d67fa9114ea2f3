//! Each operation's backward twin against finite differences of the operation itself, written anew in f64. Generic over
//! the device: every backend passes the same checks, in its own shapes and precision.

use azr_kernel_emu::{Emulator, Schedule};
use half::bf16;

use crate::base::rng::{Purpose, Rng};
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::cpu::gemm::Isa;
use crate::compute::cuda::CudaBackend;
use crate::compute::launch::device::Device;
use crate::compute::ops::{Angles, Backend, HeadLoss, HeadTarget, Heads, LayerKv, PAGE, Span, Weight};
use crate::error::Result;

/// Step of the central difference; its error in f64 is about its square.
const STEP: f64 = 1e-5;
/// Most entries of a gradient that are compared.
const MAX_ENTRIES: usize = 300;

/// A GPU that the emulator plays, of this compute capability (90: Hopper).
pub(crate) fn emulated_gpu(capability: u32) -> CudaBackend {
    let emulator = Emulator::get();
    emulator.device(capability, 3);
    emulator.schedule(Schedule::PLAIN);
    let device = Device::open_with(0, |_, _| Ok(b"STUB".to_vec())).expect("the emulated driver has a device");
    assert_eq!(device.name(), "azr emulator", "no GPU is meant");
    CudaBackend::on(device)
}

/// Cosines and sines.
type Tables = (Vec<f32>, Vec<f32>);

/// A device under test, and what it is like.
struct Case<'a, B: Backend> {
    b: &'a B,
    /// Widths are multiples of this.
    unit: usize,
    heads: Heads,
    /// Largest error of a gradient, relative to its largest entry.
    tolerance: f64,
    /// What the device makes of an input.
    round: fn(f32) -> f32,
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn weigh(y: &[f64], dy: &[f32]) -> f64 {
    y.iter().zip(dy).map(|(y, d)| y * f64::from(*d)).sum()
}

fn matmul(x: &[f64], w: &[f64], bias: &[f64], n: usize, k: usize) -> Vec<f64> {
    let row = |x: &[f64], j: usize| bias[j] + x.iter().zip(&w[j * k..]).map(|(x, w)| x * w).sum::<f64>();
    x.chunks(k).flat_map(|x| (0..n).map(move |j| row(x, j))).collect()
}

fn rmsnorm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let row = |x: &[f64]| {
        let rstd = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / w.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| x * rstd * w).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
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

impl<B: Backend> Case<'_, B> {
    /// Inputs that the device takes without rounding.
    fn random(&self, stream: u32, len: usize) -> Vec<f32> {
        let mut rng = Rng::new(5, Purpose::Test, 4, stream);
        (0..len).map(|_| (self.round)(rng.normal() as f32)).collect()
    }

    /// Compares a gradient with the slopes of a loss at `x`.
    fn compare(&self, name: &str, x: &[f32], gradient: &[f32], loss: impl Fn(&[f64]) -> f64) {
        assert_eq!(x.len(), gradient.len(), "{name}: one slope per value");
        let mut at = wide(x);
        // An odd stride meets every column sooner or later.
        let entries: Vec<usize> = (0..x.len()).step_by(x.len().div_ceil(MAX_ENTRIES) | 1).collect();
        let slopes: Vec<f64> = entries
            .iter()
            .map(|i| {
                let middle = at[*i];
                let mut moved = |by: f64| {
                    at[*i] = middle + by;
                    loss(&at)
                };
                let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                at[*i] = middle;
                slope
            })
            .collect();
        let scale = slopes.iter().fold(0.0f64, |m, s| m.max(s.abs()));
        assert!(scale > 0.0, "{name}: the loss depends on it");
        for (slope, i) in slopes.iter().zip(entries) {
            let (g, bound) = (gradient[i], self.tolerance * scale);
            assert!((slope - f64::from(g)).abs() <= bound, "{name}[{i}]: gradient {g}, slope {slope}, bound {bound}");
        }
    }

    fn products(&self) -> Result<()> {
        let (b, u) = (self.b, self.unit);
        for (t, n, k) in [(1usize, 1usize, 1usize), (5, 7, 3), (34, 17, 19), (3, 40, 33)] {
            let (n, k) = (n.next_multiple_of(u), k.next_multiple_of(u));
            let (x, w, bias, dy) =
                (self.random(1, t * k), self.random(2, n * k), self.random(3, n), self.random(4, t * n));
            let param = b.param(&w)?;
            let weight = Weight { param: &param, layout: &b.linear(&param, n, k, true)? };
            let (dy_b, x_b) = (b.upload(&dy)?, b.upload(&x)?);
            let (mut dx, mut dw, mut db) = (b.act(t * k)?, b.zeros(n * k)?, b.zeros(n)?);
            b.matmul_backward_input(&dy_b, weight, &mut dx, false)?;
            b.matmul_backward_weight(&dy_b, &x_b, n, k, &mut dw)?;
            b.bias_backward(&dy_b, n, &mut db)?;
            let loss = |x: &[f64], w: &[f64], bias: &[f64]| weigh(&matmul(x, w, bias, n, k), &dy);
            let (x_64, w_64, bias_64) = (wide(&x), wide(&w), wide(&bias));
            self.compare("matmul x", &x, &b.values(&dx)?, |x| loss(x, &w_64, &bias_64));
            self.compare("matmul w", &w, &b.download(&dw)?, |w| loss(&x_64, w, &bias_64));
            self.compare("matmul bias", &bias, &b.download(&db)?, |bias| loss(&x_64, &w_64, bias));
        }
        Ok(())
    }

    fn embedding(&self) -> Result<()> {
        let (b, tokens, v, d) = (self.b, [3u32, 0, 3, 3, 5], 7, 5 * self.unit);
        let (table, dx) = (self.random(1, v * d), self.random(2, tokens.len() * d));
        let batch = b.batch(self.heads, &tokens, &[Span { row: 0, len: 5, pos: 0, pages: &[0] }])?;
        let mut x = b.act(tokens.len() * d)?;
        b.embed(&batch, &b.param(&table)?, d, &mut x)?;
        let x = b.values(&x)?;
        let rows: Vec<f32> = tokens.iter().flat_map(|t| &table[*t as usize * d..][..d]).copied().collect();
        assert_eq!(x, rows);
        let mut dtable = b.zeros(v * d)?;
        b.embed_backward(&batch, &b.upload(&dx)?, d, &mut dtable)?;
        self.compare("embed", &table, &b.download(&dtable)?, |table| {
            let rows: Vec<f64> = tokens.iter().flat_map(|t| &table[*t as usize * d..][..d]).copied().collect();
            weigh(&rows, &dx)
        });
        Ok(())
    }

    fn norms(&self) -> Result<()> {
        let b = self.b;
        for (t, d) in [(1, 1), (4, 19), (33, 48)].map(|(t, d)| (t, d.max(self.unit).next_multiple_of(self.unit))) {
            let (x, w, dy, eps) = (self.random(1, t * d), self.random(2, d), self.random(3, t * d), 1e-3);
            let (x_b, w_b, dy_b) = (b.upload(&x)?, b.param(&w)?, b.upload(&dy)?);
            let (mut y, mut rstd, mut dx, mut dw) = (b.act(t * d)?, b.scratch(t)?, b.act(t * d)?, b.zeros(d)?);
            b.clear_act(&mut dx)?;
            b.rmsnorm(&x_b, &w_b, eps, &mut y, &mut rstd)?;
            b.rmsnorm_backward(&x_b, &w_b, &rstd, &dy_b, &mut dx, &mut dw)?;
            let eps = f64::from(eps);
            let (x_64, w_64) = (wide(&x), wide(&w));
            self.compare("rmsnorm x", &x, &b.values(&dx)?, |x| weigh(&rmsnorm(x, &w_64, eps), &dy));
            self.compare("rmsnorm w", &w, &b.download(&dw)?, |w| weigh(&rmsnorm(&x_64, w, eps), &dy));
        }
        Ok(())
    }

    fn swiglu(&self) -> Result<()> {
        let (b, t, f) = (self.b, 5, 3 * self.unit);
        let (x, dh) = (self.random(1, t * 2 * f), self.random(2, t * f));
        let mut d = b.act(t * 2 * f)?;
        b.swiglu_backward(&b.upload(&x)?, &b.upload(&dh)?, f, &mut d)?;
        self.compare("swiglu", &x, &b.values(&d)?, |x| {
            let gated = |row: &[f64]| (0..f).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[f + i]).collect::<Vec<_>>();
            weigh(&x.chunks(2 * f).flat_map(gated).collect::<Vec<_>>(), &dh)
        });
        Ok(())
    }

    /// Width of a fused row.
    fn width(&self) -> usize {
        (self.heads.num_heads + 2 * self.heads.num_kv_heads) * self.heads.head_dim
    }

    fn angles(&self, positions: usize) -> Result<(Angles<B::Buf>, Tables)> {
        let half = self.heads.head_dim / 2;
        let all: Vec<f64> =
            (0..positions).flat_map(|p| (0..half).map(move |i| p as f64 * 0.7f64.powi(i as i32))).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = all.iter().map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        let mut angles = Angles { cos: self.b.scratch(cos.len())?, sin: self.b.scratch(sin.len())? };
        self.b.write(&mut angles.cos, &cos)?;
        self.b.write(&mut angles.sin, &sin)?;
        Ok((angles, (cos, sin)))
    }

    /// Query and key norms, then rotation, of rows at positions `0..`.
    fn rope(&self, x: &[f64], norms: Option<(&[f64], &[f64])>, (cos, sin): (&[f32], &[f32])) -> Vec<f64> {
        let (heads, c) = (self.heads, self.heads.head_dim);
        let mut out = x.to_vec();
        for (pos, row) in out.chunks_mut(self.width()).enumerate() {
            for (h, head) in row.chunks_mut(c).take(heads.num_heads + heads.num_kv_heads).enumerate() {
                if let Some((q, k)) = norms {
                    let normed = rmsnorm(head, if h < heads.num_heads { q } else { k }, 1e-3);
                    head.copy_from_slice(&normed);
                }
                for i in 0..c / 2 {
                    let (cos, sin) = (f64::from(cos[pos * c / 2 + i]), f64::from(sin[pos * c / 2 + i]));
                    let (a, b) = (head[i], head[c / 2 + i]);
                    head[i] = a * cos - b * sin;
                    head[c / 2 + i] = b * cos + a * sin;
                }
            }
        }
        out
    }

    fn rotation(&self) -> Result<()> {
        let (b, heads, t, c, q) = (self.b, self.heads, 5, self.heads.head_dim, self.width());
        let (x, dy, wq, wk) = (self.random(1, t * q), self.random(2, t * q), self.random(3, c), self.random(4, c));
        let (angles, (cos, sin)) = self.angles(t)?;
        let batch = b.batch(heads, &[0; 5], &[Span { row: 0, len: t, pos: 0, pages: &[0] }])?;
        let (q_64, k_64, x_64, table) = (wide(&wq), wide(&wk), wide(&x), (&cos[..], &sin[..]));

        let mut dx = b.upload(&dy)?;
        b.rope_backward(heads, &mut dx, None, &batch, &angles, None, None)?;
        self.compare("rope", &x, &b.values(&dx)?, |x| weigh(&self.rope(x, None, table), &dy));

        let (q_b, k_b, raw) = (b.param(&wq)?, b.param(&wk)?, b.upload(&x)?);
        let (mut dx, mut dq, mut dk) = (b.upload(&dy)?, b.zeros(c)?, b.zeros(c)?);
        let norms = Some((&q_b, &k_b, 1e-3));
        b.rope_backward(heads, &mut dx, Some(&raw), &batch, &angles, norms, Some((&mut dq, &mut dk)))?;
        let both = |x: &[f64], q: &[f64], k: &[f64]| weigh(&self.rope(x, Some((q, k)), table), &dy);
        self.compare("normed rope x", &x, &b.values(&dx)?, |x| both(x, &q_64, &k_64));
        self.compare("query norm", &wq, &b.download(&dq)?, |q| both(&x_64, q, &k_64));
        self.compare("key norm", &wk, &b.download(&dk)?, |k| both(&x_64, &q_64, k));
        Ok(())
    }

    /// Causal attention of one sequence's fused rows.
    fn attention(&self, x: &[f64]) -> Vec<f64> {
        let (c, r, h, width) = (self.heads.head_dim, self.heads.group(), self.heads.num_heads, self.width());
        let (keys, values) = (h * c, (h + self.heads.num_kv_heads) * c);
        let mut out = Vec::new();
        for t in 0..x.len() / width {
            for h in 0..h {
                let q = &x[t * width + h * c..][..c];
                let part = |j: usize, from: usize| &x[j * width + from + h / r * c..][..c];
                let score = |j: usize| q.iter().zip(part(j, keys)).map(|(q, k)| q * k).sum::<f64>() / (c as f64).sqrt();
                let weights: Vec<f64> = (0..=t).map(|j| score(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                out.extend((0..c).map(|i| (0..=t).map(|j| weights[j] * part(j, values)[i]).sum::<f64>() / sum));
            }
        }
        out
    }

    fn attended(&self) -> Result<()> {
        // Two sequences, one over a page's edge, on pages out of order; no rotation.
        let (b, heads, width, lens) = (self.b, self.heads, self.width(), [1, PAGE + 3]);
        let (t, hc) = (lens[0] + lens[1], heads.num_heads * heads.head_dim);
        let (x, dout) = (self.random(1, t * width), self.random(2, t * hc));
        let spans =
            [Span { row: 0, len: lens[0], pos: 0, pages: &[2] }, Span { row: 1, len: lens[1], pos: 0, pages: &[3, 0] }];
        let half = lens[1] * heads.head_dim / 2;
        let mut angles = Angles { cos: b.scratch(half)?, sin: b.zeros(half)? };
        b.write(&mut angles.cos, &vec![1.0; half])?;
        let kv = b.new_kv(heads, 1, 4)?;
        let (kv, batch) = (LayerKv { kv: &kv, layer: 0 }, b.batch(heads, &vec![0; t], &spans)?);
        let (mut q, mut out, mut lse) = (b.act(t * hc)?, b.act(t * hc)?, b.scratch(t * heads.num_heads)?);
        let mut dqkv = b.upload(&self.random(9, t * width))?;
        b.rope(heads, &b.upload(&x)?, &batch, &angles, None, kv, &mut q)?;
        b.attention(heads, kv, &q, &batch, &mut out, &mut lse)?;
        b.attention_backward(heads, kv, &q, &out, &lse, &b.upload(&dout)?, &batch, &mut dqkv)?;
        self.compare("attention", &x, &b.values(&dqkv)?, |x| {
            let (first, second) = x.split_at(lens[0] * width);
            weigh(&[self.attention(first), self.attention(second)].concat(), &dout)
        });
        Ok(())
    }

    fn policy_head(&self) -> Result<()> {
        let (b, t, d, v) = (self.b, 6, 2 * self.unit.max(5), 3 * self.unit.max(8));
        let (x, w) = (self.random(1, t * d), self.random(2, v * d));
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
        let target =
            |(i, kind)| HeadTarget { row: 5 - i, token: 3 * i as u32, inv_temperature: 0.8, kind, entropy_coef: 0.05 };
        let targets: Vec<HeadTarget> = kinds.into_iter().enumerate().map(target).collect();
        let (mut dx, mut dw, param) = (b.act(t * d)?, b.zeros(v * d)?, b.param(&w)?);
        let head = Weight { param: &param, layout: &b.linear(&param, v, d, true)? };
        let reports = b.policy_head(&b.upload(&x)?, d, head, &targets, Some((&mut dx, &mut dw)))?;
        let reports = b.reports(reports)?;
        let loss = |x: &[f64], w: &[f64]| -> f64 {
            let logits = matmul(x, w, &vec![0.0; v], v, d);
            targets.iter().map(|t| token_loss(&logits[t.row * v..][..v], t)).sum()
        };
        let (x_64, w_64) = (wide(&x), wide(&w));
        let total: f64 = reports.iter().map(|r| f64::from(r.loss)).sum();
        assert!((total - loss(&x_64, &w_64)).abs() < 1e-4 * total.abs().max(1.0), "{total} is the loss");
        assert!(reports.iter().any(|r| r.clipped) && reports.iter().skip(2).any(|r| !r.clipped), "both sides of it");
        self.compare("head x", &x, &b.values(&dx)?, |x| loss(x, &w_64));
        self.compare("head w", &w, &b.download(&dw)?, |w| loss(&x_64, w));
        Ok(())
    }

    fn every_backward_is_the_slope(&self) -> Result<()> {
        self.products()?;
        self.embedding()?;
        self.norms()?;
        self.swiglu()?;
        self.rotation()?;
        self.attended()?;
        self.policy_head()
    }
}

#[test]
fn every_backward_on_the_cpu_is_the_slope_of_its_operation() {
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 6 };
    for isa in [Isa::detect(), Isa::Portable] {
        let b = CpuBackend::with_isa(2, isa).expect("threads start");
        // f32 sums of a few dozen terms.
        let case = Case { b: &b, unit: 1, heads, tolerance: 1e-5, round: |x| x };
        case.every_backward_is_the_slope().expect("the CPU does not fail");
    }
}

#[test]
fn every_backward_on_the_gpu_is_the_slope_of_its_operation() {
    let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 64 };
    for capability in [80, 90] {
        let b = emulated_gpu(capability);
        // A few roundings to 8 bits.
        let case = Case { b: &b, unit: 8, heads, tolerance: 1.5e-2, round: |x| bf16::from_f32(x).to_f32() };
        case.every_backward_is_the_slope().expect("the emulated GPU does not fail");
    }
}
