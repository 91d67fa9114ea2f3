//! Launchers of the LM head: rows of the hidden state times the vocabulary's weight, reduced to log-probability, entropy
//! and a drawn token, or to the policy gradient of the logits in chunks. Shapes T rows, D model width (a multiple of 8),
//! V vocabulary. Rows with top-k or top-p, which are for evaluation, are drawn again from whole logits: [`draw_kept`].

use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::base::rng::{Purpose, stream_key};
use crate::compute::launch::device::{Buf, Device, Element, Entry, Shape, View, ViewMut, args};
use crate::compute::ops::{Draw, Drawn, HeadLoss, HeadReport, HeadTarget};
use crate::error::Result;

/// Threads of `head.cu`'s blocks.
const THREADS: u32 = 128;
/// Tokens of a vocabulary tile; each leaves one record per row.
const TILE_TOKENS: usize = 64;
/// Elements of D of a pipeline stage, and stages.
const STEP: usize = 32;
const STAGES: usize = 4;
/// Threads of `keep.cu`'s blocks.
const KEEP_THREADS: u32 = 512;
/// Most rows whose whole logits are there at once.
const KEPT_ROWS: usize = 64;
/// Most blocks of a grid in y.
const MAX_GRID_Y: usize = 65_535;

/// A row of a batch: which hidden row, and what is asked of its logits.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub struct HeadRow {
    row: u32,
    token: u32,
    inv_temperature: f32,
    greedy: u32,
    position: u32,
    seq_low: u32,
    seq_high: u32,
    top_k: u32,
    top_p: f32,
    unused: [u32; 3],
}

impl Element for HeadRow {}

impl HeadRow {
    /// Asks for the token after a hidden row, drawn for this position of its sequence.
    pub fn draw(row: u32, how: &Draw, position: u32) -> Self {
        let warm = how.temperature > 0.0;
        HeadRow {
            row,
            token: u32::MAX,
            inv_temperature: if warm { 1.0 / how.temperature } else { 1.0 },
            greedy: u32::from(!warm),
            position,
            seq_low: how.seq as u32,
            seq_high: (how.seq >> 32) as u32,
            // A vocabulary has fewer tokens.
            top_k: u32::try_from(how.top_k).unwrap_or(0),
            top_p: how.top_p,
            unused: [0; 3],
        }
    }

    /// Asks for the log-probability of a target.
    pub fn target(target: &HeadTarget) -> Self {
        let (token, inv_temperature) = (target.token, target.inv_temperature);
        HeadRow { token, inv_temperature, greedy: 1, ..Self::logits(target.row as u32) }
    }

    /// Asks for the logits of a hidden row.
    pub fn logits(row: u32) -> Self {
        HeadRow { row, token: u32::MAX, inv_temperature: 1.0, greedy: 1, top_p: 1.0, ..Self::zeroed() }
    }
}

/// Loss of a row.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub struct PolicyRow {
    clips: u32,
    advantage: f32,
    old_logprob: f32,
    low: f32,
    high: f32,
    weight: f32,
    entropy_coef: f32,
    unused: u32,
}

impl Element for PolicyRow {}

impl PolicyRow {
    /// The loss of a target.
    pub fn new(target: &HeadTarget) -> Self {
        let rest = PolicyRow { entropy_coef: target.entropy_coef, ..Self::zeroed() };
        match target.kind {
            HeadLoss::Nll { weight } => PolicyRow { weight, ..rest },
            HeadLoss::Clipped { advantage, old_logprob, low, high, weight } => {
                PolicyRow { clips: 1, advantage, old_logprob, low, high, weight, ..rest }
            }
        }
    }
}

/// A drawn token as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub struct DrawnRow {
    token: u32,
    logprob: f32,
    entropy: f32,
    log_sum: f32,
}

impl Element for DrawnRow {}

impl From<DrawnRow> for Drawn {
    fn from(row: DrawnRow) -> Self {
        Drawn { token: row.token, logprob: row.logprob, entropy: row.entropy }
    }
}

/// A row's report as the kernel makes it.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub struct PolicyReport {
    logprob: f32,
    entropy: f32,
    loss: f32,
    clipped: u32,
}

impl Element for PolicyReport {}

impl From<PolicyReport> for HeadReport {
    fn from(row: PolicyReport) -> Self {
        HeadReport { logprob: row.logprob, entropy: row.entropy, loss: row.loss, clipped: row.clipped != 0 }
    }
}

/// What [`head_gradient`] needs of a row; [`head_policy`] writes it.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub struct RowSlope {
    log_sum: f32,
    slope: f32,
    entropy: f32,
    entropy_coef: f32,
}

impl Element for RowSlope {}

/// Rows of the hidden state and the vocabulary's weight.
#[derive(Clone, Copy)]
pub struct HeadInput<'a> {
    /// Hidden state, `[any][D]`.
    pub x_td: View<'a, bf16>,
    /// Rows of the batch; they name rows of `x_td` and tokens below V.
    pub rows: View<'a, HeadRow>,
    /// Weight, `[V][D]`.
    pub w_vd: View<'a, bf16>,
    /// D.
    pub d: usize,
}

impl HeadInput<'_> {
    /// T and V.
    fn check(&self) -> (usize, usize) {
        let d = self.d;
        assert!(d > 0 && d.is_multiple_of(8), "rows have a multiple of 8 elements, not {d}");
        assert!(self.x_td.len().is_multiple_of(d), "whole rows of {d} in {}", self.x_td.len());
        assert!(self.w_vd.len().is_multiple_of(d), "whole rows of {d} in {}", self.w_vd.len());
        let v = self.w_vd.len() / d;
        assert!(v > 0 && v < 1 << 30 && self.rows.len() < 1 << 30, "{} rows, {v} tokens", self.rows.len());
        (self.rows.len(), v)
    }
}

/// Records of a vocabulary's tiles.
pub fn num_tiles(v: usize) -> usize {
    v.div_ceil(TILE_TOKENS)
}

/// Scratch of [`head_forward`] for up to `rows` rows: records of all tiles, 16 bytes (24 to draw) each; and where
/// [`draw_kept`] needs them whole logits of some rows.
pub struct HeadScratch {
    v: usize,
    stats: Buf<f32>,
    best: Buf<u32>,
    target_z: Buf<f32>,
    logits: Buf<f32>,
}

impl HeadScratch {
    /// Scratch for a vocabulary of `v`; `draws` when tokens are to be drawn.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn new(device: &Device, rows: usize, v: usize, draws: bool) -> Result<Self> {
        let records = rows * num_tiles(v);
        let best = device.alloc(if draws { 2 * records } else { 0 })?;
        let (stats, target_z, logits) = (device.alloc(4 * records)?, device.alloc(rows)?, device.alloc(0)?);
        Ok(HeadScratch { v, stats, best, target_z, logits })
    }

    /// Makes room for [`draw_kept`], once.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn hold_logits(&mut self, device: &Device) -> Result<()> {
        if self.logits.is_empty() {
            self.logits = device.alloc(self.target_z.len().min(KEPT_ROWS) * self.v)?;
        }
        Ok(())
    }

    fn check(&self, rows: usize) {
        assert!(rows <= self.target_z.len(), "scratch for {} rows, not {rows}", self.target_z.len());
    }
}

/// How `head_forward` cuts a batch: entry point, and rows and tokens of a block. The result is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Entry point.
    pub name: &'static str,
    /// Rows of a block.
    pub rows: usize,
    /// Tokens of a block.
    pub tokens: usize,
}

const BLOCKS_16: Blocks = Blocks { name: "head_forward_16", rows: 16, tokens: 256 };
const BLOCKS_64: Blocks = Blocks { name: "head_forward_64", rows: 64, tokens: 128 };
const BLOCKS_128: Blocks = Blocks { name: "head_forward_128", rows: 128, tokens: 128 };

impl Blocks {
    /// Small batches stream the weight past few rows; large ones reuse what they load.
    pub fn of(rows: usize) -> Self {
        match rows {
            0..=16 => BLOCKS_16,
            17..=64 => BLOCKS_64,
            _ => BLOCKS_128,
        }
    }

    fn shape(self, rows: usize, tokens: usize) -> Shape {
        let (x, y) = (rows.div_ceil(self.rows), tokens.div_ceil(self.tokens));
        assert!(y <= MAX_GRID_Y, "{tokens} tokens are too many");
        Shape::new((x as u32, y as u32, 1), THREADS).smem(((self.rows + self.tokens) * STEP * 2 * STAGES) as u32)
    }
}

/// Reduces the logits of all rows to their tiles' records; [`head_draw`] or [`head_policy`] follows. The seed is the
/// run's: noise is that of the CPU.
///
/// # Errors
/// When the launch fails.
pub fn head_forward(device: &Device, input: &HeadInput<'_>, seed: u64, scratch: &mut HeadScratch) -> Result<()> {
    let (t, v) = input.check();
    scratch.check(t);
    assert_eq!(scratch.v, v, "scratch for a vocabulary of {v}");
    let (blocks, key) = (Blocks::of(t), stream_key(seed, Purpose::Sample));
    let entry = Entry { file: "head", name: blocks.name };
    let HeadScratch { stats, best, target_z, .. } = scratch;
    let (stats, best, target_z) = (stats.view_mut().at(), best.view_mut().at(), target_z.view_mut().at());
    let (x, rows, w) = (input.x_td.at(), input.rows.at(), input.w_vd.at());
    let args = args![x, rows, w, stats, best, target_z, t as i32, v as i32, input.d as i32, key[0], key[1]];
    // SAFETY: blocks cover rows and tokens and stop at both ends; the scratch holds a record per row and tile; whoever
    // made the rows has checked them against the hidden state and the vocabulary.
    unsafe { device.launch(entry, blocks.shape(t, v), args) }
}

/// Tokens drawn from the records of [`head_forward`], one per row.
///
/// # Errors
/// When the launch fails.
pub fn head_draw(device: &Device, scratch: &HeadScratch, drawn: &mut ViewMut<'_, DrawnRow>) -> Result<()> {
    let t = drawn.len();
    scratch.check(t);
    assert!(t == 0 || !scratch.best.is_empty(), "the scratch is for drawing");
    let entry = Entry { file: "head", name: "head_draw" };
    let (stats, best) = (scratch.stats.view().at(), scratch.best.view().at());
    let args = args![stats, best, drawn.at(), num_tiles(scratch.v) as i32];
    // SAFETY: one block per row; the scratch holds a record per row and tile.
    unsafe { device.launch(entry, Shape::new((t as u32, 1, 1), THREADS), args) }
}

/// Draws rows with top-k or top-p again, after [`head_draw`], from their whole logits, for which there must be room.
///
/// # Errors
/// When a launch fails.
pub fn draw_kept(
    device: &Device,
    input: &HeadInput<'_>,
    seed: u64,
    scratch: &mut HeadScratch,
    drawn: &mut ViewMut<'_, DrawnRow>,
) -> Result<()> {
    let (t, v) = input.check();
    assert_eq!(drawn.len(), t, "a draw per row");
    // Counts of tokens are floats.
    assert!(v < 1 << 24 && scratch.v == v, "scratch for a vocabulary of {v}");
    let (key, room) = (stream_key(seed, Purpose::Sample), scratch.logits.len() / v);
    assert!(t == 0 || room > 0, "room for logits");
    for from in (0..t).step_by(room.max(1)) {
        let count = room.min(t - from);
        let part = HeadInput { rows: input.rows.part(from, count), ..*input };
        let mut logits = scratch.logits.view_mut();
        let mut logits = logits.part(0, count * v);
        head_logits(device, &part, &mut logits)?;
        let entry = Entry { file: "keep", name: "draw_kept" };
        let args = args![logits.at(), part.rows.at(), drawn.part(from, count).at(), v as i32, key[0], key[1]];
        // SAFETY: one block per row, with whole logits of each.
        unsafe { device.launch(entry, Shape::new((count as u32, 1, 1), KEEP_THREADS), args)? };
    }
    Ok(())
}

/// Reports of targets from the records of [`head_forward`], and what [`head_gradient`] needs of each row.
///
/// # Errors
/// When the launch fails.
pub fn head_policy(
    device: &Device,
    scratch: &HeadScratch,
    policy: &View<'_, PolicyRow>,
    reports: &mut ViewMut<'_, PolicyReport>,
    slopes: &mut ViewMut<'_, RowSlope>,
) -> Result<()> {
    let t = policy.len();
    scratch.check(t);
    assert_eq!((reports.len(), slopes.len()), (t, t), "a report and a slope per row");
    let entry = Entry { file: "head", name: "head_policy" };
    let (stats, target_z) = (scratch.stats.view().at(), scratch.target_z.view().at());
    let args = args![stats, target_z, policy.at(), reports.at(), slopes.at(), num_tiles(scratch.v) as i32];
    // SAFETY: one block per row; the scratch holds a record per row and tile.
    unsafe { device.launch(entry, Shape::new((t as u32, 1, 1), THREADS), args) }
}

/// Gradient of the loss by the logits of `width` tokens from `token0` on, `dz[T][width]`; zeros past the vocabulary's
/// end. Width is a multiple of 8.
///
/// # Errors
/// When the launch fails.
pub fn head_gradient(
    device: &Device,
    input: &HeadInput<'_>,
    slopes: &View<'_, RowSlope>,
    (token0, width): (usize, usize),
    dz: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let (t, v) = input.check();
    assert!(token0 < v && width < 1 << 30 && width.is_multiple_of(8), "{width} tokens from {token0} on of {v}");
    assert_eq!((slopes.len(), dz.len()), (t, t * width), "slopes and gradient of {t} rows");
    let entry = Entry { file: "head", name: "head_gradient" };
    let (x, rows, w) = (input.x_td.at(), input.rows.at(), input.w_vd.at());
    let (first, n) = (token0 as i32, width as i32);
    let args = args![x, rows, w, slopes.at(), dz.at(), t as i32, v as i32, input.d as i32, first, n];
    // SAFETY: blocks cover rows and tokens and stop at both ends; lengths are asserted above; whoever made the rows has
    // checked them against the hidden state and the vocabulary.
    unsafe { device.launch(entry, BLOCKS_128.shape(t, width), args) }
}

/// Logits of all rows, `[T][V]`, without temperature.
///
/// # Errors
/// When the launch fails.
pub fn head_logits(device: &Device, input: &HeadInput<'_>, logits_tv: &mut ViewMut<'_, f32>) -> Result<()> {
    let (t, v) = input.check();
    assert_eq!(logits_tv.len(), t * v, "logits of {t} rows");
    let entry = Entry { file: "head", name: "head_logits" };
    let (x, rows, w) = (input.x_td.at(), input.rows.at(), input.w_vd.at());
    let args = args![x, rows, w, logits_tv.at(), t as i32, v as i32, input.d as i32];
    // SAFETY: as `head_gradient`.
    unsafe { device.launch(entry, BLOCKS_64.shape(t, v), args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_a_batch_and_fit_every_gpu() {
        for (rows, name) in [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (4096, 128)] {
            let blocks = Blocks::of(rows);
            assert_eq!(blocks.rows, name);
            let shape = blocks.shape(rows, 151_936);
            assert!(shape.grid.0 as usize * blocks.rows >= rows && shape.grid.1 as usize * blocks.tokens >= 151_936);
            // 99 KiB is what a block of compute capability 8.6 or 8.9 may have.
            assert!(shape.smem_bytes <= 99 << 10 && blocks.tokens.is_multiple_of(TILE_TOKENS));
            // 16 rows of 288 bytes per warp, after the products.
            assert!(shape.smem_bytes >= THREADS / 32 * 16 * 288);
        }
        assert_eq!(Blocks::of(0).shape(0, 8).grid.0, 0);
        assert_eq!((num_tiles(1), num_tiles(64), num_tiles(1029)), (1, 1, 17));
    }

    #[test]
    fn rows_carry_what_is_asked() {
        let how = Draw { seq: 0x5_0000_0007, temperature: 0.5, top_p: 1.0, top_k: 0 };
        let row = HeadRow::draw(3, &how, 9);
        assert_eq!((row.row, row.inv_temperature, row.greedy, row.position), (3, 2.0, 0, 9));
        assert_eq!((row.seq_low, row.seq_high, row.token), (7, 5, u32::MAX));
        let cold = HeadRow::draw(3, &Draw { temperature: 0.0, ..how }, 9);
        assert_eq!((cold.inv_temperature, cold.greedy), (1.0, 1));
        let nll = HeadLoss::Nll { weight: 2.0 };
        let target = HeadTarget { row: 1, token: 4, inv_temperature: 0.8, kind: nll, entropy_coef: 0.1 };
        assert_eq!((HeadRow::target(&target).token, PolicyRow::new(&target).clips), (4, 0));
    }
}
