//! The decoder, written once: rollout, training and scoring run these same operations on every device.
//!
//! A layer is: `x += attention(norm(x)) w_o`, then `x += swiglu(norm(x) w_gate_up) w_down`. Training keeps what the
//! backward pass needs of every layer ([`LayerActs`]); rollout reuses one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::compute::ops::{Angles, Backend, Draw, Drawn, Heads, LayerKv, Norms, PAGE, Seat, Span, Weight, WeightOf};
use crate::error::{Error, Result};
use crate::model::params::{LayerIndex, ParamTable};
use crate::weights::safetensors::Sink;
use crate::weights::spec::ModelSpec;

/// New tokens of one sequence: a piece of its prompt, or the token drawn last.
#[derive(Debug, Clone)]
pub struct SeqRows<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub pos0: usize,
    /// The sequence's page table, long enough for these tokens.
    pub pages: &'a [u32],
    /// How to draw the token after the last of these; none while more of the prompt is to come.
    pub draw: Option<Draw>,
}

/// Weights of one layer laid out for products.
pub struct LayerLinears<B: Backend> {
    /// Fused query, key and value projection.
    pub qkv: B::Linear,
    /// Output projection.
    pub o: B::Linear,
    /// Fused gate and up projection.
    pub gate_up: B::Linear,
    /// Down projection.
    pub down: B::Linear,
}

/// What a layer leaves behind for its backward pass. T rows.
pub struct LayerActs<B: Backend> {
    /// Normed input of attention, `[T][D]`.
    pub normed: B::Act,
    /// `1 / rms` of the input, `[T]`.
    pub rstd: B::Buf,
    /// Fused projection before norms and RoPE, `[T][Q]`; kept for training with query-key norms.
    pub raw: Option<B::Act>,
    /// Queries as attention reads them, `[T][H C]`.
    pub queries: B::Act,
    /// Attention's output, `[T][H C]`.
    pub attended: B::Act,
    /// Log-sum-exp of the scores, `[T][H]`.
    pub lse: B::Buf,
    /// Residual stream between the halves, `[T][D]`.
    pub middle: B::Act,
    /// Normed input of the feed-forward layer, `[T][D]`.
    pub normed2: B::Act,
    /// `1 / rms` of `middle`, `[T]`.
    pub rstd2: B::Buf,
    /// Gate and up, `[T][2 F]`; kept for training.
    pub gate_up: Option<B::Act>,
    /// Gated product, `[T][F]`.
    pub gated: B::Act,
}

/// A decoder on a device.
pub struct Decoder<B: Backend> {
    backend: B,
    spec: ModelSpec,
    table: ParamTable,
    /// Weights, in the table's order.
    pub params: Vec<B::Param>,
    layers: Vec<LayerLinears<B>>,
    head: B::Linear,
    angles: Angles<B::Buf>,
    trainable: bool,
}

impl<B: Backend> Decoder<B> {
    /// A decoder with these weights (in the table's order). A trainable one also lays its weights out for gradients.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn new(backend: B, spec: ModelSpec, weights: &[Vec<f32>], trainable: bool) -> Result<Self> {
        Self::load(backend, spec, trainable, |_, i, sink| sink(&weights[i]))
    }

    /// A decoder whose weights come from a source, tensor after tensor of the table and piece after piece, so that the host
    /// never holds them all.
    ///
    /// # Errors
    /// What the source reports; when the device cannot run such a model, or it does not fit.
    pub fn load(
        backend: B,
        spec: ModelSpec,
        trainable: bool,
        mut source: impl FnMut(&ParamTable, usize, Sink<'_>) -> Result<()>,
    ) -> Result<Self> {
        backend.check(heads(&spec), &[spec.hidden_size, spec.intermediate_size, spec.vocab_size])?;
        let table = ParamTable::new(&spec);
        let param = |i: usize| backend.param_from(table.tensors[i].len(), |sink| source(&table, i, sink));
        let params: Vec<B::Param> = (0..table.tensors.len()).map(param).collect::<Result<_>>()?;
        let linear = |i: usize| backend.linear(&params[i], table.tensors[i].rows, table.tensors[i].cols, trainable);
        let layer = |l: &LayerIndex| {
            Ok(LayerLinears {
                qkv: linear(l.qkv)?,
                o: linear(l.o)?,
                gate_up: linear(l.gate_up)?,
                down: linear(l.down)?,
            })
        };
        let layers = table.layers.iter().map(layer).collect::<Result<_>>()?;
        let head = linear(table.head)?;
        let (cos, sin) = rope_table(&spec);
        let (mut angles_cos, mut angles_sin) = (backend.scratch(cos.len())?, backend.scratch(sin.len())?);
        backend.write(&mut angles_cos, &cos)?;
        backend.write(&mut angles_sin, &sin)?;
        let angles = Angles { cos: angles_cos, sin: angles_sin };
        Ok(Decoder { backend, spec, table, params, layers, head, angles, trainable })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Shape of the model.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Names and shapes of the weights.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// Query, key and value projection of layer `l`.
    pub fn qkv(&self, l: usize) -> WeightOf<'_, B> {
        Weight { param: &self.params[self.table.layers[l].qkv], layout: &self.layers[l].qkv }
    }

    /// Output projection of layer `l`.
    pub fn o(&self, l: usize) -> WeightOf<'_, B> {
        Weight { param: &self.params[self.table.layers[l].o], layout: &self.layers[l].o }
    }

    /// Gate and up projection of layer `l`.
    pub fn gate_up(&self, l: usize) -> WeightOf<'_, B> {
        Weight { param: &self.params[self.table.layers[l].gate_up], layout: &self.layers[l].gate_up }
    }

    /// Down projection of layer `l`.
    pub fn down(&self, l: usize) -> WeightOf<'_, B> {
        Weight { param: &self.params[self.table.layers[l].down], layout: &self.layers[l].down }
    }

    /// LM head.
    pub fn head(&self) -> WeightOf<'_, B> {
        Weight { param: &self.params[self.table.head], layout: &self.head }
    }

    /// Rotary angles.
    pub fn angles(&self) -> &Angles<B::Buf> {
        &self.angles
    }

    /// Shape of the heads.
    pub fn heads(&self) -> Heads {
        heads(&self.spec)
    }

    /// Weights of the query and key norms of layer `l`, if the family has them.
    pub fn qk_norms(&self, l: usize) -> Norms<'_, B::Param> {
        let (q, k) = self.table.layers[l].qk_norms?;
        Some((&self.params[q], &self.params[k], self.spec.rms_norm_eps as f32))
    }

    /// Changes the weights, and lays them out again.
    ///
    /// # Errors
    /// What the change reports, or the device.
    pub fn update(&mut self, change: impl FnOnce(&B, &mut [B::Param]) -> Result<()> + Send) -> Result<()> {
        assert!(self.trainable, "only a trainable decoder changes");
        let Decoder { backend, table, params, layers, head, .. } = self;
        let b: &B = backend;
        b.scope(|| {
            change(b, params)?;
            for (linears, l) in layers.iter_mut().zip(&table.layers) {
                b.relayout(&mut linears.qkv, &params[l.qkv])?;
                b.relayout(&mut linears.o, &params[l.o])?;
                b.relayout(&mut linears.gate_up, &params[l.gate_up])?;
                b.relayout(&mut linears.down, &params[l.down])?;
            }
            b.relayout(head, &params[table.head])
        })
    }

    /// Room for the keys and values of `num_pages` pages.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn new_kv(&self, num_pages: usize) -> Result<B::Kv> {
        self.backend.new_kv(self.heads(), self.spec.num_layers, num_pages)
    }

    /// Copies pages (from, to) in every layer; no page is written twice, or both read and written.
    ///
    /// # Errors
    /// When the device fails.
    pub fn copy_pages(&self, kv: &mut B::Kv, copies: &[(u32, u32)]) -> Result<()> {
        self.backend.copy_pages(kv, copies)
    }

    /// Room for the activations of one layer and `t` rows, on `b`; `training` keeps what only a backward pass reads.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn layer_acts(&self, b: &B, t: usize, training: bool) -> Result<LayerActs<B>> {
        let s = &self.spec;
        let (d, f, hc) = (s.hidden_size, s.intermediate_size, s.num_heads * s.head_dim);
        let q = hc + 2 * s.num_kv_heads * s.head_dim;
        let normed = self.table.layers.first().is_some_and(|l| l.qk_norms.is_some());
        let kept = |keep: bool, len: usize| keep.then(|| b.act(len)).transpose();
        Ok(LayerActs {
            normed: b.act(t * d)?,
            rstd: b.scratch(t)?,
            raw: kept(training && normed, t * q)?,
            queries: b.act(t * hc)?,
            attended: b.act(t * hc)?,
            lse: b.scratch(t * s.num_heads)?,
            middle: b.act(t * d)?,
            normed2: b.act(t * d)?,
            rstd2: b.scratch(t)?,
            gate_up: kept(training, t * 2 * f)?,
            gated: b.act(t * f)?,
        })
    }

    /// Layer `l`: reads the residual stream `x`, leaves its activations in `acts` and the new stream in `x`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn layer_forward(
        &self,
        b: &B,
        l: usize,
        x: &mut B::Act,
        acts: &mut LayerActs<B>,
        kv: &B::Kv,
        batch: &B::Batch,
        t: usize,
    ) -> Result<()> {
        let (index, heads, kv) = (&self.table.layers[l], self.heads(), LayerKv { kv, layer: l });
        let (f, eps) = (self.spec.intermediate_size, self.spec.rms_norm_eps as f32);
        b.rmsnorm(x, &self.params[index.input_norm], eps, &mut acts.normed, &mut acts.rstd)?;
        let bias = index.qkv_bias.map(|i| &self.params[i]);
        let mut own = if acts.raw.is_none() { Some(b.act(t * self.fused_width())?) } else { None };
        let raw = acts.raw.as_mut().or(own.as_mut()).expect("one of them is there");
        b.matmul(&acts.normed, self.qkv(l), bias, raw, false)?;
        b.rope(heads, raw, batch, &self.angles, self.qk_norms(l), kv, &mut acts.queries)?;
        b.attention(heads, kv, &acts.queries, batch, &mut acts.attended, &mut acts.lse)?;
        b.matmul(&acts.attended, self.o(l), None, x, true)?;
        b.copy(&mut acts.middle, x)?;
        b.rmsnorm(&acts.middle, &self.params[index.post_norm], eps, &mut acts.normed2, &mut acts.rstd2)?;
        b.gated(&acts.normed2, self.gate_up(l), f, acts.gate_up.as_mut(), &mut acts.gated)?;
        b.matmul(&acts.gated, self.down(l), None, x, true)
    }

    /// Width of a fused query-key-value row, Q.
    pub fn fused_width(&self) -> usize {
        (self.spec.num_heads + 2 * self.spec.num_kv_heads) * self.spec.head_dim
    }

    /// Residual stream after all layers and the last norm, `[T][D]`, of rows that rollout or scoring needs no gradient of.
    fn hidden(&self, b: &B, rows: &[SeqRows<'_>], kv: &B::Kv) -> Result<B::Act> {
        let tokens: Vec<u32> = rows.iter().flat_map(|r| r.tokens).copied().collect();
        let mut spans = Vec::with_capacity(rows.len());
        let mut t = 0;
        for r in rows {
            spans.push(Span { row: t, len: r.tokens.len(), pos: r.pos0, pages: r.pages });
            t += r.tokens.len();
        }
        let batch = b.batch(self.heads(), &tokens, &spans)?;
        let mut acts = (b.act(t * self.spec.hidden_size)?, self.layer_acts(b, t, false)?);
        self.hidden_of(b, &batch, t, kv, &mut acts)?;
        Ok(acts.1.normed)
    }

    /// [`Decoder::hidden`] of a batch of `t` rows: the stream in the first of `acts`, the result in the second's `normed`.
    fn hidden_of(
        &self,
        b: &B,
        batch: &B::Batch,
        t: usize,
        kv: &B::Kv,
        (x, acts): &mut (B::Act, LayerActs<B>),
    ) -> Result<()> {
        b.embed(batch, &self.params[self.table.embed], self.spec.hidden_size, x)?;
        for l in 0..self.spec.num_layers {
            self.layer_forward(b, l, x, acts, kv, batch, t)?;
        }
        let norm = &self.params[self.table.norm];
        b.rmsnorm(x, norm, self.spec.rms_norm_eps as f32, &mut acts.normed, &mut acts.rstd)
    }

    /// Empty seats for at least `capacity` sequences of at most `max_tokens`, or none where this device has none.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn seats(&self, capacity: usize, max_tokens: usize) -> Result<Option<Seats<B>>> {
        let seats = self.backend.seats(self.heads(), self.spec.vocab_size, capacity, max_tokens)?;
        Ok(seats.map(|seats| Seats { seats, acts: BTreeMap::new() }))
    }

    /// Takes prompt pieces in without drawing or waiting.
    ///
    /// # Errors
    /// As [`Decoder::step`].
    pub fn fill(&self, kv: &mut B::Kv, rows: &[SeqRows<'_>]) -> Result<()> {
        rows.iter().try_for_each(|r| self.check(r))?;
        let (b, kv): (&B, &B::Kv) = (&self.backend, kv);
        if rows.is_empty() { Ok(()) } else { b.scope(|| self.hidden(b, rows, kv).map(drop)) }
    }

    /// Seats sequences. `prefixes` are all seats that are taken, with the whole pages that they share with others.
    ///
    /// # Errors
    /// When a sequence may grow beyond the context, or the device fails.
    pub fn take_seats(&self, seats: &mut Seats<B>, new: &[Seat<'_>], prefixes: &[(usize, &[u32])]) -> Result<()> {
        for s in new {
            let last = SeqRows { tokens: &[s.token], pos0: s.pos, pages: s.pages, draw: None };
            self.check(&last)?;
            self.check_end(s.pos + s.left)?;
        }
        self.backend.take_seats(&mut seats.seats, new, prefixes)
    }

    /// Launches a step of the first `count` seats, none with more than `longest` keys.
    ///
    /// # Errors
    /// When the device fails.
    pub fn step_seats(&self, kv: &B::Kv, seats: &mut Seats<B>, count: usize, longest: usize, seed: u64) -> Result<()> {
        let (b, Seats { seats, acts }) = (&self.backend, seats);
        let t = b.seat_rows(seats, count);
        let acts = match acts.entry(t) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let mut layer = self.layer_acts(b, t, false)?;
                layer.raw = Some(b.act(t * self.fused_width())?);
                free.insert((b.act(t * self.spec.hidden_size)?, layer))
            }
        };
        b.step_seats(seats, (count, longest), self.head(), seed, |batch| {
            self.hidden_of(b, batch, t, kv, acts)?;
            Ok(&acts.1.normed)
        })
    }

    /// Notes that what is launched from here on belongs to the next step of the seats.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin_seats(&self, seats: &mut Seats<B>) -> Result<()> {
        self.backend.begin_seats(&mut seats.seats)
    }

    /// What the first `count` seats drew in the earliest step whose draws were not asked for, and the seconds in which
    /// the device waited for that step after the one before.
    ///
    /// # Errors
    /// When the device fails, or a launch before did.
    pub fn seats_drew(&self, seats: &mut Seats<B>, count: usize) -> Result<(Vec<Drawn>, f64)> {
        self.backend.seats_drew(&mut seats.seats, count)
    }

    /// Takes the new tokens of every sequence in, and draws the next one where asked.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or a position outside the context, or the device fails.
    pub fn step(&self, kv: &mut B::Kv, rows: &[SeqRows<'_>], seed: u64) -> Result<Vec<Option<Drawn>>> {
        for r in rows {
            self.check(r)?;
        }
        let kv: &B::Kv = kv;
        let weight_bytes = self.table.num_params() * 4;
        let parts = balance(rows, self.backend.lanes(weight_bytes));
        let drawn = self.backend.split(&parts, |b, rows| b.scope(|| self.step_part(b, kv, rows, seed)));
        let drawn: Vec<Vec<_>> = drawn.into_iter().collect::<Result<_>>()?;
        Ok(drawn.into_iter().flatten().collect())
    }

    fn step_part(&self, b: &B, kv: &B::Kv, rows: &[SeqRows<'_>], seed: u64) -> Result<Vec<Option<Drawn>>> {
        let hidden = self.hidden(b, rows, kv)?;
        let mut draws = Vec::with_capacity(rows.len());
        let mut end = 0;
        for r in rows {
            end += r.tokens.len();
            if let Some(draw) = r.draw {
                draws.push((end - 1, draw, (r.pos0 + r.tokens.len()) as u32));
            }
        }
        let mut drawn = b.draw(&hidden, self.spec.hidden_size, self.head(), &draws, seed)?.into_iter();
        Ok(rows.iter().map(|r| r.draw.and_then(|_| drawn.next())).collect())
    }

    /// Logits after every token of one text, `[T][V]`.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or the text longer than the context, or the device fails.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let pages: Vec<u32> = (0..tokens.len().div_ceil(PAGE) as u32).collect();
        let rows = [SeqRows { tokens, pos0: 0, pages: &pages, draw: None }];
        self.check(&rows[0])?;
        let kv = self.new_kv(pages.len())?;
        let b = &self.backend;
        b.scope(|| b.logits(&self.hidden(b, &rows, &kv)?, self.spec.hidden_size, self.head()))
    }

    fn check_end(&self, end: usize) -> Result<()> {
        if end > self.spec.max_position_embeddings {
            return Err(Error::config(format!(
                "position {end} is beyond the model's context of {}",
                self.spec.max_position_embeddings
            )));
        }
        Ok(())
    }

    /// Whether a sequence's new tokens can be taken in.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or a position outside the context.
    pub fn check(&self, rows: &SeqRows<'_>) -> Result<()> {
        let end = rows.pos0 + rows.tokens.len();
        self.check_end(end)?;
        assert!(!rows.tokens.is_empty() && rows.pages.len() * PAGE >= end, "tokens, and pages for them");
        match rows.tokens.iter().find(|t| **t as usize >= self.spec.vocab_size) {
            Some(token) => {
                Err(Error::config(format!("token {token} is outside the vocabulary of {}", self.spec.vocab_size))
                    .with_hint("the tokenizer does not belong to these weights"))
            }
            None => Ok(()),
        }
    }
}

/// Seats of sequences that decode on the device, with the activations of their batches by number of rows.
pub struct Seats<B: Backend> {
    seats: B::Seats,
    acts: BTreeMap<usize, (B::Act, LayerActs<B>)>,
}

/// Cuts a batch into at most `lanes` runs of about equally many rows.
fn balance<'a, 'b>(rows: &'a [SeqRows<'b>], lanes: usize) -> Vec<&'a [SeqRows<'b>]> {
    let total: usize = rows.iter().map(|r| r.tokens.len()).sum();
    let (mut parts, mut start, mut seen) = (Vec::with_capacity(lanes), 0, 0);
    for (i, r) in rows.iter().enumerate() {
        seen += r.tokens.len();
        if seen * lanes >= total * (parts.len() + 1) {
            parts.push(&rows[start..=i]);
            start = i + 1;
        }
    }
    parts
}

/// Shape of a model's heads.
fn heads(spec: &ModelSpec) -> Heads {
    Heads { num_heads: spec.num_heads, num_kv_heads: spec.num_kv_heads, head_dim: spec.head_dim }
}

/// Cosines and sines of all positions, `[position][C / 2]`, computed in f64 (Su et al. 2021; scaling as in Llama 3.1).
pub fn rope_table(spec: &ModelSpec) -> (Vec<f32>, Vec<f32>) {
    let half = spec.head_dim / 2;
    let frequencies: Vec<f64> = (0..half)
        .map(|i| {
            let frequency = spec.rope_theta.powf(-2.0 * i as f64 / spec.head_dim as f64);
            let Some(s) = spec.rope_scaling else { return frequency };
            let wavelength = std::f64::consts::TAU / frequency;
            let context = s.original_context as f64;
            if wavelength < context / s.high_freq_factor {
                frequency
            } else if wavelength > context / s.low_freq_factor {
                frequency / s.factor
            } else {
                let smooth = (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
                (1.0 - smooth) * frequency / s.factor + smooth * frequency
            }
        })
        .collect();
    let angles = || (0..spec.max_position_embeddings).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
    (angles().map(|a| a.cos() as f32).collect(), angles().map(|a| a.sin() as f32).collect())
}
