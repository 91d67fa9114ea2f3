//! The closed vocabulary of fused operations that the decoder and its backward pass are written in.
//!
//! Legend of shape suffixes: T tokens (rows), D model width, F feed-forward width, N and K a weight's rows and columns,
//! V vocabulary, H query heads, G key/value heads, C head width, Q = (H + 2 G) C the width of a fused query-key-value row.
//!
//! Bit rule: a row's result never depends on the other rows, on the number of threads or on the instruction set.
//! Sums over tokens (weight gradients) run in token order.

use crate::error::Result;

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
    /// Factor on the gradient (clipping).
    pub grad_scale: f32,
}

/// Rotary embedding: cosines and sines `[position][C / 2]`.
#[derive(Debug, Clone, Default)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// A device: buffers and the operations on them. `Buf` is an array of f32 on the device.
pub trait Backend: Sized + Send + Sync {
    /// Array of f32.
    type Buf: Send + Sync;
    /// A weight `[N][K]` laid out for products.
    type Linear: Send + Sync;
    /// Keys and values of all layers, in pages.
    type Kv: Send + Sync;

    /// Runs `f` where this device's operations run (a thread pool, a stream).
    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R;
    /// Into how many independent parts a decoding batch is best split, for a model of so many weight bytes.
    fn lanes(&self, weight_bytes: usize) -> usize;
    /// Runs one closure per part, each with a device of its own.
    fn split<T: Sync, R: Send>(&self, parts: &[T], f: impl Fn(&Self, &T) -> R + Sync + Send) -> Vec<R>;

    /// Array of zeros.
    fn zeros(&self, len: usize) -> Self::Buf;
    /// Array of any values, for an operation that writes all of it.
    fn scratch(&self, len: usize) -> Self::Buf;
    /// Array on the device with these values.
    fn upload(&self, values: &[f32]) -> Self::Buf;
    /// Values of an array.
    fn download(&self, buf: &Self::Buf) -> Vec<f32>;
    /// Overwrites an array.
    fn write(&self, buf: &mut Self::Buf, values: &[f32]);
    /// Sets an array to zero.
    fn clear(&self, buf: &mut Self::Buf);
    /// `y = x`.
    fn copy(&self, y: &mut Self::Buf, x: &Self::Buf);
    /// `y += x`.
    fn add(&self, y: &mut Self::Buf, x: &Self::Buf);

    /// Lays out a weight for `y = x w^T`, and with `backward` for `dx = dy w` as well.
    fn linear(&self, w_nk: &Self::Buf, n: usize, k: usize, backward: bool) -> Self::Linear;
    /// Lays out the changed weight again.
    fn relayout(&self, linear: &mut Self::Linear, w_nk: &Self::Buf);
    /// `y = x w^T + bias`, or `y += x w^T` with `add`.
    fn matmul(&self, x_tk: &Self::Buf, w: &Self::Linear, bias: Option<&Self::Buf>, y_tn: &mut Self::Buf, add: bool);
    /// `dx = dy w`, or `dx += dy w` with `add`.
    fn matmul_backward_input(&self, dy_tn: &Self::Buf, w: &Self::Linear, dx_tk: &mut Self::Buf, add: bool);
    /// `dw += dy^T x`.
    fn matmul_backward_weight(&self, dy_tn: &Self::Buf, x_tk: &Self::Buf, n: usize, k: usize, dw_nk: &mut Self::Buf);
    /// `db += sum over rows of dy`.
    fn bias_backward(&self, dy_tn: &Self::Buf, n: usize, db_n: &mut Self::Buf);

    /// Rows of the embedding.
    fn embed(&self, tokens: &[u32], table_vd: &Self::Buf, d: usize) -> Self::Buf;
    /// Adds rows of `dx` to the rows of the embedding's gradient, in token order.
    fn embed_backward(&self, tokens: &[u32], dx_td: &Self::Buf, d: usize, dtable_vd: &mut Self::Buf);
    /// RMSNorm of every row; `rstd` keeps `1 / sqrt(mean(x^2) + eps)`.
    fn rmsnorm(&self, x_td: &Self::Buf, w_d: &Self::Buf, eps: f32, y_td: &mut Self::Buf, rstd_t: &mut Self::Buf);
    /// Adds RMSNorm's input gradient to `dx` and its weight gradient to `dw`.
    fn rmsnorm_backward(
        &self,
        x_td: &Self::Buf,
        w_d: &Self::Buf,
        rstd_t: &Self::Buf,
        dy_td: &Self::Buf,
        dx_td: &mut Self::Buf,
        dw_d: &mut Self::Buf,
    );

    /// RMSNorm of each query and key head (Qwen3), then RoPE, in place; `norms` are the two weights `[C]` and epsilon.
    fn rope(&self, heads: Heads, qkv_tq: &mut Self::Buf, spans: &[Span<'_>], table: &RopeTable, norms: Norms<'_, Self>);
    /// Backward of [`Backend::rope`] in place; `raw` is its input (read only with norms), gradients of the norms are added.
    fn rope_backward(
        &self,
        heads: Heads,
        dqkv_tq: &mut Self::Buf,
        raw_tq: &Self::Buf,
        spans: &[Span<'_>],
        table: &RopeTable,
        norms: Norms<'_, Self>,
        dnorms: Option<(&mut Self::Buf, &mut Self::Buf)>,
    );

    /// Room for the keys and values of `num_pages` pages in every layer.
    ///
    /// # Errors
    /// When they do not fit.
    fn new_kv(&self, heads: Heads, num_layers: usize, num_pages: usize) -> Result<Self::Kv>;
    /// Copies a page in every layer.
    fn copy_page(&self, kv: &mut Self::Kv, from: u32, to: u32);
    /// Writes the keys and values of the batch into one layer's pages. Pages that are written belong to one sequence only.
    fn write_kv(&self, heads: Heads, kv: &Self::Kv, layer: usize, qkv_tq: &Self::Buf, spans: &[Span<'_>]);
    /// Causal attention of the batch's rows over their sequences' pages; `out[T][H C]`, `lse[T][H]`.
    fn attention(
        &self,
        heads: Heads,
        kv: &Self::Kv,
        layer: usize,
        qkv_tq: &Self::Buf,
        spans: &[Span<'_>],
        out_thc: &mut Self::Buf,
        lse_th: &mut Self::Buf,
    );
    /// Backward of [`Backend::attention`] for sequences that lie whole in the batch; writes all of `dqkv`.
    #[expect(clippy::too_many_arguments, reason = "the operands of one fused operation")]
    fn attention_backward(
        &self,
        heads: Heads,
        kv: &Self::Kv,
        layer: usize,
        qkv_tq: &Self::Buf,
        out_thc: &Self::Buf,
        lse_th: &Self::Buf,
        dout_thc: &Self::Buf,
        spans: &[Span<'_>],
        dqkv_tq: &mut Self::Buf,
    );

    /// `h = silu(gate) * up` of fused rows `[gate F][up F]`.
    fn swiglu(&self, gate_up: &Self::Buf, f: usize, h_tf: &mut Self::Buf);
    /// Backward of [`Backend::swiglu`].
    fn swiglu_backward(&self, gate_up: &Self::Buf, dh_tf: &Self::Buf, f: usize, dgate_up: &mut Self::Buf);

    /// Draws the token after each named row: (row of `x`, how, position of the drawn token).
    fn draw(
        &self,
        x_td: &Self::Buf,
        d: usize,
        head: &Self::Linear,
        draws: &[(usize, Draw, u32)],
        seed: u64,
    ) -> Vec<Drawn>;
    /// Logits of all rows, `[T][V]`.
    fn logits(&self, x_td: &Self::Buf, head: &Self::Linear) -> Vec<f32>;
    /// Log-probability, entropy and loss of response tokens without ever holding all logits. With `grads`, also adds the
    /// gradient of the hidden rows and of the head's weight.
    fn policy_head(
        &self,
        x_td: &Self::Buf,
        d: usize,
        head: &Self::Linear,
        targets: &[HeadTarget],
        grads: Option<(&mut Self::Buf, &mut Self::Buf)>,
    ) -> Vec<HeadReport>;

    /// Sum of squares, in f64 over fixed blocks.
    fn sum_of_squares(&self, buf: &Self::Buf) -> f64;
    /// One AdamW step in place (decoupled weight decay, bias correction as in Loshchilov and Hutter 2019).
    fn adamw(&self, p: &mut Self::Buf, g: &Self::Buf, m: &mut Self::Buf, v: &mut Self::Buf, hyper: &AdamW);
}

/// Weights of the query and key norms with epsilon, or none.
pub type Norms<'a, B> = Option<(&'a <B as Backend>::Buf, &'a <B as Backend>::Buf, f32)>;
