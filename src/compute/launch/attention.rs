//! Launchers of attention: norms, rotation and page writes (`rope.cu`), many rows of a sequence
//! (`attention_forward.cu`, `attention_hopper.cu`, `attention_backward.cu`), one row of each (`attention_decode.cu`).
//! Their plans are made in `attention_plan.rs`.
//!
//! Keys and values of one layer lie in pages `[pages][G][16][C]` of bf16, C being 32, 64 or 128. Queries and outputs
//! are `[T][H][C]`, fused rows `[T][Q]` with `Q = (H + 2 G) C`. A plan decides who computes what, never a result's bits.

use half::bf16;

pub use crate::compute::launch::attention_plan::{
    CHUNK, DecodePlan, DecodeSeq, DecodeWork, NO_SLOT, RopePlan, SpanPlan,
};
use crate::compute::launch::attention_plan::{TILE_ROWS, as_u32};
use crate::compute::launch::device::{Device, Entry, Shape, View, ViewMut, args};
use crate::compute::ops::{Heads, PAGE};
use crate::error::Result;

/// Threads of the blocks of `rope.cu`, `attention_forward.cu` and `attention_backward.cu`.
const THREADS: u32 = 128;
/// Rows of a block of `rope_backward`.
const ROPE_BACKWARD_ROWS: usize = 16;
/// Threads of a block of `attention_hopper.cu`, and its stages of 64 keys and values.
const WIDE_THREADS: u32 = 384;
const WIDE_STAGES: usize = 4;
/// Columns of a TMA box: 128 bytes.
const BOX_COLUMNS: usize = 64;
/// Keys of one step of the online softmax.
const BLOCK: usize = 32;
/// Warps of a block of `attention_decode.cu`, each with work of its own.
const DECODE_WARPS: usize = 2;
/// Packed rows of a warp, so the most query heads of a group.
const MAX_GROUP: usize = 16;

fn as_i32(n: usize) -> i32 {
    i32::try_from(n).expect("sizes of a model and a batch fit 31 bits")
}

/// Whether there are kernels for such heads.
pub fn has_heads(heads: Heads) -> bool {
    matches!(heads.head_dim, 32 | 64 | 128) && heads.group() <= MAX_GROUP
}

/// Checks what all kernels here take for granted.
fn check_heads(heads: Heads) {
    assert!(matches!(heads.head_dim, 32 | 64 | 128), "heads of 32, 64 or 128, not {}", heads.head_dim);
    assert!(heads.num_kv_heads > 0 && heads.num_heads.is_multiple_of(heads.num_kv_heads), "whole groups: {heads:?}");
    assert!(heads.group() <= MAX_GROUP, "groups of at most {MAX_GROUP} query heads, not {}", heads.group());
}

/// Width of a fused row, Q.
fn fused_width(heads: Heads) -> usize {
    (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
}

/// Number of pages of a layer's keys and values.
fn num_pages(heads: Heads, k_pages: usize, v_pages: usize) -> usize {
    assert!(k_pages == v_pages && k_pages.is_multiple_of(heads.page_len()), "keys and values in whole pages");
    k_pages / heads.page_len()
}

/// The entry point for a head width: of those for 32, 64 and 128.
fn by_width(heads: Heads, file: &'static str, names: [&'static str; 3]) -> Entry {
    Entry { file, name: names[heads.head_dim / 64] }
}

/// Angle tables, `[positions][C / 2]` each, and the position of every row.
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    /// Cosines.
    pub cos: View<'a, f32>,
    /// Sines.
    pub sin: View<'a, f32>,
    /// Positions, all inside the tables.
    pub positions: View<'a, u32>,
}

impl Angles<'_> {
    fn check(&self, heads: Heads, t: usize) {
        assert!(self.cos.len() == self.sin.len() && self.cos.len().is_multiple_of(heads.head_dim / 2), "whole angles");
        assert_eq!(self.positions.len(), t, "a position per row");
    }
}

/// Weights `[C]` of the query and key norms, and epsilon.
pub type HeadNorms<'a> = Option<(View<'a, bf16>, View<'a, bf16>, f32)>;

/// Addresses of the norms' weights, 0 for none, and epsilon.
fn norm_args(heads: Heads, norms: HeadNorms<'_>) -> (u64, u64, f32) {
    let Some((q, k, eps)) = norms else { return (0, 0, 0.0) };
    assert_eq!((q.len(), k.len()), (heads.head_dim, heads.head_dim), "norms of one head's width");
    (q.at(), k.at(), eps)
}

/// Norms (if any), rotates and distributes fused rows: queries to `q`, keys and values to their slots. Slots must be
/// inside the pages, and no two rows share one.
///
/// # Errors
/// When the launch fails.
pub fn rope_forward(
    device: &Device,
    heads: Heads,
    qkv_tq: &View<'_, bf16>,
    angles: Angles<'_>,
    slots: &View<'_, u32>,
    norms: HeadNorms<'_>,
    q_thc: &mut ViewMut<'_, bf16>,
    (k_pages, v_pages): (&mut ViewMut<'_, bf16>, &mut ViewMut<'_, bf16>),
) -> Result<()> {
    check_heads(heads);
    let (c, t) = (heads.head_dim, slots.len());
    angles.check(heads, t);
    num_pages(heads, k_pages.len(), v_pages.len());
    assert_eq!(qkv_tq.len(), t * fused_width(heads), "a fused row per slot");
    assert_eq!(q_thc.len(), t * heads.num_heads * c, "queries of {t} rows");
    let (wq, wk, eps) = norm_args(heads, norms);
    let entry = Entry { file: "rope", name: "rope_forward" };
    let (from, to) = (qkv_tq.at(), (q_thc.at(), k_pages.at(), v_pages.at()));
    let (h, g) = (as_i32(heads.num_heads), as_i32(heads.num_kv_heads));
    let (cos, sin, positions) = (angles.cos.at(), angles.sin.at(), angles.positions.at());
    let (slots, rows, c) = (slots.at(), as_i32(t), as_i32(c));
    let args = args![from, cos, sin, positions, slots, wq, wk, eps, to.0, to.1, to.2, rows, h, g, c];
    let blocks = as_u32((t * fused_width(heads) / 16).div_ceil(THREADS as usize));
    // SAFETY: threads past the last head store nothing; lengths are asserted above, and the plan names positions and
    // slots of the sequences' own pages.
    unsafe { device.launch(entry, Shape::new((blocks, 1, 1), THREADS), args) }
}

/// Copies pages (from, to) in every one of `arrays`, which lie one behind another, each of `array_len` elements; no page
/// is written twice, or both read and written.
///
/// # Errors
/// When the launch fails.
pub fn copy_pages(
    device: &Device,
    arrays: &mut ViewMut<'_, bf16>,
    array_len: usize,
    page_len: usize,
    copies: &[(u32, u32)],
) -> Result<()> {
    if copies.is_empty() || arrays.is_empty() {
        return Ok(());
    }
    assert!(page_len.is_multiple_of(8) && array_len.is_multiple_of(page_len), "whole pages of whole vectors");
    assert!(arrays.len().is_multiple_of(array_len), "whole arrays");
    assert!(copies.iter().all(|(a, b)| (*a.max(b) as usize) < array_len / page_len), "pages of the array");
    let mut written: Vec<u32> = copies.iter().map(|(_, to)| *to).collect();
    written.sort_unstable();
    assert!(written.windows(2).all(|w| w[0] != w[1]), "a page is written once");
    assert!(copies.iter().all(|(from, _)| written.binary_search(from).is_err()), "what is read is not written");
    let pairs = device.upload(&copies.iter().flat_map(|(from, to)| [*from, *to]).collect::<Vec<u32>>())?;
    let args = args![arrays.at(), pairs.view().at(), array_len as u64, as_i32(page_len)];
    let grid = (as_u32(copies.len()), as_u32(arrays.len() / array_len), 1);
    // SAFETY: a block per copy and array; pages lie in the arrays, and none is written that another block touches.
    unsafe { device.launch(Entry { file: "pages", name: "copy_pages" }, Shape::new(grid, THREADS), args) }
}

/// Floats of scratch that [`rope_backward`] needs for `t` rows with norms: first the query norm's partial sums, then as
/// many of the key norm.
pub fn rope_scratch(t: usize, heads: Heads) -> usize {
    2 * t.div_ceil(ROPE_BACKWARD_ROWS) * heads.head_dim
}

/// Backward of [`rope_forward`] in place; `raw` are its fused rows (read with norms only). With norms, `partial` (of
/// [`rope_scratch`] floats, else empty) gets partial sums of their gradients: its halves go to
/// [`crate::compute::launch::rows::add_partials`].
///
/// # Errors
/// When the launch fails.
pub fn rope_backward(
    device: &Device,
    heads: Heads,
    dqkv_tq: &mut ViewMut<'_, bf16>,
    raw_tq: &View<'_, bf16>,
    angles: Angles<'_>,
    norms: HeadNorms<'_>,
    partial: &mut ViewMut<'_, f32>,
) -> Result<()> {
    check_heads(heads);
    let t = angles.positions.len();
    angles.check(heads, t);
    assert_eq!(dqkv_tq.len(), t * fused_width(heads), "a fused row per position");
    if norms.is_some() {
        assert_eq!((raw_tq.len(), partial.len()), (dqkv_tq.len(), rope_scratch(t, heads)), "arrays for {t} rows");
    }
    let (wq, wk, eps) = norm_args(heads, norms);
    let entry = Entry { file: "rope", name: "rope_backward" };
    let (h, g, c) = (as_i32(heads.num_heads), as_i32(heads.num_kv_heads), as_i32(heads.head_dim));
    let (cos, sin, positions) = (angles.cos.at(), angles.sin.at(), angles.positions.at());
    let args = args![dqkv_tq.at(), raw_tq.at(), cos, sin, positions, wq, wk, eps, partial.at(), as_i32(t), h, g, c];
    let blocks = as_u32(t.div_ceil(ROPE_BACKWARD_ROWS));
    // SAFETY: one block per 16 rows; lengths are asserted above.
    unsafe { device.launch(entry, Shape::new((blocks, 1, 1), THREADS), args) }
}

/// Grid of a list of tiles for every group.
fn tile_grid(heads: Heads, tiles: usize) -> (u32, u32, u32) {
    (as_u32(tiles), as_u32(heads.num_kv_heads), 1)
}

/// Bytes of dynamic shared memory of the kernels for tiles: `tiles` of 64 rows, `stages` of 32 keys and values (or two
/// arrays of rows), and with `totals` an f32 tile.
fn tile_smem(heads: Heads, tiles: usize, stages: usize, totals: bool) -> u32 {
    let c = heads.head_dim;
    as_u32(tiles * TILE_ROWS * c * 2 + stages * BLOCK * c * 4 + if totals { TILE_ROWS * c * 4 } else { 0 })
}

/// Keys and values of one layer.
pub type Layer<'a> = (&'a View<'a, bf16>, &'a View<'a, bf16>);

/// Which kernel takes many rows of each sequence. Both give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardKernel {
    /// `attention_forward.cu`.
    Warps,
    /// `attention_hopper.cu`.
    Warpgroups,
}

/// Hopper's own kernel on Hopper, for heads of whole TMA boxes.
pub fn choose_forward(hopper: bool, heads: Heads) -> ForwardKernel {
    if hopper && heads.head_dim.is_multiple_of(BOX_COLUMNS) { ForwardKernel::Warpgroups } else { ForwardKernel::Warps }
}

/// Bytes of dynamic shared memory of `attention_hopper.cu`: two tiles of queries, stages of keys and values, two
/// mbarriers for each.
fn wide_smem(heads: Heads) -> u32 {
    as_u32((2 + 2 * WIDE_STAGES) * TILE_ROWS * heads.head_dim * 2 + WIDE_STAGES * 16)
}

/// Causal attention of the plan's rows over their sequences' pages: `out[T][H][C]`, `lse[T][H]`.
///
/// # Errors
/// When the launch fails.
pub fn attention_forward(
    device: &Device,
    heads: Heads,
    plan: (&SpanPlan, &View<'_, u32>),
    q_thc: &View<'_, bf16>,
    layer: Layer<'_>,
    out_thc: &mut ViewMut<'_, bf16>,
    lse_th: &mut ViewMut<'_, f32>,
) -> Result<()> {
    attention_forward_by(choose_forward(device.is_hopper(), heads), device, heads, plan, q_thc, layer, out_thc, lse_th)
}

/// [`attention_forward`] by a kernel of the caller's.
///
/// # Errors
/// When the launch fails.
pub fn attention_forward_by(
    kernel: ForwardKernel,
    device: &Device,
    heads: Heads,
    (plan, packed): (&SpanPlan, &View<'_, u32>),
    q_thc: &View<'_, bf16>,
    (k_pages, v_pages): Layer<'_>,
    out_thc: &mut ViewMut<'_, bf16>,
    lse_th: &mut ViewMut<'_, f32>,
) -> Result<()> {
    check_heads(heads);
    let (rows, c) = (lse_th.len() / heads.num_heads, heads.head_dim);
    let width = heads.num_heads * c;
    assert_eq!((q_thc.len(), out_thc.len()), (rows * width, rows * width), "queries and outputs of {rows} rows");
    assert!(plan.num_rows <= rows && plan.num_pages <= num_pages(heads, k_pages.len(), v_pages.len()), "the plan fits");
    let [spans, tiles, wide_tiles, _, pages] = plan.parts(packed);
    let (h, g) = (as_i32(heads.num_heads), as_i32(heads.num_kv_heads));
    let (from, to) = (q_thc.at(), (out_thc.at(), lse_th.at()));
    if kernel == ForwardKernel::Warps {
        let names = ["attention_forward_32", "attention_forward_64", "attention_forward_128"];
        let entry = by_width(heads, "attention_forward", names);
        let args = args![from, k_pages.at(), v_pages.at(), spans, tiles, pages, to.0, to.1, h, g, heads.scale()];
        let shape = Shape::new(tile_grid(heads, plan.row_tiles.len()), THREADS).smem(tile_smem(heads, 1, 3, true));
        // SAFETY: one block per tile and group; the plan's rows and pages are inside the arrays, as asserted.
        return unsafe { device.launch(entry, shape, args) };
    }
    assert_eq!(choose_forward(device.is_hopper(), heads), kernel, "{kernel:?} is not for {heads:?} or this GPU");
    if plan.wide_tiles.is_empty() {
        return Ok(());
    }
    as_i32(k_pages.len() / c); // Rows, which TMA counts so.
    let map = |of: &View<'_, bf16>| device.tensor_map(of, (of.len() / c, c, c), (PAGE as u32, BOX_COLUMNS as u32));
    let (keys, values, v) = (map(k_pages)?, map(v_pages)?, v_pages.at());
    let name = if c == 64 { "attention_hopper_forward_64" } else { "attention_hopper_forward_128" };
    let args = args![from, keys, values, v, spans, wide_tiles, pages, to.0, to.1, h, g, heads.scale()];
    let shape = Shape::new(tile_grid(heads, plan.wide_tiles.len()), WIDE_THREADS).smem(wide_smem(heads));
    // SAFETY: as above; the maps cover the layer's pages.
    unsafe { device.launch(Entry { file: "attention_hopper", name }, shape, args) }
}

/// `delta[T][H] = out . dout`, which both backward kernels read.
///
/// # Errors
/// When the launch fails.
pub fn attention_delta(
    device: &Device,
    heads: Heads,
    out_thc: &View<'_, bf16>,
    dout_thc: &View<'_, bf16>,
    delta_th: &mut ViewMut<'_, f32>,
) -> Result<()> {
    check_heads(heads);
    let (c, rows) = (heads.head_dim, delta_th.len() / heads.num_heads);
    let len = rows * heads.num_heads * c;
    assert_eq!((out_thc.len(), dout_thc.len(), delta_th.len()), (len, len, rows * heads.num_heads), "{rows} rows");
    let entry = Entry { file: "attention_backward", name: "attention_delta" };
    let args = args![out_thc.at(), dout_thc.at(), delta_th.at(), as_i32(rows), as_i32(heads.num_heads), as_i32(c)];
    let blocks = as_u32((len / 8).div_ceil(THREADS as usize));
    // SAFETY: threads past the last head store nothing; lengths are asserted above.
    unsafe { device.launch(entry, Shape::new((blocks, 1, 1), THREADS), args) }
}

/// What attention's backward pass reads.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Queries, normed and rotated.
    pub q_thc: View<'a, bf16>,
    /// Gradients of the outputs.
    pub dout_thc: View<'a, bf16>,
    /// Log-sum-exp of the forward pass.
    pub lse_th: View<'a, f32>,
    /// Result of [`attention_delta`].
    pub delta_th: View<'a, f32>,
}

/// Arguments that both backward kernels take, with the list of tiles in question.
fn check_backward(heads: Heads, plan: &SpanPlan, saved: Saved<'_>, (k, v): Layer<'_>, dqkv_tq: &ViewMut<'_, bf16>) {
    check_heads(heads);
    assert!(plan.whole, "the backward pass takes whole sequences");
    let rows = saved.lse_th.len() / heads.num_heads;
    let width = heads.num_heads * heads.head_dim;
    assert_eq!((saved.q_thc.len(), saved.dout_thc.len()), (rows * width, rows * width), "arrays of {rows} rows");
    assert_eq!((saved.delta_th.len(), dqkv_tq.len()), (saved.lse_th.len(), rows * fused_width(heads)), "{rows} rows");
    assert!(plan.num_rows <= rows && plan.num_pages <= num_pages(heads, k.len(), v.len()), "the plan fits");
}

/// Arguments of the two backward kernels.
macro_rules! backward_args {
    ($heads:expr, $saved:expr, $layer:expr, $spans:expr, $tiles:expr, $pages:expr, $dqkv:expr) => {
        args![
            $saved.q_thc.at(),
            $layer.0.at(),
            $layer.1.at(),
            $saved.dout_thc.at(),
            $saved.lse_th.at(),
            $saved.delta_th.at(),
            $spans,
            $tiles,
            $pages,
            $dqkv.at(),
            as_i32($heads.num_heads),
            as_i32($heads.num_kv_heads),
            $heads.scale()
        ]
    };
}

/// Gradients of the queries of whole sequences, into the heads' places of `dqkv`.
///
/// # Errors
/// When the launch fails.
pub fn attention_backward_q(
    device: &Device,
    heads: Heads,
    (plan, packed): (&SpanPlan, &View<'_, u32>),
    saved: Saved<'_>,
    layer: Layer<'_>,
    dqkv_tq: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    check_backward(heads, plan, saved, layer, dqkv_tq);
    let entry = by_width(
        heads,
        "attention_backward",
        ["attention_backward_q_32", "attention_backward_q_64", "attention_backward_q_128"],
    );
    let [spans, tiles, _, _, pages] = plan.parts(packed);
    let shape = Shape::new(tile_grid(heads, plan.row_tiles.len()), THREADS).smem(tile_smem(heads, 2, 3, false));
    // SAFETY: one block per tile and group; the plan's rows and pages are inside the arrays, as asserted.
    unsafe { device.launch(entry, shape, backward_args!(heads, saved, layer, spans, tiles, pages, dqkv_tq)) }
}

/// Gradients of the keys and values of whole sequences, into their places of `dqkv`.
///
/// # Errors
/// When the launch fails.
pub fn attention_backward_kv(
    device: &Device,
    heads: Heads,
    (plan, packed): (&SpanPlan, &View<'_, u32>),
    saved: Saved<'_>,
    layer: Layer<'_>,
    dqkv_tq: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    check_backward(heads, plan, saved, layer, dqkv_tq);
    let entry = by_width(
        heads,
        "attention_backward",
        ["attention_backward_kv_32", "attention_backward_kv_64", "attention_backward_kv_128"],
    );
    let [spans, _, _, tiles, pages] = plan.parts(packed);
    let shape = Shape::new(tile_grid(heads, plan.key_tiles.len()), THREADS).smem(tile_smem(heads, 2, 2, false));
    // SAFETY: one block per tile and group; the plan's rows and pages are inside the arrays, as asserted.
    unsafe { device.launch(entry, shape, backward_args!(heads, saved, layer, spans, tiles, pages, dqkv_tq)) }
}

/// Scratch of decoding, of [`DecodePlan::scratch`] floats: outputs, and maxima with sums.
pub type Parts<'a, 'b> = (&'a mut ViewMut<'b, f32>, &'a mut ViewMut<'b, f32>);

fn check_decode(heads: Heads, work: &DecodeWork<'_>, q: &View<'_, bf16>, (k, v): Layer<'_>, parts: &Parts<'_, '_>) {
    check_heads(heads);
    let width = heads.num_heads * heads.head_dim;
    assert_eq!(q.len(), work.sequences.len() / 2 * width, "a row per sequence");
    check_scratch(heads, work, parts.0.len(), parts.1.len());
    assert!(work.num_pages <= num_pages(heads, k.len(), v.len()), "the plan's pages are inside the layer");
}

fn check_scratch(heads: Heads, work: &DecodeWork<'_>, outputs: usize, sums: usize) {
    let parts = work.num_parts * heads.num_heads;
    assert!(outputs >= parts * heads.head_dim && sums >= parts * 2, "scratch for {parts} parts");
}

/// Parts of the chunks that belong to one sequence each.
///
/// # Errors
/// When the launch fails.
pub fn attention_decode(
    device: &Device,
    heads: Heads,
    work: &DecodeWork<'_>,
    q_thc: &View<'_, bf16>,
    layer: Layer<'_>,
    parts: Parts<'_, '_>,
) -> Result<()> {
    check_decode(heads, work, q_thc, layer, &parts);
    let entry =
        by_width(heads, "attention_decode", ["attention_decode_32", "attention_decode_64", "attention_decode_128"]);
    let (h, g, items) = (as_i32(heads.num_heads), as_i32(heads.num_kv_heads), work.own.len() / 2);
    let (q, kv, to) = (q_thc.at(), (layer.0.at(), layer.1.at()), (parts.0.at(), parts.1.at()));
    let (sequences, starts, own, pages) = (work.sequences.at(), work.starts.at(), work.own.at(), work.pages.at());
    let (not_own, n) = (work.not_own.map_or(0, |v| v.at()), as_i32(items));
    let args = args![q, kv.0, kv.1, sequences, starts, own, not_own, pages, to.0, to.1, n, h, g, heads.scale()];
    let blocks = (items * heads.num_kv_heads).div_ceil(DECODE_WARPS);
    let shape = Shape::new((as_u32(blocks), 1, 1), DECODE_WARPS as u32 * 32);
    // SAFETY: one warp per chunk and group, the others leave; the plan's pages and parts are inside, as asserted.
    unsafe { device.launch(entry, shape.smem(decode_smem(heads)), args) }
}

/// Bytes of dynamic shared memory of `attention_decode`: per warp 16 queries and 2 stages of 32 keys and values.
fn decode_smem(heads: Heads) -> u32 {
    as_u32(DECODE_WARPS * (MAX_GROUP * heads.head_dim * 2 + 2 * BLOCK * heads.head_dim * 4))
}

/// Parts of the chunks that several sequences share.
///
/// # Errors
/// When the launch fails.
pub fn attention_shared(
    device: &Device,
    heads: Heads,
    work: &DecodeWork<'_>,
    q_thc: &View<'_, bf16>,
    layer: Layer<'_>,
    parts: Parts<'_, '_>,
) -> Result<()> {
    check_decode(heads, work, q_thc, layer, &parts);
    let entry =
        by_width(heads, "attention_forward", ["attention_shared_32", "attention_shared_64", "attention_shared_128"]);
    let (sequences, starts, shared) = (work.sequences.at(), work.starts.at(), work.shared.at());
    let (members, pages) = (work.members.at(), work.pages.at());
    let (h, g) = (as_i32(heads.num_heads), as_i32(heads.num_kv_heads));
    let (q, kv, to) = (q_thc.at(), (layer.0.at(), layer.1.at()), (parts.0.at(), parts.1.at()));
    let args = args![q, kv.0, kv.1, sequences, starts, shared, members, pages, to.0, to.1, h, g, heads.scale()];
    let shape = Shape::new(tile_grid(heads, work.shared.len() / 3), THREADS).smem(tile_smem(heads, 1, 3, false));
    // SAFETY: one block per shared chunk and group; the plan's pages and parts are inside, as asserted.
    unsafe { device.launch(entry, shape, args) }
}

/// Merges the parts of each sequence, in order: `out[S][H][C]`, `lse[S][H]`.
///
/// # Errors
/// When the launch fails.
pub fn attention_merge(
    device: &Device,
    heads: Heads,
    work: &DecodeWork<'_>,
    (part_o, part_ml): (&View<'_, f32>, &View<'_, f32>),
    out_thc: &mut ViewMut<'_, bf16>,
    lse_th: &mut ViewMut<'_, f32>,
) -> Result<()> {
    check_heads(heads);
    let (c, s) = (heads.head_dim, work.sequences.len() / 2);
    check_scratch(heads, work, part_o.len(), part_ml.len());
    assert_eq!((out_thc.len(), lse_th.len()), (s * heads.num_heads * c, s * heads.num_heads), "{s} rows");
    let entry = Entry { file: "attention_decode", name: "attention_merge" };
    let (lists, parts, h) = ((work.sequences.at(), work.starts.at()), (part_o.at(), part_ml.at()), heads.num_heads);
    let args = args![lists.0, lists.1, parts.0, parts.1, out_thc.at(), lse_th.at(), as_i32(h), as_i32(c)];
    let grid = (as_u32(s), as_u32((heads.num_heads * c / 4).div_ceil(THREADS as usize)), 1);
    // SAFETY: blocks cover all columns of all rows; lengths are asserted above.
    unsafe { device.launch(entry, Shape::new(grid, THREADS), args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { num_heads: 14, num_kv_heads: 2, head_dim: 64 };

    #[test]
    fn hopper_has_a_kernel_of_its_own_for_whole_boxes() {
        for head_dim in [32, 64, 128] {
            let heads = Heads { head_dim, ..HEADS };
            assert_eq!(choose_forward(true, heads) == ForwardKernel::Warpgroups, head_dim > 32);
            assert_eq!(choose_forward(false, heads), ForwardKernel::Warps);
        }
        assert_eq!((wide_smem(HEADS), wide_smem(Heads { head_dim: 128, ..HEADS })), (81_984, 163_904));
    }

    #[test]
    fn shared_memory_fits_every_gpu() {
        let wide = Heads { head_dim: 128, ..HEADS };
        let (forward, shared) = (tile_smem(wide, 1, 3, true), tile_smem(wide, 1, 3, false));
        let (queries, keys) = (tile_smem(wide, 2, 3, false), tile_smem(wide, 2, 2, false));
        let all = [forward, shared, queries, keys, decode_smem(wide)];
        assert_eq!(all, [96, 64, 80, 64, 72].map(|kib| kib << 10));
        // What a block of compute capability 8.6 or 8.9 may have, less static memory.
        assert!(all.iter().all(|bytes| *bytes <= 98 << 10));
    }
}
