//! The backward twin of `model::forward`: one packed micro-batch forward, the loss, and all gradients.

use crate::compute::ops::{Backend, HeadTarget, LayerKv, PAGE, Span};
use crate::error::Result;
use crate::model::forward::{Decoder, LayerActs, SeqRows};
use crate::train::loss::TrainSeq;

/// Forward and backward of one micro-batch; gradients are added to `grads` (in the table's order). Returns the reports of
/// all targets, sequence after sequence, which may still be on their way. With `recompute` only each layer's input is
/// kept, and its forward pass runs again, to the same bits.
///
/// # Errors
/// When a sequence does not fit the model, or its activations do not fit the memory.
pub fn micro_batch<B: Backend>(
    decoder: &Decoder<B>,
    seqs: &[TrainSeq],
    grads: &mut [B::Buf],
    recompute: bool,
) -> Result<B::Reports> {
    let mut pages: Vec<Vec<u32>> = Vec::with_capacity(seqs.len());
    let mut num_pages = 0u32;
    for seq in seqs {
        let count = seq.tokens.len().div_ceil(PAGE) as u32;
        pages.push((num_pages..num_pages + count).collect());
        num_pages += count;
    }
    let kv = decoder.new_kv(num_pages as usize)?;
    let (mut spans, mut targets, mut row) = (Vec::new(), Vec::new(), 0);
    for (seq, pages) in seqs.iter().zip(&pages) {
        decoder.check(&SeqRows { tokens: &seq.tokens, pos0: 0, pages, draw: None })?;
        spans.push(Span { row, len: seq.tokens.len(), pos: 0, pages });
        targets.extend(seq.targets.iter().map(|t| HeadTarget {
            row: row + t.at - 1,
            token: seq.tokens[t.at],
            inv_temperature: seq.inv_temperature,
            kind: t.loss,
            entropy_coef: t.entropy_coef,
        }));
        row += seq.tokens.len();
    }
    let tokens: Vec<u32> = seqs.iter().flat_map(|s| &s.tokens).copied().collect();
    let b = decoder.backend();
    b.scope(|| {
        let batch = b.batch(decoder.heads(), &tokens, &spans)?;
        Pass { decoder, kv: &kv, batch: &batch, t: tokens.len(), recompute }.run(&targets, grads)
    })
}

struct Pass<'a, B: Backend> {
    decoder: &'a Decoder<B>,
    kv: &'a B::Kv,
    batch: &'a B::Batch,
    t: usize,
    recompute: bool,
}

impl<B: Backend> Pass<'_, B> {
    fn run(&self, targets: &[HeadTarget], grads: &mut [B::Buf]) -> Result<B::Reports> {
        let (decoder, b, t) = (self.decoder, self.decoder.backend(), self.t);
        let (table, d) = (decoder.table(), decoder.spec().hidden_size);
        let mut x = b.act(t * d)?;
        b.embed(self.batch, &decoder.params[table.embed], d, &mut x)?;
        let mut kept: Vec<(B::Act, Option<LayerActs<B>>)> = Vec::with_capacity(table.layers.len());
        for l in 0..table.layers.len() {
            let mut input = b.act(t * d)?;
            b.copy(&mut input, &x)?;
            let mut acts = decoder.layer_acts(b, t, true)?;
            decoder.layer_forward(b, l, &mut x, &mut acts, self.kv, self.batch, t)?;
            kept.push((input, (!self.recompute).then_some(acts)));
        }
        let (mut hidden, mut rstd) = (b.act(t * d)?, b.scratch(t)?);
        let norm = &decoder.params[table.norm];
        b.rmsnorm(&x, norm, decoder.spec().rms_norm_eps as f32, &mut hidden, &mut rstd)?;
        let mut d_hidden = b.act(t * d)?;
        let head_grads = Some((&mut d_hidden, &mut grads[table.head]));
        let reports = b.policy_head(&hidden, d, decoder.head(), targets, head_grads)?;
        let mut dx = b.act(t * d)?;
        b.clear_act(&mut dx)?;
        b.rmsnorm_backward(&x, norm, &rstd, &d_hidden, &mut dx, &mut grads[table.norm])?;
        for (l, (input, acts)) in kept.into_iter().enumerate().rev() {
            let acts = match acts {
                Some(acts) => acts,
                None => self.again(l, &input)?,
            };
            self.layer(l, &input, &acts, &mut dx, grads)?;
        }
        b.embed_backward(self.batch, &dx, d, &mut grads[table.embed])?;
        Ok(reports)
    }

    /// Activations of layer `l`, computed once more.
    fn again(&self, l: usize, input: &B::Act) -> Result<LayerActs<B>> {
        let b = self.decoder.backend();
        let mut x = b.act(self.t * self.decoder.spec().hidden_size)?;
        b.copy(&mut x, input)?;
        let mut acts = self.decoder.layer_acts(b, self.t, true)?;
        self.decoder.layer_forward(b, l, &mut x, &mut acts, self.kv, self.batch, self.t)?;
        Ok(acts)
    }

    /// Turns the gradient of layer `l`'s output stream into that of its input stream, in place.
    fn layer(
        &self,
        l: usize,
        input: &B::Act,
        acts: &LayerActs<B>,
        dx: &mut B::Act,
        grads: &mut [B::Buf],
    ) -> Result<()> {
        let (decoder, b, t) = (self.decoder, self.decoder.backend(), self.t);
        let (spec, heads, index) = (decoder.spec(), decoder.heads(), &decoder.table().layers[l]);
        let (params, kv) = (&decoder.params, LayerKv { kv: self.kv, layer: l });
        let (d, f, hc) = (spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim);
        let q = decoder.fused_width();

        b.matmul_backward_weight(dx, &acts.gated, d, f, &mut grads[index.down])?;
        let mut d_gated = b.act(t * f)?;
        b.matmul_backward_input(dx, decoder.down(l), &mut d_gated, false)?;
        let mut d_gate_up = b.act(t * 2 * f)?;
        let gate_up = acts.gate_up.as_ref().expect("training keeps gate and up");
        b.swiglu_backward(gate_up, &d_gated, f, &mut d_gate_up)?;
        b.matmul_backward_weight(&d_gate_up, &acts.normed2, 2 * f, d, &mut grads[index.gate_up])?;
        let mut d_normed = b.act(t * d)?;
        b.matmul_backward_input(&d_gate_up, decoder.gate_up(l), &mut d_normed, false)?;
        let norm = &params[index.post_norm];
        b.rmsnorm_backward(&acts.middle, norm, &acts.rstd2, &d_normed, dx, &mut grads[index.post_norm])?;

        b.matmul_backward_weight(dx, &acts.attended, d, hc, &mut grads[index.o])?;
        let mut d_attended = b.act(t * hc)?;
        b.matmul_backward_input(dx, decoder.o(l), &mut d_attended, false)?;
        let mut dqkv = b.act(t * q)?;
        let (queries, out, lse) = (&acts.queries, &acts.attended, &acts.lse);
        b.attention_backward(heads, kv, queries, out, lse, &d_attended, self.batch, &mut dqkv)?;
        let dnorms = index.qk_norms.map(|(a, z)| {
            let [dq, dk] = grads.get_disjoint_mut([a, z]).expect("two different tensors");
            (dq, dk)
        });
        let (raw, norms) = (acts.raw.as_ref(), decoder.qk_norms(l));
        b.rope_backward(heads, &mut dqkv, raw, self.batch, decoder.angles(), norms, dnorms)?;
        if let Some(bias) = index.qkv_bias {
            b.bias_backward(&dqkv, q, &mut grads[bias])?;
        }
        b.matmul_backward_weight(&dqkv, &acts.normed, q, d, &mut grads[index.qkv])?;
        b.matmul_backward_input(&dqkv, decoder.qkv(l), &mut d_normed, false)?;
        b.rmsnorm_backward(input, &params[index.input_norm], &acts.rstd, &d_normed, dx, &mut grads[index.input_norm])
    }
}
