//! The records of metrics.jsonl and trace.jsonl. Field names are a contract with the tools that read them.

use std::collections::BTreeMap;

use serde::Serialize;

/// One configuration's part of a step.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConfigMetrics {
    /// Trained samples.
    pub num_samples: usize,
    /// Mean reward.
    pub reward: f64,
    /// Share in good format.
    pub format_ok: f64,
    /// Proposals: share that became a task. Solutions: mean accuracy.
    pub accuracy: f64,
    /// Mean length of the response, in tokens.
    pub response_tokens: f64,
    /// Mean entropy of the sampled distributions, in nats.
    pub entropy: f64,
    /// Share of responses that were cut off at the longest length.
    pub truncated: f64,
}

/// One line of metrics.jsonl.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StepMetrics {
    /// Step, from 1.
    pub step: u64,
    /// By configuration.
    pub configs: BTreeMap<String, ConfigMetrics>,
    /// Mean reward of all trained samples.
    pub reward: f64,
    /// Share of proposals that became tasks.
    pub valid: f64,
    /// Variety of the valid proposals, by task type.
    pub variety: BTreeMap<String, serde_json::Value>,
    /// Rejected proposals, by reason.
    pub rejections: BTreeMap<String, usize>,
    /// Completions that hit a constraint, by its name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub constraints: BTreeMap<String, usize>,
    /// Tasks in the buffers, by type.
    pub buffers: BTreeMap<String, usize>,
    /// Tasks in the buffers that are too easy to be drawn, by type, where that rule of the gate is on.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub too_easy: BTreeMap<String, usize>,
    /// Curated tasks among those that the solver got.
    #[serde(skip_serializing_if = "is_default")]
    pub edge_cases: usize,
    /// Prompts left out because they do not fit the model.
    pub prompts_left_out: usize,
    /// Probes drawn.
    pub num_probes: usize,
    /// Loss.
    pub loss: f64,
    /// Gradient norm before clipping; null where it was not finite, and the weights are as they were.
    pub grad_norm: f64,
    /// Temperature of the samples.
    pub temperature: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Share of response tokens where the clip decided.
    pub clip_fraction: f64,
    /// Largest difference between a token's log-probability at sampling and in the update, of tokens that are not stale; 0
    /// when both are the same bits.
    pub logprob_gap: f64,
    /// Response tokens trained on that an earlier step's weights have drawn.
    #[serde(skip_serializing_if = "is_default")]
    pub stale_tokens: u64,
    /// Proposals and solutions left to the next step.
    #[serde(skip_serializing_if = "is_default")]
    pub carried: usize,
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Tokens trained on, prompts included.
    pub trained_tokens: u64,
    /// Sampled tokens per second of the whole step.
    pub tokens_per_s: f64,
    /// Seconds of the step.
    pub step_s: f64,
    /// Seconds in the model while sampling.
    pub rollout_s: f64,
    /// Seconds of waiting for the executor with nothing to sample.
    pub executor_wait_s: f64,
    /// Seconds in which a GPU had nothing to do between decoding steps (0 on the CPU).
    pub device_idle_s: f64,
    /// Their share of the step.
    pub device_idle_share: f64,
    /// Seconds of the update.
    pub update_s: f64,
    /// Programs sent to the executor.
    pub num_programs: u64,
    /// Steps per hour, at this step's pace.
    pub steps_per_hour: f64,
    /// Signs of a collapse that have become alarms, with the steps that they have lasted for.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alarms: BTreeMap<String, u64>,
    /// Accuracy by suite, where the model was evaluated after the step.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, f64>,
    /// Seconds of the evaluation, which are not part of the step's.
    #[serde(skip_serializing_if = "is_default")]
    pub eval_s: f64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// One line of trace.jsonl: a sampled response with all that its reward is computed from.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TraceRecord {
    /// Step.
    pub step: u64,
    /// Id of the sequence.
    pub id: u64,
    /// Configuration.
    pub config: String,
    /// For a probe: id of the proposal whose task it measures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_of: Option<u64>,
    /// Whether the task is a curated one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub edge_case: bool,
    /// Prompt, special tokens by name; left out of all but the first probe of a task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Completion, special tokens by name.
    pub completion: String,
    /// Tokens of the completion.
    pub num_tokens: usize,
    /// Sum of the log-probabilities of its tokens.
    pub logprob: f64,
    /// Whether it keeps to the format.
    pub format_ok: bool,
    /// What the checks said.
    pub verdict: String,
    /// What followed from it beside reward and advantage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The gold answer that it was judged by, or the validated task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<String>,
    /// Accuracy of a solution or probe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Success rate of a valid proposal's probes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<f64>,
    /// Intrinsic reward terms, weighted and capped, where any is on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub intrinsic: Vec<f64>,
    /// Constraints that the completion hits.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub constraints: Vec<String>,
    /// What they cost, where anything; the reward has it subtracted.
    #[serde(skip_serializing_if = "is_default")]
    pub penalty: f64,
    /// Reward; none for probes that are not trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward: Option<f64>,
    /// Advantage; none for what is not trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advantage: Option<f64>,
}
