//! What a run of a model needs of a GPU, computed without one: bytes by segment, and time by the roofline. A
//! roofline is what bandwidth and products alone would take; what is reached of it is measured by `azr bench`.

use crate::compute::cuda::CudaBackend;
use crate::compute::launch::attention_plan::CHUNK;
use crate::compute::ops::{Backend, MomentPrecision, PAGE};
use crate::model::params::ParamTable;
use crate::weights::spec::ModelSpec;

/// A GPU's memory, and the speeds that large copies and products reach on it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// Bytes of memory.
    pub memory_bytes: f64,
    /// Bytes read or written per second.
    pub bandwidth: f64,
    /// bf16 operations per second.
    pub flops: f64,
}

/// What the driver, the kernels and the allocator's rounding keep for themselves.
const RESERVED_BYTES: f64 = 1.5e9;
/// Seconds to start a kernel inside a graph.
const LAUNCH_S: f64 = 1.3e-6;
/// Rows that a batch of prompts has at most.
const PREFILL_ROWS: f64 = <CudaBackend as Backend>::MAX_ROWS as f64;
/// Kernels of a layer while decoding.
const LAYER_KERNELS: f64 = 10.0;

/// How a model is run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workload {
    /// Tokens of a micro-batch.
    pub micro_batch_tokens: usize,
    /// How moments are kept.
    pub moments: MomentPrecision,
    /// Whether activations are computed again.
    pub recompute: bool,
    /// Sequences that decode at once.
    pub running: usize,
    /// Tokens that the KV pages hold.
    pub kv_tokens: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

/// A part of the memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// What it holds.
    pub name: &'static str,
    /// Bytes.
    pub bytes: f64,
    /// When it is there.
    pub phase: Phase,
}

/// When a segment is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Always.
    Always,
    /// While tokens are drawn.
    Rollout,
    /// While the model is trained.
    Training,
}

/// A model's sizes as formulas need them.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    params: f64,
    layers: f64,
    d: f64,
    f: f64,
    v: f64,
    heads: f64,
    kv_width: f64,
    q_width: f64,
    fused: f64,
    normed: bool,
}

impl Sizes {
    fn of(spec: &ModelSpec) -> Self {
        let table = ParamTable::new(spec);
        let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        Sizes {
            params: table.num_params() as f64,
            layers: spec.num_layers as f64,
            d: spec.hidden_size as f64,
            f: spec.intermediate_size as f64,
            v: spec.vocab_size as f64,
            heads: spec.num_heads as f64,
            kv_width: kv as f64,
            q_width: q as f64,
            fused: (q + 2 * kv) as f64,
            normed: table.layers.first().is_some_and(|l| l.qk_norms.is_some()),
        }
    }

    /// Bytes that a layer's forward pass leaves of a token: what `LayerActs` holds, and the layer's input.
    fn kept_bytes(&self) -> f64 {
        let raw = if self.normed { self.fused } else { 0.0 };
        2.0 * (4.0 * self.d + 2.0 * self.q_width + raw + 3.0 * self.f) + 4.0 * (2.0 + self.heads)
    }

    /// Bytes of a token that one layer's backward pass works with.
    fn working_bytes(&self) -> f64 {
        2.0 * (3.0 * self.d + 2.0 * self.q_width + self.fused + 3.0 * self.f)
    }

    /// Weights of a layer that every token is multiplied with.
    fn layer_weights(&self) -> f64 {
        self.d * (self.fused + self.q_width + 3.0 * self.f)
    }
}

/// Bytes of each segment.
pub fn segments(spec: &ModelSpec, work: &Workload) -> Vec<Segment> {
    let s = Sizes::of(spec);
    let (t, chunk) = (work.micro_batch_tokens as f64, (1u64 << 28) as f64);
    let moment = if work.moments == MomentPrecision::F32 { 8.0 } else { 4.0 };
    let kept = if work.recompute { 2.0 * s.d * s.layers + s.kept_bytes() } else { s.kept_bytes() * s.layers };
    let page_bytes = 4.0 * s.kv_width * s.layers;
    let of = |name, bytes, phase| Segment { name, bytes, phase };
    vec![
        of("weights (bf16)", 2.0 * s.params, Phase::Always),
        of("tails of the f32 masters", 2.0 * s.params, Phase::Always),
        of("gradients (f32)", 4.0 * s.params, Phase::Always),
        of("moments", moment * s.params, Phase::Always),
        of("driver, kernels, rounding", RESERVED_BYTES, Phase::Always),
        of("KV pages", page_bytes * work.kv_tokens as f64, Phase::Rollout),
        of("a batch of prompts' rows", (s.kept_bytes() + 2.0 * s.fused) * PREFILL_ROWS, Phase::Rollout),
        of("head's records", 24.0 * work.running as f64 * s.v / 64.0, Phase::Rollout),
        of("seats of decoding sequences", seat_bytes(spec, work.longest) * work.running as f64, Phase::Rollout),
        of("activations", kept * t, Phase::Training),
        of("KV pages of a micro-batch", page_bytes * t, Phase::Training),
        of("a layer's backward pass", s.working_bytes() * t, Phase::Training),
        of("a chunk of the head's gradient", 2.0 * chunk.min(t * s.v) + 16.0 * t * s.v / 64.0, Phase::Training),
    ]
}

/// Bytes of a decoding sequence's seat: partial sums of its attention by chunk and head, and its page table.
fn seat_bytes(spec: &ModelSpec, longest: usize) -> f64 {
    let parts = longest.div_ceil(CHUNK) * spec.num_heads * (spec.head_dim + 2);
    4.0 * (parts + longest.div_ceil(PAGE)) as f64
}

/// Most bytes that are in use at once.
pub fn peak_bytes(segments: &[Segment]) -> f64 {
    let sum = |phase| segments.iter().filter(|s| s.phase == phase).map(|s| s.bytes).sum::<f64>();
    sum(Phase::Always) + sum(Phase::Rollout).max(sum(Phase::Training))
}

/// Tokens that KV pages can hold beside everything that is always there.
pub fn kv_room(spec: &ModelSpec, work: &Workload, gpu: &Gpu) -> usize {
    let s = Sizes::of(spec);
    let without = segments(spec, &Workload { kv_tokens: 0, ..*work });
    let taken: f64 = without.iter().filter(|s| s.phase != Phase::Training).map(|s| s.bytes).sum();
    ((gpu.memory_bytes - taken) / (4.0 * s.kv_width * s.layers)).max(0.0) as usize
}

/// Seconds of one decoding step of `batch` sequences with `context` keys each: every weight is read once or multiplied,
/// whichever takes longer; keys and values are read once; kernels are started.
pub fn decode_s(spec: &ModelSpec, batch: usize, context: usize, gpu: &Gpu) -> f64 {
    let s = Sizes::of(spec);
    let weights = s.layer_weights() * s.layers + s.d * s.v;
    let products = (2.0 * weights / gpu.bandwidth).max(2.0 * batch as f64 * weights / gpu.flops);
    let keys = batch as f64 * context as f64 * 4.0 * s.layers * s.kv_width / gpu.bandwidth;
    products + keys + LAYER_KERNELS * s.layers * LAUNCH_S
}

/// Operations of one token's forward pass: products, and attention over half of `length` keys. `head` as a share: 1 when
/// its logits are computed.
pub fn forward_flops(spec: &ModelSpec, length: usize, head: f64) -> f64 {
    let s = Sizes::of(spec);
    2.0 * (s.layer_weights() * s.layers + head * s.d * s.v) + 2.0 * length as f64 * s.layers * s.q_width
}

/// Operations of one token's forward and backward pass in sequences of `length`, a share `response` of whose tokens have a
/// loss.
pub fn training_flops(spec: &ModelSpec, length: usize, response: f64) -> f64 {
    let s = Sizes::of(spec);
    let products = 6.0 * (s.layer_weights() * s.layers + response * s.d * s.v);
    products + 7.0 * length as f64 * s.layers * s.q_width
}

/// A self-play step: how much is drawn and trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepShape {
    /// Samples that are trained.
    pub trained: usize,
    /// Probes of proposed tasks.
    pub probes: usize,
    /// Mean tokens of a prompt.
    pub prompt: usize,
    /// Mean tokens of a response.
    pub response: usize,
    /// Prompts that are run once for several samples: probes of one task.
    pub probes_per_prompt: usize,
}

/// The paper's batch: 64 prompts of each of six configurations, 8 probes of each of 192 proposals.
pub const PAPER: StepShape =
    StepShape { trained: 384, probes: 1536, prompt: 1000, response: 800, probes_per_prompt: 8 };

/// Seconds of a step's parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// Running prompts.
    pub prefill_s: f64,
    /// Drawing tokens.
    pub decode_s: f64,
    /// Forward, backward and update.
    pub train_s: f64,
}

impl StepTime {
    /// All of them.
    pub fn total_s(&self) -> f64 {
        self.prefill_s + self.decode_s + self.train_s
    }
}

/// Seconds of a self-play step by the roofline.
pub fn step_time(spec: &ModelSpec, work: &Workload, shape: &StepShape, gpu: &Gpu) -> StepTime {
    let s = Sizes::of(spec);
    let prompts = shape.trained + shape.probes / shape.probes_per_prompt.max(1);
    let prefill = prompts as f64 * shape.prompt as f64 * forward_flops(spec, shape.prompt, 0.0) / gpu.flops;
    let tokens = (shape.trained + shape.probes) as f64 * shape.response as f64;
    let context = shape.prompt + shape.response / 2;
    let decode = tokens / work.running as f64 * decode_s(spec, work.running, context, gpu);
    let (length, response) = (shape.prompt + shape.response, shape.response as f64);
    let again = if work.recompute { forward_flops(spec, length, 0.0) } else { 0.0 };
    let flops = training_flops(spec, length, response / length as f64) + again;
    let moments = if work.moments == MomentPrecision::F32 { 32.0 } else { 24.0 };
    let update = moments * s.params / gpu.bandwidth;
    let train = shape.trained as f64 * length as f64 * flops / gpu.flops + update;
    StepTime { prefill_s: prefill, decode_s: decode, train_s: train }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::spec::qwen25;

    const H200: Gpu = Gpu { memory_bytes: 141e9, bandwidth: 4.3e12, flops: 790e12 };

    fn work() -> Workload {
        Workload {
            micro_batch_tokens: 8192,
            moments: MomentPrecision::Bf16,
            recompute: true,
            running: 256,
            kv_tokens: 256 * 2048,
            longest: 4096,
        }
    }

    #[test]
    fn decoding_rooflines_are_those_that_were_computed_by_hand() {
        // Tokens per second at a batch of 256 and a mean context of 2,048, launches not counted.
        for (name, expected) in [("0.5B", 141e3), ("1.5B", 57e3), ("3B", 39e3), ("7B", 22e3)] {
            let spec = qwen25(name).expect("a size");
            let launches = LAYER_KERNELS * spec.num_layers as f64 * LAUNCH_S;
            let rate = 256.0 / (decode_s(&spec, 256, 2048, &H200) - launches);
            assert!((rate / expected - 1.0).abs() < 0.1, "{name}: {rate} tokens/s");
        }
    }

    #[test]
    fn seven_billion_parameters_are_trained_on_one_h200() {
        let spec = qwen25("7B").expect("a size");
        assert!((ParamTable::new(&spec).num_params() as f64 / 7.616e9 - 1.0).abs() < 0.001);
        let all = segments(&spec, &work());
        assert!(peak_bytes(&all) < 139e9, "{all:?}");
        let plain = Workload { moments: MomentPrecision::F32, recompute: false, ..work() };
        assert!(peak_bytes(&segments(&spec, &plain)) > 141e9, "without bf16 moments and recomputation it does not fit");
        let room = kv_room(&spec, &work(), &H200);
        assert!(room > 256 * 2048, "{room} tokens");
    }

    #[test]
    fn what_is_not_in_use_at_once_does_not_add_up() {
        let of = |bytes, phase| Segment { name: "", bytes, phase };
        let all = [of(5.0, Phase::Always), of(3.0, Phase::Rollout), of(1.0, Phase::Training), of(1.0, Phase::Training)];
        assert_eq!(peak_bytes(&all), 8.0);
    }

    #[test]
    fn a_step_takes_longer_where_more_is_done() {
        let spec = qwen25("3B").expect("a size");
        let base = step_time(&spec, &work(), &PAPER, &H200);
        let more = StepShape { response: 1600, ..PAPER };
        let longer = step_time(&spec, &work(), &more, &H200);
        assert!(longer.decode_s > 2.0 * base.decode_s && longer.prefill_s == base.prefill_s);
        let kept = step_time(&spec, &Workload { recompute: false, ..work() }, &PAPER, &H200);
        assert!(kept.train_s < base.train_s && base.total_s() > base.decode_s + base.train_s);
    }
}
