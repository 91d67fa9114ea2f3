//! `azr exec`: the executor as a command. Programs in as JSON lines, verdicts out as JSON lines in the same order.

use std::collections::{BTreeMap, VecDeque};
use std::io::BufRead;
use std::path::Path;

use crossbeam::channel::{Receiver, bounded, never, select};
use serde_json::{Value as Json, json};

use crate::cli::args::{ExecArgs, SandboxMode};
use crate::cli::exec_request::{Item, read};
use crate::cli::output::print_line;
use crate::cli::{exec_bench, exec_soak};
use crate::error::{Error, Result};
use crate::exec::pool::{Pool, PoolConfig, Sandbox};
use crate::exec::protocol::{Outcome, Request, Verdict};
use crate::exec::value::Value;

/// Lines that may be on their way at once, per executor: what finishes early waits for its turn.
const WINDOW_PER_EXECUTOR: usize = 1024;

/// Does what the command line says.
///
/// # Errors
/// When the sandbox cannot be had (exit code 6), a line was no request (3), or reading or writing failed (74).
pub fn exec(args: &ExecArgs) -> Result<()> {
    let config = pool_config(args);
    if args.bench {
        return exec_bench::bench(&config);
    }
    let pool = Pool::start(&config)?;
    for layer in pool.missing_layers() {
        eprintln!("azr: WARNING: the sandbox lacks {layer}");
    }
    match args.soak {
        Some(num_tasks) => exec_soak::soak(&pool, &config, num_tasks),
        None => stream(&pool, args, &config),
    }
}

fn pool_config(args: &ExecArgs) -> PoolConfig {
    let cpu_ms = args.cpu_ms;
    let defaults = PoolConfig::default();
    PoolConfig {
        num_workers: args.executors.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        cpu_ms_propose: cpu_ms.unwrap_or(defaults.cpu_ms_propose),
        cpu_ms_answer: cpu_ms.unwrap_or(defaults.cpu_ms_answer),
        cpu_ms_run: cpu_ms.unwrap_or(defaults.cpu_ms_run),
        memory_bytes: args.memory_mib.map_or(defaults.memory_bytes, |m| m << 20),
        sandbox: match args.sandbox {
            SandboxMode::Strict => Sandbox::Strict,
            SandboxMode::BestEffort => Sandbox::BestEffort,
        },
        recheck: args.recheck,
        ..defaults
    }
}

/// Lines of standard input as they come.
fn lines() -> Result<Receiver<std::io::Result<String>>> {
    let (send, lines) = bounded(64);
    let work = move || {
        for line in std::io::stdin().lock().split(b'\n') {
            // What is no UTF-8 is no request, and is answered as such.
            let line = line.map(|bytes| String::from_utf8(bytes).unwrap_or_else(|_| "not UTF-8".to_owned()));
            if send.send(line).is_err() {
                break;
            }
        }
    };
    let thread = std::thread::Builder::new().name("azr-exec-input".to_owned()).spawn(work);
    thread.map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
    Ok(lines)
}

/// Lines on their way.
#[derive(Default)]
struct Stream {
    /// Number of the next line to be read.
    next: u64,
    /// Number of the next line to be written.
    due: u64,
    waiting: VecDeque<(u64, Request)>,
    items: BTreeMap<u64, Item>,
    ready: BTreeMap<u64, Json>,
    num_bad: u64,
}

fn stream(pool: &Pool, args: &ExecArgs, config: &PoolConfig) -> Result<()> {
    let (input, closed) = (lines()?, never());
    let window = (WINDOW_PER_EXECUTOR * config.num_workers.max(1)) as u64;
    let (mut stream, mut open) = (Stream::default(), true);
    while open || stream.due < stream.next {
        stream.submit(pool)?;
        let room = open && stream.waiting.is_empty() && stream.next - stream.due < window;
        select! {
            recv(if room { &input } else { &closed }) -> line => match line {
                Ok(Ok(line)) if line.trim().is_empty() => {}
                Ok(Ok(line)) => stream.take(&line, args, config),
                Ok(Err(e)) => return Err(Error::io("read", Path::new("standard input"), &e)),
                Err(_) => open = false,
            },
            recv(pool.verdicts()) -> verdict => {
                let (tag, verdict) = verdict.map_err(|_| Error::failure("the executor has stopped"))?;
                let item = stream.items.remove(&tag).expect("a verdict answers a line");
                stream.ready.insert(tag, verdict_line(&item, &verdict?));
            }
        }
        while let Some(line) = stream.ready.remove(&stream.due) {
            print_line(&line)?;
            stream.due += 1;
        }
    }
    match stream.num_bad {
        0 => Ok(()),
        n => Err(Error::config(format!("{n} of {} lines are no requests", stream.next))
            .with_hint("their verdicts are bad_request, with the reason; see azr exec --help")),
    }
}

impl Stream {
    fn take(&mut self, line: &str, args: &ExecArgs, config: &PoolConfig) {
        let tag = self.next;
        self.next += 1;
        match read(line, args.profile.into(), |p| args.limits(config.limits(p))) {
            Ok(mut item) => {
                if args.wall_ms.is_some() && item.limits.is_none() {
                    item.limits = Some(args.limits(config.limits(item.request.profile)));
                }
                self.waiting.push_back((tag, item.request.clone()));
                self.items.insert(tag, item);
            }
            Err(error) => {
                self.num_bad += 1;
                self.ready.insert(tag, json!({"verdict": "bad_request", "detail": error, "line": tag + 1}));
            }
        }
    }

    fn submit(&mut self, pool: &Pool) -> Result<()> {
        while let Some((tag, request)) = self.waiting.pop_front() {
            let limits = self.items.get(&tag).and_then(|i| i.limits);
            if let Some(request) = pool.try_submit_limited(tag, request, limits)? {
                self.waiting.push_front((tag, request));
                break;
            }
        }
        Ok(())
    }
}

/// The line that answers a line.
fn verdict_line(item: &Item, verdict: &Verdict) -> Json {
    let mut line = json!({});
    if let Some(id) = &item.id {
        line["id"] = id.clone();
    }
    let first = verdict.calls.iter().find(|o| !matches!(o, Outcome::Value { .. }));
    line["verdict"] = json!(match (&verdict.rejection, first) {
        (Some(rejection), _) => rejection.class(),
        (None, Some(outcome)) => outcome.class(),
        _ => "value",
    });
    let asked = item.tests || item.request.calls.iter().any(|c| c.expect.is_some());
    if asked {
        let passed = |(o, c): (&Outcome, &crate::exec::protocol::Call)| match o {
            Outcome::Value { .. } if c.expect.is_none() => true,
            o => o.matches(),
        };
        let all = verdict.calls.iter().zip(&item.request.calls).all(passed);
        line["passed"] = json!(verdict.rejection.is_none() && all);
    }
    if let Some(rejection) = &verdict.rejection {
        line["detail"] = json!(rejection.to_string());
    }
    line["calls"] = verdict.calls.iter().map(outcome_json).collect();
    for (i, unstable) in verdict.unstable.iter().enumerate().filter_map(|(i, u)| Some((i, u.as_ref()?))) {
        line["calls"][i]["unstable"] = json!(unstable.class());
    }
    line["cpu_ms"] = json!(verdict.cpu_us as f64 / 1e3);
    line["memory_mib"] = json!((verdict.memory_bytes as f64 / f64::from(1 << 20) * 1e3).round() / 1e3);
    line
}

fn outcome_json(outcome: &Outcome) -> Json {
    let class = outcome.class();
    match outcome {
        Outcome::Value { text, matches } => {
            let value = Value::parse(text).map_or(Json::Null, |v| v.to_json());
            let mut json = json!({"verdict": class, "value": text, "json": value});
            if let Some(equal) = matches {
                json["equal"] = json!(equal);
            }
            json
        }
        Outcome::Exception { class: name, message } => json!({"verdict": class, "exception": name, "message": message}),
        Outcome::Unsupported(what) => json!({"verdict": class, "detail": what.to_string()}),
        Outcome::BadArgs(what) => json!({"verdict": class, "detail": what}),
        _ => json!({"verdict": class}),
    }
}
