//! `azr eval`: accuracy on suites, and two models compared; and the model that `azr solve` shares with it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use azr_tokenizer::Tokenizer;
use serde_json::{Value as Json, json};

use crate::base::run_dir::publish;
use crate::base::stop::StopFlag;
use crate::cli::args::{AnswerArgs, EvalArgs, SandboxMode};
use crate::cli::output::print;
use crate::cli::train::gpu;
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::ops::Backend;
use crate::error::{Error, Result};
use crate::eval::protocol::{Protocol, Settings, Turn};
use crate::eval::run::{Model, Record, run, stop_tokens};
use crate::eval::suites::{Format, Item, read_all};
use crate::eval::template::Template;
use crate::eval::{builtin, report};
use crate::exec::pool::{Pool, PoolConfig, Sandbox};
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::pipeline::config::cores;
use crate::rollout::engine::Engine;
use crate::selfplay::codec::Codec;
use crate::selfplay::prompt;
use crate::weights::model_files::ModelFiles;

/// Tokens that the KV cache holds at least.
const KV_TOKENS: usize = 1 << 16;
/// Longest completion of the embedded model's kind, and of others, in tokens.
const MAX_NEW: [usize; 2] = [128, 2048];
/// Temperature of several samples.
const SAMPLED: f32 = 0.8;
/// Tasks of the built-in suite per type and level.
const NUM_BUILTIN: usize = 128;

/// Does what the command line says.
///
/// # Errors
/// When a suite, the model or the executor fails, or writing does.
pub fn eval(args: &EvalArgs) -> Result<()> {
    if let Some([a, b]) = args.compare.as_deref() {
        return compare(a, b, args.json);
    }
    match gpu(args.answer.device)? {
        Some(gpu) => evaluate(args, gpu),
        None => evaluate(args, cpu(&args.answer)?),
    }
}

/// The CPU with the threads that the options name.
///
/// # Errors
/// When the threads cannot be had.
pub(crate) fn cpu(args: &AnswerArgs) -> Result<CpuBackend> {
    CpuBackend::new(args.threads.unwrap_or_else(cores))
}

fn evaluate<B: Backend>(args: &EvalArgs, backend: B) -> Result<()> {
    let format = args.format.as_deref().and_then(format_named);
    let (generated, files): (Vec<&PathBuf>, Vec<&PathBuf>) =
        args.suites.iter().partition(|p| [builtin::NAME, builtin::GRAMMAR].iter().any(|n| p.as_os_str() == *n));
    let files: Vec<&Path> = files.into_iter().map(PathBuf::as_path).collect();
    let mut suites = read_all(&files, format, args.limit)?;
    if let Some(k) = args.k.iter().min().filter(|k| **k > args.samples) {
        return Err(Error::usage(format!("pass@{k} needs as many samples")).with_hint(format!("give --samples {k}")));
    }
    // Before the work whose results are to go there.
    if let Some(dir) = &args.out {
        std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
    }
    let mut loaded = Loaded::open(&args.answer, args.samples, backend)?;
    for name in generated {
        let count = args.limit.unwrap_or(NUM_BUILTIN);
        suites.extend(builtin::items(&name.to_string_lossy(), &loaded.pool, count)?.unwrap_or_default());
    }
    if args.samples > 1 && loaded.settings.temperature == 0.0 {
        return Err(Error::usage("greedy samples are all the same").with_hint("give --temperature above 0"));
    }
    eprintln!("{} questions, {} samples each", suites.len(), args.samples);
    let records = loaded.run(&suites, args.samples)?;
    if args.answer.show_trace {
        records.iter().for_each(|r| r.traces.iter().for_each(|t| print_trace(&format!("{} {}", r.suite, r.id), t)));
    }
    let rows = report::rows(&records, &args.k, args.answer.seed);
    let results = report::json(&rows, &config(args, &loaded));
    let printed = print(&if args.json { format!("{results:#}\n") } else { report::table(&rows) });
    if let Some(dir) = &args.out {
        write(dir, &results, &records)?;
    }
    printed
}

fn format_named(name: &str) -> Option<Format> {
    Format::NAMED.iter().find(|(n, _)| *n == name).map(|(_, f)| *f)
}

/// What was evaluated and how, for the results file.
fn config(args: &EvalArgs, loaded: &Loaded<impl Backend>) -> Json {
    let s = &loaded.settings;
    json!({
        "model": "azr",
        "model_args": args.answer.weights.as_ref().map_or("embedded".to_owned(), |w| w.display().to_string()),
        "device": loaded.decoder.backend().describe(),
        "limit": args.limit,
        "random_seed": args.answer.seed,
        "template": args.answer.template,
        "protocol": args.answer.protocol,
        "gen_kwargs": {
            "temperature": s.temperature, "top_p": loaded.top_p, "top_k": loaded.top_k, "max_gen_toks": s.max_new,
        },
        "budget": args.answer.budget,
        "paths": s.num_paths,
        "rounds": s.num_rounds,
        "version": env!("CARGO_PKG_VERSION"),
    })
}

fn write(dir: &Path, results: &Json, records: &[Record]) -> Result<()> {
    publish(&dir.join("results.json"), format!("{results:#}\n").as_bytes())?;
    let mut lines = Vec::new();
    for record in records {
        serde_json::to_writer(&mut lines, record).map_err(|e| Error::failure(e.to_string()))?;
        lines.push(b'\n');
    }
    publish(&dir.join("samples.jsonl"), &lines)
}

fn compare(a: &PathBuf, b: &PathBuf, as_json: bool) -> Result<()> {
    let records = |path: &PathBuf| -> Result<Vec<Record>> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
        let bad = |e| {
            Error::config(format!("{} holds a line that is no record: {e}", path.display()))
                .with_hint("--compare takes the samples.jsonl of two evaluations")
        };
        text.lines().map(|line| serde_json::from_str(line).map_err(bad)).collect()
    };
    let found = report::compare(&records(a)?, &records(b)?)
        .map_err(|e| Error::config(e).with_hint("evaluate both models on the same suites"))?;
    print(&if as_json { format!("{:#}\n", json!(found)) } else { report::comparison_table(&found) })
}

/// Writes an attempt's turns to standard error.
pub(crate) fn print_trace(title: &str, trace: &[Turn]) {
    eprintln!("=== {title}");
    for turn in trace {
        eprintln!("--- {}\n{}", turn.role, turn.text);
    }
}

/// A model ready to answer, and the executor.
pub(crate) struct Loaded<B: Backend> {
    decoder: Decoder<B>,
    engine: Engine<B>,
    codec: Codec,
    tokenizer: Arc<Tokenizer>,
    eos: Vec<u32>,
    stop: StopFlag,
    /// The executor.
    pub(crate) pool: Pool,
    /// How questions are worked on.
    pub(crate) settings: Settings,
    top_p: f32,
    top_k: usize,
}

impl<B: Backend> Loaded<B> {
    /// Opens model and executor as the options say.
    ///
    /// # Errors
    /// When one of them cannot be had, or they do not fit the options.
    pub(crate) fn open(args: &AnswerArgs, num_samples: usize, backend: B) -> Result<Self> {
        let mut model = match &args.weights {
            None => ModelFiles::embedded()?,
            Some(path) => ModelFiles::open(path)?,
        };
        let tokenizer = Arc::new(model.tokenizer.clone());
        let template = Template::named(&args.template, &tokenizer)?;
        let named = Protocol::NAMED.iter().find(|(n, _)| *n == args.protocol);
        let protocol = named.map_or(Protocol::Direct, |(_, p)| *p);
        if protocol.needs_english() && template == Template::Compact {
            return Err(Error::usage(format!("--protocol {} needs a model that writes English", args.protocol))
                .with_hint("the embedded model can do direct, vote and reflexion"));
        }
        let compact = template == Template::Compact;
        let settings = Settings {
            template,
            protocol,
            temperature: args.temperature.unwrap_or(if num_samples > 1 { SAMPLED } else { 0.0 }),
            max_new: args.max_new.unwrap_or(MAX_NEW[usize::from(!compact)]),
            budget: args.budget.unwrap_or(usize::MAX),
            num_paths: args.paths,
            num_rounds: args.rounds,
            keep_trace: args.show_trace,
        };
        if !(0.0..=100.0).contains(&settings.temperature) {
            return Err(Error::usage("--temperature lies between 0 and 100"));
        }
        let (top_p, top_k) = (args.top_p, args.top_k);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::usage("--top-p lies above 0 and is at most 1"));
        }
        let pool = Pool::start(&PoolConfig {
            num_workers: args.executors.unwrap_or_else(cores),
            cpu_ms_answer: args.cpu_ms,
            cpu_ms_run: args.cpu_ms,
            sandbox: if args.sandbox == SandboxMode::Strict { Sandbox::Strict } else { Sandbox::BestEffort },
            ..PoolConfig::default()
        })?;
        for layer in pool.missing_layers() {
            eprintln!("azr: WARNING: the sandbox lacks {layer}");
        }
        let format = if compact { prompt::Format::Compact } else { prompt::Format::Azr };
        let codec = Codec::new(tokenizer.clone(), format, model.bos.filter(|_| !compact))?;
        model.spec.max_position_embeddings = model.spec.max_position_embeddings.min(args.context.max(1));
        let context = model.spec.max_position_embeddings;
        ParamTable::new(&model.spec).check(&model.tensors)?;
        let decoder =
            Decoder::load(backend, model.spec, false, |table, i, sink| table.stream(i, &model.tensors, sink))?;
        let limits = Engine::<B>::limits(decoder.backend().num_running(), context, KV_TOKENS.max(context));
        let engine = Engine::new(&decoder, limits, args.seed)?;
        let stop = StopFlag::on_signals()?;
        Ok(Loaded { decoder, engine, codec, tokenizer, eos: model.eos, stop, pool, settings, top_p, top_k })
    }

    /// The model as a voice.
    pub(crate) fn parts(&mut self) -> (Model<'_, B>, &Pool) {
        let stop_tokens = stop_tokens(self.settings.template, &self.codec, &self.eos);
        let model = Model {
            decoder: &self.decoder,
            engine: &mut self.engine,
            codec: &self.codec,
            tokenizer: &self.tokenizer,
            stop_tokens,
            top_p: self.top_p,
            top_k: self.top_k,
            stop: &self.stop,
        };
        (model, &self.pool)
    }

    fn run(&mut self, items: &[Item], num_samples: usize) -> Result<Vec<Record>> {
        let settings = self.settings;
        let (mut model, pool) = self.parts();
        run(items, settings, num_samples, 0, &mut model, pool)
    }
}
