//! Causal attention over KV pages of 16 tokens, one row at a time: what decoding runs, and the definition of a row's
//! arithmetic.
//!
//! Shapes: C head width, G key/value heads, H query heads, R = H / G query heads of a group. A page of one layer holds for
//! each key/value head its keys transposed, `[C][16]` (16 keys are 16 lanes), and its values, `[16][C]`.
//!
//! Scores are sums over C in order; the softmax's denominator has 16 lanes (position mod 16) and a fixed tree; the output is
//! a sum over positions in order. None of this depends on which other rows are computed.

use crate::compute::cpu::gemm::{Isa, Left, PANEL, TILE_ROWS, ZERO, tile};
use crate::compute::cpu::math::{LANES, exp, ln, tree_sum};
use crate::compute::cpu::rows::multiversion;
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
    pub fn page(&self, heads: Heads, p: usize, g: usize) -> (&'a [f32], &'a [f32]) {
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

multiversion! {
    /// [`soften`] for an instruction set.
    pub fn soften_row(row: &mut [f32], pos: usize) -> (f32, f32) = soften
}

/// Attention of one row at position `pos` in the heads of group `g`: `out[R][C]` and, for the backward pass, the
/// log-sum-exp of each head. This is decoding; [`super::attention_block`] does many rows of one sequence, to the same bits.
pub fn attend_row(
    isa: Isa,
    heads: Heads,
    q: &[f32],
    kv: SeqKv<'_>,
    g: usize,
    pos: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let c = heads.head_dim;
    let width = (pos / PAGE + 1) * PAGE;
    for ((q, out), lse) in q.chunks(TILE_ROWS * c).zip(out.chunks_mut(TILE_ROWS * c)).zip(lse.chunks_mut(TILE_ROWS)) {
        let n = lse.len();
        scores.resize(n * width, 0.0);
        score(isa, heads, q, kv, g, width, scores);
        let mut inverse = [0.0f32; TILE_ROWS];
        for (i, row) in scores.chunks_exact_mut(width).take(n).enumerate() {
            let (max, sum) = soften_row(isa, row, pos);
            lse[i] = max + ln(sum);
            inverse[i] = 1.0 / sum;
        }
        weigh(isa, heads, kv, g, pos, &scores[..n * width], &inverse[..n], out);
    }
}

/// Scaled scores of a few heads' queries against all keys of the pages, two pages at a time.
fn score(isa: Isa, heads: Heads, q: &[f32], kv: SeqKv<'_>, g: usize, width: usize, scores: &mut [f32]) {
    let (c, num_pages) = (heads.head_dim, width / PAGE);
    let a = Left { data: q, row: c, step: 1 };
    let mut sums = ZERO;
    for p in (0..num_pages).step_by(2) {
        let count = (num_pages - p).min(2);
        let keys = [kv.page(heads, p, g).0, kv.page(heads, p + count - 1, g).0];
        sums[..q.len() / c].fill([0.0; 2 * PANEL]);
        tile(isa, a, q.len() / c, &keys[..count], PAGE, c, &mut sums);
        for (row, sums) in scores.chunks_exact_mut(width).zip(&sums) {
            for (x, sum) in row[p * PAGE..][..count * PAGE].iter_mut().zip(sums) {
                *x = sum * heads.scale();
            }
        }
    }
}

/// Outputs of a few heads: values weighted, position after position, and scaled.
fn weigh(isa: Isa, heads: Heads, kv: SeqKv<'_>, g: usize, pos: usize, weights: &[f32], scale: &[f32], out: &mut [f32]) {
    let (c, width) = (heads.head_dim, weights.len() / scale.len());
    let whole = c / PANEL * PANEL;
    for from in (0..whole).step_by(2 * PANEL) {
        let panels = ((whole - from) / PANEL).min(2);
        let mut sums = ZERO;
        for p in 0..=pos / PAGE {
            let values = &kv.page(heads, p, g).1[from..];
            let b = [values, &values[(panels - 1) * PANEL..]];
            let a = Left { data: &weights[p * PAGE..], row: width, step: 1 };
            tile(isa, a, scale.len(), &b[..panels], c, (pos + 1 - p * PAGE).min(PAGE), &mut sums);
        }
        for ((out, sums), scale) in out.chunks_exact_mut(c).zip(&sums).zip(scale) {
            for (o, sum) in out[from..][..panels * PANEL].iter_mut().zip(sums) {
                *o = sum * scale;
            }
        }
    }
    // Columns that fill no panel; heads of today's models have none.
    for ((out, weights), scale) in out.chunks_exact_mut(c).zip(weights.chunks_exact(width)).zip(scale) {
        for (i, o) in out.iter_mut().enumerate().skip(whole) {
            let value = |j: usize| kv.page(heads, j / PAGE, g).1[j % PAGE * c + i];
            *o = (0..=pos).fold(0.0f32, |sum, j| weights[j].mul_add(value(j), sum)) * scale;
        }
    }
}

/// Replaces scores of positions up to `pos` by `exp(score - max)` and the rest by 0; returns the maximum and the sum.
#[inline(always)]
pub fn soften(row: &mut [f32], pos: usize) -> (f32, f32) {
    let (row, rest) = row.split_at_mut((pos / LANES + 1) * LANES);
    rest.fill(0.0);
    row[pos + 1..].fill(f32::NEG_INFINITY);
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
