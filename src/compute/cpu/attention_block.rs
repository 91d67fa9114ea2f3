//! Attention of many rows of one sequence, forward and backward, as small matrix products.
//!
//! A block is up to 32 positions with all query heads of one group. Scores are sums over C in order, outputs sums over
//! positions in order, as in [`super::attention`]; so a row's bits are those of decoding. The backward pass adds the
//! blocks' parts of the key and value gradients in the order of positions.

use crate::compute::cpu::attention::{SeqKv, soften_row};
use crate::compute::cpu::gemm::{Isa, Left, PANEL, Right, copy_part, product};
use crate::compute::cpu::math::{dot, exp, ln};
use crate::compute::cpu::rows::multiversion;
use crate::compute::ops::{Heads, PAGE};

/// Positions of one block.
pub const BLOCK: usize = 32;

multiversion! {
    fn slopes(p: &mut [f32], dp: &mut [f32], pos: usize, scale: f32, lse: f32, delta: f32) = slopes_body
}
multiversion! {
    fn dot_of(a: &[f32], b: &[f32]) -> f32 = dot
}

/// Rows of several positions, each holding `[R][C]` of one group's heads: position i at `data[i * stride..]`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Elements.
    pub data: &'a [f32],
    /// Distance of positions.
    pub stride: usize,
}

/// Buffers that blocks reuse.
#[derive(Default)]
pub struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    key_columns: Vec<f32>,
    q: Vec<f32>,
    q_panels: Vec<f32>,
    d_out: Vec<f32>,
    d_out_panels: Vec<f32>,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    result: Vec<f32>,
}

/// Length of a panel array for `rows` rows of `c` columns.
fn panels_len(rows: usize, c: usize) -> usize {
    c.div_ceil(PANEL) * PANEL * rows
}

/// Copies rows of `c` columns into panels of 16 columns, `[C/16][rows][16]`.
fn pack<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, c: usize, out: &mut Vec<f32>) {
    let count = rows.len();
    out.resize(panels_len(count, c), 0.0);
    for (i, row) in rows.enumerate() {
        for (p, part) in row.chunks(PANEL).enumerate() {
            copy_part::<PANEL>(part, part.len(), &mut out[(p * count + i) * PANEL..]);
        }
    }
}

/// Keys of the first `num_pages` pages as panels, `[pages][C][16]`.
fn gather_keys(heads: Heads, kv: SeqKv<'_>, g: usize, num_pages: usize, out: &mut Vec<f32>) {
    out.clear();
    (0..num_pages).for_each(|p| out.extend_from_slice(kv.page(heads, p, g).0));
}

/// Rows of `[R][C]` of positions `from..to`, one after another.
fn gather(rows: Rows<'_>, from: usize, to: usize, width: usize, out: &mut Vec<f32>) {
    out.clear();
    (from..to).for_each(|i| out.extend_from_slice(&rows.data[i * rows.stride..][..width]));
}

/// Attention of one block in the heads of group `g`: query rows at positions `pos0 ..`, `out` and `lse` with one entry per
/// position, `[H C]` and `[H]` wide.
pub fn attend_block(
    isa: Isa,
    heads: Heads,
    kv: SeqKv<'_>,
    g: usize,
    pos0: usize,
    q: Rows<'_>,
    scratch: &mut Scratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (c, group, h) = (heads.head_dim, heads.group(), heads.num_heads);
    let positions = lse.len() / h;
    let (rows, end) = (positions * group, pos0 + positions);
    let num_pages = end.div_ceil(PAGE);
    let width = num_pages * PAGE;
    let s = scratch;
    gather(q, 0, positions, group * c, &mut s.q);
    gather_keys(heads, kv, g, num_pages, &mut s.keys);
    s.scores.resize(rows * width, 0.0);
    let (a, b) = (
        Left { data: &s.q, row: c, step: 1 },
        Right { data: &s.keys, stride: c * PAGE, row: PANEL, cols: width, count: c },
    );
    product(isa, a, rows, b, &mut s.scores, width, false);
    s.result.resize(rows * c, 0.0);
    let mut inverse = Vec::with_capacity(rows);
    for (i, row) in s.scores.chunks_exact_mut(width).take(rows).enumerate() {
        row.iter_mut().for_each(|x| *x *= heads.scale());
        let (max, sum) = soften_row(isa, row, pos0 + i / group);
        lse[i / group * h + g * group + i % group] = max + ln(sum);
        inverse.push(1.0 / sum);
    }
    let values = (0..end).map(|j| &kv.page(heads, j / PAGE, g).1[j % PAGE * c..][..c]);
    pack(values, c, &mut s.values);
    let (a, b) = (
        Left { data: &s.scores, row: width, step: 1 },
        Right { data: &s.values, stride: end * PANEL, row: PANEL, cols: c, count: end },
    );
    product(isa, a, rows, b, &mut s.result, c, false);
    for (i, (row, scale)) in s.result.chunks_exact(c).zip(inverse).enumerate() {
        let at = (i / group * h + g * group + i % group) * c;
        out[at..at + c].iter_mut().zip(row).for_each(|(o, x)| *o = x * scale);
    }
}

/// What the backward pass of one whole sequence reads.
pub struct BackwardIn<'a> {
    /// Queries.
    pub q: Rows<'a>,
    /// Attention's outputs.
    pub out: Rows<'a>,
    /// Their gradients.
    pub d_out: Rows<'a>,
    /// Log-sum-exp, position i at `i * H`, `[R]` of the group.
    pub lse: &'a [f32],
    /// Number of positions.
    pub len: usize,
}

/// Gradients of one sequence in group `g`: writes query rows through `write_dq(position, [R][C])` and `dk`, `dv` as
/// `[T][C]`.
pub fn attend_backward(
    isa: Isa,
    heads: Heads,
    kv: SeqKv<'_>,
    g: usize,
    io: &BackwardIn<'_>,
    s: &mut Scratch,
    mut write_dq: impl FnMut(usize, &[f32]),
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (c, group, len) = (heads.head_dim, heads.group(), io.len);
    let all_pages = len.div_ceil(PAGE);
    gather_keys(heads, kv, g, all_pages, &mut s.keys);
    s.values.clear();
    s.values.resize(all_pages * c * PAGE, 0.0);
    let mut key_rows = vec![0.0; len * c];
    for j in 0..len {
        let (keys, values) = kv.page(heads, j / PAGE, g);
        for i in 0..c {
            s.values[(j / PAGE * c + i) * PAGE + j % PAGE] = values[j % PAGE * c + i];
            key_rows[j * c + i] = keys[i * PAGE + j % PAGE];
        }
    }
    pack(key_rows.chunks_exact(c), c, &mut s.key_columns);
    dk.fill(0.0);
    dv.fill(0.0);
    for start in (0..len).step_by(BLOCK) {
        let end = (start + BLOCK).min(len);
        let rows = (end - start) * group;
        let width = end.div_ceil(PAGE) * PAGE;
        gather(io.q, start, end, group * c, &mut s.q);
        gather(io.d_out, start, end, group * c, &mut s.d_out);
        s.scores.resize(rows * width, 0.0);
        s.d_scores.resize(rows * width, 0.0);
        for (x, panels, y) in [(&s.q, &s.keys, &mut s.scores), (&s.d_out, &s.values, &mut s.d_scores)] {
            let b = Right { data: panels, stride: c * PAGE, row: PANEL, cols: width, count: c };
            product(isa, Left { data: x, row: c, step: 1 }, rows, b, y, width, false);
        }
        let pairs = s.scores.chunks_exact_mut(width).zip(s.d_scores.chunks_exact_mut(width));
        for (i, (p, dp)) in pairs.take(rows).enumerate() {
            let (pos, r) = (start + i / group, i % group);
            let out = &io.out.data[pos * io.out.stride + r * c..][..c];
            let delta = dot_of(isa, out, &s.d_out[i * c..][..c]);
            slopes(isa, p, dp, pos, heads.scale(), io.lse[pos * heads.num_heads + r], delta);
        }
        // dQ = dS K; dK += dS^T Q; dV += P^T dO.
        s.result.resize(rows * c, 0.0);
        let b = Right { data: &s.key_columns, stride: len * PANEL, row: PANEL, cols: c, count: end };
        product(isa, Left { data: &s.d_scores, row: width, step: 1 }, rows, b, &mut s.result, c, false);
        for (i, row) in s.result.chunks_exact(group * c).take(end - start).enumerate() {
            write_dq(start + i, row);
        }
        pack(s.q.chunks_exact(c), c, &mut s.q_panels);
        pack(s.d_out.chunks_exact(c), c, &mut s.d_out_panels);
        for (weights, panels, y) in [(&s.d_scores, &s.q_panels, &mut *dk), (&s.scores, &s.d_out_panels, &mut *dv)] {
            let b = Right { data: panels, stride: rows * PANEL, row: PANEL, cols: c, count: rows };
            product(isa, Left { data: weights, row: 1, step: width }, end, b, y, c, true);
        }
    }
}

/// Turns a row of raw scores and of `dO V^T` into attention weights and score gradients; 0 behind `pos`.
#[inline(always)]
fn slopes_body(p: &mut [f32], dp: &mut [f32], pos: usize, scale: f32, lse: f32, delta: f32) {
    for (p, dp) in p[..=pos].iter_mut().zip(&mut dp[..=pos]) {
        *p = exp(*p * scale - lse);
        *dp = *p * (*dp - delta) * scale;
    }
    p[pos + 1..].fill(0.0);
    dp[pos + 1..].fill(0.0);
}
