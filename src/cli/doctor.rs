//! `azr doctor`: what this machine and this build have of what a run uses. It ends as the run would end.

use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use crate::cli::args::{Device, DoctorArgs, SandboxMode};
use crate::cli::output::print_line;
use crate::cli::train::gpu;
use crate::compute::cpu::gemm::Isa;
use crate::compute::launch::device::probe;
use crate::compute::launch::images::IMAGES;
use crate::compute::ops::Backend;
use crate::error::{Error, Result};
use crate::exec::pool::{Pool, PoolConfig, Sandbox};
use crate::exec::protocol::{Call, Profile, Request};

/// Whether something is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It is.
    Ok,
    /// It is not, and the run goes without.
    Absent,
    /// It is not, and the run would not start.
    Missing,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    detail: String,
    hint: Option<String>,
}

/// Checks, and the first error that would end the run.
#[derive(Default)]
struct Report {
    checks: Vec<Check>,
    error: Option<Error>,
}

impl Report {
    fn add(&mut self, name: &'static str, state: State, detail: impl Into<String>) {
        self.checks.push(Check { name, state, detail: detail.into(), hint: None });
    }

    /// Adds what was found, or an error in that state.
    fn found(&mut self, name: &'static str, found: Result<String>, otherwise: State) {
        match found {
            Ok(detail) => self.add(name, State::Ok, detail),
            Err(error) => {
                self.add(name, otherwise, error.to_string());
                self.checks.last_mut().expect("just added").hint = error.hint().map(str::to_owned);
                if otherwise == State::Missing {
                    self.error.get_or_insert(error);
                }
            }
        }
    }
}

/// Prints a line per check, or one JSON object.
///
/// # Errors
/// The one that a run without further options would end with.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    let mut report = Report::default();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report.add("azr", State::Ok, format!("{} on Linux {}", env!("CARGO_PKG_VERSION"), release.trim()));
    sandbox(&mut report, args.sandbox);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let products = match Isa::detect() {
        Isa::Portable => "no vector instructions that this build knows".to_owned(),
        isa => format!("products in {}", format!("{isa:?}").to_uppercase()),
    };
    report.add("cpu", State::Ok, format!("{threads} threads, {}, {products}", std::env::consts::ARCH));
    // As a run without --device chooses.
    match (gpu(Device::Auto), probe()) {
        (Ok(Some(gpu)), _) => report.found("gpu", Ok(gpu.describe()), State::Ok),
        (Ok(None), Err(error)) => report.found("gpu", Err(error), State::Absent),
        (Ok(None), Ok(_)) => {
            report.add("gpu", State::Absent, "there is one that cannot be used, as was said; left alone")
        }
        (Err(error), _) => report.found("gpu", Err(error), State::Missing),
    }
    let mut arches: Vec<&str> = IMAGES.iter().map(|i| i.arch).collect();
    arches.sort_unstable();
    arches.dedup();
    match arches.as_slice() {
        [] => report.add("gpu kernels", State::Absent, "none in this build: it runs on the CPU"),
        some => report.add("gpu kernels", State::Ok, format!("{} images for {}", IMAGES.len(), some.join(", "))),
    }
    report.found("directory", writable(), State::Missing);
    if args.json {
        let code = report.error.as_ref().map_or(0, Error::exit_code);
        print_line(&json!({"works": code == 0, "exit_code": code, "checks": report.checks}))?;
    } else {
        let mut out = std::io::stdout().lock();
        for Check { name, state, detail, hint } in &report.checks {
            let hint = hint.as_ref().map(|h| format!(" ({h})")).unwrap_or_default();
            let written = writeln!(out, "{name:12} {:8} {detail}{hint}", format!("{state:?}").to_lowercase());
            written.map_err(|e| Error::io("write", Path::new("standard output"), &e))?;
        }
    }
    report.error.map_or(Ok(()), Err)
}

/// The layers as far as they can be had, whether that is enough, and whether a program gets its verdict behind them.
fn sandbox(report: &mut Report, mode: SandboxMode) {
    let config = PoolConfig { num_workers: 1, sandbox: Sandbox::BestEffort, ..PoolConfig::default() };
    let pool = match Pool::start(&config) {
        Ok(pool) => pool,
        Err(error) => return report.found("executor", Err(error), State::Missing),
    };
    for layer in pool.layers() {
        let state = match (layer.in_force, layer.required && mode == SandboxMode::Strict) {
            (true, _) => State::Ok,
            (false, required) => [State::Absent, State::Missing][usize::from(required)],
        };
        report.checks.push(Check {
            name: "sandbox",
            state,
            detail: format!("{}: {}", layer.name, layer.detail),
            hint: None,
        });
    }
    let strict = pool.strict().map(|()| "every layer that it needs is in force".to_owned());
    report.found("strict", strict, if mode == SandboxMode::Strict { State::Missing } else { State::Absent });
    let calls = vec![Call { args: "41".to_owned(), expect: Some("42".to_owned()) }];
    let program = "def f(x):\n    return x + 1".to_owned();
    let verdicts = pool.run(vec![Request { program, calls, profile: Profile::Propose }]);
    let executor = verdicts.and_then(|verdicts| match verdicts.first() {
        Some(v) if v.calls.iter().any(|c| c.matches()) => Ok("a program got its right verdict".to_owned()),
        other => Err(Error::environment(format!("a program that adds 1 got the verdict {other:?}"))),
    });
    report.found("executor", executor, State::Missing);
}

/// Whether a run directory could be made here.
fn writable() -> Result<String> {
    let here = std::env::current_dir().map_err(|e| Error::io("find", Path::new("the working directory"), &e))?;
    let probe = here.join(format!(".azr-doctor-{}", std::process::id()));
    std::fs::create_dir(&probe).map_err(|e| Error::io("create a run directory in", &here, &e))?;
    std::fs::remove_dir(&probe).map_err(|e| Error::io("remove", &probe, &e))?;
    Ok(format!("runs go to {}", here.join("runs").display()))
}
