//! Matrix products with one accumulation order per output element.
//!
//! `y[t][n] = sum over k of x[t][k] * w[n][k]`, summed for k = 0, 1, .. K-1 with one fused multiply-add each, starting
//! from 0. No other order occurs: not for another number of rows, not for another thread count, not on another
//! instruction set. That is what makes a sampled token's log-probability equal the trainer's bit for bit.
//!
//! Weights are packed once into panels of 16 output columns, `[N/16][K][16]`, zero-padded.

use rayon::prelude::*;

/// Output columns of one packed panel.
pub const PANEL: usize = 16;
/// Rows of a register tile: with two panels it fills 24 of AVX-512's 32 registers.
pub const TILE_ROWS: usize = 12;
/// Panels of a register tile.
const TILE_PANELS: usize = 2;
/// Columns of a register tile.
const TILE_COLS: usize = TILE_PANELS * PANEL;
/// Rows that one task works on; its inputs stay in the L2 cache.
const ROW_BLOCK: usize = 96;

/// A matrix packed for products with rows of length `k`.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    data: Vec<f32>,
    /// Number of output columns, N.
    pub n: usize,
    /// Length of the sums, K.
    pub k: usize,
}

/// Instruction set of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512F.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Plain Rust with `f32::mul_add`.
    Portable,
}

impl Isa {
    /// The best one that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }
}

impl Packed {
    /// Packs `w[n][k]` (row-major, N rows of K): the weight of `y = x w^T`.
    pub fn rows(w: &[f32], n: usize, k: usize) -> Self {
        let mut packed = Packed::default();
        packed.pack_rows(w, n, k);
        packed
    }

    /// Packs `w[n][k]` for the product with its columns: the weight of `dx = dy w`, sums over N.
    pub fn columns(w: &[f32], n: usize, k: usize) -> Self {
        let mut packed = Packed::default();
        packed.pack_columns(w, n, k);
        packed
    }

    /// As [`Packed::rows`], into the buffer that is there.
    pub fn pack_rows(&mut self, w: &[f32], n: usize, k: usize) {
        assert_eq!(w.len(), n * k, "a weight of {n} x {k}");
        self.resize(n, k);
        self.data.par_chunks_mut(PANEL * k).enumerate().for_each(|(p, panel)| {
            for c in 0..PANEL.min(n - p * PANEL) {
                let row = &w[(p * PANEL + c) * k..][..k];
                for (i, value) in row.iter().enumerate() {
                    panel[i * PANEL + c] = *value;
                }
            }
        });
    }

    /// As [`Packed::columns`], into the buffer that is there.
    pub fn pack_columns(&mut self, w: &[f32], n: usize, k: usize) {
        assert_eq!(w.len(), n * k, "a weight of {n} x {k}");
        self.resize(k, n);
        self.data.par_chunks_mut(PANEL * n).enumerate().for_each(|(p, panel)| {
            let width = PANEL.min(k - p * PANEL);
            for (i, out) in panel.chunks_exact_mut(PANEL).enumerate() {
                copy_part::<PANEL>(&w[i * k + p * PANEL..], width, out);
            }
        });
    }

    fn resize(&mut self, n: usize, k: usize) {
        if (self.n, self.k) != (n, k) {
            (self.n, self.k) = (n, k);
            self.data = vec![0.0; n.div_ceil(PANEL) * PANEL * k];
        }
    }

    fn right(&self) -> Right<'_> {
        Right { data: &self.data, stride: PANEL * self.k, row: PANEL, cols: self.n, count: self.k }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * 4
    }
}

/// `y[t][n] (+)= x[t][k] w[n][k] (+ bias[n])` for all rows of `x`; with `add`, the sum goes on top of what `y` holds.
/// With `parallel`, blocks of rows (or, for few rows, of columns) are spread over the current thread pool.
pub fn matmul(isa: Isa, x_tk: &[f32], w: &Packed, bias: Option<&[f32]>, y_tn: &mut [f32], add: bool, parallel: bool) {
    let (n, k) = (w.n, w.k);
    let rows = x_tk.len() / k;
    assert_eq!((x_tk.len(), y_tn.len()), (rows * k, rows * n), "rows of {k} in, {n} out");
    assert!(bias.is_none_or(|b| b.len() == n), "a bias of {n}");
    let panels = n.div_ceil(PANEL);
    let left = |data| Left { data, row: k, step: 1 };
    if !parallel || rows * n * k < 1 << 17 {
        for (x, y) in x_tk.chunks(ROW_BLOCK * k).zip(y_tn.chunks_mut(ROW_BLOCK * n)) {
            block(isa, left(x), x.len() / k, w.right(), bias, Out(y.as_mut_ptr(), n), 0..panels, add);
        }
    } else if rows >= 4 * ROW_BLOCK {
        x_tk.par_chunks(ROW_BLOCK * k).zip(y_tn.par_chunks_mut(ROW_BLOCK * n)).for_each(|(x, y)| {
            block(isa, left(x), x.len() / k, w.right(), bias, Out(y.as_mut_ptr(), n), 0..panels, add)
        });
    } else {
        let per_task = panels.div_ceil(4 * rayon::current_num_threads()).max(1);
        let out = Out(y_tn.as_mut_ptr(), n);
        (0..panels.div_ceil(per_task)).into_par_iter().for_each(|task| {
            let range = task * per_task..((task + 1) * per_task).min(panels);
            for (i, x) in x_tk.chunks(ROW_BLOCK * k).enumerate() {
                block(isa, left(x), x.len() / k, w.right(), bias, out.row(i * ROW_BLOCK), range.clone(), add);
            }
        });
    }
}

/// Start and row length of an output that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Out(*mut f32, usize);

// SAFETY: tasks that share an `Out` write disjoint column ranges (see `matmul` and `outer`).
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn row(self, row: usize) -> Self {
        // SAFETY: callers name rows inside the output.
        Out(unsafe { self.0.add(row * self.1) }, self.1)
    }
}

/// Left side of a product: element (i, s) is `data[i * row + s * step]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    /// Elements.
    pub data: &'a [f32],
    /// Distance of rows.
    pub row: usize,
    /// Distance of the elements of a sum.
    pub step: usize,
}

/// Right side of a product: element (s, n) is `data[n / 16 * stride + s * row + n % 16]`. Panels of 16 columns have
/// `row` 16; a plain matrix has `stride` 16, and as many columns as whole panels hold.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    /// Elements.
    pub data: &'a [f32],
    /// Distance of panels.
    pub stride: usize,
    /// Distance of the elements of a sum.
    pub row: usize,
    /// Number of columns, N.
    pub cols: usize,
    /// Length of the sums.
    pub count: usize,
}

/// `y[i][n] (+)= sum over s of a(i, s) b(s, n)` for `rows` rows, on this thread; rows of `y` lie `y_row` apart.
pub fn product(isa: Isa, a: Left<'_>, rows: usize, b: Right<'_>, y: &mut [f32], y_row: usize, add: bool) {
    assert!(rows > 0 && b.cols > 0 && y_row >= b.cols && y.len() >= (rows - 1) * y_row + b.cols, "rows inside y");
    block(isa, a, rows, b, None, Out(y.as_mut_ptr(), y_row), 0..b.cols.div_ceil(PANEL), add);
}

fn block(
    isa: Isa,
    a: Left<'_>,
    rows: usize,
    b: Right<'_>,
    bias: Option<&[f32]>,
    y: Out,
    panels: std::ops::Range<usize>,
    add: bool,
) {
    let mut p = panels.start;
    while p < panels.end {
        let num_panels = (panels.end - p).min(TILE_PANELS);
        let width = (num_panels * PANEL).min(b.cols - p * PANEL);
        let mut start = [0.0f32; TILE_COLS];
        if let Some(bias) = bias {
            start[..width].copy_from_slice(&bias[p * PANEL..][..width]);
        }
        let first = &b.data[p * b.stride..];
        let second = if num_panels == 2 { &first[b.stride..] } else { first };
        let mut t = 0;
        while t < rows {
            let count = (rows - t).min(TILE_ROWS);
            let mut acc = ZERO;
            let a = Left { data: &a.data[t * a.row..], ..a };
            tile(isa, a, count, &[first, second][..num_panels], b.row, b.count, &mut acc);
            for (i, row) in acc.iter().enumerate().take(count) {
                // SAFETY: row t + i and columns p * PANEL.. + width lie inside the output, and no other task has them.
                let out = unsafe { std::slice::from_raw_parts_mut(y.0.add((t + i) * y.1 + p * PANEL), width) };
                for ((value, sum), start) in out.iter_mut().zip(row).zip(&start) {
                    let sum = sum + start;
                    *value = if add { *value + sum } else { sum };
                }
            }
            t += count;
        }
        p += num_panels;
    }
}

/// Sums of a register tile.
pub type Tile = [[f32; TILE_COLS]; TILE_ROWS];

/// A tile before its first element.
pub const ZERO: Tile = [[0.0; TILE_COLS]; TILE_ROWS];

/// `acc[i][c] += sum over s of a(i, s) b(s, c)`, one element after the other in the order of s, for up to 12 rows and 1 or 2
/// panels; elements of a panel lie `b_row` apart.
pub fn tile(isa: Isa, a: Left<'_>, rows: usize, b: &[&[f32]], b_row: usize, count: usize, acc: &mut Tile) {
    let last = (rows - 1) * a.row + count.saturating_sub(1) * a.step;
    assert!(count > 0 && (1..=TILE_ROWS).contains(&rows) && a.data.len() > last, "rows inside their input");
    let end = (count - 1) * b_row + PANEL;
    assert!((1..=TILE_PANELS).contains(&b.len()) && b.iter().all(|b| b.len() >= end), "panels inside their input");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set was detected; the assertions above bound every access.
        Isa::Avx512 => unsafe { x86::tile_512(a, rows, b, b_row, count, acc) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::tile_256(a, rows, b, b_row, count, acc) },
        _ => {
            for (i, acc) in acc.iter_mut().enumerate().take(rows) {
                for s in 0..count {
                    let value = a.data[i * a.row + s * a.step];
                    for (p, panel) in b.iter().enumerate() {
                        let column = &panel[s * b_row..][..PANEL];
                        for (sum, w) in acc[p * PANEL..][..PANEL].iter_mut().zip(column) {
                            *sum = value.mul_add(*w, *sum);
                        }
                    }
                }
            }
        }
    }
}

/// Scratch of [`outer`].
#[derive(Debug, Default)]
pub struct OuterScratch {
    rows: Vec<f32>,
    panels: Vec<f32>,
}

/// Copies `width` of N values and zeros for the rest; the usual N of N without a call.
#[inline(always)]
pub fn copy_part<const N: usize>(from: &[f32], width: usize, to: &mut [f32]) {
    if let (true, Some(from), Some(to)) = (width == N, from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
        *to = *from;
    } else {
        to[..width].copy_from_slice(&from[..width]);
        to[width..N].fill(0.0);
    }
}

/// Rows that one pass of [`outer`] packs.
const OUTER_ROWS: usize = 256;

/// `g[n][k] += sum over t of dy[t][n] x[t][k]`: the gradient of a weight. Each element is summed over t in order by one
/// task, whatever the number of threads.
pub fn outer(isa: Isa, dy_tn: &[f32], x_tk: &[f32], n: usize, k: usize, g_nk: &mut [f32], scratch: &mut OuterScratch) {
    let rows = dy_tn.len() / n;
    assert_eq!((dy_tn.len(), x_tk.len(), g_nk.len()), (rows * n, rows * k, n * k), "dy {n} wide, x {k} wide");
    let (strips, panels) = (n.div_ceil(TILE_ROWS), k.div_ceil(PANEL));
    scratch.rows.resize(strips * TILE_ROWS * OUTER_ROWS, 0.0);
    scratch.panels.resize(panels * PANEL * OUTER_ROWS, 0.0);
    for (dy, x) in dy_tn.chunks(OUTER_ROWS * n).zip(x_tk.chunks(OUTER_ROWS * k)) {
        let count = dy.len() / n;
        scratch.rows.par_chunks_mut(TILE_ROWS * OUTER_ROWS).enumerate().with_min_len(8).for_each(|(s, strip)| {
            let width = TILE_ROWS.min(n - s * TILE_ROWS);
            for (t, out) in strip.chunks_exact_mut(TILE_ROWS).take(count).enumerate() {
                copy_part::<TILE_ROWS>(&dy[t * n + s * TILE_ROWS..], width, out);
            }
        });
        scratch.panels.par_chunks_mut(PANEL * OUTER_ROWS).enumerate().with_min_len(4).for_each(|(p, panel)| {
            let width = PANEL.min(k - p * PANEL);
            for (t, out) in panel.chunks_exact_mut(PANEL).take(count).enumerate() {
                copy_part::<PANEL>(&x[t * k + p * PANEL..], width, out);
            }
        });
        let (strip_data, panel_data) = (&scratch.rows, &scratch.panels);
        g_nk.par_chunks_mut(TILE_ROWS * k).enumerate().for_each(|(s, g)| {
            let strip = &strip_data[s * TILE_ROWS * OUTER_ROWS..][..TILE_ROWS * count];
            let rows = g.len() / k;
            for p in (0..panels).step_by(TILE_PANELS) {
                let num_panels = (panels - p).min(TILE_PANELS);
                let panel = |i: usize| &panel_data[(p + i) * PANEL * OUTER_ROWS..][..PANEL * OUTER_ROWS];
                let b = [panel(0), panel(num_panels - 1)];
                let mut acc = ZERO;
                let a = Left { data: strip, row: 1, step: TILE_ROWS };
                tile(isa, a, rows, &b[..num_panels], PANEL, count, &mut acc);
                let width = (num_panels * PANEL).min(k - p * PANEL);
                for (row, g) in acc.iter().zip(g.chunks_exact_mut(k)) {
                    for (g, value) in g[p * PANEL..][..width].iter_mut().zip(row) {
                        *g += value;
                    }
                }
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Left, PANEL, TILE_COLS, Tile};
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    /// Calls a kernel whose row count is a constant.
    macro_rules! with_rows {
        ($rows:expr, $kernel:ident, $vectors:literal, $args:tt, $($n:literal)*) => {
            match $rows { $($n => $kernel::<$n, $vectors> $args,)* _ => unreachable!("rows of a tile") }
        };
    }

    /// A kernel of R rows and V vectors of columns; its sums live in registers.
    macro_rules! kernel {
        ($name:ident, $features:literal, $width:literal, $zero:ident, $load:ident, $store:ident, $fma:ident, $set:expr) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const R: usize, const V: usize>(
                a: *const f32,
                row: usize,
                step: usize,
                b: [*const f32; V],
                b_row: usize,
                count: usize,
                acc: *mut f32,
            ) {
                let mut sums = [[$zero(); V]; R];
                // SAFETY: `tile` checked that `count` steps of both operands exist, and a tile has 12 rows of 32 columns.
                unsafe {
                    for i in 0..R {
                        for v in 0..V {
                            sums[i][v] = $load(acc.add(i * TILE_COLS + v * $width));
                        }
                    }
                    for s in 0..count {
                        // What there is less of stays in registers beside the sums.
                        if R < V {
                            let mut x = [$zero(); R];
                            for i in 0..R {
                                x[i] = $set(a.add(i * row + s * step));
                            }
                            for v in 0..V {
                                let column = $load(b[v].add(s * b_row));
                                for i in 0..R {
                                    sums[i][v] = $fma(x[i], column, sums[i][v]);
                                }
                            }
                        } else {
                            let mut column = [$zero(); V];
                            for v in 0..V {
                                column[v] = $load(b[v].add(s * b_row));
                            }
                            for i in 0..R {
                                let x = $set(a.add(i * row + s * step));
                                for v in 0..V {
                                    sums[i][v] = $fma(x, column[v], sums[i][v]);
                                }
                            }
                        }
                    }
                    for i in 0..R {
                        for v in 0..V {
                            $store(acc.add(i * TILE_COLS + v * $width), sums[i][v]);
                        }
                    }
                }
            }
        };
    }

    kernel!(
        kernel_512,
        "avx512f",
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        |x: *const f32| { _mm512_set1_ps(*x) }
    );
    kernel!(
        kernel_256,
        "avx2,fma",
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        |x: *const f32| { _mm256_broadcast_ss(&*x) }
    );

    /// Both panels of up to 12 rows at once: 24 of 32 registers hold sums.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn tile_512(a: Left<'_>, rows: usize, b: &[&[f32]], b_row: usize, count: usize, acc: &mut Tile) {
        let (x, acc) = (a.data.as_ptr(), acc.as_mut_ptr().cast());
        // SAFETY: as in the kernel.
        unsafe {
            match b {
                [b0, b1] => {
                    let b = [b0.as_ptr(), b1.as_ptr()];
                    with_rows!(rows, kernel_512, 2, (x, a.row, a.step, b, b_row, count, acc), 1 2 3 4 5 6 7 8 9 10 11 12);
                }
                _ => {
                    let b = [b[0].as_ptr()];
                    with_rows!(rows, kernel_512, 1, (x, a.row, a.step, b, b_row, count, acc), 1 2 3 4 5 6 7 8 9 10 11 12);
                }
            }
        }
    }

    /// Up to 3 rows of both panels at once, or 6 rows of one: 12 of 16 registers hold sums.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn tile_256(a: Left<'_>, rows: usize, b: &[&[f32]], b_row: usize, count: usize, acc: &mut Tile) {
        let (x, acc): (_, *mut f32) = (a.data.as_ptr(), acc.as_mut_ptr().cast());
        // SAFETY: as in the kernel.
        unsafe {
            if let ([b0, b1], 1..=3) = (b, rows) {
                let b = [b0.as_ptr(), b0.as_ptr().add(8), b1.as_ptr(), b1.as_ptr().add(8)];
                with_rows!(rows, kernel_256, 4, (x, a.row, a.step, b, b_row, count, acc), 1 2 3);
                return;
            }
            for (p, panel) in b.iter().enumerate() {
                let b = [panel.as_ptr(), panel.as_ptr().add(8)];
                for r in (0..rows).step_by(6) {
                    let (x, acc) = (x.add(r * a.row), acc.add(r * TILE_COLS + p * PANEL));
                    with_rows!((rows - r).min(6), kernel_256, 2, (x, a.row, a.step, b, b_row, count, acc), 1 2 3 4 5 6);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::{Purpose, Rng};

    fn random(len: usize, stream: u32) -> Vec<f32> {
        let mut rng = Rng::new(1, Purpose::Test, 0, stream);
        (0..len).map(|_| rng.normal() as f32).collect()
    }

    fn reference(x: &[f32], w: &[f32], n: usize, k: usize) -> Vec<f32> {
        let sum = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0.0f32, |a, (x, w)| x.mul_add(*w, a));
        x.chunks(k).flat_map(|x| w.chunks(k).take(n).map(move |w| sum(x, w))).collect()
    }

    #[test]
    fn every_path_gives_the_sequential_sum_to_the_bit() {
        for (rows, n, k) in [(1, 1, 1), (5, 17, 3), (6, 16, 32), (13, 40, 19), (400, 33, 20), (97, 64, 64)] {
            let (x, w) = (random(rows * k, 1), random(n * k, 2));
            let expected = reference(&x, &w, n, k);
            let packed = Packed::rows(&w, n, k);
            for isa in [Isa::detect(), Isa::Portable] {
                for parallel in [false, true] {
                    let mut y = vec![f32::NAN; rows * n];
                    matmul(isa, &x, &packed, None, &mut y, false, parallel);
                    assert_eq!(y, expected, "{rows}x{k} by {n}, {isa:?}, parallel {parallel}");
                }
            }
        }
    }

    #[test]
    fn gradients_of_both_sides_are_products_too() {
        let (rows, n, k) = (300, 19, 37);
        let (x, w, dy) = (random(rows * k, 1), random(n * k, 2), random(rows * n, 3));
        let mut dx = vec![0.0; rows * k];
        matmul(Isa::detect(), &dy, &Packed::columns(&w, n, k), None, &mut dx, false, true);
        let transposed: Vec<f32> =
            (0..k).flat_map(|j| (0..n).map(move |i| (i, j))).map(|(i, j)| w[i * k + j]).collect();
        assert_eq!(dx, reference(&dy, &transposed, k, n));
        let mut g = vec![1.0f32; n * k];
        outer(Isa::detect(), &dy, &x, n, k, &mut g, &mut OuterScratch::default());
        for i in 0..n {
            for j in 0..k {
                let exact: f64 = (0..rows).map(|t| f64::from(dy[t * n + i]) * f64::from(x[t * k + j])).sum();
                assert!((f64::from(g[i * k + j]) - exact - 1.0).abs() < 1e-3, "element {i}, {j}");
            }
        }
    }
}
