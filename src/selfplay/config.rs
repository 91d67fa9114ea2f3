//! The algorithm's settings. Where the paper and its published code differ, both are here by name, and the default is
//! the sounder one.

use serde::{Deserialize, Serialize};

use crate::exec::source::FunctionRule;
use crate::selfplay::advantage::Baseline;
use crate::selfplay::buffer::{ReferenceSampling, TaskSampling};
use crate::selfplay::gate::GateConfig;
use crate::selfplay::reward::{AcceptProposals, Combine, Extremes, InductionReward};

/// Which tasks the solver gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SolverTasks {
    /// Those of the buffers as the step finds them: proposals of earlier steps (the code).
    PreviousStep,
    /// Valid proposals of this very step first (the paper).
    SameStep,
}

/// What happens to a proposal that is in its buffer already: the same program up to renaming, and for induction the same
/// inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Duplicates {
    /// Stored again (paper and code).
    Allow,
    /// Refused as invalid: no reward, no room in the buffer.
    Refuse,
}

/// Intrinsic reward terms of the proposer: coefficients (0 is off) and the cap of each term.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IntrinsicConfig {
    /// Cognitive complexity / 15.
    pub complexity: f64,
    /// Halstead effort and volume with cyclomatic complexity.
    pub halstead: f64,
    /// Mean edit distance of the syntax from the references'.
    pub edit_distance: f64,
    /// Surprise of the input (abduction), output (deduction) or exception (error).
    pub answer_diversity: f64,
    /// Mean surprise of an induction task's inputs.
    pub input_diversity: f64,
    /// Mean surprise of an induction task's outputs.
    pub output_diversity: f64,
    /// Largest contribution of one term.
    pub max: f64,
    /// How the terms join the learnability.
    pub combine: Combine,
}

impl IntrinsicConfig {
    /// Whether a term needs the answers of earlier tasks counted.
    pub fn needs_counts(&self) -> bool {
        [self.answer_diversity, self.input_diversity, self.output_diversity].iter().any(|c| *c != 0.0)
    }
}

impl Default for IntrinsicConfig {
    fn default() -> Self {
        IntrinsicConfig {
            complexity: 0.0,
            halstead: 0.0,
            edit_distance: 0.0,
            answer_diversity: 0.0,
            input_diversity: 0.0,
            output_diversity: 0.0,
            max: 0.5,
            combine: Combine::Sum,
        }
    }
}

/// Composite functions: proposals that must call programs of the buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompositeConfig {
    /// Probability that a prompt asks for one; 0 is off.
    pub chance: f64,
    /// Most programs to compose.
    pub max_functions: usize,
    /// First step with composites.
    pub start_step: u64,
}

impl Default for CompositeConfig {
    fn default() -> Self {
        CompositeConfig { chance: 0.0, max_functions: 3, start_step: 1 }
    }
}

/// Settings of self-play.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelfPlayConfig {
    /// Prompts per configuration and step, B.
    pub batch_size: usize,
    /// References of a proposer's prompt, K.
    pub num_references: usize,
    /// Solver samples that measure a task's difficulty, n.
    pub num_probes: usize,
    /// Whether proposals are trained on.
    pub train_proposer: bool,
    /// Whether probes are trained on as further solver samples (neither paper nor code).
    pub train_on_probes: bool,
    /// Tasks of the solver.
    pub solver_tasks: SolverTasks,
    /// Answers that the solver gives to each of its tasks (1 in paper and code).
    pub num_answers: usize,
    /// How solver tasks are drawn from a buffer.
    pub task_sampling: TaskSampling,
    /// How references are drawn.
    pub reference_sampling: ReferenceSampling,
    /// Reward of a valid task that all probes solve, or none.
    pub propose_reward: Extremes,
    /// Reward of an induction answer.
    pub induction_reward: InductionReward,
    /// Whether an induction answer is also checked on the pairs that its prompt shows.
    pub check_shown: bool,
    /// Which valid proposals are stored.
    pub accept: AcceptProposals,
    /// Proposals that repeat.
    pub duplicates: Duplicates,
    /// Proposals that teach nothing.
    pub gate: GateConfig,
    /// JSON lines of curated tasks for the solver (`program` with `input`, or with `inputs` and `message`); empty for none.
    pub edge_cases: String,
    /// Share of the solver's tasks that come from `edge_cases`, of the types that have any.
    pub edge_share: f64,
    /// Folder of Python files; proposers of programs are shown one of its functions each, to draw ideas from. Empty for none.
    pub ground: String,
    /// What completions are watched for: JSON lines (`name`, a regular expression `pattern`, and what a hit costs, `penalty`,
    /// 0 by default), or a .py file whose `f(text)` gives the penalty. Empty for nothing.
    pub constraints: String,
    /// Statistics of the advantage.
    pub baseline: Baseline,
    /// Factor of the solver's advantages below 0 (1 in paper and code). Wrong answers say little about what is right: a small
    /// model forgets less when they count for less.
    pub negative_weight: f64,
    /// Functions that a program may define.
    pub function_rule: FunctionRule,
    /// Tasks that a buffer holds; the oldest goes first.
    pub buffer_size: usize,
    /// Seeds per buffer as a multiple of `batch_size`.
    pub seed_factor: usize,
    /// Most passes of seeding, so that a model that proposes nothing valid ends with what there is.
    pub max_seed_passes: u64,
    /// The error task.
    pub error_task: bool,
    /// Intrinsic rewards.
    pub intrinsic: IntrinsicConfig,
    /// Composite functions.
    pub composite: CompositeConfig,
}

impl Default for SelfPlayConfig {
    fn default() -> Self {
        SelfPlayConfig {
            batch_size: 64,
            num_references: 6,
            num_probes: 8,
            train_proposer: true,
            train_on_probes: false,
            solver_tasks: SolverTasks::PreviousStep,
            num_answers: 1,
            task_sampling: TaskSampling::MaxNew,
            reference_sampling: ReferenceSampling::Uniform,
            propose_reward: Extremes::Zero,
            induction_reward: InductionReward::Binary,
            check_shown: false,
            accept: AcceptProposals::All,
            duplicates: Duplicates::Allow,
            gate: GateConfig::default(),
            edge_cases: String::new(),
            edge_share: 0.1,
            ground: String::new(),
            constraints: String::new(),
            baseline: Baseline::Token,
            negative_weight: 1.0,
            function_rule: FunctionRule::Any,
            buffer_size: 16_384,
            seed_factor: 4,
            max_seed_passes: 64,
            error_task: false,
            intrinsic: IntrinsicConfig::default(),
            composite: CompositeConfig::default(),
        }
    }
}
