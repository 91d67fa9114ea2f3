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
                out[..width].copy_from_slice(&w[i * k + p * PANEL..][..width]);
            }
        });
    }

    fn resize(&mut self, n: usize, k: usize) {
        if (self.n, self.k) != (n, k) {
            (self.n, self.k) = (n, k);
            self.data = vec![0.0; n.div_ceil(PANEL) * PANEL * k];
        }
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
    if !parallel || rows * n * k < 1 << 17 {
        for (x, y) in x_tk.chunks(ROW_BLOCK * k).zip(y_tn.chunks_mut(ROW_BLOCK * n)) {
            block(isa, x, w, bias, Out(y.as_mut_ptr(), n), 0..panels, add);
        }
    } else if rows >= 4 * ROW_BLOCK {
        x_tk.par_chunks(ROW_BLOCK * k)
            .zip(y_tn.par_chunks_mut(ROW_BLOCK * n))
            .for_each(|(x, y)| block(isa, x, w, bias, Out(y.as_mut_ptr(), n), 0..panels, add));
    } else {
        let per_task = panels.div_ceil(4 * rayon::current_num_threads()).max(1);
        let out = Out(y_tn.as_mut_ptr(), n);
        (0..panels.div_ceil(per_task)).into_par_iter().for_each(|task| {
            let range = task * per_task..((task + 1) * per_task).min(panels);
            for (i, x) in x_tk.chunks(ROW_BLOCK * k).enumerate() {
                block(isa, x, w, bias, out.row(i * ROW_BLOCK), range.clone(), add);
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

fn block(isa: Isa, x_tk: &[f32], w: &Packed, bias: Option<&[f32]>, y: Out, panels: std::ops::Range<usize>, add: bool) {
    let k = w.k;
    let rows = x_tk.len() / k;
    for p in panels {
        let panel = &w.data[p * PANEL * k..][..PANEL * k];
        let width = PANEL.min(w.n - p * PANEL);
        let mut start = [0.0f32; PANEL];
        if let Some(bias) = bias {
            start[..width].copy_from_slice(&bias[p * PANEL..][..width]);
        }
        let mut t = 0;
        while t < rows {
            let count = (rows - t).min(6);
            let mut acc = [[0.0f32; PANEL]; 6];
            tile(isa, &x_tk[t * k..], k, count, panel, &mut acc);
            for (i, row) in acc.iter().enumerate().take(count) {
                // SAFETY: row t + i and columns p * PANEL.. + width lie inside the output, and no other task has them.
                let out = unsafe { std::slice::from_raw_parts_mut(y.0.add((t + i) * y.1 + p * PANEL), width) };
                for (c, value) in out.iter_mut().enumerate() {
                    let sum = row[c] + start[c];
                    *value = if add { *value + sum } else { sum };
                }
            }
            t += count;
        }
    }
}

/// Up to 6 rows times one panel; `x` starts at the first row, rows are `k` apart.
fn tile(isa: Isa, x: &[f32], k: usize, rows: usize, panel: &[f32], acc: &mut [[f32; PANEL]; 6]) {
    assert!(x.len() >= rows * k && panel.len() >= k * PANEL && (1..=6).contains(&rows), "a tile inside its inputs");
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        // SAFETY: the instruction set was detected; the assertion above bounds every access.
        unsafe {
            match rows {
                1 => x86::tile::<1>(x.as_ptr(), k, 1, panel.as_ptr(), k, acc),
                2 => x86::tile::<2>(x.as_ptr(), k, 1, panel.as_ptr(), k, acc),
                3 => x86::tile::<3>(x.as_ptr(), k, 1, panel.as_ptr(), k, acc),
                4 => x86::tile::<4>(x.as_ptr(), k, 1, panel.as_ptr(), k, acc),
                5 => x86::tile::<5>(x.as_ptr(), k, 1, panel.as_ptr(), k, acc),
                _ => x86::tile::<6>(x.as_ptr(), k, 1, panel.as_ptr(), k, acc),
            }
        }
        return;
    }
    for (i, acc) in acc.iter_mut().enumerate().take(rows) {
        for (value, column) in x[i * k..][..k].iter().zip(panel.chunks_exact(PANEL)) {
            for (a, w) in acc.iter_mut().zip(column) {
                *a = value.mul_add(*w, *a);
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

/// Rows that one pass of [`outer`] packs.
const OUTER_ROWS: usize = 256;

/// `g[n][k] += sum over t of dy[t][n] x[t][k]`: the gradient of a weight. Each element is summed over t in order by one
/// task, whatever the number of threads.
pub fn outer(isa: Isa, dy_tn: &[f32], x_tk: &[f32], n: usize, k: usize, g_nk: &mut [f32], scratch: &mut OuterScratch) {
    let rows = dy_tn.len() / n;
    assert_eq!((dy_tn.len(), x_tk.len(), g_nk.len()), (rows * n, rows * k, n * k), "dy {n} wide, x {k} wide");
    let (strips, panels) = (n.div_ceil(6), k.div_ceil(PANEL));
    scratch.rows.resize(strips * 6 * OUTER_ROWS, 0.0);
    scratch.panels.resize(panels * PANEL * OUTER_ROWS, 0.0);
    for (dy, x) in dy_tn.chunks(OUTER_ROWS * n).zip(x_tk.chunks(OUTER_ROWS * k)) {
        let count = dy.len() / n;
        scratch.rows.par_chunks_mut(6 * OUTER_ROWS).enumerate().with_min_len(8).for_each(|(s, strip)| {
            let width = 6.min(n - s * 6);
            for (t, out) in strip.chunks_exact_mut(6).take(count).enumerate() {
                out[..width].copy_from_slice(&dy[t * n + s * 6..][..width]);
            }
        });
        scratch.panels.par_chunks_mut(PANEL * OUTER_ROWS).enumerate().with_min_len(4).for_each(|(p, panel)| {
            let width = PANEL.min(k - p * PANEL);
            for (t, out) in panel.chunks_exact_mut(PANEL).take(count).enumerate() {
                out[..width].copy_from_slice(&x[t * k + p * PANEL..][..width]);
                out[width..].fill(0.0);
            }
        });
        let (strip_data, panel_data) = (&scratch.rows, &scratch.panels);
        g_nk.par_chunks_mut(6 * k).enumerate().for_each(|(s, g)| {
            let strip = &strip_data[s * 6 * OUTER_ROWS..][..6 * count];
            for p in 0..panels {
                let panel = &panel_data[p * PANEL * OUTER_ROWS..][..PANEL * count];
                let mut acc = [[0.0f32; PANEL]; 6];
                strip_tile(isa, strip, panel, &mut acc);
                let width = PANEL.min(k - p * PANEL);
                for (row, g) in acc.iter().zip(g.chunks_exact_mut(k)) {
                    for (g, value) in g[p * PANEL..][..width].iter_mut().zip(row) {
                        *g += value;
                    }
                }
            }
        });
    }
}

/// Six columns of `dy` (packed `[t][6]`) times one panel of `x` (packed `[t][16]`).
fn strip_tile(isa: Isa, strip: &[f32], panel: &[f32], acc: &mut [[f32; PANEL]; 6]) {
    let count = strip.len() / 6;
    assert!(panel.len() >= count * PANEL, "a panel as long as its strip");
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        // SAFETY: the instruction set was detected; the assertion above bounds every access.
        unsafe { x86::tile::<6>(strip.as_ptr(), 1, 6, panel.as_ptr(), count, acc) };
        return;
    }
    for (values, column) in strip.chunks_exact(6).zip(panel.chunks_exact(PANEL)) {
        for (acc, value) in acc.iter_mut().zip(values) {
            for (a, x) in acc.iter_mut().zip(column) {
                *a = value.mul_add(*x, *a);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::PANEL;
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    /// `acc[i][c] = sum over s of a[i * row + s * step] * b[s * 16 + c]` for R rows and 16 columns, in the order of s.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn tile<const R: usize>(
        a: *const f32,
        row: usize,
        step: usize,
        b: *const f32,
        count: usize,
        acc: &mut [[f32; PANEL]; 6],
    ) {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for s in 0..count {
            // SAFETY: the caller's slices hold `count` steps of both operands.
            unsafe {
                let b0 = _mm256_loadu_ps(b.add(s * PANEL));
                let b1 = _mm256_loadu_ps(b.add(s * PANEL + 8));
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(i * row + s * step));
                    sum[0] = _mm256_fmadd_ps(x, b0, sum[0]);
                    sum[1] = _mm256_fmadd_ps(x, b1, sum[1]);
                }
            }
        }
        for (sum, out) in sums.iter().zip(acc.iter_mut()) {
            // SAFETY: each row of `acc` has 16 elements.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), sum[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), sum[1]);
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
