//! `azr pretrain`: makes the embedded model anew, and says how good it is.

use crate::cli::args::PretrainArgs;
use crate::cli::output::print;
use crate::error::{Error, Result};
use crate::eval::pretrained;
use crate::exec::pool::PoolConfig;
use crate::pretrain::{self, PretrainConfig};

/// Steps between two lines of pre-training's progress.
const REPORT_EVERY: u64 = 50;

/// Trains the embedded model or its vocabulary into a folder, and evaluates the model.
///
/// # Errors
/// When the executor or the disk fails, or the training diverges.
pub fn pretrain(args: &PretrainArgs) -> Result<()> {
    if args.vocabulary {
        std::fs::create_dir_all(&args.out).map_err(|e| Error::io("create", &args.out, &e))?;
        return pretrain::train_tokenizer(&args.out.join("tokenizer.json"), args.seed);
    }
    let num_threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let config = PretrainConfig {
        seed: args.seed,
        num_tokens: args.tokens,
        batch_tokens: 8192,
        learning_rate: args.learning_rate,
        weights: args.weights.clone(),
        num_threads,
        pool: PoolConfig { num_workers: num_threads, ..PoolConfig::default() },
    };
    if !args.evaluate {
        if std::fs::read_dir(&args.out).is_ok_and(|mut files| files.next().is_some()) {
            return Err(Error::usage(format!("{} is not empty", args.out.display()))
                .with_hint("the model's folder is written as a whole: name another --out"));
        }
        pretrain::train(&config, &args.out, |p| {
            if p.step % REPORT_EVERY == 0 {
                eprintln!("step {}  tokens {}  loss {:.4}  {:.0} tokens/s", p.step, p.tokens, p.loss, p.tokens_per_s);
            }
        })?;
    }
    let found = pretrained::evaluate(&args.out, &config)?;
    let text = serde_json::to_string_pretty(&found).map_err(|e| Error::failure(e.to_string()))?;
    print(&(text + "\n"))
}
