//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  azr --steps 20                               train the embedded model for 20 steps
  azr --weights Qwen2.5-Coder-3B --preset paper-3b --out runs/coder
  azr --resume runs/coder                      go on with a run, bit for bit
  azr --set selfplay.batch_size=16 --set train.learning_rate=2e-4
  echo '{\"text\": \"def f(x):\"}' | azr score --weights Qwen2.5-Coder-3B

Exit codes: 0 done, 1 failure, 2 wrong command line, 3 wrong configuration or input file, 4 the machine lacks
something, 5 out of memory, 6 the sandbox cannot be enforced, 74 reading or writing failed, 75 stopped by a
signal and resumable.";

/// Absolute Zero Reasoner: teaches a language model to reason by self-play. Without a subcommand it trains.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 110, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of training.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of training.
    #[command(flatten)]
    pub train: TrainArgs,
}

/// Options of training.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Weights: a folder as transformers saves it, or a .safetensors file in one [default: the embedded model]
    #[arg(long, value_name = "PATH", help_heading = "Model")]
    pub weights: Option<PathBuf>,
    /// Train until this step [default: 500]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub steps: Option<u64>,
    /// Directory of the run [default: the next free runs/N]
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub out: Option<PathBuf>,
    /// Go on with the run in DIR [default: --out, else the newest in runs/]
    #[arg(long, value_name = "DIR", num_args = 0..=1, help_heading = "Run")]
    pub resume: Option<Option<PathBuf>>,
    /// Seed of every random draw [default: 1]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub seed: Option<u64>,
    /// Named settings [default: tiny for the embedded model, else the paper's]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Settings")]
    pub preset: Option<Preset>,
    /// TOML file with settings
    #[arg(long, value_name = "FILE", help_heading = "Settings")]
    pub config: Option<PathBuf>,
    /// One setting, as in the file; may be given again
    #[arg(long = "set", value_name = "KEY=VALUE", help_heading = "Settings")]
    pub sets: Vec<String>,
    /// Where the model runs
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Device::Auto, help_heading = "Machine")]
    pub device: Device,
    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub threads: Option<usize>,
    /// Executors of proposed programs [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub executors: Option<usize>,
    /// What must be enforced for programs to run [default: strict]
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Machine")]
    pub sandbox: Option<SandboxMode>,
    /// No progress
    #[arg(long, short, help_heading = "Machine")]
    pub quiet: bool,
}

/// Named settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// The embedded model on a few CPU cores.
    Tiny,
    /// The paper's 3B runs.
    #[value(name = "paper-3b")]
    Paper3b,
    /// The paper's 7B runs.
    #[value(name = "paper-7b")]
    Paper7b,
    /// The paper's 14B runs.
    #[value(name = "paper-14b")]
    Paper14b,
    /// The paper's Llama-3.1-8B run.
    PaperLlama,
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The best there is.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What must be enforced for programs to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// Every layer, or no run.
    Strict,
    /// What the kernel has.
    BestEffort,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Log-probabilities, logits, gradients and continuations of texts, for checks against other frameworks
    Score(ScoreArgs),
    /// Make the embedded model anew: a small decoder, trained on generated programs
    Pretrain(PretrainArgs),
}

/// Options of `score`. Standard input holds JSON lines: {"text": ".."} or {"tokens": [..]}, each with optional
/// "weights": [..], one signed number per token.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Weights [default: the embedded model]
    #[arg(long, value_name = "PATH")]
    pub weights: Option<PathBuf>,
    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Continue each line greedily by at most N tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub generate: usize,
    /// Write logits to a safetensors file: line i as tensor "i", [tokens, vocabulary]
    #[arg(long, value_name = "FILE")]
    pub logits: Option<PathBuf>,
    /// Write gradients of the summed, weighted negative log-likelihood to a safetensors file, by parameter name
    #[arg(long, value_name = "FILE")]
    pub grads: Option<PathBuf>,
    /// Only tokenize: print the token ids of each text
    #[arg(long, conflicts_with_all = ["generate", "logits", "grads", "decode"])]
    pub encode: bool,
    /// Only detokenize: print the text of each line's tokens
    #[arg(long, conflicts_with_all = ["generate", "logits", "grads"])]
    pub decode: bool,
}

/// Options of `pretrain`.
#[derive(Debug, Args)]
pub struct PretrainArgs {
    /// Folder for the model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Tokens to train on
    #[arg(long, value_name = "N", default_value_t = 16_000_000)]
    pub tokens: u64,
    /// Seed of weights and programs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Highest learning rate
    #[arg(long, value_name = "X", default_value_t = 4e-3)]
    pub learning_rate: f64,
    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Only evaluate the model in the folder
    #[arg(long)]
    pub evaluate: bool,
    /// Train the vocabulary instead, and write it as tokenizer.json into the folder
    #[arg(long, conflicts_with = "evaluate")]
    pub vocabulary: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
