//! The GPU's kernels at the shapes of Qwen2.5, each through its launcher, timed by events on random data that does not
//! stay in the L2 cache. A JSON line each: TFLOP/s, GB/s, and the share of what a roofline allows, whose two parts are the
//! GPU's published speed of bf16 products and the speed of a large copy in the same run.
//!
//! Without a GPU it says SKIPPED. `AZR_KERNEL_BENCH_SMALL=1` takes tiny shapes once, for the emulated driver.

use std::process::ExitCode;

use azr::Result;
use azr::base::rng::{Purpose, Rng};
use azr::compute::launch::attention::{
    Angles, DecodePlan, DecodeSeq, RopePlan, Saved, SpanPlan, attention_backward_kv, attention_backward_q,
    attention_decode, attention_delta, attention_forward, attention_merge, rope_backward, rope_forward,
};
use azr::compute::launch::device::{Buf, Device, Element};
use azr::compute::launch::head::{DrawnRow, HeadInput, HeadRow, HeadScratch, head_draw, head_forward};
use azr::compute::launch::optim::{
    ClipState, Parameter, Rounding, adamw_bf16, adamw_f32, clip_factor, norm_blocks, norm_partials,
};
use azr::compute::launch::{gemm, rows};
use azr::compute::ops::{AdamW, Draw, Heads, PAGE, Span};
use half::bf16;
use serde_json::json;

/// Bytes that launches in a row touch before they touch anything twice: some times the L2 cache.
const ROTATION_BYTES: f64 = 192e6;
/// Most copies of a launch's buffers.
const MAX_COPIES: f64 = 16.0;
/// Seconds of a sample, and samples of a measurement; the median counts.
const SAMPLE_S: f64 = 0.01;
const SAMPLES: usize = 5;
/// Most sequences that decode at once.
const MAX_SEQUENCES: usize = 256;
/// Random numbers that all arrays are filled with, over and over.
const POOL: usize = 1 << 20;

/// A model's shape.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    d: usize,
    f: usize,
    vocab: usize,
    heads: Heads,
}

const fn model(name: &'static str, d: usize, f: usize, vocab: usize, heads: [usize; 3]) -> Model {
    Model { name, d, f, vocab, heads: Heads { num_heads: heads[0], num_kv_heads: heads[1], head_dim: heads[2] } }
}

const MODELS: &[Model] = &[
    model("qwen2.5-0.5b", 896, 4864, 151_936, [14, 2, 64]),
    model("qwen2.5-1.5b", 1536, 8960, 151_936, [12, 2, 128]),
    model("qwen2.5-3b", 2048, 11_008, 151_936, [16, 2, 128]),
    model("qwen2.5-7b", 3584, 18_944, 152_064, [28, 4, 128]),
];

/// What a run measures.
struct Sizes {
    models: &'static [Model],
    /// Rows of decoding and prefill.
    rows: &'static [usize],
    /// Rows of training, in sequences of `context`; a decoding row sees as many keys.
    train_rows: usize,
    context: usize,
}

const FULL: Sizes = Sizes { models: MODELS, rows: &[1, 16, 64, 256, 8192], train_rows: 8192, context: 2048 };
const SMALL: Sizes =
    Sizes { models: &[model("tiny", 64, 128, 192, [2, 1, 64])], rows: &[1, 40], train_rows: 40, context: 20 };

/// What a launch does.
struct Work {
    kernel: &'static str,
    shape: Vec<usize>,
    flops: f64,
    bytes: f64,
}

fn work(kernel: &'static str, shape: &[usize], flops: f64, bytes: f64) -> Work {
    Work { kernel, shape: shape.to_vec(), flops, bytes }
}

struct Bench {
    device: Device,
    small: bool,
    pool: Vec<f32>,
    pool_bf16: Vec<bf16>,
    /// FLOP/s of dense bf16 products as published, where known.
    peak: Option<f64>,
    /// Bytes per second of a large copy.
    copy: f64,
}

impl Bench {
    fn new(device: Device, small: bool) -> Result<Self> {
        let mut rng = Rng::new(1, Purpose::Test, 0, 0);
        let pool: Vec<f32> = (0..if small { 1 << 12 } else { POOL }).map(|_| rng.normal() as f32).collect();
        let pool_bf16 = pool.iter().map(|x| bf16::from_f32(*x)).collect();
        let peak = match device.capability() {
            (9, 0) => Some(989e12),
            (8, 0) => Some(312e12),
            _ => None,
        };
        let mut bench = Bench { device, small, pool, pool_bf16, peak, copy: f64::INFINITY };
        let len = if small { 1 << 12 } else { 1 << 29 };
        let (from, mut to) = (bench.random(len)?, bench.device.alloc::<bf16>(len)?);
        let seconds = bench.seconds(|_| bench.device.copy(&from.view(), &mut to.view_mut()))?;
        bench.copy = 4.0 * len as f64 / seconds;
        println!(
            "{}",
            json!({
                "device": bench.device.name(),
                "multiprocessors": bench.device.num_multiprocessors(),
                "published_tflops": bench.peak.map(|p| p / 1e12),
                "copy_gb_per_s": bench.copy / 1e9,
            })
        );
        Ok(bench)
    }

    fn fill<T: Element>(&self, pool: &[T], len: usize) -> Result<Buf<T>> {
        let mut buf = self.device.alloc(len)?;
        for from in (0..len).step_by(pool.len()) {
            let count = pool.len().min(len - from);
            self.device.write(&mut buf.view_mut().part(from, count), &pool[..count])?;
        }
        Ok(buf)
    }

    fn random(&self, len: usize) -> Result<Buf<bf16>> {
        self.fill(&self.pool_bf16, len)
    }

    fn random_f32(&self, len: usize) -> Result<Buf<f32>> {
        self.fill(&self.pool, len)
    }

    /// Median seconds of a launch, which gets the launch's number.
    fn seconds(&self, mut launch: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let mut sample = |count: usize| {
            let start = self.device.mark()?;
            (0..count).try_for_each(&mut launch)?;
            Ok(self.device.mark()?.seconds_since(&start)? / count as f64)
        };
        let first: f64 = sample(1)?;
        if self.small {
            return Ok(first);
        }
        let guess = sample(MAX_COPIES as usize)?.max(1e-7);
        let count = ((SAMPLE_S / guess) as usize).clamp(1, 2000);
        let mut samples = (0..SAMPLES).map(|_| sample(count)).collect::<Result<Vec<f64>>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(samples[SAMPLES / 2])
    }

    /// Measures launches on copies of their buffers in turn, and prints the line.
    fn measure<S>(
        &self,
        model: &Model,
        work: Work,
        make: impl Fn() -> Result<S>,
        launch: impl Fn(&mut S) -> Result<()>,
    ) -> Result<()> {
        let copies = if self.small { 1 } else { (ROTATION_BYTES / work.bytes).ceil().clamp(1.0, MAX_COPIES) as usize };
        let mut sets = (0..copies).map(|_| make()).collect::<Result<Vec<S>>>()?;
        let seconds = self.seconds(|i| launch(&mut sets[i % copies]))?;
        let (products, memory) = (self.peak.map(|p| work.flops / p), work.bytes / self.copy);
        let least = products.unwrap_or(0.0).max(memory);
        // Without a published speed nothing is known of what products bind.
        let known = self.peak.is_some() || work.flops == 0.0;
        println!(
            "{}",
            json!({
                "kernel": work.kernel,
                "model": model.name,
                "shape": work.shape,
                "seconds": seconds,
                "tflops": work.flops / seconds / 1e12,
                "gb_per_s": work.bytes / seconds / 1e9,
                "bound": if products.is_some_and(|p| p > memory) { "products" } else { "memory" },
                "share": known.then_some(least / seconds),
            })
        );
        Ok(())
    }

    /// Products of a layer with T rows: forward, and with `gradients` backward.
    fn products(&self, m: &Model, t: usize, gradients: bool) -> Result<()> {
        let (device, width) = (&self.device, m.heads.num_heads * m.heads.head_dim);
        let fused = width + 2 * m.heads.num_kv_heads * m.heads.head_dim;
        for (n, k) in [(fused, m.d), (m.d, width), (m.d, m.f)] {
            let (flops, bytes) = (2.0 * (t * n * k) as f64, 2.0 * (t * k + n * k + t * n) as f64);
            let make = || Ok((self.random(t * k)?, self.random(n * k)?, self.random(t * n)?));
            self.measure(m, work("gemm_forward", &[t, n, k], flops, bytes), make, |(x, w, y)| {
                gemm::forward(device, &x.view(), &w.view(), k, None, &mut y.view_mut(), false)
            })?;
            if !gradients {
                continue;
            }
            self.measure(m, work("gemm_input", &[t, n, k], flops, bytes), make, |(dx, w, dy)| {
                gemm::input_gradient(device, &dy.view(), &w.view(), n, &mut dx.view_mut(), false)
            })?;
            let make = || Ok((self.random(t * k)?, self.random_f32(n * k)?, self.random(t * n)?));
            let bytes = bytes + 6.0 * (n * k) as f64;
            self.measure(m, work("gemm_weight", &[t, n, k], flops, bytes), make, |(x, dw, dy)| {
                gemm::weight_gradient(device, &dy.view(), &x.view(), (n, k), &mut dw.view_mut())
            })?;
        }
        let (n, k) = (2 * m.f, m.d);
        let (flops, bytes) = (2.0 * (t * n * k) as f64, 2.0 * (t * k + n * k + t * m.f) as f64);
        let make = || Ok((self.random(t * k)?, self.random(n * k)?, self.random(t * m.f)?));
        self.measure(m, work("gemm_swiglu", &[t, n, k], flops, bytes), make, |(x, w, h)| {
            gemm::swiglu(device, &x.view(), &w.view(), k, None, &mut h.view_mut())
        })
    }

    /// Tokens drawn for T rows.
    fn head(&self, m: &Model, t: usize) -> Result<()> {
        let (device, d, v) = (&self.device, m.d, m.vocab);
        let how = |row: usize| Draw { seq: row as u64, temperature: 1.0, top_p: 1.0, top_k: 0 };
        let asked: Vec<HeadRow> = (0..t).map(|row| HeadRow::draw(row as u32, &how(row), 7)).collect();
        let (flops, bytes) = (2.0 * (t * v * d) as f64, 2.0 * (v * d + t * d) as f64);
        let make = || {
            let scratch = HeadScratch::new(device, t, v, true)?;
            Ok((
                self.random(t * d)?,
                device.upload(&asked)?,
                self.random(v * d)?,
                scratch,
                device.alloc::<DrawnRow>(t)?,
            ))
        };
        self.measure(m, work("head_forward, head_draw", &[t, v, d], flops, bytes), make, |(x, rows, w, scratch, to)| {
            let input = HeadInput { x_td: x.view(), rows: rows.view(), w_vd: w.view(), d };
            head_forward(device, &input, 1, scratch)?;
            head_draw(device, scratch, &mut to.view_mut())
        })
    }

    /// One row of each of S sequences that see `context` keys.
    fn decode(&self, m: &Model, s: usize, context: usize) -> Result<()> {
        let (device, heads, width) = (&self.device, m.heads, m.heads.num_heads * m.heads.head_dim);
        let pages = context.div_ceil(PAGE);
        let table: Vec<u32> = (0..(s * pages) as u32).collect();
        let sequences: Vec<DecodeSeq<'_>> =
            table.chunks(pages).map(|pages| DecodeSeq { len: context, pages }).collect();
        let plan = DecodePlan::new(heads, &sequences, false);
        let scratch = plan.scratch(heads);
        let flops = 4.0 * (s * context * width) as f64;
        let bytes = 4.0 * (s * context * heads.num_kv_heads * heads.head_dim + s * width) as f64;
        let make = || {
            let kv = (self.random(s * pages * heads.page_len())?, self.random(s * pages * heads.page_len())?);
            let parts = (device.alloc::<f32>(scratch.0)?, device.alloc::<f32>(scratch.1)?);
            let to = (device.alloc::<bf16>(s * width)?, device.alloc::<f32>(s * heads.num_heads)?);
            Ok((device.upload(&plan.packed())?, self.random(s * width)?, kv, parts, to))
        };
        let done = work("attention_decode, attention_merge", &[s, context], flops, bytes);
        self.measure(m, done, make, |(packed, q, (k, v), (o, ml), (out, lse))| {
            let (work, layer) = (&plan.work(&packed.view()), (&k.view(), &v.view()));
            let parts = (&mut o.view_mut(), &mut ml.view_mut());
            attention_decode(device, heads, work, &q.view(), layer, parts)?;
            let parts = (&o.view(), &ml.view());
            attention_merge(device, heads, work, parts, &mut out.view_mut(), &mut lse.view_mut())
        })
    }

    /// T rows in whole sequences of at most `context`, forward and (`gradients`) backward.
    fn attention(&self, m: &Model, t: usize, context: usize, gradients: bool) -> Result<()> {
        let (device, heads) = (&self.device, m.heads);
        let width = heads.num_heads * heads.head_dim;
        let fused = width + 2 * heads.num_kv_heads * heads.head_dim;
        let (len, pages) = (context.min(t), context.min(t).div_ceil(PAGE));
        let table: Vec<u32> = (0..(t / len * pages) as u32).collect();
        let span = |(i, pages)| Span { row: i * len, len, pos: 0, pages };
        let spans: Vec<Span<'_>> = table.chunks(pages).enumerate().map(span).collect();
        let (plan, rows) = (SpanPlan::new(heads, &spans), t / len * len);
        let seen = (rows * (len + 1)) as f64 / 2.0;
        let kv_bytes = 4.0 * (rows * heads.num_kv_heads * heads.head_dim) as f64;
        let (flops, bytes) = (4.0 * seen * width as f64, 4.0 * (rows * width) as f64 + kv_bytes);
        let make = || {
            let kv = (self.random(table.len() * heads.page_len())?, self.random(table.len() * heads.page_len())?);
            let to = (self.random(rows * width)?, self.random_f32(rows * heads.num_heads)?);
            Ok((device.upload(&plan.packed())?, self.random(rows * width)?, kv, to))
        };
        let done = work("attention_forward", &[rows, len], flops, bytes);
        self.measure(m, done, make, |(packed, q, (k, v), (out, lse))| {
            let (plan, layer) = ((&plan, &packed.view()), (&k.view(), &v.view()));
            attention_forward(device, heads, plan, &q.view(), layer, &mut out.view_mut(), &mut lse.view_mut())
        })?;
        if !gradients {
            return Ok(());
        }
        let make = || {
            let (packed, q, kv, to) = make()?;
            let rest = (self.random_f32(rows * heads.num_heads)?, device.alloc::<bf16>(rows * fused)?);
            Ok((packed, q, kv, to, self.random(rows * width)?, rest))
        };
        let bytes = 2.0 * bytes + 2.0 * (rows * width) as f64;
        let done =
            work("attention_delta, attention_backward_q, attention_backward_kv", &[rows, len], 2.5 * flops, bytes);
        self.measure(m, done, make, |(packed, q, (k, v), (out, lse), dout, (delta, dqkv))| {
            let (plan, layer) = ((&plan, &packed.view()), (&k.view(), &v.view()));
            attention_delta(device, heads, &out.view(), &dout.view(), &mut delta.view_mut())?;
            let saved = Saved { q_thc: q.view(), dout_thc: dout.view(), lse_th: lse.view(), delta_th: delta.view() };
            attention_backward_q(device, heads, plan, saved, layer, &mut dqkv.view_mut())?;
            attention_backward_kv(device, heads, plan, saved, layer, &mut dqkv.view_mut())
        })
    }

    /// Kernels that memory binds, with T rows.
    fn rows(&self, m: &Model, t: usize) -> Result<()> {
        let (device, d, f) = (&self.device, m.d, m.f);
        let (row, gated) = (2.0 * (t * d) as f64, 2.0 * (t * f) as f64);
        let make = || Ok((self.random(t * d)?, self.random(d)?, self.random(t * d)?, self.random_f32(t)?));
        self.measure(m, work("rmsnorm_forward", &[t, d], 0.0, 2.0 * row), make, |(x, w, y, rstd)| {
            rows::rmsnorm_forward(device, &x.view(), &w.view(), 1e-6, &mut y.view_mut(), &mut rstd.view_mut())
        })?;
        let scratch = rows::rmsnorm_scratch(t, d);
        let make = || Ok((make()?, self.random(t * d)?, device.alloc::<f32>(scratch)?));
        self.measure(m, work("rmsnorm_add_forward", &[t, d], 0.0, 4.0 * row), make, |((x, w, y, rstd), delta, _)| {
            let (x, rstd) = (&mut x.view_mut(), &mut rstd.view_mut());
            rows::rmsnorm_add_forward(device, x, &delta.view(), &w.view(), 1e-6, &mut y.view_mut(), rstd)
        })?;
        let bytes = 4.0 * row + 4.0 * scratch as f64;
        self.measure(m, work("rmsnorm_backward", &[t, d], 0.0, bytes), make, |((x, w, dx, rstd), dy, partial)| {
            let (saved, partial) = ((&x.view(), &w.view(), &rstd.view()), &mut partial.view_mut());
            rows::rmsnorm_backward(device, saved, &dy.view(), &mut dx.view_mut(), partial)
        })?;
        let scratch = rows::column_sums_scratch(t, d);
        let make = || Ok((self.random(t * d)?, device.alloc::<f32>(scratch)?, self.random_f32(d)?));
        let bytes = row + 8.0 * scratch as f64;
        self.measure(m, work("column_sums, add_partials", &[t, d], 0.0, bytes), make, |(dy, partial, out)| {
            rows::column_sums(device, &dy.view(), d, &mut partial.view_mut())?;
            rows::add_partials(device, &partial.view(), &mut out.view_mut())
        })?;
        let make = || Ok((self.random(2 * t * f)?, self.random(t * f)?, device.alloc::<bf16>(2 * t * f)?));
        self.measure(m, work("swiglu_forward", &[t, f], 0.0, 3.0 * gated), make, |(both, h, _)| {
            rows::swiglu_forward(device, &both.view(), f, &mut h.view_mut())
        })?;
        self.measure(m, work("swiglu_backward", &[t, f], 0.0, 5.0 * gated), make, |(both, dh, to)| {
            rows::swiglu_backward(device, &both.view(), &dh.view(), f, &mut to.view_mut())
        })?;
        let tokens: Vec<u32> = (0..t).map(|i| (i * 7919 % m.vocab) as u32).collect();
        let make = || Ok((device.upload(&tokens)?, self.random(m.vocab * d)?, device.alloc::<bf16>(t * d)?));
        self.measure(m, work("embed_forward", &[t, d], 0.0, 2.0 * row), make, |(tokens, table, out)| {
            rows::embed_forward(device, &tokens.view(), &table.view(), d, &mut out.view_mut())
        })
    }

    /// Rotation of T rows, and their keys and values to their pages.
    fn rope(&self, m: &Model, t: usize) -> Result<()> {
        let (device, heads) = (&self.device, m.heads);
        let width = heads.num_heads * heads.head_dim;
        let fused = width + 2 * heads.num_kv_heads * heads.head_dim;
        let table: Vec<u32> = (0..t.div_ceil(PAGE) as u32).collect();
        let plan = RopePlan::new(t, &[Span { row: 0, len: t, pos: 0, pages: &table }]);
        let make = || {
            let angles = (self.random_f32(t * heads.head_dim / 2)?, self.random_f32(t * heads.head_dim / 2)?);
            let plan = (device.upload(&plan.positions)?, device.upload(&plan.slots)?);
            let pages = table.len() * heads.page_len();
            let to = (device.alloc::<bf16>(t * width)?, device.alloc::<bf16>(pages)?, device.alloc::<bf16>(pages)?);
            Ok((self.random(t * fused)?, angles, plan, to))
        };
        let done = work("rope_forward", &[t, fused], 0.0, 4.0 * (t * fused) as f64);
        self.measure(m, done, make, |(qkv, (cos, sin), (positions, slots), (q, k, v))| {
            let angles = Angles { cos: cos.view(), sin: sin.view(), positions: positions.view() };
            let (q, pages) = (&mut q.view_mut(), (&mut k.view_mut(), &mut v.view_mut()));
            rope_forward(device, heads, &qkv.view(), angles, &slots.view(), None, q, pages)
        })?;
        let turned = t * (fused - heads.num_kv_heads * heads.head_dim);
        let done = work("rope_backward", &[t, fused], 0.0, 4.0 * turned as f64);
        let make = || Ok((make()?, device.alloc::<f32>(0)?));
        self.measure(m, done, make, |((qkv, (cos, sin), (positions, _), (q, ..)), none)| {
            let angles = Angles { cos: cos.view(), sin: sin.view(), positions: positions.view() };
            rope_backward(device, heads, &mut qkv.view_mut(), &q.view(), angles, None, &mut none.view_mut())
        })
    }

    /// Norm and update of a parameter of F rows of D.
    fn optimiser(&self, m: &Model) -> Result<()> {
        let (device, n) = (&self.device, m.d * m.f);
        let (learning_rate, beta1, beta2, eps, weight_decay) = (1e-6, 0.9, 0.99, 1e-8, 0.01);
        let hyper = AdamW { learning_rate, beta1, beta2, eps, weight_decay, step: 3, seed: 1, parameter: 0 };
        let make = || {
            let (mut clip, partial) = (device.alloc::<ClipState>(1)?, self.fill(&[1.0f64], norm_blocks(n))?);
            clip_factor(device, &partial.view(), 1.0, &mut clip.view_mut())?;
            let moments = (self.random_f32(n)?, self.fill(&[0.5f32; 1024], n)?);
            let weight = (self.random(n)?, self.fill(&[0x1234u16; 1024], n)?);
            Ok((weight, self.random_f32(n)?, moments, partial, clip))
        };
        self.measure(m, work("norm_partials", &[n], 0.0, 4.0 * n as f64), make, |(_, g, _, partial, _)| {
            norm_partials(device, &g.view(), &mut partial.view_mut())
        })?;
        let done = work("adamw_f32", &[n], 0.0, 32.0 * n as f64);
        self.measure(m, done, make, |((w, tail), g, (first, second), _, clip)| {
            let (weight, tail, grad) = (w.view_mut(), tail.view_mut(), g.view_mut());
            let moments = (&mut first.view_mut(), &mut second.view_mut());
            adamw_f32(device, &mut Parameter { weight, tail, grad }, moments, &clip.view(), &hyper)
        })?;
        let done = work("adamw_bf16", &[n], 0.0, 24.0 * n as f64);
        let make = || Ok((make()?, self.random(n)?, self.fill(&[bf16::from_f32(0.5); 1024], n)?));
        self.measure(m, done, make, |(((w, tail), g, _, _, clip), first, second)| {
            let (weight, tail, grad) = (w.view_mut(), tail.view_mut(), g.view_mut());
            let moments = (&mut first.view_mut(), &mut second.view_mut());
            let rounding = Rounding { seed: 1, parameter: 0 };
            adamw_bf16(device, &mut Parameter { weight, tail, grad }, moments, &clip.view(), &hyper, rounding)
        })
    }

    fn all(&self, sizes: &Sizes) -> Result<()> {
        for m in sizes.models {
            for t in sizes.rows {
                self.products(m, *t, *t >= sizes.train_rows)?;
                self.head(m, *t)?;
                if *t <= MAX_SEQUENCES {
                    self.decode(m, *t, sizes.context)?;
                }
            }
            for t in [16, 256, sizes.train_rows] {
                self.attention(m, t, sizes.context, t == sizes.train_rows)?;
            }
            self.rows(m, sizes.train_rows)?;
            self.rope(m, sizes.train_rows)?;
            self.optimiser(m)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    // `cargo bench` says so; other ways of running it (cargo test) get the tiny shapes.
    let small =
        std::env::var_os("AZR_KERNEL_BENCH_SMALL").is_some() || !std::env::args().any(|argument| argument == "--bench");
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(reason) => {
            println!("SKIPPED: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    let run = Bench::new(device, small).and_then(|bench| bench.all(if small { &SMALL } else { &FULL }));
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
