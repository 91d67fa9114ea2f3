//! Causal attention over KV pages of 16 tokens, one row at a time: what decoding runs, and the definition of a row's
//! arithmetic.
//!
//! Shapes: C head width, G key/value heads, H query heads, R = H / G query heads of a group. A page of one layer holds for
//! each key/value head its keys transposed, `[C][16]` (16 keys are 16 lanes), and its values, `[16][C]`.
//!
//! Scores are sums over C in order; the softmax's denominator has 16 lanes (position mod 16) and a fixed tree; the output is
//! a sum over positions in order. None of this depends on which other rows are computed.

use crate::compute::cpu::math::{LANES, exp, ln, tree_sum};
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

/// Attention of one row at position `pos` in the heads of group `g`: `out[R][C]` and, for the backward pass, the
/// log-sum-exp of each head. This is decoding; [`super::attention_block`] does many rows of one sequence, to the same bits.
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
    let width = (pos / PAGE + 1) * PAGE;
    scores.resize(group * width, 0.0);
    let mut r = 0;
    while r < group {
        let count = (group - r).min(4);
        let (q, scores) = (&q[r * c..][..count * c], &mut scores[r * width..][..count * width]);
        let (out, lse) = (&mut out[r * c..][..count * c], &mut lse[r..][..count]);
        match count {
            1 => attend_heads::<1, 4>(heads, q, kv, g, pos, scores, out, lse),
            2 => attend_heads::<2, 2>(heads, q, kv, g, pos, scores, out, lse),
            3 => attend_heads::<3, 2>(heads, q, kv, g, pos, scores, out, lse),
            _ => attend_heads::<4, 1>(heads, q, kv, g, pos, scores, out, lse),
        }
        r += count;
    }
}

/// Attention of N heads that share keys and values; scores of P pages are computed at a time.
#[inline(always)]
fn attend_heads<const N: usize, const P: usize>(
    heads: Heads,
    q: &[f32],
    kv: SeqKv<'_>,
    g: usize,
    pos: usize,
    scores: &mut [f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (c, num_pages) = (heads.head_dim, pos / PAGE + 1);
    let width = num_pages * PAGE;
    let mut p = 0;
    while p + P <= num_pages {
        page_scores::<N, P>(heads, q, kv, g, p, width, scores);
        p += P;
    }
    for p in p..num_pages {
        page_scores::<N, 1>(heads, q, kv, g, p, width, scores);
    }
    let mut inverse = [0.0f32; N];
    for n in 0..N {
        let row = &mut scores[n * width..][..width];
        let (max, sum) = soften(row, pos);
        lse[n] = max + ln(sum);
        inverse[n] = 1.0 / sum;
    }
    let mut from = 0;
    while from + 2 * LANES <= c {
        weigh::<N, { 2 * LANES }>(heads, kv, g, pos, scores, &inverse, from, out);
        from += 2 * LANES;
    }
    while from + 8 <= c {
        weigh::<N, 8>(heads, kv, g, pos, scores, &inverse, from, out);
        from += 8;
    }
    for from in from..c {
        weigh::<N, 1>(heads, kv, g, pos, scores, &inverse, from, out);
    }
}

#[inline(always)]
fn page_scores<const N: usize, const P: usize>(
    heads: Heads,
    q: &[f32],
    kv: SeqKv<'_>,
    g: usize,
    page: usize,
    width: usize,
    scores: &mut [f32],
) {
    let c = heads.head_dim;
    let keys: [&[f32]; P] = std::array::from_fn(|i| kv.page(heads, page + i, g).0);
    let mut sums = [[[0.0f32; LANES]; P]; N];
    for i in 0..c {
        let key: [&[f32; LANES]; P] =
            std::array::from_fn(|p| keys[p][i * PAGE..][..PAGE].try_into().expect("a page is 16 wide"));
        for n in 0..N {
            let x = q[n * c + i];
            for p in 0..P {
                for lane in 0..LANES {
                    sums[n][p][lane] = x.mul_add(key[p][lane], sums[n][p][lane]);
                }
            }
        }
    }
    for n in 0..N {
        for p in 0..P {
            for lane in 0..LANES {
                scores[n * width + (page + p) * PAGE + lane] = sums[n][p][lane] * heads.scale();
            }
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

/// Columns `from .. from + W` of the outputs of N heads.
#[inline(always)]
fn weigh<const N: usize, const W: usize>(
    heads: Heads,
    kv: SeqKv<'_>,
    g: usize,
    pos: usize,
    weights: &[f32],
    scale: &[f32; N],
    from: usize,
    out: &mut [f32],
) {
    let (c, width) = (heads.head_dim, weights.len() / N);
    let mut sums = [[0.0f32; W]; N];
    for p in 0..=pos / PAGE {
        let (_, values) = kv.page(heads, p, g);
        for slot in 0..(pos + 1 - p * PAGE).min(PAGE) {
            let value: &[f32; W] = values[slot * c + from..][..W].try_into().expect("W columns");
            for n in 0..N {
                let weight = weights[n * width + p * PAGE + slot];
                for i in 0..W {
                    sums[n][i] = weight.mul_add(value[i], sums[n][i]);
                }
            }
        }
    }
    for n in 0..N {
        for i in 0..W {
            out[n * c + from + i] = sums[n][i] * scale[n];
        }
    }
}
