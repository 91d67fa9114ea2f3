//! Causal attention over KV pages of 16 tokens: one row's arithmetic, used by prefill, decoding and training alike.
//!
//! Shapes: C head width, G key/value heads, H query heads, R = H / G query heads of a group. A page of one layer holds for
//! each key/value head its keys transposed, `[C][16]` (16 keys are 16 lanes), and its values, `[16][C]`.
//!
//! Scores are sums over C in order; the softmax's denominator has 16 lanes (position mod 16) and a fixed tree; the output is
//! a sum over positions in order. None of this depends on which other rows are computed.

use crate::compute::cpu::math::{LANES, dot, exp, ln, tree_sum};
use crate::compute::ops::{Heads, PAGE};

/// One sequence's keys and values in one layer.
#[derive(Clone, Copy)]
pub struct SeqKv<'a> {
    /// Keys of all pages of the layer.
    pub keys: &'a [f32],
    /// Values of all pages of the layer.
    pub values: &'a [f32],
    /// The sequence's page table.
    pub pages: &'a [u32],
}

impl<'a> SeqKv<'a> {
    /// Keys `[C][16]` and values `[16][C]` of head `g` on the sequence's page `p`.
    #[inline(always)]
    fn page(&self, heads: Heads, p: usize, g: usize) -> (&'a [f32], &'a [f32]) {
        let len = heads.head_dim * PAGE;
        let at = self.pages[p] as usize * heads.page_len() + g * len;
        (&self.keys[at..at + len], &self.values[at..at + len])
    }
}

/// Writes one token's key and value (each `[G][C]`) at slot `slot` of a page (`[G][C][16]`, `[G][16][C]`).
pub fn write_page(heads: Heads, key: &[f32], value: &[f32], slot: usize, k_page: &mut [f32], v_page: &mut [f32]) {
    let c = heads.head_dim;
    for g in 0..heads.num_kv_heads {
        let page = &mut k_page[g * c * PAGE..][..c * PAGE];
        for (i, x) in key[g * c..][..c].iter().enumerate() {
            page[i * PAGE + slot] = *x;
        }
        v_page[g * c * PAGE + slot * c..][..c].copy_from_slice(&value[g * c..][..c]);
    }
}

/// Attention of one row at position `pos` in the heads of group `g`: `out[R][C]` and, for the backward pass, the
/// log-sum-exp of each head.
#[inline(always)]
pub fn attend_group(
    heads: Heads,
    q: &[f32],
    kv: SeqKv<'_>,
    g: usize,
    pos: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (c, group) = (heads.head_dim, heads.group());
    let num_pages = pos / PAGE + 1;
    scores.resize(group * num_pages * PAGE, 0.0);
    for p in 0..num_pages {
        let (keys, _) = kv.page(heads, p, g);
        let mut r = 0;
        while r < group {
            let count = (group - r).min(4);
            let q = &q[r * c..];
            let mut acc = [[0.0f32; LANES]; 4];
            match count {
                1 => page_scores::<1>(q, c, keys, &mut acc),
                2 => page_scores::<2>(q, c, keys, &mut acc),
                3 => page_scores::<3>(q, c, keys, &mut acc),
                _ => page_scores::<4>(q, c, keys, &mut acc),
            }
            for (i, acc) in acc.iter().enumerate().take(count) {
                let row = &mut scores[((r + i) * num_pages + p) * PAGE..][..PAGE];
                for lane in 0..LANES {
                    row[lane] = acc[lane] * heads.scale();
                }
            }
            r += count;
        }
    }
    for r in 0..group {
        let row = &mut scores[r * num_pages * PAGE..][..num_pages * PAGE];
        row[pos + 1..].fill(f32::NEG_INFINITY);
        let (max, sum) = soften(row);
        lse[r] = max + ln(sum);
        let inverse = 1.0 / sum;
        weigh(heads, kv, g, pos, row, inverse, &mut out[r * c..][..c]);
    }
}

#[inline(always)]
fn page_scores<const N: usize>(q: &[f32], c: usize, keys: &[f32], acc: &mut [[f32; LANES]; 4]) {
    let mut sums = [[0.0f32; LANES]; N];
    for i in 0..c {
        let key: &[f32; LANES] = keys[i * PAGE..][..PAGE].try_into().expect("a page is 16 wide");
        for (r, sum) in sums.iter_mut().enumerate() {
            let x = q[r * c + i];
            for lane in 0..LANES {
                sum[lane] = x.mul_add(key[lane], sum[lane]);
            }
        }
    }
    acc[..N].copy_from_slice(&sums);
}

/// Replaces scores by `exp(score - max)`; returns the maximum and the sum.
#[inline(always)]
fn soften(row: &mut [f32]) -> (f32, f32) {
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in row.chunks_exact(LANES) {
        for lane in 0..LANES {
            max[lane] = if chunk[lane] > max[lane] { chunk[lane] } else { max[lane] };
        }
    }
    let max = max.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    let mut sum = [0.0f32; LANES];
    for chunk in row.chunks_exact_mut(LANES) {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - max);
            sum[lane] += chunk[lane];
        }
    }
    (max, tree_sum(sum))
}

#[inline(always)]
fn weigh(heads: Heads, kv: SeqKv<'_>, g: usize, pos: usize, row: &[f32], scale: f32, out: &mut [f32]) {
    let c = heads.head_dim;
    out.fill(0.0);
    for p in 0..=pos / PAGE {
        let (_, values) = kv.page(heads, p, g);
        for slot in 0..(pos + 1 - p * PAGE).min(PAGE) {
            let weight = row[p * PAGE + slot];
            for (o, v) in out.iter_mut().zip(&values[slot * c..][..c]) {
                *o = weight.mul_add(*v, *o);
            }
        }
    }
    for o in out {
        *o *= scale;
    }
}

/// What the backward pass of one sequence and one key/value head reads; row t belongs to position t.
pub struct BackwardIn<'a> {
    /// Queries, row t at `t * q_stride`, `[R][C]` each.
    pub q: &'a [f32],
    /// Attention outputs, same layout.
    pub out: &'a [f32],
    /// Gradients of the outputs, same layout.
    pub d_out: &'a [f32],
    /// Distance of rows in the three.
    pub q_stride: usize,
    /// Log-sum-exp, row t at `t * lse_stride`, `[R]` each.
    pub lse: &'a [f32],
    /// Distance of rows in `lse`.
    pub lse_stride: usize,
    /// Number of rows, T.
    pub num_rows: usize,
}

/// Scratch of [`attend_backward`].
#[derive(Default)]
pub struct BackwardScratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
}

/// Gradients of one sequence in group `g`: `dq` rows as `q` lies, `dk` and `dv` as `[T][C]`.
#[inline(always)]
pub fn attend_backward(
    heads: Heads,
    kv: SeqKv<'_>,
    g: usize,
    io: &BackwardIn<'_>,
    scratch: &mut BackwardScratch,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (c, group, scale) = (heads.head_dim, heads.group(), heads.scale());
    let num_pages = io.num_rows.div_ceil(PAGE);
    scratch.keys.resize(num_pages * PAGE * c, 0.0);
    scratch.values.resize(num_pages * PAGE * c, 0.0);
    for p in 0..num_pages {
        let (keys, values) = kv.page(heads, p, g);
        for slot in 0..PAGE {
            for i in 0..c {
                scratch.keys[(p * PAGE + slot) * c + i] = keys[i * PAGE + slot];
                scratch.values[(p * c + i) * PAGE + slot] = values[slot * c + i];
            }
        }
    }
    dk.fill(0.0);
    dv.fill(0.0);
    for t in 0..io.num_rows {
        let pages = t / PAGE + 1;
        scratch.p.resize(pages * PAGE, 0.0);
        scratch.ds.resize(pages * PAGE, 0.0);
        for r in 0..group {
            let at = t * io.q_stride + r * c;
            let (q, out, d_out) = (&io.q[at..at + c], &io.out[at..at + c], &io.d_out[at..at + c]);
            let (lse, delta) = (io.lse[t * io.lse_stride + r], dot(out, d_out));
            for p in 0..pages {
                let (keys, _) = kv.page(heads, p, g);
                let mut s = [[0.0f32; LANES]; 4];
                let mut dp = [[0.0f32; LANES]; 4];
                page_scores::<1>(q, c, keys, &mut s);
                page_scores::<1>(d_out, c, &scratch.values[p * PAGE * c..][..PAGE * c], &mut dp);
                for lane in 0..LANES {
                    let visible = p * PAGE + lane <= t;
                    let weight = if visible { exp(s[0][lane] * scale - lse) } else { 0.0 };
                    scratch.p[p * PAGE + lane] = weight;
                    scratch.ds[p * PAGE + lane] = if visible { weight * (dp[0][lane] - delta) * scale } else { 0.0 };
                }
            }
            let dq = &mut dq[at..at + c];
            dq.fill(0.0);
            for j in 0..=t {
                let (weight, ds) = (scratch.p[j], scratch.ds[j]);
                let key = &scratch.keys[j * c..][..c];
                let (dk, dv) = (&mut dk[j * c..][..c], &mut dv[j * c..][..c]);
                for i in 0..c {
                    dq[i] = ds.mul_add(key[i], dq[i]);
                    dk[i] = ds.mul_add(q[i], dk[i]);
                    dv[i] = weight.mul_add(d_out[i], dv[i]);
                }
            }
        }
    }
}
