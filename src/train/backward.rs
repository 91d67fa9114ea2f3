//! The backward twin of `model::forward`: one packed micro-batch forward, the loss, and all gradients.

use crate::compute::ops::{Backend, HeadReport, HeadTarget, PAGE, Span};
use crate::error::Result;
use crate::model::forward::{Decoder, LayerActs, SeqRows};
use crate::train::loss::TrainSeq;

/// Forward and backward of one micro-batch; gradients are added to `grads` (in the table's order). Returns the report of
/// every target, sequence after sequence.
///
/// # Errors
/// When a sequence does not fit the model, or its activations do not fit the memory.
pub fn micro_batch<B: Backend>(
    decoder: &Decoder<B>,
    seqs: &[TrainSeq],
    grads: &mut [B::Buf],
) -> Result<Vec<HeadReport>> {
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
    let pass = Pass { decoder, kv: &kv, spans: &spans, tokens: &tokens };
    Ok(decoder.backend().scope(|| pass.run(&targets, grads)))
}

struct Pass<'a, B: Backend> {
    decoder: &'a Decoder<B>,
    kv: &'a B::Kv,
    spans: &'a [Span<'a>],
    tokens: &'a [u32],
}

impl<B: Backend> Pass<'_, B> {
    fn run(&self, targets: &[HeadTarget], grads: &mut [B::Buf]) -> Vec<HeadReport> {
        let (decoder, b, t) = (self.decoder, self.decoder.backend(), self.tokens.len());
        let (table, d) = (decoder.table(), decoder.spec().hidden_size);
        let mut x = b.embed(self.tokens, &decoder.params[table.embed], d);
        let mut kept: Vec<(B::Buf, LayerActs<B>)> = Vec::with_capacity(table.layers.len());
        for l in 0..table.layers.len() {
            let mut input = b.scratch(t * d);
            b.copy(&mut input, &x);
            let mut acts = decoder.layer_acts(t);
            decoder.layer_forward(b, l, &mut x, &mut acts, self.kv, self.spans, true);
            kept.push((input, acts));
        }
        let (mut hidden, mut rstd) = (b.scratch(t * d), b.scratch(t));
        let norm = &decoder.params[table.norm];
        b.rmsnorm(&x, norm, decoder.spec().rms_norm_eps as f32, &mut hidden, &mut rstd);
        let mut d_hidden = b.zeros(t * d);
        let head_grads = Some((&mut d_hidden, &mut grads[table.head]));
        let reports = b.policy_head(&hidden, d, decoder.head(), targets, head_grads);
        let mut dx = b.zeros(t * d);
        b.rmsnorm_backward(&x, norm, &rstd, &d_hidden, &mut dx, &mut grads[table.norm]);
        for (l, (input, acts)) in kept.iter().enumerate().rev() {
            self.layer(l, input, acts, &mut dx, grads);
        }
        b.embed_backward(self.tokens, &dx, d, &mut grads[table.embed]);
        reports
    }

    /// Turns the gradient of layer `l`'s output stream into that of its input stream, in place.
    fn layer(&self, l: usize, input: &B::Buf, acts: &LayerActs<B>, dx: &mut B::Buf, grads: &mut [B::Buf]) {
        let (decoder, b, t) = (self.decoder, self.decoder.backend(), self.tokens.len());
        let (spec, heads, index) = (decoder.spec(), decoder.heads(), &decoder.table().layers[l]);
        let (linears, params) = (decoder.layer(l), &decoder.params);
        let (d, f, hc) = (spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim);
        let q = hc + 2 * spec.num_kv_heads * spec.head_dim;

        b.matmul_backward_weight(dx, &acts.gated, d, f, &mut grads[index.down]);
        let mut d_gated = b.scratch(t * f);
        b.matmul_backward_input(dx, &linears.down, &mut d_gated, false);
        let mut d_gate_up = b.scratch(t * 2 * f);
        b.swiglu_backward(&acts.gate_up, &d_gated, f, &mut d_gate_up);
        b.matmul_backward_weight(&d_gate_up, &acts.normed2, 2 * f, d, &mut grads[index.gate_up]);
        let mut d_normed = b.scratch(t * d);
        b.matmul_backward_input(&d_gate_up, &linears.gate_up, &mut d_normed, false);
        let norm = &params[index.post_norm];
        b.rmsnorm_backward(&acts.middle, norm, &acts.rstd2, &d_normed, dx, &mut grads[index.post_norm]);

        b.matmul_backward_weight(dx, &acts.attended, d, hc, &mut grads[index.o]);
        let mut d_attended = b.scratch(t * hc);
        b.matmul_backward_input(dx, &linears.o, &mut d_attended, false);
        let mut dqkv = b.scratch(t * q);
        let (qkv, out, lse) = (&acts.qkv, &acts.attended, &acts.lse);
        b.attention_backward(heads, self.kv, l, qkv, out, lse, &d_attended, self.spans, &mut dqkv);
        let dnorms = index.qk_norms.map(|(a, z)| {
            let [dq, dk] = grads.get_disjoint_mut([a, z]).expect("two different tensors");
            (dq, dk)
        });
        b.rope_backward(heads, &mut dqkv, &acts.raw, self.spans, decoder.rope(), decoder.qk_norms(l), dnorms);
        if let Some(bias) = index.qkv_bias {
            b.bias_backward(&dqkv, q, &mut grads[bias]);
        }
        b.matmul_backward_weight(&dqkv, &acts.normed, q, d, &mut grads[index.qkv]);
        b.matmul_backward_input(&dqkv, &linears.qkv, &mut d_normed, false);
        b.rmsnorm_backward(input, &params[index.input_norm], &acts.rstd, &d_normed, dx, &mut grads[index.input_norm]);
    }
}
