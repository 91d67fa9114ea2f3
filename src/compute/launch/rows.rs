//! Launchers of the row-wise kernels: RMSNorm, embedding, bias gradient, SwiGLU. Shapes T tokens, D model width, F
//! feed-forward width, N columns, V vocabulary; D, F and N are multiples of 8. An empty batch launches nothing.

use half::bf16;

use crate::compute::launch::device::{Device, Entry, Shape, View, ViewMut, args};
use crate::error::Result;

/// Threads of `rmsnorm.cu`'s blocks.
const NORM_THREADS: u32 = 128;
/// Widest row of `rmsnorm.cu`: 5 eights of elements per thread fit its registers.
pub const MAX_NORM_WIDTH: usize = NORM_THREADS as usize * 8 * 5;
/// Rows of a block of `rmsnorm_backward`.
const NORM_BACKWARD_ROWS: usize = 8;
/// Rows that a block of `column_sums` adds.
const SUM_ROWS: usize = 64;
/// Columns of a block of `column_sums`.
const SUM_COLUMNS: usize = 1024;
/// Columns and threads of a block of `add_partials`.
const PARTIAL_COLUMNS: usize = 32;
const PARTIAL_THREADS: u32 = 512;
/// Columns of a block of `embed_backward`.
const EMBED_COLUMNS: usize = 256;
/// Threads of `swiglu.cu`'s blocks.
const SWIGLU_THREADS: usize = 256;

/// Number of rows; rows are whole, and begin at 16 bytes.
fn rows_of(len: usize, width: usize, what: &str) -> usize {
    assert!(width > 0 && width.is_multiple_of(8), "{what} has rows of a multiple of 8 elements, not {width}");
    assert!(len.is_multiple_of(width), "{what} of {len} has whole rows of {width}");
    len / width
}

fn as_i32(n: usize) -> i32 {
    i32::try_from(n).expect("sizes of a model and a batch fit 31 bits")
}

/// `y = x / rms(x) * w` for rows of `x`; `rstd` keeps `1 / rms`.
///
/// # Errors
/// When the launch fails.
pub fn rmsnorm_forward(
    device: &Device,
    x_td: &View<'_, bf16>,
    w_d: &View<'_, bf16>,
    eps: f32,
    y_td: &mut ViewMut<'_, bf16>,
    rstd_t: &mut ViewMut<'_, f32>,
) -> Result<()> {
    let d = w_d.len();
    let t = rows_of(x_td.len(), d, "x");
    assert!(d <= MAX_NORM_WIDTH, "rows of at most {MAX_NORM_WIDTH}, not {d}");
    assert_eq!((y_td.len(), rstd_t.len()), (t * d, t), "y and rstd for {t} rows of {d}");
    let entry = Entry { file: "rmsnorm", name: "rmsnorm_forward" };
    let args = args![x_td.at(), w_d.at(), y_td.at(), rstd_t.at(), as_i32(d), eps];
    // SAFETY: one block per row; the lengths asserted above are those that the kernel reads and writes.
    unsafe { device.launch(entry, Shape::new((t as u32, 1, 1), NORM_THREADS), args) }
}

/// `x += delta`, then as [`rmsnorm_forward`].
///
/// # Errors
/// When the launch fails.
pub fn rmsnorm_add_forward(
    device: &Device,
    x_td: &mut ViewMut<'_, bf16>,
    delta_td: &View<'_, bf16>,
    w_d: &View<'_, bf16>,
    eps: f32,
    y_td: &mut ViewMut<'_, bf16>,
    rstd_t: &mut ViewMut<'_, f32>,
) -> Result<()> {
    let d = w_d.len();
    let t = rows_of(x_td.len(), d, "x");
    assert!(d <= MAX_NORM_WIDTH, "rows of at most {MAX_NORM_WIDTH}, not {d}");
    assert_eq!((delta_td.len(), y_td.len(), rstd_t.len()), (t * d, t * d, t), "arrays for {t} rows of {d}");
    let entry = Entry { file: "rmsnorm", name: "rmsnorm_add_forward" };
    let args = args![x_td.at(), delta_td.at(), w_d.at(), y_td.at(), rstd_t.at(), as_i32(d), eps];
    // SAFETY: one block per row; the lengths asserted above are those that the kernel reads and writes.
    unsafe { device.launch(entry, Shape::new((t as u32, 1, 1), NORM_THREADS), args) }
}

/// Floats of scratch that [`rmsnorm_backward`] and [`add_partials`] need for `t` rows of `d`.
pub fn rmsnorm_scratch(t: usize, d: usize) -> usize {
    t.div_ceil(NORM_BACKWARD_ROWS) * d
}

/// Adds RMSNorm's input gradient to `dx`, and leaves sums of the weight's gradient over 8 rows each in `partial`
/// (of [`rmsnorm_scratch`] floats; [`add_partials`] finishes).
///
/// # Errors
/// When the launch fails.
pub fn rmsnorm_backward(
    device: &Device,
    (x_td, w_d, rstd_t): (&View<'_, bf16>, &View<'_, bf16>, &View<'_, f32>),
    dy_td: &View<'_, bf16>,
    dx_td: &mut ViewMut<'_, bf16>,
    partial: &mut ViewMut<'_, f32>,
) -> Result<()> {
    let d = w_d.len();
    let t = rows_of(x_td.len(), d, "x");
    assert!(d <= MAX_NORM_WIDTH, "rows of at most {MAX_NORM_WIDTH}, not {d}");
    assert_eq!((rstd_t.len(), dy_td.len(), dx_td.len()), (t, t * d, t * d), "arrays for {t} rows of {d}");
    assert_eq!(partial.len(), rmsnorm_scratch(t, d), "scratch for {t} rows of {d}");
    let entry = Entry { file: "rmsnorm", name: "rmsnorm_backward" };
    let args = args![x_td.at(), w_d.at(), rstd_t.at(), dy_td.at(), dx_td.at(), partial.at(), as_i32(t), as_i32(d)];
    let blocks = t.div_ceil(NORM_BACKWARD_ROWS) as u32;
    // SAFETY: one block per 8 rows; the lengths asserted above are those that the kernel reads and writes.
    unsafe { device.launch(entry, Shape::new((blocks, 1, 1), NORM_THREADS), args) }
}

/// Floats of scratch that [`column_sums`] and [`add_partials`] need for `t` rows of `n`.
pub fn column_sums_scratch(t: usize, n: usize) -> usize {
    t.div_ceil(SUM_ROWS) * n
}

/// Leaves sums of the columns of `dy` over 64 rows each in `partial` (of [`column_sums_scratch`] floats).
///
/// # Errors
/// When the launch fails.
pub fn column_sums(device: &Device, dy_tn: &View<'_, bf16>, n: usize, partial: &mut ViewMut<'_, f32>) -> Result<()> {
    let t = rows_of(dy_tn.len(), n, "dy");
    assert_eq!(partial.len(), column_sums_scratch(t, n), "scratch for {t} rows of {n}");
    let grid = (n.div_ceil(SUM_COLUMNS) as u32, t.div_ceil(SUM_ROWS) as u32, 1);
    let entry = Entry { file: "reduce", name: "column_sums" };
    let args = args![dy_tn.at(), partial.at(), as_i32(t), as_i32(n)];
    // SAFETY: blocks cover all columns and blocks of rows; lengths are asserted above.
    unsafe { device.launch(entry, Shape::new(grid, 128), args) }
}

/// `out += sum of the rows of partial`, in an order that depends on their number alone.
///
/// # Errors
/// When the launch fails.
pub fn add_partials(device: &Device, partial: &View<'_, f32>, out_n: &mut ViewMut<'_, f32>) -> Result<()> {
    let n = out_n.len();
    let count = rows_of(partial.len(), n, "partial sums");
    let blocks = if count == 0 { 0 } else { n.div_ceil(PARTIAL_COLUMNS) as u32 };
    let entry = Entry { file: "reduce", name: "add_partials" };
    let args = args![partial.at(), out_n.at(), as_i32(count), as_i32(n)];
    // SAFETY: blocks cover all columns; lengths are asserted above.
    unsafe { device.launch(entry, Shape::new((blocks, 1, 1), PARTIAL_THREADS), args) }
}

/// `out[t] = table[tokens[t]]`; the tokens must be below the table's number of rows.
///
/// # Errors
/// When the launch fails.
pub fn embed_forward(
    device: &Device,
    tokens: &View<'_, u32>,
    table_vd: &View<'_, bf16>,
    d: usize,
    out_td: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    rows_of(table_vd.len(), d, "the table");
    assert_eq!(out_td.len(), tokens.len() * d, "a row of {d} per token");
    let entry = Entry { file: "embedding", name: "embed_forward" };
    let args = args![tokens.at(), table_vd.at(), out_td.at(), as_i32(d)];
    // SAFETY: one block per token; the decoder has checked the tokens against the vocabulary.
    unsafe { device.launch(entry, Shape::new((tokens.len() as u32, 1, 1), 128), args) }
}

/// Rows of a batch sorted by their token: what `embed_backward` reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbedPlan {
    /// Different tokens, ascending.
    pub ids: Vec<u32>,
    /// Where each token's rows begin in `rows`, and the end.
    pub starts: Vec<u32>,
    /// Rows, by token, each token's in their order.
    pub rows: Vec<u32>,
}

impl EmbedPlan {
    /// The plan of a batch's tokens.
    pub fn new(tokens: &[u32]) -> Self {
        let mut rows: Vec<u32> = (0..tokens.len() as u32).collect();
        rows.sort_by_key(|row| tokens[*row as usize]);
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        for (i, row) in rows.iter().enumerate() {
            let token = tokens[*row as usize];
            if ids.last() != Some(&token) {
                ids.push(token);
                starts.push(i as u32);
            }
        }
        starts.push(rows.len() as u32);
        EmbedPlan { ids, starts, rows }
    }

    /// All three lists in one array, as they are uploaded.
    pub fn packed(&self) -> Vec<u32> {
        [&self.ids[..], &self.starts, &self.rows].concat()
    }
}

/// Adds rows of `dx` to the gradient of the table, each token's in their order. `packed` is [`EmbedPlan::packed`] with
/// `num_ids` different tokens.
///
/// # Errors
/// When the launch fails.
pub fn embed_backward(
    device: &Device,
    packed: &View<'_, u32>,
    num_ids: usize,
    dx_td: &View<'_, bf16>,
    d: usize,
    dtable_vd: &mut ViewMut<'_, f32>,
) -> Result<()> {
    let t = rows_of(dx_td.len(), d, "dx");
    rows_of(dtable_vd.len(), d, "the table");
    assert_eq!(packed.len(), 2 * num_ids + 1 + t, "a plan of {num_ids} tokens and {t} rows");
    let (ids, starts) = (packed.part(0, num_ids), packed.part(num_ids, num_ids + 1));
    let rows = packed.part(2 * num_ids + 1, t);
    let entry = Entry { file: "embedding", name: "embed_backward" };
    let args = args![ids.at(), starts.at(), rows.at(), dx_td.at(), dtable_vd.at(), as_i32(d)];
    let grid = (num_ids as u32, d.div_ceil(EMBED_COLUMNS) as u32, 1);
    // SAFETY: one block per token and 256 columns; the plan names rows of dx, and the decoder has checked the tokens.
    unsafe { device.launch(entry, Shape::new(grid, 128), args) }
}

/// Blocks of the SwiGLU kernels: a thread has 8 outputs of a row.
fn swiglu_blocks(t: usize, f: usize) -> u32 {
    u32::try_from((t * f / 8).div_ceil(SWIGLU_THREADS)).expect("a batch has less than 2^40 elements")
}

/// `h = silu(gate) up` of rows `[gate F][up F]`.
///
/// # Errors
/// When the launch fails.
pub fn swiglu_forward(device: &Device, gate_up: &View<'_, bf16>, f: usize, h_tf: &mut ViewMut<'_, bf16>) -> Result<()> {
    let t = rows_of(h_tf.len(), f, "h");
    assert_eq!(gate_up.len(), 2 * t * f, "gate and up for {t} rows of {f}");
    let entry = Entry { file: "swiglu", name: "swiglu_forward" };
    let args = args![gate_up.at(), h_tf.at(), as_i32(t), as_i32(f)];
    let shape = Shape::new((swiglu_blocks(t, f), 1, 1), SWIGLU_THREADS as u32);
    // SAFETY: threads past the last row return; lengths are asserted above.
    unsafe { device.launch(entry, shape, args) }
}

/// Gradients of gate and up from that of [`swiglu_forward`]'s result.
///
/// # Errors
/// When the launch fails.
pub fn swiglu_backward(
    device: &Device,
    gate_up: &View<'_, bf16>,
    dh_tf: &View<'_, bf16>,
    f: usize,
    dgate_up: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let t = rows_of(dh_tf.len(), f, "dh");
    assert_eq!((gate_up.len(), dgate_up.len()), (2 * t * f, 2 * t * f), "gate and up for {t} rows of {f}");
    let entry = Entry { file: "swiglu", name: "swiglu_backward" };
    let args = args![gate_up.at(), dh_tf.at(), dgate_up.at(), as_i32(t), as_i32(f)];
    let shape = Shape::new((swiglu_blocks(t, f), 1, 1), SWIGLU_THREADS as u32);
    // SAFETY: threads past the last row return; lengths are asserted above.
    unsafe { device.launch(entry, shape, args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_embedding_plan_lists_every_row_once_by_token_and_in_order() {
        let plan = EmbedPlan::new(&[7, 3, 7, 0, 3, 7]);
        assert_eq!(plan.ids, [0, 3, 7]);
        assert_eq!(plan.starts, [0, 1, 3, 6]);
        assert_eq!(plan.rows, [3, 1, 4, 0, 2, 5]);
        assert_eq!(plan.packed().len(), 3 + 4 + 6);
        assert_eq!(EmbedPlan::new(&[]), EmbedPlan { ids: vec![], starts: vec![0], rows: vec![] });
    }

    #[test]
    fn swiglu_covers_every_element() {
        assert_eq!(swiglu_blocks(0, 8), 0);
        assert_eq!(swiglu_blocks(1, 8), 1);
        assert_eq!(swiglu_blocks(257, 8), 2);
    }
}
