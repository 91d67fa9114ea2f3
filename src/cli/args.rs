//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::eval::protocol::Protocol;
use crate::eval::suites::Format;
use crate::eval::template::Template;
use crate::exec::protocol::{Limits, MAX_MEMORY_MIB, Profile};

const EXAMPLES: &str = "\
Examples:
  azr --steps 20                               train the embedded model for 20 steps
  azr --weights Qwen2.5-Coder-3B --preset paper-3b --out runs/coder
  azr --resume runs/coder                      go on with a run, bit for bit
  azr --set selfplay.batch_size=16 --set rollout.hold_entropy=0
  echo '{\"text\": \"def f(x):\"}' | azr score --weights Qwen2.5-Coder-3B
  echo '{\"program\": \"def f(x): return x\", \"input\": \"1\"}' | azr exec

Exit codes: 0 done, 1 failure, 2 wrong command line, 3 wrong configuration or input file, 4 the machine lacks
something, 5 out of memory, 6 the sandbox cannot be enforced, 74 reading or writing failed, 75 stopped by a
signal and resumable.";

const BENCH_HELP: &str = "\
Rooflines use two speeds of this machine that are measured first: bytes per second of a large copy (BW) and operations per
second of a large product (F). A decoding step of B sequences with c keys each takes at least
  max(2 W / BW, 2 B W / F) + B c 4 L G C / BW + 10 L 1.3 us
for W weights outside the embedding, L layers, G key/value heads of width C, 2 bytes a number. A trained token takes
  6 W' + 7 n L H C operations
in sequences of n tokens, W' being W with the head counted for response tokens only.
Models that fit a cache can exceed the roofline of memory.";

const EXEC_HELP: &str = "\
Input, one JSON object per line:
  {\"program\": \"def f(x): return x\", \"calls\": [{\"args\": \"1\", \"expect\": \"1\"}, {\"args\": [\"a\"]}]}
  {\"program\": .., \"inputs\": [\"1\", \"2\"], \"outputs\": [\"1\", \"2\"]}     many inputs, one program
  {\"code\": .., \"input\": \"1, 2\", \"output\": \"3\"}                   one input (CRUXEval)
  {\"code\": .., \"test_list\": [\"assert f(1) == 1\"]}               tests (MBPP)
  {\"prompt\": .., \"canonical_solution\": .., \"test\": .., \"entry_point\": ..}   whole program (HumanEval)
  {\"program\": ..}                                             only runs it
A string as argument or expected value is Python text, any other JSON stands for itself. Optional in every line:
\"id\" (comes back), \"entry\" (function to call, else f), \"profile\", \"limits\" {\"cpu_ms\", \"wall_ms\", \"memory_mib\"}, which
hold for one call.

Output, one JSON object per line, in the order of the input:
  {\"verdict\": \"value\", \"passed\": true, \"calls\": [{\"verdict\": \"value\", \"value\": \"1\", \"json\": 1, \"equal\": true}],
   \"cpu_ms\": 0.9, \"memory_mib\": 0.1}
Verdicts: value, exception, timeout_cpu, timeout_wall, out_of_memory, policy (forbidden system call), crash,
output_too_large, unsupported (module or type of value), bad_args, not_deterministic, set_order (depends on the order
of a set); rejected_syntax, rejected_policy; bad_request. A line's verdict is that of its first call that gave no value.

Profiles: run executes anything, and arguments and expected values may be any expression; answer and propose are what
training uses: arguments and expected values are literals, the import and name policy holds, and propose also runs
everything three times in two processes to see whether it is deterministic. The sandbox is the same for all.
With --recheck a call whose value changes when it is run elsewhere, with sets giving their members in reverse, keeps its
value and gets \"unstable\": \"set_order\" or \"not_deterministic\" beside it; that takes twice the time.

Values are compared as values, as Python's == does, never by the program. Differences from CPython 3.11: sets give their
members in the order of insertion; messages of exceptions; numpy, sympy and the like are not there.";

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
    #[arg(long, value_name = "PATH", help_heading = "Model", conflicts_with = "resume")]
    pub weights: Option<PathBuf>,
    /// Train until this step [default: 500, with tiny 100]
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
    /// Evaluate the model every N steps, before the first and after the last
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub eval_every: Option<u64>,
    /// What to evaluate on, as azr eval takes it; may be given again [default: builtin]
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub eval_suite: Vec<PathBuf>,
    /// Named settings [default: tiny for the embedded model, else the paper's]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Settings", conflicts_with = "resume")]
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
    /// Run Python programs in the sandbox: JSON lines in, verdicts out in the same order
    #[command(after_help = EXEC_HELP)]
    Exec(ExecArgs),
    /// Tell what this machine and this build have, and whether a run would start
    Doctor(DoctorArgs),
    /// Check a device: every operation against the CPU, the same bits twice, drawn log-probabilities that are the trainer's
    Selftest(SelftestArgs),
    /// Measure decoding, training, whole steps and the executor, beside the roofline of this machine
    #[command(after_help = BENCH_HELP)]
    Bench(BenchArgs),
    /// Memory and expected speed of a model on a GPU, computed without either
    Plan(PlanArgs),
    /// Make the embedded model anew: a small decoder, trained on generated programs
    Pretrain(PretrainArgs),
    /// Accuracy on suites in their public file formats, or two models compared
    #[command(after_help = EVAL_HELP)]
    Eval(EvalArgs),
    /// Answer one question: words, a task file, or standard input
    Solve(SolveArgs),
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

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// What must be enforced for programs to run
    #[arg(long, value_enum, value_name = "MODE", default_value_t = SandboxMode::Strict)]
    pub sandbox: SandboxMode,
    /// One JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Executors that run at once [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024).map(usize::from))]
    pub executors: Option<usize>,
    /// What must be enforced for programs to run
    #[arg(long, value_enum, value_name = "MODE", default_value_t = SandboxMode::Strict)]
    pub sandbox: SandboxMode,
    /// Checks and limits of lines that name none
    #[arg(long, value_enum, value_name = "NAME", default_value_t = ExecProfile::Run)]
    pub profile: ExecProfile,
    /// Processor time of one call, in milliseconds [default: 4000, answer 1000, propose 300]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub cpu_ms: Option<u64>,
    /// Time on the wall of one call, in milliseconds [default: sixty times the processor time]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=36_000_000))]
    pub wall_ms: Option<u64>,
    /// Memory of one call, in MiB [default: 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_MEMORY_MIB))]
    pub memory_mib: Option<u64>,
    /// Run what came to a value once more in another process, with sets reversed, and mark what changes
    #[arg(long)]
    pub recheck: bool,
    /// Measure speed instead, beside CPython where there is a python3
    #[arg(long, conflicts_with = "soak")]
    pub bench: bool,
    /// Run N mixed tasks instead, hostile ones among them, and fail unless descriptors, processes and memory stay flat
    #[arg(long, value_name = "N")]
    pub soak: Option<u64>,
}

impl ExecArgs {
    /// A profile's limits as the command line changes them.
    pub fn limits(&self, profile: Limits) -> Limits {
        Limits { wall_ms: self.wall_ms.unwrap_or(profile.wall_ms), ..profile }
    }
}

/// Checks and limits of programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExecProfile {
    /// Any program; calls are source.
    Run,
    /// As training runs answers.
    Answer,
    /// As training validates proposals.
    Propose,
}

impl From<ExecProfile> for Profile {
    fn from(profile: ExecProfile) -> Self {
        match profile {
            ExecProfile::Run => Profile::Run,
            ExecProfile::Answer => Profile::Answer,
            ExecProfile::Propose => Profile::Propose,
        }
    }
}

/// Options of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, value_name = "PART", default_value_t = BenchPart::All)]
    pub part: BenchPart,
    /// A config.json, the folder of one, or 0.5B, 1.5B, 3B or 7B for Qwen2.5; weights are random [default: the embedded one]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Where the model runs
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Device::Auto)]
    pub device: Device,
    /// Compute threads, and executors [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Sequences that decode at once [default: 256, CPU 32]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub batch: Option<usize>,
    /// Keys of each when decoding begins [default: 2048, CPU 256]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub context: Option<usize>,
    /// Decoding steps that are timed
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one())]
    pub steps: usize,
    /// Sequences of a training step [default: 16]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub sequences: Option<usize>,
    /// Tokens of each [default: 2048, CPU 256]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub length: Option<usize>,
    /// Of these without a loss, as a prompt's have none [default: half]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub prompt: Option<usize>,
    /// Tokens of a micro-batch [default: 8192]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub micro_batch_tokens: Option<usize>,
    /// Moments in bf16
    #[arg(long)]
    pub bf16_moments: bool,
    /// Activations computed again
    #[arg(long)]
    pub recompute: bool,
    /// What a step draws and trains [default: paper, CPU short]
    #[arg(long, value_enum, value_name = "NAME")]
    pub workload: Option<BenchWorkload>,
    /// Decode with smaller batches and contexts as well
    #[arg(long)]
    pub curves: bool,
    /// Tiny sizes, to see that everything runs
    #[arg(long)]
    pub small: bool,
    /// Results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Compare two files of results instead
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"])]
    pub compare: Vec<PathBuf>,
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchPart {
    /// Decoding steps at a fixed batch and context.
    Decode,
    /// Forward, backward and update.
    Train,
    /// Drawing and training of a step's samples.
    Step,
    /// Programs and verdicts.
    Executor,
    /// All of these.
    All,
}

/// What a step draws and trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchWorkload {
    /// 384 trained samples and 1,536 probes; prompts of 1,000 and responses of 800 tokens on average.
    Paper,
    /// 24 and 48; 96 and 64 tokens.
    Short,
}

/// Options of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// A config.json, the folder of one, or 0.5B, 1.5B, 3B or 7B for Qwen2.5 of that size
    #[arg(long, value_name = "MODEL")]
    pub weights: String,
    /// The GPU: h200, h100, a100, or its memory (141GB)
    #[arg(long, value_name = "GPU", default_value = "h200")]
    pub gpu: String,
    /// Sequences that decode at once
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one())]
    pub batch: usize,
    /// Mean tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = at_least_one())]
    pub prompt: usize,
    /// Mean tokens of a response
    #[arg(long, value_name = "N", default_value_t = 800, value_parser = at_least_one())]
    pub response: usize,
    /// Tokens of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = at_least_one())]
    pub micro_batch_tokens: usize,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// A number that is not 0, and small enough to compute with.
fn at_least_one() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u32).range(1..=100_000_000).map(|n| n as usize)
}

/// Options of `selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// The device
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Device::Auto)]
    pub device: Device,
    /// Small shapes, few rounds
    #[arg(long)]
    pub quick: bool,
}

const EVAL_HELP: &str = "\
Suites are JSON lines (or one JSON array) in their public formats, recognised from their fields:
  cruxeval       code, input, output: two suites, NAME-i asks for the input and NAME-o for the output
  livecodebench  code, input (a call), output, function_name: execution
  humaneval      prompt, entry_point, test; or EvalPlus's base_input, plus_input and canonical_solution
  mbpp           text or prompt, test_list, and test where it is MBPP+
  gsm8k          question, answer ending in #### gold
  math           problem or question, answer, final_answer or a solution with \\boxed: MATH, AMC, AIME, OlympiadBench
  strategyqa     question, answer true or false
  drop           passage, question, answers_spans or answer and validated_answers; or DROP's own file
  azr            kind, program, pairs: tasks as self-play stores them
builtin holds generated tasks over program templates that the embedded model's pre-training has not seen; grammar holds
easier ones, over programs of its own generator that were left out.

Programs run in the sandbox on RustPython. Tests that import numpy get a stand-in for numpy.allclose; other modules
outside the standard library are not there. MBPP+ is read as a data set (`test`), not as EvalPlus's own file.

With --out, DIR/results.json has the shape of lm-evaluation-harness and DIR/samples.jsonl a record per item;
--compare takes two of the latter and tests whether one model is better (McNemar, exact, two-sided).";

/// The model, and how it answers.
#[derive(Debug, Args)]
pub struct AnswerArgs {
    /// Weights [default: the embedded model]
    #[arg(long, value_name = "PATH", help_heading = "Model")]
    pub weights: Option<PathBuf>,
    /// Prompt template; -direct without thinking
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = PossibleValuesParser::new(Template::NAMES), help_heading = "Model")]
    pub template: String,
    /// Longest completion, in tokens [default: 128 for compact prompts, else 2048]
    #[arg(long, value_name = "N", value_parser = at_least_one(), help_heading = "Model")]
    pub max_new: Option<usize>,
    /// Longest prompt and completion, in tokens, up to the model's own limit
    #[arg(long, value_name = "N", default_value_t = 8192, help_heading = "Model")]
    pub context: usize,
    /// Sampling temperature; 0 is greedy [default: 0, or 0.8 for several samples]
    #[arg(long, value_name = "X", help_heading = "Model")]
    pub temperature: Option<f32>,
    /// Draw from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Model")]
    pub top_p: f32,
    /// Draw from so many of the likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Model")]
    pub top_k: usize,
    /// Seed of every random draw
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Model")]
    pub seed: u64,
    /// How a question is worked on
    #[arg(long, value_name = "NAME", default_value = "direct", value_parser = PossibleValuesParser::new(Protocol::NAMED.map(|p| p.0)), help_heading = "Protocol")]
    pub protocol: String,
    /// Completions of a vote
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = up_to(1024), help_heading = "Protocol")]
    pub paths: usize,
    /// Turns of ReAct, attempts of Reflexion
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = up_to(1024), help_heading = "Protocol")]
    pub rounds: usize,
    /// Tokens that one attempt may sample in all [default: no limit]
    #[arg(long, value_name = "N", value_parser = at_least_one(), help_heading = "Protocol")]
    pub budget: Option<usize>,
    /// Print what was said to standard error
    #[arg(long, help_heading = "Protocol")]
    pub show_trace: bool,
    /// Where the model runs
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Device::Auto, help_heading = "Machine")]
    pub device: Device,
    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub threads: Option<usize>,
    /// Executors that run at once [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub executors: Option<usize>,
    /// Processor time of one call of a program, in milliseconds
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = clap::value_parser!(u64).range(1..=3_600_000), help_heading = "Machine")]
    pub cpu_ms: u64,
    /// What must be enforced for programs to run
    #[arg(long, value_enum, value_name = "MODE", default_value_t = SandboxMode::Strict, help_heading = "Machine")]
    pub sandbox: SandboxMode,
}

/// A number from 1 to `most`.
fn up_to(most: u64) -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u64).range(1..=most).map(|n| n as usize)
}

/// Options of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A suite's file, builtin or grammar; may be given again
    #[arg(long = "suite", value_name = "FILE", default_value = "builtin")]
    pub suites: Vec<PathBuf>,
    /// Format of the files [default: by their fields]
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Format::NAMED.map(|f| f.0)))]
    pub format: Option<String>,
    /// First N questions of each suite; of builtin and grammar, N of each task type and level
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub limit: Option<usize>,
    /// Samples per question
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = up_to(4096))]
    pub samples: usize,
    /// k of pass@k, those up to --samples
    #[arg(long, value_name = "K,..", value_delimiter = ',', default_value = "1,2,4,8,16,32,64")]
    pub k: Vec<usize>,
    /// Folder for results.json and samples.jsonl
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Compare two models item by item: their samples.jsonl
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    pub compare: Option<Vec<PathBuf>>,
    /// The model, and how it answers.
    #[command(flatten)]
    pub answer: AnswerArgs,
}

/// Options of `solve`.
#[derive(Debug, Args)]
pub struct SolveArgs {
    /// The question in words, or the path of a file with one record of a suite's format [default: standard input]
    #[arg(value_name = "QUESTION")]
    pub question: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The model, and how it answers.
    #[command(flatten)]
    pub answer: AnswerArgs,
}

/// Options of `pretrain`.
#[derive(Debug, Args)]
pub struct PretrainArgs {
    /// Folder for the model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Model of this vocabulary to go on from [default: random weights]
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["evaluate", "vocabulary"])]
    pub weights: Option<PathBuf>,
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
