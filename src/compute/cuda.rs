//! An NVIDIA GPU behind [`Backend`]: activations and weights in bf16, sums in f32, one stream. What a kernel computes and
//! how it is launched stands in `launch/`; here is what each operation allocates, uploads and launches.
//!
//! Nothing waits for the GPU but what gives values to the host: draws, reports, norms, downloads.

use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use crate::compute::cuda_batch::{CudaBatch, CudaSeats, Decode, Given, locked};
use crate::compute::launch::attention::{
    self, Angles as LaunchAngles, DecodePlan, DecodeSeq, HeadNorms, RopePlan, Saved, SpanPlan,
};
use crate::compute::launch::device::{Buf, Device};
use crate::compute::launch::graph::Pinned;
use crate::compute::launch::head::{
    DrawnRow, HeadInput, HeadRow, HeadScratch, PolicyReport, PolicyRow, draw_kept, head_draw, head_forward,
    head_gradient, head_logits, head_policy,
};
use crate::compute::launch::optim::{
    ClipState, Parameter, Rounding, adamw_bf16, adamw_f32, clip_factor, join_master, norm_blocks, norm_partials,
    split_master,
};
use crate::compute::launch::seats::padded_rows;
use crate::compute::launch::{gemm, rows};
use crate::compute::ops::{
    AdamW, Angles, Backend, Draw, Drawn, HeadReport, HeadTarget, Heads, LayerKv, MomentPrecision, Norms, Seat, Span,
    Weight,
};
use crate::error::{Error, Result};
use crate::weights::safetensors::Sink;

/// Most elements of the gradient of a chunk of the logits: 512 MiB.
const MAX_CHUNK: usize = 1 << 28;
/// Sequences that decode at once: what streaming the weights leaves room for at little cost.
pub const NUM_RUNNING: usize = 256;
/// Columns of a chunk come in multiples of the head's tiles.
const CHUNK_UNIT: usize = 128;

/// A GPU.
#[derive(Clone)]
pub struct CudaBackend {
    device: Device,
    graphs: bool,
    blocks: Arc<Mutex<Blocks>>,
}

/// Elements of a block that weights are uploaded by: as many as files hand over at a time.
const BLOCK: usize = 1 << 20;

/// Page-locked memory that weights go through: one block is filled while the other is copied.
#[derive(Default)]
struct Blocks {
    both: Vec<(Pinned<bf16>, Pinned<u16>)>,
    next: usize,
}

impl Blocks {
    fn take(&mut self, device: &Device) -> Result<&mut (Pinned<bf16>, Pinned<u16>)> {
        while self.both.len() < 2 {
            self.both.push((Pinned::new(device, BLOCK)?, Pinned::new(device, BLOCK)?));
        }
        self.next = 1 - self.next;
        Ok(&mut self.both[self.next])
    }
}

/// A weight: what products read, and the rest of its f32 master.
pub struct CudaParam {
    weight: Buf<bf16>,
    tail: Buf<u16>,
}

/// Both moments of a parameter.
pub enum CudaMoments {
    /// In 8 bytes.
    F32([Buf<f32>; 2]),
    /// In 4 bytes.
    Bf16([Buf<bf16>; 2]),
}

/// Rows and columns of a weight; kernels take it as it lies.
pub struct CudaLinear {
    n: usize,
    k: usize,
}

/// Keys and values of all layers.
pub struct CudaKv {
    /// Keys of the first layer, its values, keys of the second, ...
    arrays: Mutex<Buf<bf16>>,
    array_len: usize,
    page_len: usize,
}

impl CudaKv {
    /// Where a layer's keys begin, and its values.
    fn starts(&self, layer: usize) -> [usize; 2] {
        [2 * layer, 2 * layer + 1].map(|i| i * self.array_len)
    }
}

/// Reports on the device.
pub struct CudaReports(Buf<PolicyReport>);

impl CudaBackend {
    /// The first GPU, with this build's kernels.
    ///
    /// # Errors
    /// When there is no usable driver or device, or no kernels for it.
    pub fn open() -> Result<Self> {
        Ok(Self::on(Device::open(0)?))
    }

    /// A GPU that was opened already.
    pub fn on(device: Device) -> Self {
        CudaBackend { device, graphs: true, blocks: Arc::default() }
    }

    /// The same GPU, launching every kernel of a step by itself: what graphs are compared with.
    #[must_use]
    pub fn without_graphs(self) -> Self {
        CudaBackend { graphs: false, ..self }
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn upload_bf16(&self, values: impl Iterator<Item = f32>) -> Result<Buf<bf16>> {
        self.device.upload(&values.map(bf16::from_f32).collect::<Vec<bf16>>())
    }

    /// Rows of `from` by their numbers.
    fn gather(&self, from: &Buf<bf16>, d: usize, numbers: &[u32]) -> Result<Buf<bf16>> {
        let (numbers, mut to) = (self.device.upload(numbers)?, self.device.alloc(numbers.len() * d)?);
        rows::embed_forward(&self.device, &numbers.view(), &from.view(), d, &mut to.view_mut())?;
        Ok(to)
    }

    fn logits_of(
        &self,
        x_td: &Buf<bf16>,
        d: usize,
        head: Weight<'_, CudaParam, CudaLinear>,
        rows: &[HeadRow],
    ) -> Result<Vec<f32>> {
        let rows = self.device.upload(rows)?;
        let input = HeadInput { x_td: x_td.view(), rows: rows.view(), w_vd: head.param.weight.view(), d };
        let mut logits = self.device.alloc(rows.len() * head.layout.n)?;
        head_logits(&self.device, &input, &mut logits.view_mut())?;
        self.device.download(&logits.view())
    }
}

/// Norms as the launchers take them.
fn head_norms<'a>(norms: Norms<'a, CudaParam>) -> HeadNorms<'a> {
    norms.map(|(q, k, eps)| (q.weight.view(), k.weight.view(), eps))
}

fn launch_angles<'a>(angles: &'a Angles<Buf<f32>>, batch: &'a CudaBatch) -> LaunchAngles<'a> {
    LaunchAngles { cos: angles.cos.view(), sin: angles.sin.view(), positions: batch.positions() }
}

impl Backend for CudaBackend {
    type Buf = Buf<f32>;
    type Act = Buf<bf16>;
    type Param = CudaParam;
    type Moments = CudaMoments;
    type Linear = CudaLinear;
    type Kv = CudaKv;
    type Batch = CudaBatch;
    type Reports = CudaReports;
    type Clip = Buf<ClipState>;
    type Seats = CudaSeats;

    /// A product of so many rows keeps a GPU busy.
    const MAX_ROWS: usize = 4096;

    fn describe(&self) -> String {
        let (major, minor) = self.device.capability();
        format!("{} (compute capability {major}.{minor})", self.device.name())
    }

    fn num_running(&self) -> usize {
        NUM_RUNNING
    }

    fn check(&self, heads: Heads, widths: &[usize]) -> Result<()> {
        let no = |what: String| {
            Err(Error::config(format!("the GPU kernels do not have {what}")).with_hint("use --device cpu"))
        };
        if !attention::has_heads(heads) {
            return no(format!(
                "{} query and {} key/value heads of width {}",
                heads.num_heads, heads.num_kv_heads, heads.head_dim
            ));
        }
        match widths.iter().find(|w| !w.is_multiple_of(8)) {
            Some(width) => no(format!("rows of {width}, which is no multiple of 8")),
            None if widths[0] > rows::MAX_NORM_WIDTH => no(format!("models wider than {}", rows::MAX_NORM_WIDTH)),
            None => Ok(()),
        }
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        f()
    }

    fn lanes(&self, _: usize) -> usize {
        1
    }

    fn split<T: Sync, R: Send>(&self, parts: &[T], f: impl Fn(&Self, &T) -> R + Sync + Send) -> Vec<R> {
        parts.iter().map(|part| f(self, part)).collect()
    }

    fn finish(&self) -> Result<()> {
        self.device.synchronize()
    }

    fn zeros(&self, len: usize) -> Result<Buf<f32>> {
        self.device.zeros(len)
    }

    fn scratch(&self, len: usize) -> Result<Buf<f32>> {
        self.device.alloc(len)
    }

    fn write(&self, buf: &mut Buf<f32>, values: &[f32]) -> Result<()> {
        self.device.write(&mut buf.view_mut(), values)
    }

    fn download(&self, buf: &Buf<f32>) -> Result<Vec<f32>> {
        self.device.download(&buf.view())
    }

    fn clear(&self, buf: &mut Buf<f32>) -> Result<()> {
        self.device.clear(&mut buf.view_mut())
    }

    fn act(&self, len: usize) -> Result<Buf<bf16>> {
        self.device.alloc(len)
    }

    fn upload(&self, values: &[f32]) -> Result<Buf<bf16>> {
        self.upload_bf16(values.iter().copied())
    }

    fn values(&self, act: &Buf<bf16>) -> Result<Vec<f32>> {
        Ok(self.device.download(&act.view())?.into_iter().map(bf16::to_f32).collect())
    }

    fn clear_act(&self, act: &mut Buf<bf16>) -> Result<()> {
        self.device.clear(&mut act.view_mut())
    }

    fn copy(&self, y: &mut Buf<bf16>, x: &Buf<bf16>) -> Result<()> {
        self.device.copy(&x.view(), &mut y.view_mut())
    }

    fn param_from(&self, len: usize, source: impl FnOnce(Sink<'_>) -> Result<()>) -> Result<CudaParam> {
        let (mut weight, mut tail) = (self.device.alloc(len)?, self.device.alloc(len)?);
        let (mut blocks, mut from) = (locked(&self.blocks), 0);
        source(&mut |values| {
            for piece in values.chunks(BLOCK) {
                let (weights, tails) = blocks.take(&self.device)?;
                let parts = || piece.iter().copied().map(split_master);
                weights.send(&mut weight.view_mut().part(from, piece.len()), |to| {
                    to.iter_mut().zip(parts()).for_each(|(to, (w, _))| *to = w);
                })?;
                tails.send(&mut tail.view_mut().part(from, piece.len()), |to| {
                    to.iter_mut().zip(parts()).for_each(|(to, (_, t))| *to = t);
                })?;
                from += piece.len();
            }
            Ok(())
        })?;
        assert_eq!(from, len, "values of a weight");
        Ok(CudaParam { weight, tail })
    }

    fn master(&self, param: &CudaParam) -> Result<Vec<f32>> {
        let (weight, tail) = (self.device.download(&param.weight.view())?, self.device.download(&param.tail.view())?);
        Ok(weight.into_iter().zip(tail).map(|(w, t)| join_master(w, t)).collect())
    }

    fn linear(&self, w_nk: &CudaParam, n: usize, k: usize, _: bool) -> Result<CudaLinear> {
        assert_eq!(w_nk.weight.len(), n * k, "a weight of {n} x {k}");
        Ok(CudaLinear { n, k })
    }

    fn relayout(&self, _: &mut CudaLinear, _: &CudaParam) -> Result<()> {
        Ok(())
    }

    fn matmul(
        &self,
        x_tk: &Buf<bf16>,
        w: Weight<'_, CudaParam, CudaLinear>,
        bias: Option<&CudaParam>,
        y_tn: &mut Buf<bf16>,
        add: bool,
    ) -> Result<()> {
        let (weight, bias) = (w.param.weight.view(), bias.map(|b| b.weight.view()));
        gemm::forward(&self.device, &x_tk.view(), &weight, w.layout.k, bias.as_ref(), &mut y_tn.view_mut(), add)
    }

    fn gated(
        &self,
        x_tk: &Buf<bf16>,
        w: Weight<'_, CudaParam, CudaLinear>,
        f: usize,
        gate_up: Option<&mut Buf<bf16>>,
        h_tf: &mut Buf<bf16>,
    ) -> Result<()> {
        assert_eq!(w.layout.n, 2 * f, "a weight of gates and ups");
        let mut gate_up = gate_up.map(Buf::view_mut);
        let (x, weight) = (x_tk.view(), w.param.weight.view());
        gemm::swiglu(&self.device, &x, &weight, w.layout.k, gate_up.as_mut(), &mut h_tf.view_mut())
    }

    fn swiglu_backward(
        &self,
        gate_up: &Buf<bf16>,
        dh_tf: &Buf<bf16>,
        f: usize,
        dgate_up: &mut Buf<bf16>,
    ) -> Result<()> {
        rows::swiglu_backward(&self.device, &gate_up.view(), &dh_tf.view(), f, &mut dgate_up.view_mut())
    }

    fn matmul_backward_input(
        &self,
        dy_tn: &Buf<bf16>,
        w: Weight<'_, CudaParam, CudaLinear>,
        dx_tk: &mut Buf<bf16>,
        add: bool,
    ) -> Result<()> {
        let (dy, weight) = (dy_tn.view(), w.param.weight.view());
        gemm::input_gradient(&self.device, &dy, &weight, w.layout.n, &mut dx_tk.view_mut(), add)
    }

    fn matmul_backward_weight(
        &self,
        dy_tn: &Buf<bf16>,
        x_tk: &Buf<bf16>,
        n: usize,
        k: usize,
        dw_nk: &mut Buf<f32>,
    ) -> Result<()> {
        gemm::weight_gradient(&self.device, &dy_tn.view(), &x_tk.view(), (n, k), &mut dw_nk.view_mut())
    }

    fn bias_backward(&self, dy_tn: &Buf<bf16>, n: usize, db_n: &mut Buf<f32>) -> Result<()> {
        let mut partial = self.device.alloc(rows::column_sums_scratch(dy_tn.len() / n, n))?;
        rows::column_sums(&self.device, &dy_tn.view(), n, &mut partial.view_mut())?;
        rows::add_partials(&self.device, &partial.view(), &mut db_n.view_mut())
    }

    fn batch(&self, heads: Heads, tokens: &[u32], spans: &[Span<'_>]) -> Result<CudaBatch> {
        // A row after others of its sequence decodes; where a sequence begins, its rows are a span, however few.
        let count = spans.iter().take_while(|s| s.len == 1 && s.pos > 0).count();
        let (decoding, others) = spans.split_at(count);
        let rope = RopePlan::new(tokens.len(), spans);
        let decode = if decoding.is_empty() {
            None
        } else {
            let sequences: Vec<DecodeSeq<'_>> =
                decoding.iter().map(|s| DecodeSeq { len: s.pos + 1, pages: s.pages }).collect();
            let plan = DecodePlan::new(heads, &sequences, true);
            let (outputs, sums) = plan.scratch(heads);
            let parts = Mutex::new((self.device.alloc(outputs)?, self.device.alloc(sums)?));
            Some(Decode { packed: self.device.upload(&plan.packed())?, plan, parts })
        };
        let spans = if others.is_empty() {
            None
        } else {
            let plan = SpanPlan::new(heads, others);
            Some((self.device.upload(&plan.packed())?, plan)).map(|(packed, plan)| (plan, packed))
        };
        Ok(CudaBatch::Given(Box::new(Given {
            tokens: tokens.to_vec(),
            token_ids: self.device.upload(tokens)?,
            positions: self.device.upload(&rope.positions)?,
            slots: self.device.upload(&rope.slots)?,
            decode,
            spans,
        })))
    }

    fn embed(&self, batch: &CudaBatch, table_vd: &CudaParam, d: usize, x_td: &mut Buf<bf16>) -> Result<()> {
        rows::embed_forward(&self.device, &batch.token_ids(), &table_vd.weight.view(), d, &mut x_td.view_mut())
    }

    fn embed_backward(&self, batch: &CudaBatch, dx_td: &Buf<bf16>, d: usize, dtable_vd: &mut Buf<f32>) -> Result<()> {
        let plan = rows::EmbedPlan::new(&batch.given().tokens);
        let packed = self.device.upload(&plan.packed())?;
        let dx = dx_td.view();
        rows::embed_backward(&self.device, &packed.view(), plan.ids.len(), &dx, d, &mut dtable_vd.view_mut())
    }

    fn rmsnorm(
        &self,
        x_td: &Buf<bf16>,
        w_d: &CudaParam,
        eps: f32,
        y_td: &mut Buf<bf16>,
        rstd_t: &mut Buf<f32>,
    ) -> Result<()> {
        let (x, w) = (x_td.view(), w_d.weight.view());
        rows::rmsnorm_forward(&self.device, &x, &w, eps, &mut y_td.view_mut(), &mut rstd_t.view_mut())
    }

    fn rmsnorm_backward(
        &self,
        x_td: &Buf<bf16>,
        w_d: &CudaParam,
        rstd_t: &Buf<f32>,
        dy_td: &Buf<bf16>,
        dx_td: &mut Buf<bf16>,
        dw_d: &mut Buf<f32>,
    ) -> Result<()> {
        let mut partial = self.device.alloc(rows::rmsnorm_scratch(rstd_t.len(), w_d.weight.len()))?;
        let saved = (&x_td.view(), &w_d.weight.view(), &rstd_t.view());
        rows::rmsnorm_backward(&self.device, saved, &dy_td.view(), &mut dx_td.view_mut(), &mut partial.view_mut())?;
        rows::add_partials(&self.device, &partial.view(), &mut dw_d.view_mut())
    }

    fn rope(
        &self,
        heads: Heads,
        qkv_tq: &Buf<bf16>,
        batch: &CudaBatch,
        angles: &Angles<Buf<f32>>,
        norms: Norms<'_, CudaParam>,
        kv: LayerKv<'_, CudaKv>,
        q_thc: &mut Buf<bf16>,
    ) -> Result<()> {
        let (angles, slots) = (launch_angles(angles, batch), batch.slots());
        let mut arrays = locked(&kv.kv.arrays);
        let [start, middle] = kv.kv.starts(kv.layer);
        let (_, rest) = arrays.view_mut().split(start);
        let (mut keys, mut rest) = rest.split(middle - start);
        let mut values = rest.part(0, kv.kv.array_len);
        let (qkv, norms, mut q) = (qkv_tq.view(), head_norms(norms), q_thc.view_mut());
        attention::rope_forward(&self.device, heads, &qkv, angles, &slots, norms, &mut q, (&mut keys, &mut values))
    }

    fn rope_backward(
        &self,
        heads: Heads,
        dqkv_tq: &mut Buf<bf16>,
        raw_tq: Option<&Buf<bf16>>,
        batch: &CudaBatch,
        angles: &Angles<Buf<f32>>,
        norms: Norms<'_, CudaParam>,
        dnorms: Option<(&mut Buf<f32>, &mut Buf<f32>)>,
    ) -> Result<()> {
        let nothing = self.device.alloc::<bf16>(0)?;
        let raw = raw_tq.unwrap_or(&nothing).view();
        let len = if norms.is_some() { attention::rope_scratch(batch.positions().len(), heads) } else { 0 };
        let mut partial = self.device.alloc::<f32>(len)?;
        let (angles, norms, mut sums) = (launch_angles(angles, batch), head_norms(norms), partial.view_mut());
        attention::rope_backward(&self.device, heads, &mut dqkv_tq.view_mut(), &raw, angles, norms, &mut sums)?;
        if let Some((dq, dk)) = dnorms {
            rows::add_partials(&self.device, &partial.view().part(0, len / 2), &mut dq.view_mut())?;
            rows::add_partials(&self.device, &partial.view().part(len / 2, len / 2), &mut dk.view_mut())?;
        }
        Ok(())
    }

    fn new_kv(&self, heads: Heads, num_layers: usize, num_pages: usize) -> Result<CudaKv> {
        let (page_len, array_len) = (heads.page_len(), heads.page_len().saturating_mul(num_pages));
        let arrays = self.device.alloc(array_len.saturating_mul(2 * num_layers))?;
        Ok(CudaKv { arrays: Mutex::new(arrays), array_len, page_len })
    }

    fn copy_pages(&self, kv: &mut CudaKv, copies: &[(u32, u32)]) -> Result<()> {
        let arrays = kv.arrays.get_mut().unwrap_or_else(PoisonError::into_inner);
        attention::copy_pages(&self.device, &mut arrays.view_mut(), kv.array_len, kv.page_len, copies)
    }

    fn attention(
        &self,
        heads: Heads,
        kv: LayerKv<'_, CudaKv>,
        q_thc: &Buf<bf16>,
        batch: &CudaBatch,
        out_thc: &mut Buf<bf16>,
        lse_th: &mut Buf<f32>,
    ) -> Result<()> {
        let arrays = locked(&kv.kv.arrays);
        let [keys, values] = kv.kv.starts(kv.layer).map(|start| arrays.view().part(start, kv.kv.array_len));
        let (layer, device) = ((&keys, &values), &self.device);
        if let Some((work, parts)) = batch.decode() {
            let (count, hc) = (work.sequences.len() / 2, heads.num_heads * heads.head_dim);
            let (work, q) = (&work, q_thc.view().part(0, count * hc));
            let mut parts = locked(parts);
            let (outputs, sums) = &mut *parts;
            let (mut o, mut ml) = (outputs.view_mut(), sums.view_mut());
            attention::attention_decode(device, heads, work, &q, layer, (&mut o, &mut ml))?;
            attention::attention_shared(device, heads, work, &q, layer, (&mut o, &mut ml))?;
            let (mut out, mut lse) = (out_thc.view_mut(), lse_th.view_mut());
            let (mut out, mut lse) = (out.part(0, count * hc), lse.part(0, count * heads.num_heads));
            attention::attention_merge(device, heads, work, (&o.as_view(), &ml.as_view()), &mut out, &mut lse)?;
        }
        if let Some((plan, packed)) = batch.spans() {
            let (work, q) = ((plan, &packed), q_thc.view());
            attention::attention_forward(
                device,
                heads,
                work,
                &q,
                layer,
                &mut out_thc.view_mut(),
                &mut lse_th.view_mut(),
            )?;
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        heads: Heads,
        kv: LayerKv<'_, CudaKv>,
        q_thc: &Buf<bf16>,
        out_thc: &Buf<bf16>,
        lse_th: &Buf<f32>,
        dout_thc: &Buf<bf16>,
        batch: &CudaBatch,
        dqkv_tq: &mut Buf<bf16>,
    ) -> Result<()> {
        assert!(batch.decode().is_none(), "the backward pass takes whole sequences");
        let Some((plan, packed)) = batch.spans() else { return Ok(()) };
        let arrays = locked(&kv.kv.arrays);
        let [keys, values] = kv.kv.starts(kv.layer).map(|start| arrays.view().part(start, kv.kv.array_len));
        let (layer, device, work) = ((&keys, &values), &self.device, (plan, &packed));
        let mut delta = device.alloc(lse_th.len())?;
        let dout_thc = dout_thc.view();
        attention::attention_delta(device, heads, &out_thc.view(), &dout_thc, &mut delta.view_mut())?;
        let saved = Saved { q_thc: q_thc.view(), dout_thc, lse_th: lse_th.view(), delta_th: delta.view() };
        let mut dqkv = dqkv_tq.view_mut();
        attention::attention_backward_q(device, heads, work, saved, layer, &mut dqkv)?;
        attention::attention_backward_kv(device, heads, work, saved, layer, &mut dqkv)
    }

    fn draw(
        &self,
        x_td: &Buf<bf16>,
        d: usize,
        head: Weight<'_, CudaParam, CudaLinear>,
        draws: &[(usize, Draw, u32)],
        seed: u64,
    ) -> Result<Vec<Drawn>> {
        let rows: Vec<HeadRow> = draws.iter().map(|(row, how, at)| HeadRow::draw(*row as u32, how, *at)).collect();
        let (device, rows) = (&self.device, self.device.upload(&rows)?);
        let input = HeadInput { x_td: x_td.view(), rows: rows.view(), w_vd: head.param.weight.view(), d };
        let mut scratch = HeadScratch::new(device, rows.len(), head.layout.n, true)?;
        head_forward(device, &input, seed, &mut scratch)?;
        let mut drawn = device.alloc::<DrawnRow>(rows.len())?;
        head_draw(device, &scratch, &mut drawn.view_mut())?;
        if draws.iter().any(|(_, how, _)| !how.is_full()) {
            scratch.hold_logits(device)?;
            draw_kept(device, &input, seed, &mut scratch, &mut drawn.view_mut())?;
        }
        Ok(device.download(&drawn.view())?.into_iter().map(Drawn::from).collect())
    }

    fn seats(&self, heads: Heads, v: usize, capacity: usize, max_tokens: usize) -> Result<Option<CudaSeats>> {
        CudaSeats::new(&self.device, heads, v, capacity, max_tokens).map(Some)
    }

    fn take_seats(&self, seats: &mut CudaSeats, new: &[Seat<'_>], prefixes: &[(usize, &[u32])]) -> Result<()> {
        seats.take(&self.device, new, prefixes)
    }

    fn seat_rows(&self, _: &CudaSeats, count: usize) -> usize {
        padded_rows(count)
    }

    fn step_seats<'x>(
        &self,
        seats: &mut CudaSeats,
        extent: (usize, usize),
        head: Weight<'_, CudaParam, CudaLinear>,
        seed: u64,
        hidden: impl FnOnce(&CudaBatch) -> Result<&'x Buf<bf16>>,
    ) -> Result<()> {
        let (device, w_vd, d) = (&self.device, head.param.weight.view(), head.layout.k);
        seats.step(device, self.graphs, seed, extent, |batch, rows, scratch, drawn| {
            let x_td = hidden(batch)?.view();
            let input = HeadInput { x_td, rows, w_vd, d };
            head_forward(device, &input, seed, scratch)?;
            head_draw(device, scratch, drawn)?;
            if batch.keeps() { draw_kept(device, &input, seed, scratch, drawn) } else { Ok(()) }
        })
    }

    fn begin_seats(&self, seats: &mut CudaSeats) -> Result<()> {
        seats.begin(&self.device)
    }

    fn seats_drew(&self, seats: &mut CudaSeats, count: usize) -> Result<(Vec<Drawn>, f64)> {
        seats.drew(count)
    }

    fn logits(&self, x_td: &Buf<bf16>, d: usize, head: Weight<'_, CudaParam, CudaLinear>) -> Result<Vec<f32>> {
        let rows: Vec<HeadRow> = (0..x_td.len() / d).map(|row| HeadRow::logits(row as u32)).collect();
        self.logits_of(x_td, d, head, &rows)
    }

    fn policy_head(
        &self,
        x_td: &Buf<bf16>,
        d: usize,
        head: Weight<'_, CudaParam, CudaLinear>,
        targets: &[HeadTarget],
        grads: Option<(&mut Buf<bf16>, &mut Buf<f32>)>,
    ) -> Result<CudaReports> {
        let (device, v, t) = (&self.device, head.layout.n, targets.len());
        let rows = device.upload(&targets.iter().map(HeadRow::target).collect::<Vec<_>>())?;
        let policy = device.upload(&targets.iter().map(PolicyRow::new).collect::<Vec<_>>())?;
        let input = HeadInput { x_td: x_td.view(), rows: rows.view(), w_vd: head.param.weight.view(), d };
        let mut scratch = HeadScratch::new(device, t, v, false)?;
        head_forward(device, &input, 0, &mut scratch)?;
        let (mut reports, mut slopes) = (device.alloc(t)?, device.alloc(t)?);
        head_policy(device, &scratch, &policy.view(), &mut reports.view_mut(), &mut slopes.view_mut())?;
        drop(scratch);
        let Some((dx_td, dw_vd)) = grads else { return Ok(CudaReports(reports)) };
        // The targets' own rows, and after their gradients a row of zeros for all the others.
        let numbers: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let x = self.gather(x_td, d, &numbers)?;
        let mut dx = device.zeros::<bf16>((t + 1) * d)?;
        let width = (MAX_CHUNK / t.max(1) / CHUNK_UNIT * CHUNK_UNIT).max(CHUNK_UNIT).min(v);
        for token0 in (0..v).step_by(width) {
            let count = width.min(v - token0);
            let mut dz = device.alloc(t * count)?;
            head_gradient(device, &input, &slopes.view(), (token0, count), &mut dz.view_mut())?;
            let (dz, w) = (dz.view(), head.param.weight.view().part(token0 * d, count * d));
            gemm::input_gradient(device, &dz, &w, count, &mut dx.view_mut().part(0, t * d), token0 > 0)?;
            let (x, mut dw) = (x.view(), dw_vd.view_mut());
            gemm::weight_gradient(device, &dz, &x, (count, d), &mut dw.part(token0 * d, count * d))?;
        }
        let mut numbers = vec![t as u32; x_td.len() / d];
        for (i, target) in targets.iter().enumerate() {
            assert_eq!(numbers[target.row], t as u32, "no two targets name one row");
            numbers[target.row] = i as u32;
        }
        let numbers = device.upload(&numbers)?;
        rows::embed_forward(device, &numbers.view(), &dx.view(), d, &mut dx_td.view_mut())?;
        Ok(CudaReports(reports))
    }

    fn reports(&self, reports: CudaReports) -> Result<Vec<HeadReport>> {
        Ok(self.device.download(&reports.0.view())?.into_iter().map(HeadReport::from).collect())
    }

    fn moments(&self, len: usize, precision: MomentPrecision) -> Result<CudaMoments> {
        Ok(match precision {
            MomentPrecision::F32 => CudaMoments::F32([self.device.zeros(len)?, self.device.zeros(len)?]),
            MomentPrecision::Bf16 => CudaMoments::Bf16([self.device.zeros(len)?, self.device.zeros(len)?]),
        })
    }

    fn read_moments(&self, moments: &CudaMoments, which: usize) -> Result<Vec<f32>> {
        match moments {
            CudaMoments::F32(moments) => self.download(&moments[which]),
            CudaMoments::Bf16(moments) => self.values(&moments[which]),
        }
    }

    fn write_moments(&self, moments: &mut CudaMoments, values: [&[f32]; 2]) -> Result<()> {
        match moments {
            CudaMoments::F32(moments) => moments.iter_mut().zip(values).try_for_each(|(m, v)| self.write(m, v)),
            CudaMoments::Bf16(moments) => moments.iter_mut().zip(values).try_for_each(|(m, v)| {
                let values: Vec<bf16> = v.iter().copied().map(bf16::from_f32).collect();
                self.device.write(&mut m.view_mut(), &values)
            }),
        }
    }

    fn clip(&self, grads: &[Buf<f32>], max_norm: f32) -> Result<Buf<ClipState>> {
        let counts = grads.iter().map(|g| norm_blocks(g.len()));
        let mut partial = self.device.alloc::<f64>(counts.clone().sum())?;
        let mut from = 0;
        for (g, count) in grads.iter().zip(counts) {
            norm_partials(&self.device, &g.view(), &mut partial.view_mut().part(from, count))?;
            from += count;
        }
        let mut clip = self.device.alloc(1)?;
        clip_factor(&self.device, &partial.view(), max_norm, &mut clip.view_mut())?;
        Ok(clip)
    }

    fn norm(&self, clip: &Buf<ClipState>) -> Result<f64> {
        Ok(self.device.download(&clip.view())?[0].norm)
    }

    fn adamw(
        &self,
        p: &mut CudaParam,
        g: &mut Buf<f32>,
        moments: &mut CudaMoments,
        clip: &Buf<ClipState>,
        hyper: &AdamW,
    ) -> Result<()> {
        let mut parameter = Parameter { weight: p.weight.view_mut(), tail: p.tail.view_mut(), grad: g.view_mut() };
        let clip = clip.view();
        match moments {
            CudaMoments::F32([m, v]) => {
                let moments = (&mut m.view_mut(), &mut v.view_mut());
                adamw_f32(&self.device, &mut parameter, moments, &clip, hyper)
            }
            CudaMoments::Bf16([m, v]) => {
                let moments = (&mut m.view_mut(), &mut v.view_mut());
                let rounding = Rounding { seed: hyper.seed, parameter: hyper.parameter };
                adamw_bf16(&self.device, &mut parameter, moments, &clip, hyper, rounding)
            }
        }
    }
}
