//! The CPU behind [`Backend`]: work is spread over rows or output columns on a pool of its own, never in a way that a
//! result could notice.

use std::cell::UnsafeCell;
use std::sync::Arc;

use rayon::prelude::*;

use crate::compute::cpu::attention::{SeqKv, attend_row, write_page};
use crate::compute::cpu::attention_block::{self, BackwardIn, Rows, Scratch, attend_backward, attend_block};
use crate::compute::cpu::buffer::{CpuBuf, Store};
use crate::compute::cpu::gemm::{Isa, OuterScratch, Packed, matmul, outer};
use crate::compute::cpu::head;
use crate::compute::cpu::rows::{self, multiversion};
use crate::compute::ops::{
    AdamW, Angles, Backend, Draw, Drawn, HeadReport, HeadTarget, Heads, LayerKv, MomentPrecision, Norms, PAGE, Seat,
    Span, Weight, WeightOf,
};
use crate::error::{Error, Result};
use crate::weights::safetensors::Sink;

/// Rows per task of row-wise operations.
const ROWS: usize = 32;
/// Most threads of a pool.
pub const MAX_THREADS: usize = 1024;
/// Shortest span whose attention runs in blocks of rows.
const MIN_BLOCK: usize = 4;
/// Elements per task of elementwise operations; also the block of the gradient norm's sum.
const BLOCK: usize = 1 << 14;
/// Sequences that decode at once for each thread.
const RUNNING_PER_THREAD: usize = 32;
/// Rows whose logits are held at a time.
const HEAD_ROWS: usize = 48;
/// Weights larger than this do not stay in the cache: all threads then share one pass over them.
const SHARED_PASS_BYTES: usize = 24 << 20;

/// The CPU: instruction set and thread pool.
#[derive(Clone)]
pub struct CpuBackend {
    isa: Isa,
    pool: Arc<rayon::ThreadPool>,
    serial: bool,
    store: Arc<Store>,
}

/// A weight packed for products.
pub struct CpuLinear {
    forward: Packed,
    backward: Option<Packed>,
}

/// Keys and values of all layers.
pub struct CpuKv {
    layers: Vec<PagedLayer>,
    page_len: usize,
}

struct PagedLayer {
    keys: Shared,
    values: Shared,
}

/// A batch: its tokens, and its sequences' rows.
pub struct CpuBatch {
    tokens: Vec<u32>,
    spans: Vec<OwnSpan>,
}

/// A [`Span`] with a page table of its own.
struct OwnSpan {
    row: usize,
    len: usize,
    pos: usize,
    pages: Vec<u32>,
}

/// Norm of a gradient before clipping, and the factor on it.
#[derive(Debug, Clone, Copy)]
pub struct CpuClip {
    norm: f64,
    scale: f32,
}

/// An array that threads write disjoint pages of.
struct Shared(UnsafeCell<CpuBuf>);

// SAFETY: `rope` writes only pages that belong to one sequence of the batch, and no page is read in the same call.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> &[f32] {
        // SAFETY: readers run after the writers of their pages (same thread, or a later operation).
        unsafe { &*self.0.get() }
    }

    fn page(&self, page: u32, len: usize) -> *mut f32 {
        // SAFETY: the vector never changes its length, and the index is checked here.
        unsafe {
            let all = &mut *self.0.get();
            assert!((page as usize + 1) * len <= all.len(), "page {page} exists");
            all.as_mut_ptr().add(page as usize * len)
        }
    }
}

impl CpuBackend {
    /// A pool of `threads` threads (0: one per core) and the best instruction set of this machine.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        Self::with_isa(threads, Isa::detect())
    }

    /// As [`CpuBackend::new`] with a given instruction set, for tests.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self> {
        if threads > MAX_THREADS {
            return Err(Error::usage(format!("{threads} threads are too many; the most is {MAX_THREADS}"))
                .with_hint("more threads than cores make nothing faster"));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("azr-compute-{i}"))
            .build()
            .map_err(|e| Error::environment(format!("cannot start {threads} threads: {e}")))?;
        Ok(CpuBackend { isa, pool: Arc::new(pool), serial: false, store: Arc::default() })
    }

    /// Number of threads.
    pub fn num_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `f` with matching pieces of `n` rows of two arrays.
    fn rows2(&self, a: &[f32], wa: usize, b: &mut [f32], wb: usize, f: impl Fn(&[f32], &mut [f32]) + Sync + Send) {
        if self.serial {
            f(a, b);
        } else {
            a.par_chunks(ROWS * wa).zip(b.par_chunks_mut(ROWS * wb)).for_each(|(a, b)| f(a, b));
        }
    }

    /// Calls `f` with pieces of columns `0..d`, as (first column, piece).
    fn columns(&self, out: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let width = 64;
        if self.serial {
            out.chunks_mut(width).enumerate().for_each(|(i, c)| f(i * width, c));
        } else {
            out.par_chunks_mut(width).enumerate().for_each(|(i, c)| f(i * width, c));
        }
    }
}

multiversion! {
    fn rope_row(heads: Heads, row: &mut [f32], cos: &[f32], sin: &[f32], norms: Option<(&[f32], &[f32], f32)>) = rows::rope_row
}
multiversion! {
    fn rope_row_backward(heads: Heads, row: &mut [f32], raw: &[f32], cos: &[f32], sin: &[f32], norms: Option<(&[f32], &[f32], f32)>, dnorms: Option<(&mut [f32], &mut [f32])>) = rows::rope_row_backward
}

fn angles_at(angles: &Angles<CpuBuf>, heads: Heads, pos: usize) -> (&[f32], &[f32]) {
    let half = heads.head_dim / 2;
    (&angles.cos[pos * half..][..half], &angles.sin[pos * half..][..half])
}

fn as_slices<'a>(norms: Norms<'a, CpuBuf>) -> Option<(&'a [f32], &'a [f32], f32)> {
    norms.map(|(q, k, eps)| (&**q, &**k, eps))
}

fn width(heads: Heads) -> usize {
    (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
}

/// There are none: the host takes part in every step.
pub enum NoSeats {}

impl Backend for CpuBackend {
    type Buf = CpuBuf;
    type Act = CpuBuf;
    type Param = CpuBuf;
    type Moments = [CpuBuf; 2];
    type Linear = CpuLinear;
    type Kv = CpuKv;
    type Batch = CpuBatch;
    type Reports = Vec<HeadReport>;
    type Seats = NoSeats;
    type Clip = CpuClip;

    const MAX_ROWS: usize = 1024;

    fn describe(&self) -> String {
        format!("{} CPU threads", self.num_threads())
    }

    fn num_running(&self) -> usize {
        RUNNING_PER_THREAD * self.num_threads()
    }

    fn check(&self, _: Heads, _: &[usize]) -> Result<()> {
        Ok(())
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        if self.serial { f() } else { self.pool.install(f) }
    }

    fn lanes(&self, weight_bytes: usize) -> usize {
        if self.serial || weight_bytes > SHARED_PASS_BYTES { 1 } else { self.num_threads() }
    }

    fn split<T: Sync, R: Send>(&self, parts: &[T], f: impl Fn(&Self, &T) -> R + Sync + Send) -> Vec<R> {
        if let [part] = parts {
            return vec![f(self, part)];
        }
        let serial = CpuBackend { serial: true, ..self.clone() };
        self.pool.install(|| parts.par_iter().with_max_len(1).map(|part| f(&serial, part)).collect())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn zeros(&self, len: usize) -> Result<CpuBuf> {
        Ok(self.store.zeros(len))
    }

    fn scratch(&self, len: usize) -> Result<CpuBuf> {
        Ok(self.store.scratch(len))
    }

    fn write(&self, buf: &mut CpuBuf, values: &[f32]) -> Result<()> {
        buf.copy_from_slice(values);
        Ok(())
    }

    fn download(&self, buf: &CpuBuf) -> Result<Vec<f32>> {
        Ok(buf.to_vec())
    }

    fn clear(&self, buf: &mut CpuBuf) -> Result<()> {
        buf.fill(0.0);
        Ok(())
    }

    fn act(&self, len: usize) -> Result<CpuBuf> {
        self.scratch(len)
    }

    fn upload(&self, values: &[f32]) -> Result<CpuBuf> {
        Ok(self.store.copy_of(values))
    }

    fn values(&self, act: &CpuBuf) -> Result<Vec<f32>> {
        self.download(act)
    }

    fn clear_act(&self, act: &mut CpuBuf) -> Result<()> {
        self.clear(act)
    }

    fn copy(&self, y: &mut CpuBuf, x: &CpuBuf) -> Result<()> {
        y.copy_from_slice(x);
        Ok(())
    }

    fn param_from(&self, len: usize, source: impl FnOnce(Sink<'_>) -> Result<()>) -> Result<CpuBuf> {
        let (mut param, mut from) = (self.scratch(len)?, 0);
        source(&mut |piece| {
            param[from..][..piece.len()].copy_from_slice(piece);
            from += piece.len();
            Ok(())
        })?;
        assert_eq!(from, len, "values of a weight");
        Ok(param)
    }

    fn master(&self, param: &CpuBuf) -> Result<Vec<f32>> {
        self.download(param)
    }

    fn linear(&self, w_nk: &CpuBuf, n: usize, k: usize, backward: bool) -> Result<CpuLinear> {
        Ok(self.scope(|| CpuLinear {
            forward: Packed::rows(w_nk, n, k),
            backward: backward.then(|| Packed::columns(w_nk, n, k)),
        }))
    }

    fn relayout(&self, linear: &mut CpuLinear, w_nk: &CpuBuf) -> Result<()> {
        let (n, k) = (linear.forward.n, linear.forward.k);
        linear.forward.pack_rows(w_nk, n, k);
        if let Some(backward) = &mut linear.backward {
            backward.pack_columns(w_nk, n, k);
        }
        Ok(())
    }

    fn matmul(
        &self,
        x_tk: &CpuBuf,
        w: Weight<'_, CpuBuf, CpuLinear>,
        bias: Option<&CpuBuf>,
        y_tn: &mut CpuBuf,
        add: bool,
    ) -> Result<()> {
        matmul(self.isa, x_tk, &w.layout.forward, bias.map(|b| &**b), y_tn, add, !self.serial);
        Ok(())
    }

    fn gated(
        &self,
        x_tk: &CpuBuf,
        w: Weight<'_, CpuBuf, CpuLinear>,
        f: usize,
        gate_up: Option<&mut CpuBuf>,
        h_tf: &mut CpuBuf,
    ) -> Result<()> {
        let mut own = if gate_up.is_none() { Some(self.scratch(2 * h_tf.len())?) } else { None };
        let gate_up = gate_up.or(own.as_mut()).expect("one of them is there");
        self.matmul(x_tk, w, None, gate_up, false)?;
        self.rows2(gate_up, 2 * f, h_tf, f, |gu, h| rows::swiglu(self.isa, gu, f, h));
        Ok(())
    }

    fn swiglu_backward(&self, gate_up: &CpuBuf, dh_tf: &CpuBuf, f: usize, dgate_up: &mut CpuBuf) -> Result<()> {
        gate_up
            .par_chunks(ROWS * 2 * f)
            .zip(dh_tf.par_chunks(ROWS * f))
            .zip(dgate_up.par_chunks_mut(ROWS * 2 * f))
            .for_each(|((gu, dh), d)| rows::swiglu_backward(self.isa, gu, dh, f, d));
        Ok(())
    }

    fn matmul_backward_input(
        &self,
        dy_tn: &CpuBuf,
        w: Weight<'_, CpuBuf, CpuLinear>,
        dx_tk: &mut CpuBuf,
        add: bool,
    ) -> Result<()> {
        let packed = w.layout.backward.as_ref().expect("a weight that is trained is laid out for its backward pass");
        matmul(self.isa, dy_tn, packed, None, dx_tk, add, !self.serial);
        Ok(())
    }

    fn matmul_backward_weight(
        &self,
        dy_tn: &CpuBuf,
        x_tk: &CpuBuf,
        n: usize,
        k: usize,
        dw_nk: &mut CpuBuf,
    ) -> Result<()> {
        outer(self.isa, dy_tn, x_tk, n, k, dw_nk, &mut OuterScratch::default());
        Ok(())
    }

    fn bias_backward(&self, dy_tn: &CpuBuf, n: usize, db_n: &mut CpuBuf) -> Result<()> {
        self.columns(db_n, |from, db| rows::column_sums(self.isa, dy_tn, n, from, db));
        Ok(())
    }

    fn batch(&self, _: Heads, tokens: &[u32], spans: &[Span<'_>]) -> Result<CpuBatch> {
        let own = |s: &Span<'_>| OwnSpan { row: s.row, len: s.len, pos: s.pos, pages: s.pages.to_vec() };
        Ok(CpuBatch { tokens: tokens.to_vec(), spans: spans.iter().map(own).collect() })
    }

    fn embed(&self, batch: &CpuBatch, table_vd: &CpuBuf, d: usize, x_td: &mut CpuBuf) -> Result<()> {
        for (t, row) in batch.tokens.iter().zip(x_td.chunks_exact_mut(d)) {
            row.copy_from_slice(&table_vd[*t as usize * d..][..d]);
        }
        Ok(())
    }

    fn embed_backward(&self, batch: &CpuBatch, dx_td: &CpuBuf, d: usize, dtable_vd: &mut CpuBuf) -> Result<()> {
        for (token, dx) in batch.tokens.iter().zip(dx_td.chunks_exact(d)) {
            for (g, x) in dtable_vd[*token as usize * d..][..d].iter_mut().zip(dx) {
                *g += x;
            }
        }
        Ok(())
    }

    fn rmsnorm(&self, x_td: &CpuBuf, w_d: &CpuBuf, eps: f32, y_td: &mut CpuBuf, rstd_t: &mut CpuBuf) -> Result<()> {
        let d = w_d.len();
        if self.serial {
            rows::rmsnorm(self.isa, x_td, w_d, eps, y_td, rstd_t);
        } else {
            x_td.par_chunks(ROWS * d)
                .zip(y_td.par_chunks_mut(ROWS * d))
                .zip(rstd_t.par_chunks_mut(ROWS))
                .for_each(|((x, y), rstd)| rows::rmsnorm(self.isa, x, w_d, eps, y, rstd));
        }
        Ok(())
    }

    fn rmsnorm_backward(
        &self,
        x_td: &CpuBuf,
        w_d: &CpuBuf,
        rstd_t: &CpuBuf,
        dy_td: &CpuBuf,
        dx_td: &mut CpuBuf,
        dw_d: &mut CpuBuf,
    ) -> Result<()> {
        let d = w_d.len();
        x_td.par_chunks(ROWS * d)
            .zip(rstd_t.par_chunks(ROWS))
            .zip(dy_td.par_chunks(ROWS * d))
            .zip(dx_td.par_chunks_mut(ROWS * d))
            .for_each(|(((x, rstd), dy), dx)| rows::rmsnorm_dx(self.isa, x, w_d, rstd, dy, dx));
        self.columns(dw_d, |from, dw| rows::rmsnorm_dw(self.isa, x_td, rstd_t, dy_td, d, from, dw));
        Ok(())
    }

    fn rope(
        &self,
        heads: Heads,
        qkv_tq: &CpuBuf,
        batch: &CpuBatch,
        angles: &Angles<CpuBuf>,
        norms: Norms<'_, CpuBuf>,
        kv: LayerKv<'_, CpuKv>,
        q_thc: &mut CpuBuf,
    ) -> Result<()> {
        let (q, c, norms) = (width(heads), heads.head_dim, as_slices(norms));
        let (hc, layer, len) = (heads.num_heads * c, &kv.kv.layers[kv.layer], kv.kv.page_len);
        // A piece is what one span has on one page: nobody else writes there.
        let (mut pieces, mut rest) = (Vec::new(), &mut q_thc[..]);
        for span in &batch.spans {
            let mut from = 0;
            while from < span.len {
                let count = (PAGE - (span.pos + from) % PAGE).min(span.len - from);
                let (piece, tail) = rest.split_at_mut(count * hc);
                pieces.push((span, from, piece));
                (from, rest) = (from + count, tail);
            }
        }
        let one = |scratch: &mut Vec<f32>, (span, from, queries): (&OwnSpan, usize, &mut [f32])| {
            let page = span.pages[(span.pos + from) / PAGE];
            let (keys, values) = (layer.keys.page(page, len), layer.values.page(page, len));
            // SAFETY: this sequence alone owns the pages that it writes, and one piece writes a page.
            let (keys, values) =
                unsafe { (std::slice::from_raw_parts_mut(keys, len), std::slice::from_raw_parts_mut(values, len)) };
            for (i, query) in queries.chunks_exact_mut(hc).enumerate() {
                let pos = span.pos + from + i;
                scratch.clear();
                scratch.extend_from_slice(&qkv_tq[(span.row + from + i) * q..][..q]);
                let (cos, sin) = angles_at(angles, heads, pos);
                rope_row(self.isa, heads, scratch, cos, sin, norms);
                query.copy_from_slice(&scratch[..hc]);
                let (key, value) = scratch[hc..].split_at(heads.num_kv_heads * c);
                write_page(heads, key, value, pos % PAGE, keys, values);
            }
        };
        if self.serial {
            let mut scratch = Vec::with_capacity(q);
            pieces.into_iter().for_each(|piece| one(&mut scratch, piece));
        } else {
            pieces.into_par_iter().with_min_len(2).for_each_init(Vec::new, one);
        }
        Ok(())
    }

    fn rope_backward(
        &self,
        heads: Heads,
        dqkv_tq: &mut CpuBuf,
        raw_tq: Option<&CpuBuf>,
        batch: &CpuBatch,
        angles: &Angles<CpuBuf>,
        norms: Norms<'_, CpuBuf>,
        dnorms: Option<(&mut CpuBuf, &mut CpuBuf)>,
    ) -> Result<()> {
        let (norms, q, c) = (as_slices(norms), width(heads), heads.head_dim);
        let raw_tq = raw_tq.map_or(&[][..], |raw| raw);
        let positions: Vec<usize> = batch.spans.iter().flat_map(|s| s.pos..s.pos + s.len).collect();
        // Each block of rows has its own sums for the norms' gradients; blocks are added in order.
        let partial: Vec<(Vec<f32>, Vec<f32>)> = dqkv_tq
            .par_chunks_mut(BLOCK / 64 * q)
            .zip(positions.par_chunks(BLOCK / 64))
            .enumerate()
            .map(|(b, (rows, positions))| {
                let (mut dq, mut dk) = (vec![0.0; c], vec![0.0; c]);
                for (i, (row, pos)) in rows.chunks_exact_mut(q).zip(positions).enumerate() {
                    let raw = raw_tq.get((b * (BLOCK / 64) + i) * q..).unwrap_or_default();
                    let (cos, sin) = angles_at(angles, heads, *pos);
                    rope_row_backward(self.isa, heads, row, raw, cos, sin, norms, Some((&mut dq, &mut dk)));
                }
                (dq, dk)
            })
            .collect();
        if let Some((dq, dk)) = dnorms {
            for (q, k) in &partial {
                dq.iter_mut().zip(q).for_each(|(a, b)| *a += b);
                dk.iter_mut().zip(k).for_each(|(a, b)| *a += b);
            }
        }
        Ok(())
    }

    fn new_kv(&self, heads: Heads, num_layers: usize, num_pages: usize) -> Result<CpuKv> {
        let len = heads.page_len().checked_mul(num_pages).filter(|n| *n < isize::MAX as usize / 4);
        let len = len.ok_or_else(|| Error::new(crate::error::Kind::OutOfMemory, "the KV cache is too large"))?;
        let array = || Shared(UnsafeCell::new(self.store.zeros(len)));
        let layers = (0..num_layers).map(|_| PagedLayer { keys: array(), values: array() }).collect();
        Ok(CpuKv { layers, page_len: heads.page_len() })
    }

    fn copy_pages(&self, kv: &mut CpuKv, copies: &[(u32, u32)]) -> Result<()> {
        let len = kv.page_len;
        for array in kv.layers.iter_mut().flat_map(|l| [&mut l.keys, &mut l.values]) {
            for (from, to) in copies {
                let from = *from as usize * len;
                array.0.get_mut().copy_within(from..from + len, *to as usize * len);
            }
        }
        Ok(())
    }

    fn attention(
        &self,
        heads: Heads,
        kv: LayerKv<'_, CpuKv>,
        q_thc: &CpuBuf,
        batch: &CpuBatch,
        out_thc: &mut CpuBuf,
        lse_th: &mut CpuBuf,
    ) -> Result<()> {
        let (h, c, r) = (heads.num_heads, heads.head_dim, heads.group());
        let layer = &kv.kv.layers[kv.layer];
        // Long spans run in blocks of rows, which gives the bits of single rows.
        let mut pieces = Vec::new();
        let (mut out, mut lse) = (&mut out_thc[..], &mut lse_th[..]);
        for span in &batch.spans {
            let size = if span.len >= MIN_BLOCK { attention_block::BLOCK } else { 1 };
            for from in (0..span.len).step_by(size) {
                let count = size.min(span.len - from);
                let (piece, out_rest) = out.split_at_mut(count * h * c);
                let (piece_lse, lse_rest) = lse.split_at_mut(count * h);
                (out, lse) = (out_rest, lse_rest);
                pieces.push((span, from, piece, piece_lse));
            }
        }
        let one = |scratch: &mut (Vec<f32>, Scratch), piece: (&OwnSpan, usize, &mut [f32], &mut [f32])| {
            let (span, from, out, lse) = piece;
            let kv = SeqKv { keys: layer.keys.get(), values: layer.values.get(), pages: &span.pages };
            let (pos, rows) = (span.pos + from, &q_thc[(span.row + from) * h * c..]);
            for g in 0..heads.num_kv_heads {
                let queries = &rows[g * r * c..];
                if lse.len() > h {
                    let queries = Rows { data: queries, stride: h * c };
                    attend_block(self.isa, heads, kv, g, pos, queries, &mut scratch.1, out, lse);
                } else {
                    let (out, lse) = (&mut out[g * r * c..][..r * c], &mut lse[g * r..][..r]);
                    attend_row(self.isa, heads, &queries[..r * c], kv, g, pos, &mut scratch.0, out, lse);
                }
            }
        };
        if self.serial {
            let mut scratch = Default::default();
            pieces.into_iter().for_each(|piece| one(&mut scratch, piece));
        } else {
            pieces.into_par_iter().with_max_len(ROWS).for_each_init(Default::default, one);
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        heads: Heads,
        kv: LayerKv<'_, CpuKv>,
        q_thc: &CpuBuf,
        out_thc: &CpuBuf,
        lse_th: &CpuBuf,
        dout_thc: &CpuBuf,
        batch: &CpuBatch,
        dqkv_tq: &mut CpuBuf,
    ) -> Result<()> {
        let (q, h, c, g_count, r) = (width(heads), heads.num_heads, heads.head_dim, heads.num_kv_heads, heads.group());
        let layer = &kv.kv.layers[kv.layer];
        let mut pieces: Vec<(&OwnSpan, &mut [f32])> = Vec::with_capacity(batch.spans.len());
        let mut rest = &mut dqkv_tq[..];
        for span in &batch.spans {
            assert_eq!(span.pos, 0, "the backward pass takes whole sequences");
            let (piece, tail) = rest.split_at_mut(span.len * q);
            pieces.push((span, piece));
            rest = tail;
        }
        pieces.into_par_iter().with_max_len(1).for_each_init(Scratch::default, |scratch, (span, dqkv)| {
            let t = span.len;
            let (mut dk, mut dv) = (vec![0.0; t * c], vec![0.0; t * c]);
            for g in 0..g_count {
                let at = g * r * c;
                let io = BackwardIn {
                    q: Rows { data: &q_thc[span.row * h * c + at..], stride: h * c },
                    out: Rows { data: &out_thc[span.row * h * c + at..], stride: h * c },
                    d_out: Rows { data: &dout_thc[span.row * h * c + at..], stride: h * c },
                    lse: &lse_th[span.row * h + g * r..],
                    len: t,
                };
                let kv = SeqKv { keys: layer.keys.get(), values: layer.values.get(), pages: &span.pages };
                let write_dq = |i: usize, row: &[f32]| dqkv[i * q + at..][..r * c].copy_from_slice(row);
                attend_backward(self.isa, heads, kv, g, &io, scratch, write_dq, &mut dk, &mut dv);
                for (i, row) in dqkv.chunks_exact_mut(q).enumerate() {
                    row[(h + g) * c..][..c].copy_from_slice(&dk[i * c..][..c]);
                    row[(h + g_count + g) * c..][..c].copy_from_slice(&dv[i * c..][..c]);
                }
            }
        });
        Ok(())
    }

    fn draw(
        &self,
        x_td: &CpuBuf,
        d: usize,
        head: Weight<'_, CpuBuf, CpuLinear>,
        draws: &[(usize, Draw, u32)],
        seed: u64,
    ) -> Result<Vec<Drawn>> {
        let v = head.layout.forward.n;
        let mut drawn = Vec::with_capacity(draws.len());
        for draws in draws.chunks(HEAD_ROWS) {
            let x: Vec<f32> = draws.iter().flat_map(|(row, ..)| &x_td[row * d..][..d]).copied().collect();
            let mut logits = self.scratch(draws.len() * v)?;
            matmul(self.isa, &x, &head.layout.forward, None, &mut logits, false, !self.serial);
            let one = |(logits, (_, how, position)): (&mut [f32], &(usize, Draw, u32))| {
                head::draw(self.isa, logits, how, *position, seed)
            };
            if self.serial {
                drawn.extend(logits.chunks_exact_mut(v).zip(draws).map(one));
            } else {
                drawn.par_extend(logits.par_chunks_exact_mut(v).zip(draws).map(one));
            }
        }
        Ok(drawn)
    }

    fn seats(&self, _: Heads, _: usize, _: usize, _: usize) -> Result<Option<NoSeats>> {
        Ok(None)
    }

    fn take_seats(&self, seats: &mut NoSeats, _: &[Seat<'_>], _: &[(usize, &[u32])]) -> Result<()> {
        match *seats {}
    }

    fn seat_rows(&self, seats: &NoSeats, _: usize) -> usize {
        match *seats {}
    }

    fn step_seats<'x>(
        &self,
        seats: &mut NoSeats,
        _: (usize, usize),
        _: WeightOf<'_, Self>,
        _: u64,
        _: impl FnOnce(&CpuBatch) -> Result<&'x CpuBuf>,
    ) -> Result<()> {
        match *seats {}
    }

    fn begin_seats(&self, seats: &mut NoSeats) -> Result<()> {
        match *seats {}
    }

    fn seats_drew(&self, seats: &mut NoSeats, _: usize) -> Result<(Vec<Drawn>, f64)> {
        match *seats {}
    }

    fn logits(&self, x_td: &CpuBuf, d: usize, head: Weight<'_, CpuBuf, CpuLinear>) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; x_td.len() / d * head.layout.forward.n];
        matmul(self.isa, x_td, &head.layout.forward, None, &mut logits, false, !self.serial);
        Ok(logits)
    }

    fn policy_head(
        &self,
        x_td: &CpuBuf,
        d: usize,
        head: Weight<'_, CpuBuf, CpuLinear>,
        targets: &[HeadTarget],
        mut grads: Option<(&mut CpuBuf, &mut CpuBuf)>,
    ) -> Result<Vec<HeadReport>> {
        let v = head.layout.forward.n;
        let mut reports = Vec::with_capacity(targets.len());
        let rows = (4 * HEAD_ROWS).max((1 << 20) / v / HEAD_ROWS * HEAD_ROWS);
        let mut logits = vec![0.0; rows.min(targets.len()) * v];
        let mut scratch = OuterScratch::default();
        if let Some((dx_td, _)) = &mut grads {
            dx_td.fill(0.0);
        }
        for targets in targets.chunks(rows) {
            let x: Vec<f32> = targets.iter().flat_map(|t| &x_td[t.row * d..][..d]).copied().collect();
            let logits = &mut logits[..targets.len() * v];
            matmul(self.isa, &x, &head.layout.forward, None, logits, false, true);
            let gradient = grads.is_some();
            reports.par_extend(
                logits.par_chunks_exact_mut(v).zip(targets).map(|(z, t)| head::policy(self.isa, z, t, gradient)),
            );
            if let Some((dx_td, dw_vd)) = &mut grads {
                let mut dx = vec![0.0; targets.len() * d];
                let packed = head.layout.backward.as_ref().expect("a trained head is laid out for its backward pass");
                matmul(self.isa, logits, packed, None, &mut dx, false, true);
                for (target, dx) in targets.iter().zip(dx.chunks_exact(d)) {
                    dx_td[target.row * d..][..d].copy_from_slice(dx);
                }
                outer(self.isa, logits, &x, v, d, dw_vd, &mut scratch);
            }
        }
        Ok(reports)
    }

    fn reports(&self, reports: Vec<HeadReport>) -> Result<Vec<HeadReport>> {
        Ok(reports)
    }

    fn moments(&self, len: usize, precision: MomentPrecision) -> Result<[CpuBuf; 2]> {
        match precision {
            MomentPrecision::F32 => Ok([self.zeros(len)?, self.zeros(len)?]),
            MomentPrecision::Bf16 => {
                Err(Error::config("the CPU keeps moments in f32").with_hint("set train.moments=f32, or use a GPU"))
            }
        }
    }

    fn read_moments(&self, moments: &[CpuBuf; 2], which: usize) -> Result<Vec<f32>> {
        Ok(moments[which].to_vec())
    }

    fn write_moments(&self, moments: &mut [CpuBuf; 2], values: [&[f32]; 2]) -> Result<()> {
        moments.iter_mut().zip(values).for_each(|(m, values)| m.copy_from_slice(values));
        Ok(())
    }

    fn clip(&self, grads: &[CpuBuf], max_norm: f32) -> Result<CpuClip> {
        let squares = |g: &CpuBuf| {
            let blocks: Vec<f64> = g.par_chunks(BLOCK).map(|b| rows::sum_of_squares(self.isa, b)).collect();
            blocks.iter().sum::<f64>()
        };
        let norm = self.scope(|| grads.iter().map(squares).sum::<f64>()).sqrt();
        let max = f64::from(max_norm);
        let scale = if max > 0.0 && norm > max { (max / (norm + 1e-6)) as f32 } else { 1.0 };
        Ok(CpuClip { norm, scale })
    }

    fn norm(&self, clip: &CpuClip) -> Result<f64> {
        Ok(clip.norm)
    }

    fn adamw(
        &self,
        p: &mut CpuBuf,
        g: &mut CpuBuf,
        moments: &mut [CpuBuf; 2],
        clip: &CpuClip,
        hyper: &AdamW,
    ) -> Result<()> {
        let [m, v] = moments;
        if clip.norm.is_finite() {
            p.par_chunks_mut(BLOCK)
                .zip(g.par_chunks(BLOCK))
                .zip(m.par_chunks_mut(BLOCK))
                .zip(v.par_chunks_mut(BLOCK))
                .for_each(|(((p, g), m), v)| rows::adamw(self.isa, p, g, m, v, clip.scale, hyper));
        }
        self.clear(g)
    }
}
