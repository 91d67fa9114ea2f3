//! `azr solve`: one question, answered by any checkpoint under any reasoning protocol.

use std::io::Read as _;
use std::path::Path;

use serde_json::json;

use crate::cli::args::SolveArgs;
use crate::cli::eval::{Loaded, cpu, print_trace};
use crate::cli::output::print;
use crate::cli::train::gpu;
use crate::compute::ops::Backend;
use crate::error::{Error, Result};
use crate::eval::protocol::Attempt;
use crate::eval::run::work;
use crate::eval::suites::{Item, Question, read_question};

/// Answers the question of the command line.
///
/// # Errors
/// When there is no question, or the model or the executor fails; with exit code 1 when no answer was found.
pub fn solve(args: &SolveArgs) -> Result<()> {
    let text = match &args.question {
        Some(text) if Path::new(text).is_file() => {
            std::fs::read_to_string(text).map_err(|e| Error::io("read", Path::new(text), &e))?
        }
        Some(text) => text.clone(),
        None => {
            let mut text = String::new();
            let read = std::io::stdin().read_to_string(&mut text);
            read.map_err(|e| Error::io("read", Path::new("standard input"), &e))?;
            text
        }
    };
    if text.trim().is_empty() {
        return Err(Error::usage("there is no question").with_hint("give it as an argument, a file or standard input"));
    }
    let question = read_question(&text).map_err(|e| Error::config(format!("the question: {e}")))?;
    match gpu(args.answer.device)? {
        Some(gpu) => answer(args, question, gpu),
        None => answer(args, question, cpu(&args.answer)?),
    }
}

fn answer<B: Backend>(args: &SolveArgs, question: Question, backend: B) -> Result<()> {
    let mut loaded = Loaded::open(&args.answer, 1, backend)?;
    let settings = loaded.settings;
    if matches!(question, Question::Open(_)) && settings.template == crate::eval::template::Template::Compact {
        return Err(Error::usage("the embedded model answers tasks only, not questions in words")
            .with_hint("give a record such as {\"code\": \"def f(x): return x\", \"input\": \"1\"}, or --weights"));
    }
    let item = Item { suite: String::new(), id: String::new(), question };
    let mut attempts = [Attempt::new(&item, settings, 0)];
    let (mut model, pool) = loaded.parts();
    work(&mut attempts, &mut model, pool)?;
    let [attempt] = &attempts;
    if args.answer.show_trace {
        print_trace("trace", &attempt.trace);
    }
    let cost = json!({"answer": attempt.answer, "tokens": attempt.num_tokens, "executor_calls": attempt.num_calls});
    match &attempt.answer {
        _ if args.json => print(&format!("{cost}\n"))?,
        Some(answer) => print(&format!("{answer}\n"))?,
        None => {}
    }
    match attempt.answer {
        Some(_) => Ok(()),
        None => Err(Error::failure("no answer was found").with_hint("see what was said: --show-trace")),
    }
}
