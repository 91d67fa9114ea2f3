//! The closed vocabulary of fused operations that the decoder and its backward pass are written in.
//!
//! Legend of shape suffixes: T tokens (rows), D model width, F feed-forward width, N and K a weight's rows and columns,
//! V vocabulary, H query heads, G key/value heads, C head width, Q = (H + 2 G) C the width of a fused query-key-value row.
//!
//! Bit rule: a row's result never depends on the other rows, on the number of threads or on the instruction set.
//! Sums over tokens (weight gradients) run in token order.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::weights::safetensors::Sink;

/// Tokens of one KV page.
pub const PAGE: usize = 16;

/// Shape of the heads.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Number of query heads, H.
    pub num_heads: usize,
    /// Number of key/value heads, G.
    pub num_kv_heads: usize,
    /// Head width, C.
    pub head_dim: usize,
}

impl Heads {
    /// Query heads of a group, R.
    pub fn group(self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Floats of one page's keys (or values) of one layer.
    pub fn page_len(self) -> usize {
        self.num_kv_heads * self.head_dim * PAGE
    }

    /// Softmax scale, 1 / sqrt(C).
    pub fn scale(self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }
}

/// How AdamW's moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MomentPrecision {
    /// 4 bytes each.
    F32,
    /// 2 bytes each, rounded by chance. GPU only.
    Bf16,
}

/// How the next token of a sequence is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Sequence id; with the position and the run's seed it decides the noise.
    pub seq: u64,
    /// Temperature; 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the likeliest tokens up to this probability; 1 keeps all. Evaluation only.
    pub top_p: f32,
    /// Keeps this many likeliest tokens; 0 keeps all. Evaluation only.
    pub top_k: usize,
}

impl Draw {
    /// Whether any token may come, without top-k and top-p: else the whole row of logits must be known before the draw.
    pub fn is_full(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0
    }
}

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Its log-probability (nats) under the full softmax at the temperature (at 1 when greedy).
    pub logprob: f32,
    /// Entropy (nats) of that softmax.
    pub entropy: f32,
}

/// Most stop tokens of a [`Seat`].
pub const MAX_STOPS: usize = 16;

/// A sequence that sits down to decode on the device.
#[derive(Debug, Clone, Copy)]
pub struct Seat<'a> {
    /// The seat; its row of the batch.
    pub seat: usize,
    /// The newest token.
    pub token: u32,
    /// Its position.
    pub pos: usize,
    /// How to draw.
    pub draw: Draw,
    /// Tokens after which it ends, at most [`MAX_STOPS`].
    pub stop: &'a [u32],
    /// Tokens that may still be drawn.
    pub left: usize,
    /// Its page table, for the longest course.
    pub pages: &'a [u32],
}

/// Rows of one sequence in a batch, as attention sees them.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// First row in the batch.
    pub row: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row in its sequence.
    pub pos: usize,
    /// The sequence's page table.
    pub pages: &'a [u32],
}

/// What the policy-gradient head does with one response token.
#[derive(Debug, Clone, Copy)]
pub struct HeadTarget {
    /// Row of the hidden state that predicts the token.
    pub row: usize,
    /// The token.
    pub token: u32,
    /// 1 / temperature, by which logits are scaled.
    pub inv_temperature: f32,
    /// Loss of the token.
    pub kind: HeadLoss,
    /// Weight of the entropy bonus (already divided by the normaliser): the loss has `- entropy_coef * entropy`.
    pub entropy_coef: f32,
}

/// Loss of one token, before summation.
#[derive(Debug, Clone, Copy)]
pub enum HeadLoss {
    /// `-weight * logprob`.
    Nll {
        /// Weight of the token.
        weight: f32,
    },
    /// `weight * max(-A rho, -A clip(rho, 1 - low, 1 + high))` with `rho = exp(logprob - old_logprob)`.
    Clipped {
        /// Advantage, A.
        advantage: f32,
        /// Log-probability at sampling.
        old_logprob: f32,
        /// Clip range below 1.
        low: f32,
        /// Clip range above 1.
        high: f32,
        /// Share of the token in the loss.
        weight: f32,
    },
}

/// What the head reports of one token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HeadReport {
    /// Log-probability (nats).
    pub logprob: f32,
    /// Entropy (nats).
    pub entropy: f32,
    /// Loss of the token, weight and entropy bonus included.
    pub loss: f32,
    /// Whether the clip decided.
    pub clipped: bool,
}

/// Constants of one AdamW step.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Number of the step, from 1.
    pub step: u64,
    /// Seed of the noise that rounds bf16 moments.
    pub seed: u64,
    /// Number of the parameter, for that noise.
    pub parameter: u32,
}

/// A weight with its layout for products.
pub struct Weight<'a, P, L> {
    /// The weight, `[N][K]`.
    pub param: &'a P,
    /// Its layout.
    pub layout: &'a L,
}

impl<P, L> Clone for Weight<'_, P, L> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P, L> Copy for Weight<'_, P, L> {}

/// A weight on a device.
pub type WeightOf<'a, B> = Weight<'a, <B as Backend>::Param, <B as Backend>::Linear>;

/// Rotary embedding: cosines and sines `[position][C / 2]`.
pub struct Angles<T> {
    /// Cosines.
    pub cos: T,
    /// Sines.
    pub sin: T,
}

/// Weights of the query and key norms with epsilon, or none.
pub type Norms<'a, P> = Option<(&'a P, &'a P, f32)>;

/// One layer's keys and values.
pub struct LayerKv<'a, K> {
    /// Those of all layers.
    pub kv: &'a K,
    /// Number of the layer.
    pub layer: usize,
}

impl<K> Clone for LayerKv<'_, K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K> Copy for LayerKv<'_, K> {}

/// A device: arrays and the operations on them. An operation may still be running when it returns; only those that give
/// values to the host wait.
///
/// # Errors
/// Every operation fails when an array does not fit the device's memory, or when the device fails; it may tell so later,
/// at the next operation that waits.
pub trait Backend: Sized + Send + Sync {
    /// Array of f32: statistics, gradients, moments.
    type Buf: Send + Sync;
    /// Activations, in the precision that the device multiplies in.
    type Act: Send + Sync;
    /// A weight with its f32 master.
    type Param: Send + Sync;
    /// Both moments of a parameter.
    type Moments: Send + Sync;
    /// A weight `[N][K]` laid out for products.
    type Linear: Send + Sync;
    /// Keys and values of all layers, in pages.
    type Kv: Send + Sync;
    /// Tokens of a batch and where they stand in their sequences.
    type Batch: Send + Sync;
    /// Reports of a policy head that may still be on their way.
    type Reports: Send;
    /// Norm and clip factor of a gradient.
    type Clip: Send + Sync;
    /// Seats of sequences that decode without the host between their steps.
    type Seats: Send;

    /// Most rows of a rollout's step: prompts come in pieces of so many.
    const MAX_ROWS: usize;

    /// What the device is, for people.
    fn describe(&self) -> String;
    /// How many sequences best decode at once.
    fn num_running(&self) -> usize;
    /// Whether the device can run a model of these heads and widths (rows of activations, weights).
    fn check(&self, heads: Heads, widths: &[usize]) -> Result<()>;
    /// Runs `f` where this device's operations run (a thread pool, a stream).
    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R;
    /// Into how many independent parts a decoding batch is best split, for a model of so many weight bytes.
    fn lanes(&self, weight_bytes: usize) -> usize;
    /// Runs one closure per part, each with a device of its own.
    fn split<T: Sync, R: Send>(&self, parts: &[T], f: impl Fn(&Self, &T) -> R + Sync + Send) -> Vec<R>;

    /// Waits for everything that was asked for.
    fn finish(&self) -> Result<()>;
    /// Array of zeros.
    fn zeros(&self, len: usize) -> Result<Self::Buf>;
    /// Array of any values, for an operation that writes all of it.
    fn scratch(&self, len: usize) -> Result<Self::Buf>;
    /// Overwrites an array.
    fn write(&self, buf: &mut Self::Buf, values: &[f32]) -> Result<()>;
    /// Values of an array.
    fn download(&self, buf: &Self::Buf) -> Result<Vec<f32>>;
    /// Sets an array to zero.
    fn clear(&self, buf: &mut Self::Buf) -> Result<()>;
    /// Activations of any values, for an operation that writes all of them.
    fn act(&self, len: usize) -> Result<Self::Act>;
    /// Activations with these values, rounded.
    fn upload(&self, values: &[f32]) -> Result<Self::Act>;
    /// Values of activations.
    fn values(&self, act: &Self::Act) -> Result<Vec<f32>>;
    /// Sets activations to zero.
    fn clear_act(&self, act: &mut Self::Act) -> Result<()>;
    /// `y = x`.
    fn copy(&self, y: &mut Self::Act, x: &Self::Act) -> Result<()>;

    /// A weight with these master values.
    fn param(&self, values: &[f32]) -> Result<Self::Param> {
        self.param_from(values.len(), |sink| sink(values))
    }
    /// A weight with the `len` master values that `source` hands over, piece after piece.
    fn param_from(&self, len: usize, source: impl FnOnce(Sink<'_>) -> Result<()>) -> Result<Self::Param>;
    /// Master values of a weight.
    fn master(&self, param: &Self::Param) -> Result<Vec<f32>>;
    /// Lays out a weight for `y = x w^T`, and with `backward` for `dx = dy w` as well.
    fn linear(&self, w_nk: &Self::Param, n: usize, k: usize, backward: bool) -> Result<Self::Linear>;
    /// Lays out the changed weight again.
    fn relayout(&self, linear: &mut Self::Linear, w_nk: &Self::Param) -> Result<()>;
    /// `y = x w^T + bias`, or `y += x w^T` with `add`.
    fn matmul(
        &self,
        x_tk: &Self::Act,
        w: WeightOf<'_, Self>,
        bias: Option<&Self::Param>,
        y_tn: &mut Self::Act,
        add: bool,
    ) -> Result<()>;
    /// `h = silu(gate) up` with `[gate F][up F] = x w^T`, which is kept where asked.
    fn gated(
        &self,
        x_tk: &Self::Act,
        w: WeightOf<'_, Self>,
        f: usize,
        gate_up: Option<&mut Self::Act>,
        h_tf: &mut Self::Act,
    ) -> Result<()>;
    /// Gradient of gate and up.
    fn swiglu_backward(&self, gate_up: &Self::Act, dh_tf: &Self::Act, f: usize, dgate_up: &mut Self::Act)
    -> Result<()>;
    /// `dx = dy w`, or `dx += dy w` with `add`.
    fn matmul_backward_input(
        &self,
        dy_tn: &Self::Act,
        w: WeightOf<'_, Self>,
        dx_tk: &mut Self::Act,
        add: bool,
    ) -> Result<()>;
    /// `dw += dy^T x`.
    fn matmul_backward_weight(
        &self,
        dy_tn: &Self::Act,
        x_tk: &Self::Act,
        n: usize,
        k: usize,
        dw_nk: &mut Self::Buf,
    ) -> Result<()>;
    /// `db += sum over rows of dy`.
    fn bias_backward(&self, dy_tn: &Self::Act, n: usize, db_n: &mut Self::Buf) -> Result<()>;

    /// A batch of tokens; the spans' rows follow one another and cover it.
    fn batch(&self, heads: Heads, tokens: &[u32], spans: &[Span<'_>]) -> Result<Self::Batch>;
    /// The batch's rows of the embedding.
    fn embed(&self, batch: &Self::Batch, table_vd: &Self::Param, d: usize, x_td: &mut Self::Act) -> Result<()>;
    /// Adds rows of `dx` to the rows of the embedding's gradient, in token order.
    fn embed_backward(&self, batch: &Self::Batch, dx_td: &Self::Act, d: usize, dtable_vd: &mut Self::Buf)
    -> Result<()>;
    /// RMSNorm of every row; `rstd` keeps `1 / sqrt(mean(x^2) + eps)`.
    fn rmsnorm(
        &self,
        x_td: &Self::Act,
        w_d: &Self::Param,
        eps: f32,
        y_td: &mut Self::Act,
        rstd_t: &mut Self::Buf,
    ) -> Result<()>;
    /// Adds RMSNorm's input gradient to `dx` and its weight gradient to `dw`.
    fn rmsnorm_backward(
        &self,
        x_td: &Self::Act,
        w_d: &Self::Param,
        rstd_t: &Self::Buf,
        dy_td: &Self::Act,
        dx_td: &mut Self::Act,
        dw_d: &mut Self::Buf,
    ) -> Result<()>;

    /// RMSNorm of each query and key head (Qwen3), then RoPE: queries to `q`, keys and values to their pages. Pages that
    /// are written belong to one sequence only. `norms` are the two weights `[C]` and epsilon.
    fn rope(
        &self,
        heads: Heads,
        qkv_tq: &Self::Act,
        batch: &Self::Batch,
        angles: &Angles<Self::Buf>,
        norms: Norms<'_, Self::Param>,
        kv: LayerKv<'_, Self::Kv>,
        q_thc: &mut Self::Act,
    ) -> Result<()>;
    /// Backward of [`Backend::rope`] in place; `raw` is its input (only with norms), gradients of the norms are added.
    fn rope_backward(
        &self,
        heads: Heads,
        dqkv_tq: &mut Self::Act,
        raw_tq: Option<&Self::Act>,
        batch: &Self::Batch,
        angles: &Angles<Self::Buf>,
        norms: Norms<'_, Self::Param>,
        dnorms: Option<(&mut Self::Buf, &mut Self::Buf)>,
    ) -> Result<()>;

    /// Room for the keys and values of `num_pages` pages in every layer.
    fn new_kv(&self, heads: Heads, num_layers: usize, num_pages: usize) -> Result<Self::Kv>;
    /// Copies pages (from, to) in every layer; no page is written twice, or both read and written.
    fn copy_pages(&self, kv: &mut Self::Kv, copies: &[(u32, u32)]) -> Result<()>;
    /// Causal attention of the batch's rows over their sequences' pages; `out[T][H C]`, `lse[T][H]`.
    fn attention(
        &self,
        heads: Heads,
        kv: LayerKv<'_, Self::Kv>,
        q_thc: &Self::Act,
        batch: &Self::Batch,
        out_thc: &mut Self::Act,
        lse_th: &mut Self::Buf,
    ) -> Result<()>;
    /// Backward of [`Backend::attention`] for sequences that lie whole in the batch; writes all of `dqkv`.
    fn attention_backward(
        &self,
        heads: Heads,
        kv: LayerKv<'_, Self::Kv>,
        q_thc: &Self::Act,
        out_thc: &Self::Act,
        lse_th: &Self::Buf,
        dout_thc: &Self::Act,
        batch: &Self::Batch,
        dqkv_tq: &mut Self::Act,
    ) -> Result<()>;

    /// Draws the token after each named row: (row of `x`, how, position of the drawn token).
    fn draw(
        &self,
        x_td: &Self::Act,
        d: usize,
        head: WeightOf<'_, Self>,
        draws: &[(usize, Draw, u32)],
        seed: u64,
    ) -> Result<Vec<Drawn>>;
    /// At least `capacity` empty seats for sequences of at most `max_tokens` in a vocabulary of `v`, or none where every
    /// step goes through the host.
    fn seats(&self, heads: Heads, v: usize, capacity: usize, max_tokens: usize) -> Result<Option<Self::Seats>>;
    /// Seats sequences in empty seats. `prefixes` are all seats that are taken, the new ones among them, with the whole
    /// pages that they share with others.
    fn take_seats(&self, seats: &mut Self::Seats, new: &[Seat<'_>], prefixes: &[(usize, &[u32])]) -> Result<()>;
    /// Rows of the batch of a step of the first `count` seats.
    fn seat_rows(&self, seats: &Self::Seats, count: usize) -> usize;
    /// Notes that what is launched from here on belongs to the next step.
    fn begin_seats(&self, seats: &mut Self::Seats) -> Result<()>;
    /// Launches a step of `extent`: the first so many seats, none with more than so many keys. Each draws a token from its row of
    /// what `hidden` leaves, and moves on to it or, when that ends it, leaves its seat empty. `hidden` may be recorded to
    /// be launched again whenever rows and keys are about as many: what it works on stays where it is, and it neither
    /// allocates nor waits.
    fn step_seats<'x>(
        &self,
        seats: &mut Self::Seats,
        extent: (usize, usize),
        head: WeightOf<'_, Self>,
        seed: u64,
        hidden: impl FnOnce(&Self::Batch) -> Result<&'x Self::Act>,
    ) -> Result<()>
    where
        Self: 'x;
    /// What the first `count` seats drew in the earliest step whose draws were not asked for (of at most two), and the
    /// seconds in which the device waited for that step after the one before.
    fn seats_drew(&self, seats: &mut Self::Seats, count: usize) -> Result<(Vec<Drawn>, f64)>;
    /// Logits of all rows, `[T][V]`.
    fn logits(&self, x_td: &Self::Act, d: usize, head: WeightOf<'_, Self>) -> Result<Vec<f32>>;
    /// Log-probability, entropy and loss of response tokens without ever holding all logits. With `grads`, also writes
    /// the gradient of the hidden rows and adds that of the head's weight; then no two targets name one row.
    fn policy_head(
        &self,
        x_td: &Self::Act,
        d: usize,
        head: WeightOf<'_, Self>,
        targets: &[HeadTarget],
        grads: Option<(&mut Self::Act, &mut Self::Buf)>,
    ) -> Result<Self::Reports>;
    /// The reports themselves.
    fn reports(&self, reports: Self::Reports) -> Result<Vec<HeadReport>>;

    /// Moments of `len` zeros.
    fn moments(&self, len: usize, precision: MomentPrecision) -> Result<Self::Moments>;
    /// Values of the first (0) or of the second (1) moments.
    fn read_moments(&self, moments: &Self::Moments, which: usize) -> Result<Vec<f32>>;
    /// Overwrites the first and the second moments with values that were read.
    fn write_moments(&self, moments: &mut Self::Moments, values: [&[f32]; 2]) -> Result<()>;
    /// Global norm of gradients, and the factor that brings it down to `max_norm` (0: none). Sums are in f64 over fixed
    /// blocks.
    fn clip(&self, grads: &[Self::Buf], max_norm: f32) -> Result<Self::Clip>;
    /// The norm before clipping.
    fn norm(&self, clip: &Self::Clip) -> Result<f64>;
    /// One AdamW step in place (decoupled weight decay, bias correction as in Loshchilov and Hutter 2019) on the clipped
    /// gradient, which is zero afterwards. With a norm that is not finite, only the gradient changes.
    fn adamw(
        &self,
        p: &mut Self::Param,
        g: &mut Self::Buf,
        moments: &mut Self::Moments,
        clip: &Self::Clip,
        hyper: &AdamW,
    ) -> Result<()>;
}
