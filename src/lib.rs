//! `azr`: Absolute Zero Reasoner. One model proposes Python tasks, a sandboxed executor validates them, the model
//! solves them, and one task-relative REINFORCE++ update per step trains both roles.
//!
//! This file is the map of the house. Modules stand on floors and import only downward (`tests/tidy.rs` checks):
//!
//! | floor | module | its one job |
//! |---|---|---|
//! | 9 | `main.rs` | allocator, parse, run, one line of error with a hint, exit code |
//! | 8 | [`cli`] | flags and TOML to one resolved `Config`; the commands |
//! | 7 | [`eval`] | suites in their public formats, graders, reasoning protocols |
//! | 6 | [`pipeline`], [`pretrain`] | THE self-play loop; the embedded model's pre-training |
//! | 5 | [`selfplay`] | the algorithm as pure functions and plain structs |
//! | 5 | [`train`] | packed sequences, policy-gradient loss, backward twin of the forward, AdamW |
//! | 5 | [`rollout`] | continuous batching over KV pages |
//! | 4 | [`model`] | parameter table and decoder, written once for rollout and training |
//! | 3 | [`compute`] | `trait Backend`: a closed vocabulary of fused ops; the devices |
//! | 3 | [`exec`] | RustPython in supervised, sandboxed processes; knows nothing of models |
//! | 2 | [`weights`] | mapped weights, config.json, atomic checkpoints in Hugging Face layout |
//! | 2 | [`observe`] | the only place that knows log formats |
//! | 1 | [`base`] | run directory, typed events, random numbers, shutdown |
//! | 0 | [`error`] | one error type with hint and exit code |

pub mod error;

/// Floor 1: run directory, typed events, counter-based random numbers, shutdown.
pub mod base {
    pub mod rng;
    pub mod run_dir;
    pub mod stop;
}

/// Floor 2: checkpoints on disk.
pub mod weights {
    pub mod model_files;
    pub mod safetensors;
    pub mod spec;
}

/// Floor 2: logs and progress.
pub mod observe {
    pub mod console;
    pub mod records;
    pub mod sinks;
    pub mod tensorboard;
}

/// Floor 3: the operations that a model is made of, and the devices that run them.
pub mod compute {
    pub mod ops;
    #[cfg(test)]
    pub(crate) mod tests;

    /// The CPU.
    pub mod cpu {
        pub mod attention;
        pub mod attention_block;
        pub mod backend;
        pub mod buffer;
        pub mod gemm;
        pub mod head;
        pub mod math;
        pub mod rows;
    }

    /// An NVIDIA GPU.
    pub mod cuda;
    pub mod cuda_batch;

    /// NVIDIA GPUs: the device layer, and one launcher per kernel.
    pub mod launch {
        pub mod attention;
        pub mod attention_plan;
        pub mod device;
        pub mod gemm;
        pub mod graph;
        pub mod head;
        pub mod images;
        pub mod mark;
        pub mod optim;
        pub mod rows;
        pub mod seats;
        mod staging;
    }
}

/// Floor 3: running programs that nobody has read.
pub mod exec {
    mod arithmetic;
    pub mod child;
    mod constructors;
    pub mod convert;
    pub mod filter;
    mod identity;
    pub mod json;
    pub mod literal;
    pub mod moment;
    pub mod normal_form;
    pub mod number;
    mod patches;
    pub mod policy;
    pub mod pool;
    pub mod protocol;
    mod repr;
    mod rules;
    pub mod sandbox;
    pub mod source;
    pub mod value;
    pub mod worker;
}

/// Floor 4: the decoder.
pub mod model {
    pub mod forward;
    pub mod params;
    pub mod plan;
}

/// Floor 5: training.
pub mod train {
    pub mod backward;
    pub mod loss;
    pub mod optim;
    pub mod pack;
    #[cfg(test)]
    mod tests;
}

/// Floor 5: drawing samples from the model.
pub mod rollout {
    pub mod engine;
    pub mod pages;
    pub mod scheduler;
}

/// Floor 5: the algorithm, pure.
pub mod selfplay {
    pub mod advantage;
    pub mod alarm;
    pub mod buffer;
    pub mod codec;
    pub mod config;
    pub mod constraint;
    pub mod gate;
    pub mod intrinsic;
    pub mod monitor;
    pub mod parse;
    pub mod prompt;
    pub mod reward;
    pub mod task;
    pub mod warmth;
}

/// Floor 6: THE self-play loop.
pub mod pipeline;

/// Floor 6: the embedded model's pre-training on generated programs.
pub mod pretrain;

/// Floor 7: how good a model is.
pub mod eval {
    pub mod builtin;
    pub mod formula;
    pub mod grade;
    pub mod math;
    pub mod pretrained;
    pub mod protocol;
    pub mod report;
    pub mod run;
    pub mod stats;
    pub mod suites;
    pub mod template;
    #[cfg(test)]
    mod tests;
    pub mod watch;
    pub mod words;
}

/// Floor 8: flags and TOML to one resolved configuration; the commands.
pub mod cli;

pub use error::{Error, Result};
