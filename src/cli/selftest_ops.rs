//! What `selftest` runs on two devices: each operation on random shapes, as the values that it leaves. Inputs are numbers
//! that bf16 holds, so that all devices begin with the same.

use half::bf16;

use crate::base::rng::{Purpose, Rng};
use crate::compute::ops::{
    AdamW, Angles, Backend, HeadLoss, HeadTarget, Heads, LayerKv, MomentPrecision, PAGE, Span, Weight,
};
use crate::error::Result;

/// Values that an operation leaves, by name.
pub type Values = Vec<(&'static str, Vec<f32>)>;

/// Sizes of one round, and its random numbers.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Number of the round.
    pub number: u64,
    /// Most rows.
    pub rows: usize,
    /// Largest width, in eights.
    pub eights: usize,
}

/// Heads of the models that are trained: widths 32, 64 and 128, groups of 2, 7 and 4.
const HEADS: [Heads; 3] = [
    Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 },
    Heads { num_heads: 7, num_kv_heads: 1, head_dim: 64 },
    Heads { num_heads: 4, num_kv_heads: 1, head_dim: 128 },
];

impl Round {
    fn rng(self, stream: u32) -> Rng {
        Rng::new(self.number, Purpose::Test, 7, stream)
    }

    /// From 1 to the most rows.
    fn rows(self, stream: u32) -> usize {
        1 + self.rng(stream).below(self.rows)
    }

    fn width(self, stream: u32) -> usize {
        8 * (1 + self.rng(stream).below(self.eights))
    }

    fn random(self, stream: u32, len: usize) -> Vec<f32> {
        let mut rng = self.rng(stream);
        (0..len).map(|_| bf16::from_f64(rng.normal()).to_f32()).collect()
    }

    fn heads(self) -> Heads {
        HEADS[(self.number % 3) as usize]
    }
}

/// A weight that is as large as its inputs are many, so that products stay near 1.
fn weight<B: Backend>(b: &B, round: Round, stream: u32, n: usize, k: usize) -> Result<(B::Param, B::Linear)> {
    let scale = 1.0 / (k as f32).sqrt();
    let values: Vec<f32> = round.random(stream, n * k).iter().map(|w| bf16::from_f32(w * scale).to_f32()).collect();
    let param = b.param(&values)?;
    let layout = b.linear(&param, n, k, true)?;
    Ok((param, layout))
}

/// Products forward and backward, with bias, and added to what is there.
pub fn products<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let (t, n, k) = (round.rows(1), round.width(2), round.width(3));
    let (param, layout) = weight(b, round, 4, n, k)?;
    let w = Weight { param: &param, layout: &layout };
    let (x, dy) = (b.upload(&round.random(5, t * k))?, b.upload(&round.random(6, t * n))?);
    let bias = b.param(&round.random(7, n))?;
    let (mut y, mut sum) = (b.act(t * n)?, b.upload(&round.random(8, t * n))?);
    b.matmul(&x, w, Some(&bias), &mut y, false)?;
    b.matmul(&x, w, None, &mut sum, true)?;
    let (mut dx, mut dw, mut db) = (b.act(t * k)?, b.zeros(n * k)?, b.zeros(n)?);
    b.matmul_backward_input(&dy, w, &mut dx, false)?;
    b.matmul_backward_weight(&dy, &x, n, k, &mut dw)?;
    b.matmul_backward_weight(&dy, &x, n, k, &mut dw)?;
    b.bias_backward(&dy, n, &mut db)?;
    Ok(vec![
        ("y", b.values(&y)?),
        ("y +=", b.values(&sum)?),
        ("dx", b.values(&dx)?),
        ("dw", b.download(&dw)?),
        ("db", b.download(&db)?),
    ])
}

/// Gated products, with gate and up kept and not.
pub fn gates<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let (t, f, k) = (round.rows(1), round.width(2), round.width(3));
    let (param, layout) = weight(b, round, 4, 2 * f, k)?;
    let w = Weight { param: &param, layout: &layout };
    let (x, dh) = (b.upload(&round.random(5, t * k))?, b.upload(&round.random(6, t * f))?);
    let (mut kept, mut h, mut again, mut d) = (b.act(2 * t * f)?, b.act(t * f)?, b.act(t * f)?, b.act(2 * t * f)?);
    b.gated(&x, w, f, Some(&mut kept), &mut h)?;
    b.gated(&x, w, f, None, &mut again)?;
    b.swiglu_backward(&kept, &dh, f, &mut d)?;
    Ok(vec![("h", b.values(&h)?), ("h alone", b.values(&again)?), ("d", b.values(&d)?)])
}

/// Embedding and RMSNorm.
pub fn rows<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let (t, d, v) = (round.rows(1), round.width(2), 8 * 5);
    let mut rng = round.rng(3);
    let tokens: Vec<u32> = (0..t).map(|_| rng.below(v) as u32).collect();
    let pages: Vec<u32> = (0..t.div_ceil(PAGE) as u32).collect();
    let batch = b.batch(round.heads(), &tokens, &[Span { row: 0, len: t, pos: 0, pages: &pages }])?;
    let mut x = b.act(t * d)?;
    b.embed(&batch, &b.param(&round.random(4, v * d))?, d, &mut x)?;
    let (w, dy) = (b.param(&round.random(5, d))?, b.upload(&round.random(6, t * d))?);
    let (mut y, mut rstd, mut dx, mut dw) = (b.act(t * d)?, b.scratch(t)?, b.act(t * d)?, b.zeros(d)?);
    b.rmsnorm(&x, &w, 1e-5, &mut y, &mut rstd)?;
    b.clear_act(&mut dx)?;
    b.rmsnorm_backward(&x, &w, &rstd, &dy, &mut dx, &mut dw)?;
    let mut dtable = b.zeros(v * d)?;
    b.embed_backward(&batch, &dy, d, &mut dtable)?;
    Ok(vec![
        ("x", b.values(&x)?),
        ("y", b.values(&y)?),
        ("1/rms", b.download(&rstd)?),
        ("dx", b.values(&dx)?),
        ("dw", b.download(&dw)?),
        ("dtable", b.download(&dtable)?),
    ])
}

/// Rotation with head norms, attention over whole sequences, and both backward.
pub fn training_attention<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let heads = round.heads();
    let (lens, c) = ([round.rows(1), 1, round.rows(2)], heads.head_dim);
    let (t, hc) = (lens.iter().sum::<usize>(), heads.num_heads * c);
    let q = hc + 2 * heads.num_kv_heads * c;
    // Pages from both ends, so that they are out of order.
    let count = |len: usize| len.div_ceil(PAGE) as u32;
    let total: u32 = lens.iter().map(|l| count(*l)).sum();
    let (mut from, mut row, mut pages) = (total, 0, Vec::new());
    for len in lens {
        pages.push((from - count(len)..from).rev().collect::<Vec<u32>>());
        from -= count(len);
    }
    let mut spans = Vec::new();
    for (len, pages) in lens.into_iter().zip(&pages) {
        spans.push(Span { row, len, pos: 0, pages });
        row += len;
    }
    let (kv, batch) = (b.new_kv(heads, 1, total as usize)?, b.batch(heads, &vec![0; t], &spans)?);
    let (kv, angles) = (LayerKv { kv: &kv, layer: 0 }, angles(b, heads, round.rows)?);
    let (wq, wk) = (b.param(&round.random(3, c))?, b.param(&round.random(4, c))?);
    let norms = round.number.is_multiple_of(2).then_some((&wq, &wk, 1e-5));
    let (raw, dout) = (b.upload(&round.random(5, t * q))?, b.upload(&round.random(6, t * hc))?);
    let (mut queries, mut out, mut lse) = (b.act(t * hc)?, b.act(t * hc)?, b.scratch(t * heads.num_heads)?);
    b.rope(heads, &raw, &batch, &angles, norms, kv, &mut queries)?;
    b.attention(heads, kv, &queries, &batch, &mut out, &mut lse)?;
    let (mut d, mut dq, mut dk) = (b.act(t * q)?, b.zeros(c)?, b.zeros(c)?);
    b.attention_backward(heads, kv, &queries, &out, &lse, &dout, &batch, &mut d)?;
    let before = b.values(&d)?;
    let dnorms = norms.is_some().then_some((&mut dq, &mut dk));
    b.rope_backward(heads, &mut d, norms.map(|_| &raw), &batch, &angles, norms, dnorms)?;
    let mut values = vec![
        ("queries", b.values(&queries)?),
        ("out", b.values(&out)?),
        ("lse", b.download(&lse)?),
        ("d before rotation", before),
        ("d", b.values(&d)?),
    ];
    if norms.is_some() {
        values.extend([("d query norm", b.download(&dq)?), ("d key norm", b.download(&dk)?)]);
    }
    Ok(values)
}

fn angles<B: Backend>(b: &B, heads: Heads, positions: usize) -> Result<Angles<B::Buf>> {
    let half = heads.head_dim / 2;
    let angle = |i: usize| (i / half) as f64 * 0.8f64.powi((i % half) as i32);
    let all: Vec<f64> = (0..2 * positions.max(PAGE) * half).map(angle).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = all.iter().map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
    let mut angles = Angles { cos: b.scratch(cos.len())?, sin: b.scratch(sin.len())? };
    b.write(&mut angles.cos, &cos)?;
    b.write(&mut angles.sin, &sin)?;
    Ok(angles)
}

/// A prompt that several sequences share, whose last page each copies, and a step in which they decode beside a prompt
/// of another.
pub fn decoding_attention<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let heads = round.heads();
    let (samples, prompt, other) = (3, round.rows(1) + round.rows, round.rows(2));
    let hc = heads.num_heads * heads.head_dim;
    let q = hc + 2 * heads.num_kv_heads * heads.head_dim;
    let whole = (prompt / PAGE) as u32;
    let prompt_pages: Vec<u32> = (0..=whole).collect();
    let tables: Vec<Vec<u32>> = (0..samples).map(|i| (0..whole).chain([whole + i]).collect()).collect();
    let first = whole + samples;
    let other_pages: Vec<u32> = (first..first + other.div_ceil(PAGE) as u32).collect();
    let mut kv = b.new_kv(heads, 1, (first as usize) + other_pages.len())?;
    let angles = angles(b, heads, round.rows + 1)?;
    let run = |kv: &B::Kv, stream: u32, spans: &[Span<'_>]| {
        let t: usize = spans.iter().map(|s| s.len).sum();
        let (kv, batch) = (LayerKv { kv, layer: 0 }, b.batch(heads, &vec![0; t], spans)?);
        let (mut queries, mut out, mut lse) = (b.act(t * hc)?, b.act(t * hc)?, b.scratch(t * heads.num_heads)?);
        b.rope(heads, &b.upload(&round.random(stream, t * q))?, &batch, &angles, None, kv, &mut queries)?;
        b.attention(heads, kv, &queries, &batch, &mut out, &mut lse)?;
        Ok::<_, crate::Error>((b.values(&out)?, b.download(&lse)?))
    };
    let (filled, _) = run(&kv, 3, &[Span { row: 0, len: prompt, pos: 0, pages: &prompt_pages }])?;
    b.copy_pages(&mut kv, &(1..samples).map(|copy| (whole, whole + copy)).collect::<Vec<_>>())?;
    let mut spans: Vec<Span<'_>> =
        tables.iter().enumerate().map(|(row, pages)| Span { row, len: 1, pos: prompt, pages }).collect();
    spans.push(Span { row: spans.len(), len: other, pos: 0, pages: &other_pages });
    let (out, lse) = run(&kv, 4, &spans)?;
    Ok(vec![("prompt", filled), ("out", out), ("lse", lse)])
}

/// Logits, reports and gradients of the head.
pub fn head<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let (t, d, v) = (round.rows(1), round.width(2), round.width(3) + 64);
    let (param, layout) = weight(b, round, 4, v, d)?;
    let (head, x) = (Weight { param: &param, layout: &layout }, b.upload(&round.random(5, t * d))?);
    let mut rng = round.rng(6);
    let targets: Vec<HeadTarget> = (0..t)
        .step_by(2)
        .map(|row| {
            let clipped = HeadLoss::Clipped { advantage: 1.5, old_logprob: -4.5, low: 0.9, high: 9.0, weight: 0.3 };
            let kind = if row % 4 == 0 { HeadLoss::Nll { weight: 0.7 } } else { clipped };
            HeadTarget { row, token: rng.below(v) as u32, inv_temperature: 1.25, kind, entropy_coef: 0.01 }
        })
        .collect();
    let (mut dx, mut dw) = (b.act(t * d)?, b.zeros(v * d)?);
    let reports = b.reports(b.policy_head(&x, d, head, &targets, Some((&mut dx, &mut dw)))?)?;
    Ok(vec![
        ("logits", b.logits(&x, d, head)?),
        ("logprob", reports.iter().map(|r| r.logprob).collect()),
        ("entropy", reports.iter().map(|r| r.entropy).collect()),
        ("loss", reports.iter().map(|r| r.loss).collect()),
        ("dx", b.values(&dx)?),
        ("dw", b.download(&dw)?),
    ])
}

/// Three clipped steps of AdamW.
pub fn updates<B: Backend>(b: &B, round: Round) -> Result<Values> {
    let n = round.width(1) * round.rows(2);
    let mut p = b.param(&round.random(3, n))?;
    let (mut g, mut moments) = (b.zeros(n)?, b.moments(n, MomentPrecision::F32)?);
    let mut norms = Vec::new();
    for step in 1..=3 {
        b.write(&mut g, &round.random(3 + step as u32, n))?;
        let clip = b.clip(std::slice::from_ref(&g), 1.0)?;
        let (learning_rate, beta1, beta2, eps, weight_decay) = (1e-2, 0.9, 0.99, 1e-8, 0.1);
        let hyper = AdamW { learning_rate, beta1, beta2, eps, weight_decay, step, seed: 1, parameter: 0 };
        b.adamw(&mut p, &mut g, &mut moments, &clip, &hyper)?;
        norms.push(b.norm(&clip)? as f32);
    }
    let (master, m, v) = (b.master(&p)?, b.read_moments(&moments, 0)?, b.read_moments(&moments, 1)?);
    Ok(vec![
        ("norm", norms),
        ("weights", master),
        ("m", m),
        ("v", v),
        ("g + 1", b.download(&g)?.iter().map(|g| g + 1.0).collect()),
    ])
}
