//! Every setting of a run. Defaults are those of a full-size run on given weights; presets and layers are `cli`'s.

use serde::{Deserialize, Serialize};

use crate::compute::cpu::backend::MAX_THREADS;
use crate::compute::ops::MomentPrecision;
use crate::error::{Error, Result};
use crate::exec::pool::{PoolConfig, Sandbox};
use crate::exec::protocol::{MAX_CPU_S, MAX_MEMORY_MIB};
use crate::selfplay::alarm::OnCollapse;
use crate::selfplay::config::SelfPlayConfig;
use crate::train::loss::LossAggregation;
use crate::train::optim::OptimConfig;

/// Prompt format, or the choice by the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptFormat {
    /// Compact where the tokenizer has the compact format's special tokens, else azr.
    Auto,
    /// English prompts.
    Azr,
    /// Special tokens.
    Compact,
}

/// Sampling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutConfig {
    /// Temperature of proposals, solutions and probes.
    pub temperature: f64,
    /// Share of the first steps' entropy that is kept by raising the temperature as the model becomes surer; 0 leaves the
    /// temperature as it is.
    pub hold_entropy: f64,
    /// Longest prompt, in tokens.
    pub max_prompt: usize,
    /// Longest completion of the proposer, in tokens.
    pub max_propose: usize,
    /// Longest completion of the solver, in tokens.
    pub max_solve: usize,
    /// Sequences that are sampled at once; 0 chooses by the device.
    pub max_running: usize,
    /// Tokens that the KV cache holds; 0 chooses by `max_running`.
    pub kv_tokens: usize,
    /// Most tokens that one step draws of a sample; what is longer goes on in the next step and is trained where it ends. 0
    /// lets every sample end in its step.
    pub straggler_tokens: usize,
    /// Steps that proposals may be drawn ahead of their own, 0 or 1, so that the batch stays full while a step ends.
    pub max_lag: usize,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        RolloutConfig {
            temperature: 1.0,
            hold_entropy: 0.0,
            max_prompt: 6144,
            max_propose: 8096,
            max_solve: 8096,
            max_running: 0,
            kv_tokens: 0,
            straggler_tokens: 0,
            max_lag: 0,
        }
    }
}

/// The update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Learning rate, constant.
    pub learning_rate: f64,
    /// Factor of the learning rate for the norm before the head. Its weights are the scale of all logits: how sure the model
    /// is. At the rate that suits matrices a small model becomes surer of single answers long before it does in general. The
    /// norm's weight decay has the factor as well.
    pub final_norm_rate: f64,
    /// AdamW: decay of the first moment.
    pub beta1: f64,
    /// AdamW: decay of the second moment.
    pub beta2: f64,
    /// AdamW: added to the root of the second moment.
    pub eps: f64,
    /// AdamW: decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 does not clip.
    pub grad_clip: f64,
    /// Clip range of the probability ratio below 1.
    pub clip_low: f64,
    /// Clip range of the probability ratio above 1.
    pub clip_high: f64,
    /// Weight of the entropy bonus.
    pub entropy_coef: f64,
    /// How token losses are averaged.
    pub loss_aggregation: LossAggregation,
    /// Tokens of one forward and backward pass.
    pub micro_batch_tokens: usize,
    /// AdamW: how moments are kept. bf16 saves 4 bytes a parameter.
    pub moments: MomentPrecision,
    /// Whether activations are computed again for the backward pass: less memory, a third more work, the same bits.
    pub recompute: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            learning_rate: 1e-6,
            final_norm_rate: 1.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            grad_clip: 1.0,
            clip_low: 0.2,
            clip_high: 0.2,
            entropy_coef: 0.001,
            loss_aggregation: LossAggregation::TokenMean,
            micro_batch_tokens: 8192,
            moments: MomentPrecision::F32,
            recompute: false,
        }
    }
}

impl TrainConfig {
    /// Constants of the optimiser, and the run's seed.
    pub fn optim(&self, seed: u64) -> OptimConfig {
        OptimConfig {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            eps: self.eps as f32,
            weight_decay: self.weight_decay as f32,
            final_norm_rate: self.final_norm_rate as f32,
            grad_clip: self.grad_clip as f32,
            micro_batch_tokens: self.micro_batch_tokens,
            moments: self.moments,
            recompute: self.recompute,
            seed,
        }
    }
}

/// Limits of programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecutorConfig {
    /// CPU limit of one call of a proposal, in milliseconds.
    pub cpu_ms_propose: u64,
    /// CPU limit of one call of an answer, in milliseconds; larger, so that a borderline task does not flip.
    pub cpu_ms_answer: u64,
    /// Memory that one call may add, in MiB.
    pub memory_mib: u64,
    /// What must be enforced for programs to run.
    pub sandbox: Sandbox,
}

impl Default for ExecutorConfig {
    fn default() -> Self {
        ExecutorConfig { cpu_ms_propose: 300, cpu_ms_answer: 1000, memory_mib: 256, sandbox: Sandbox::Strict }
    }
}

impl ExecutorConfig {
    /// Settings of a pool with so many supervisors.
    pub fn pool(&self, num_workers: usize) -> PoolConfig {
        PoolConfig {
            num_workers,
            cpu_ms_propose: self.cpu_ms_propose,
            cpu_ms_answer: self.cpu_ms_answer,
            memory_bytes: self.memory_mib << 20,
            sandbox: self.sandbox,
            ..PoolConfig::default()
        }
    }
}

/// When checkpoints are written, and how many stay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Every so many steps; 0 does not count steps.
    pub every_steps: u64,
    /// Every so many minutes; 0 does not look at the clock.
    pub every_minutes: f64,
    /// Checkpoints that stay; 0 keeps all.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every_steps: 10, every_minutes: 30.0, keep: 3 }
    }
}

/// Signs of a collapse.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlarmConfig {
    /// What is done about an alarm.
    pub on_collapse: OnCollapse,
    /// Steps that a sign must last for.
    pub patience: u64,
}

impl Default for AlarmConfig {
    fn default() -> Self {
        AlarmConfig { on_collapse: OnCollapse::Warn, patience: 10 }
    }
}

/// Evaluation while training. It has random numbers of its own and changes nothing of the training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Every so many steps, before the first and after the last; 0 is never.
    pub every_steps: u64,
    /// Suites: files, or builtin and grammar.
    pub suites: Vec<String>,
    /// Programs per level of builtin and grammar, each asked about in three ways.
    pub num_builtin: usize,
    /// Questions of each file; 0 takes all.
    pub limit: usize,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f64,
}

/// Most that the last norm may change a step, whose weights are about 1, unless everything may change by more.
const MAX_RATE: f64 = 0.05;

impl Default for EvalConfig {
    fn default() -> Self {
        EvalConfig { every_steps: 0, suites: vec!["builtin".to_owned()], num_builtin: 32, limit: 0, temperature: 0.0 }
    }
}

/// A run. Threads, executors, steps and what is logged may change between a run and its resumption without changing its result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Weights: a folder, a .safetensors file, or empty for the embedded model.
    pub weights: String,
    /// Steps to train, seeding not counted.
    pub steps: u64,
    /// Seed of every random draw.
    pub seed: u64,
    /// Compute threads; 0 takes all cores.
    pub threads: usize,
    /// Executor supervisors; 0 takes all cores.
    pub executors: usize,
    /// Prompt format.
    pub prompt_format: PromptFormat,
    /// Every so many steps their completions go to trace.jsonl, which grows by a line for each; 0 is never.
    pub trace_every: u64,
    /// File that seeds are read from, or written to where it does not exist; empty for none.
    pub seeds: String,
    /// The algorithm.
    pub selfplay: SelfPlayConfig,
    /// Sampling.
    pub rollout: RolloutConfig,
    /// The update.
    pub train: TrainConfig,
    /// Limits of programs.
    pub executor: ExecutorConfig,
    /// Checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Signs of a collapse.
    pub alarm: AlarmConfig,
    /// Evaluation while training.
    pub eval: EvalConfig,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            weights: String::new(),
            steps: 500,
            seed: 1,
            threads: 0,
            executors: 0,
            prompt_format: PromptFormat::Auto,
            trace_every: 1,
            seeds: String::new(),
            selfplay: SelfPlayConfig::default(),
            rollout: RolloutConfig::default(),
            train: TrainConfig::default(),
            executor: ExecutorConfig::default(),
            checkpoint: CheckpointConfig::default(),
            alarm: AlarmConfig::default(),
            eval: EvalConfig::default(),
        }
    }
}

impl Config {
    /// Refuses values that make no sense, by name.
    ///
    /// # Errors
    /// The first such value.
    pub fn check(&self) -> Result<()> {
        let (s, r, t, e) = (&self.selfplay, &self.rollout, &self.train, &self.executor);
        let at_least_one = [
            ("selfplay.batch_size", s.batch_size),
            ("selfplay.num_probes", s.num_probes),
            ("selfplay.num_answers", s.num_answers),
            ("selfplay.buffer_size", s.buffer_size),
            ("selfplay.seed_factor", s.seed_factor),
            ("rollout.max_prompt", r.max_prompt),
            ("rollout.max_propose", r.max_propose),
            ("rollout.max_solve", r.max_solve),
            ("train.micro_batch_tokens", t.micro_batch_tokens),
            ("executor.cpu_ms_propose", e.cpu_ms_propose as usize),
            ("executor.cpu_ms_answer", e.cpu_ms_answer as usize),
            ("executor.memory_mib", e.memory_mib as usize),
            ("eval.num_builtin", self.eval.num_builtin),
            ("alarm.patience", self.alarm.patience as usize),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, n)| *n == 0) {
            return Err(Error::config(format!("{name} must be at least 1")));
        }
        let max_cpu_ms = 1000 * MAX_CPU_S as usize;
        // Ids of sequences keep 31 bits for the step, 16 for the index in a configuration and 8 for the probe or the answer.
        for (name, value, limit) in [
            ("selfplay.batch_size", s.batch_size, 1 << 16),
            ("selfplay.num_probes", s.num_probes, 255),
            ("selfplay.num_answers", s.num_answers, 256),
            ("executor.memory_mib", e.memory_mib as usize, MAX_MEMORY_MIB as usize),
            ("rollout.max_lag", r.max_lag, 1),
            ("rollout.max_running", r.max_running, 1 << 16),
            ("selfplay.num_references", s.num_references, 64),
            ("selfplay.seed_factor", s.seed_factor, 1 << 16),
            ("executor.cpu_ms_propose", e.cpu_ms_propose as usize, max_cpu_ms),
            ("executor.cpu_ms_answer", e.cpu_ms_answer as usize, max_cpu_ms),
            ("steps", self.steps as usize, (1 << 31) - 1),
            ("threads", self.threads, MAX_THREADS),
            ("executors", self.executors, MAX_THREADS),
            ("selfplay.composite.max_functions", s.composite.max_functions, 16),
        ] {
            if value > limit {
                return Err(Error::config(format!("{name} is {value}; the most is {limit}")));
            }
        }
        let in_range = |name: &str, value: f64, low: f64, high: f64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::config(format!("{name} is {value}; it lies between {low} and {high}")))
            }
        };
        in_range("rollout.temperature", r.temperature, 0.01, 100.0)?;
        in_range("rollout.hold_entropy", r.hold_entropy, 0.0, 1.0)?;
        in_range("train.learning_rate", t.learning_rate, 0.0, 1.0)?;
        in_range("train.beta1", t.beta1, 0.0, 0.999_999)?;
        in_range("train.beta2", t.beta2, 0.0, 0.999_999_9)?;
        in_range("train.eps", t.eps, 1e-16, 1.0)?;
        in_range("train.weight_decay", t.weight_decay, 0.0, 1.0)?;
        in_range("train.final_norm_rate", t.final_norm_rate, 0.0, 1e6)?;
        let last = t.learning_rate * t.final_norm_rate;
        if last > MAX_RATE.max(t.learning_rate) {
            return Err(Error::config(format!(
                "train.learning_rate times train.final_norm_rate is {last:.2}: the last norm would change by that much a step"
            ))
            .with_hint(format!("lower train.final_norm_rate, so that it is at most {MAX_RATE}")));
        }
        in_range("train.grad_clip", t.grad_clip, 0.0, 1e9)?;
        in_range("train.clip_low", t.clip_low, 0.0, 1.0)?;
        in_range("train.clip_high", t.clip_high, 0.0, 1e9)?;
        in_range("train.entropy_coef", t.entropy_coef, -1.0, 1.0)?;
        in_range("selfplay.gate.max_guess", s.gate.max_guess, 0.0, 1.0)?;
        in_range("selfplay.gate.misleading", s.gate.misleading, 0.0, 1.0)?;
        in_range("selfplay.edge_share", s.edge_share, 0.0, 1.0)?;
        in_range("selfplay.negative_weight", s.negative_weight, 0.0, 1.0)?;
        in_range("selfplay.composite.chance", s.composite.chance, 0.0, 1.0)?;
        for (name, value) in [
            ("complexity", s.intrinsic.complexity),
            ("halstead", s.intrinsic.halstead),
            ("edit_distance", s.intrinsic.edit_distance),
            ("answer_diversity", s.intrinsic.answer_diversity),
            ("input_diversity", s.intrinsic.input_diversity),
            ("output_diversity", s.intrinsic.output_diversity),
            ("max", s.intrinsic.max),
        ] {
            in_range(&format!("selfplay.intrinsic.{name}"), value, -1e6, 1e6)?;
        }
        in_range("eval.temperature", self.eval.temperature, 0.0, 100.0)?;
        in_range("checkpoint.every_minutes", self.checkpoint.every_minutes, 0.0, 1e9)
    }

    /// Compute threads, cores where 0.
    pub fn num_threads(&self) -> usize {
        if self.threads > 0 { self.threads } else { cores() }
    }

    /// Executor supervisors, cores where 0.
    pub fn num_executors(&self) -> usize {
        if self.executors > 0 { self.executors } else { cores() }
    }
}

/// Cores of this machine.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
