//! The worker process: a zygote with a warm interpreter that forks one child per run of calls.
//!
//! A child runs calls one after another, each in a fresh module, and writes each outcome as it is known. When it dies, the
//! zygote runs the call that it died in once more, alone and with a full budget, so that no call's verdict depends on the
//! calls before it; the calls behind it get a new child.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use rustpython_vm as vm;
use vm::builtins::{PyBaseExceptionRef, PyCode};
use vm::compiler::Mode;
use vm::scope::Scope;
use vm::{AsObject, Interpreter, InterpreterBuilder, PyObjectRef, PyRef, Settings, VirtualMachine};

use crate::exec::convert::{Unsupported, from_python, to_python};
use crate::exec::protocol::{Call, Job, JobResult, Outcome, frame, receive, send, take_frames};
use crate::exec::sandbox::{self, Ending};
use crate::exec::value::Value;

/// First argument of a process that is to be a zygote; the second is the hash seed, the third the sandbox mode.
pub const MARKER: &str = "--azr-executor-zygote";
/// Exit status of a child whose interpreter panicked.
const EXIT_PANIC: i32 = 78;
/// Longest output literal, in bytes.
pub const MAX_OUTPUT: usize = 4096;
/// Longest exception message kept, in bytes.
const MAX_MESSAGE: usize = 300;
/// Deepest recursion of Python code, the same in every build.
const RECURSION_LIMIT: usize = 1000;

/// Modules imported before the first program, so that children share their memory.
const WARM_MODULES: &[&str] = &[
    "collections",
    "itertools",
    "functools",
    "heapq",
    "math",
    "re",
    "string",
    "random",
    "statistics",
    "fractions",
    "decimal",
    "datetime",
    "json",
    "bisect",
    "typing",
    "dataclasses",
    "copy",
    "operator",
    "enum",
    "time",
];

/// RustPython 0.5.0 without host files has no FileIO, which `io` (and so `dataclasses`, `statistics`) wants to name.
const NO_FILES: &str = "\
import _io
class FileIO(_io._RawIOBase):
    def __init__(self, *args, **kwargs):
        raise PermissionError(1, 'Operation not permitted')
_io.FileIO = FileIO
";

/// Becomes a worker if the command line says so, and then never returns. First thing of `main`.
pub fn maybe_run() {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some(MARKER) {
        let hash_seed = args.next().and_then(|s| s.parse().ok()).unwrap_or(0);
        let strict = args.next().as_deref() != Some("best-effort");
        zygote(hash_seed, strict);
    }
}

fn interpreter(hash_seed: u32) -> Interpreter {
    let mut settings = Settings::default();
    settings.install_signal_handlers = false;
    settings.hash_seed = Some(hash_seed);
    settings.import_site = false;
    settings.write_bytecode = false;
    settings.user_site_directory = false;
    settings.ignore_environment = true;
    settings.isolated = true;
    settings.safe_path = true;
    settings.allow_external_library = false;
    let builder = InterpreterBuilder::new().settings(settings);
    let native = rustpython_stdlib::stdlib_module_defs(&builder.ctx);
    builder
        .add_native_modules(&native)
        .add_frozen_modules(rustpython_pylib::FROZEN_STDLIB)
        .add_frozen_modules(vm::py_freeze!(file = "shim/os.py", module_name = "os"))
        .add_frozen_modules(vm::py_freeze!(file = "shim/posix.py", module_name = "posix"))
        .interpreter()
}

/// What the zygote says once it is ready: the layers that could not be had.
pub type Ready = Vec<String>;

fn zygote(hash_seed: u32, strict: bool) -> ! {
    sandbox::die_with_parent();
    std::panic::set_hook(Box::new(|_| sandbox::exit_now(EXIT_PANIC)));
    // The supervisor's pipes arrive as standard input and output; programs must not see them there.
    let plan = || -> std::io::Result<()> {
        sandbox::duplicate(0, sandbox::JOBS_FD)?;
        sandbox::duplicate(1, sandbox::RESULTS_FD)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for fd in 0..3 {
            sandbox::duplicate(null.as_raw_fd(), fd)?;
        }
        Ok(())
    };
    if plan().is_err() {
        sandbox::exit_now(1);
    }
    sandbox::close_from(sandbox::OUTCOMES_FD);
    let (mut jobs, mut results) = (sandbox::file_at(sandbox::JOBS_FD), sandbox::file_at(sandbox::RESULTS_FD));
    interpreter(hash_seed).enter(|vm| {
        vm.recursion_limit.set(RECURSION_LIMIT);
        warm_up(vm);
        let missing = enter_sandbox();
        let ready = send(&mut results, &missing).is_ok();
        if !ready || (strict && !missing.is_empty()) {
            sandbox::exit_now(1);
        }
        let child_filter = sandbox::filter(false).ok();
        while let Ok(job) = receive::<Job>(&mut jobs) {
            let result = run_job(vm, &job, child_filter.as_ref());
            if send(&mut results, &result).is_err() {
                break;
            }
        }
        sandbox::exit_now(0)
    })
}

fn warm_up(vm: &VirtualMachine) {
    let imports = WARM_MODULES.iter().map(|module| format!("import {module}\n"));
    for source in std::iter::once(NO_FILES.to_owned()).chain(imports) {
        if let Ok(code) = vm.compile(&source, Mode::Exec, "<warm>".to_owned()) {
            let _ = vm.run_code_obj(code, vm.new_scope_with_builtins());
        }
    }
    let job = Job {
        program: "def f(xs, k):\n    d = {}\n    for x in xs:\n        d[x] = d.get(x, 0) + 1\n    return sorted(d.items())[:k], f'{k}'\n"
            .to_owned(),
        calls: vec![Call { args: "['a', 'b', 'a'], 2".to_owned(), expect: Some("1".to_owned()) }],
        reverse: false,
        repeat: true,
        cpu_ms: 0,
        wall_ms: 0,
        memory_bytes: 0,
    };
    if let Ok(code) = vm.compile(&job.program, Mode::Exec, "<program>".to_owned()) {
        for _ in 0..20 {
            run_call(vm, &code, &job.calls[0], true);
        }
    }
}

/// Enters the zygote's layers; returns those that could not be had.
fn enter_sandbox() -> Ready {
    let mut missing = Vec::new();
    if let Err(e) = sandbox::no_new_privileges() {
        missing.push(format!("no_new_privs: {e}"));
    }
    missing.extend(sandbox::enter_landlock().err());
    missing.extend(sandbox::filter(true).and_then(|f| sandbox::apply_filter(&f)).err());
    missing
}

type Filter = seccompiler::BpfProgram;

fn run_job(vm: &VirtualMachine, job: &Job, filter: Option<&Filter>) -> JobResult {
    let mut order: Vec<usize> = (0..job.calls.len()).collect();
    if job.reverse {
        order.reverse();
    }
    let mut calls = vec![Outcome::Crash; job.calls.len()];
    let (mut done, mut cpu_us) = (0, 0);
    while done < order.len() {
        let (outcomes, death, micros) = run_child(vm, job, &order[done..], filter);
        cpu_us += micros;
        let known = outcomes.len().min(order.len() - done);
        for (at, outcome) in order[done..].iter().zip(outcomes) {
            calls[*at] = outcome;
        }
        done += known;
        if let Some(death) = death
            && known == 0
        {
            calls[order[done]] = death;
            done += 1;
        }
    }
    JobResult { calls, cpu_us }
}

/// Runs calls in a fresh child: the outcomes it wrote, why it died if it did, and its CPU time.
fn run_child(
    vm: &VirtualMachine,
    job: &Job,
    order: &[usize],
    filter: Option<&Filter>,
) -> (Vec<Outcome>, Option<Outcome>, u64) {
    let Ok((read, write)) = sandbox::pipe() else { return (Vec::new(), Some(Outcome::Crash), 0) };
    match sandbox::fork() {
        Ok(None) => child(vm, job, order, filter, &write),
        Err(_) => (Vec::new(), Some(Outcome::Crash), 0),
        Ok(Some(pid)) => {
            drop(write);
            let (bytes, late) = collect(read, Duration::from_millis(job.wall_ms), order.len());
            if late {
                sandbox::kill(pid);
            }
            let (ending, cpu_us) = sandbox::wait_for(pid).unwrap_or((Ending::Exited(EXIT_PANIC), 0));
            let outcomes: Vec<Outcome> = take_frames(&bytes);
            let death = match ending {
                _ if late => Some(Outcome::TimeoutWall),
                Ending::Exited(0) if outcomes.len() >= order.len() => None,
                Ending::Exited(sandbox::EXIT_OUT_OF_MEMORY) => Some(Outcome::OutOfMemory),
                Ending::Killed(libc::SIGPROF | libc::SIGXCPU) => Some(Outcome::TimeoutCpu),
                Ending::Killed(libc::SIGSYS) => Some(Outcome::Policy),
                _ => Some(Outcome::Crash),
            };
            (outcomes, death, cpu_us)
        }
    }
}

/// Reads what a child writes until it closes its pipe; late when one call takes longer than `limit`.
fn collect(read: std::os::fd::OwnedFd, limit: Duration, num_calls: usize) -> (Vec<u8>, bool) {
    let mut file = File::from(read);
    let (mut bytes, mut buffer) = (Vec::new(), [0; 16 << 10]);
    let most = num_calls * (2 * MAX_OUTPUT + MAX_MESSAGE + 256);
    let mut deadline = Instant::now() + limit;
    loop {
        if !sandbox::wait_readable(&file, deadline.saturating_duration_since(Instant::now())) {
            return (bytes, true);
        }
        match std::io::Read::read(&mut file, &mut buffer) {
            Ok(0) | Err(_) => return (bytes, false),
            Ok(n) => {
                bytes.extend_from_slice(&buffer[..n]);
                deadline = Instant::now() + limit;
            }
        }
        if bytes.len() > most {
            return (Vec::new(), true);
        }
    }
}

fn child(vm: &VirtualMachine, job: &Job, order: &[usize], filter: Option<&Filter>, write: &impl AsRawFd) -> ! {
    let enter = || -> Option<()> {
        sandbox::duplicate(write.as_raw_fd(), sandbox::OUTCOMES_FD).ok()?;
        sandbox::close_from(sandbox::OUTCOMES_FD + 1);
        sandbox::set_rlimits().ok()?;
        sandbox::set_cpu_timer(job.cpu_ms).ok()?;
        sandbox::set_memory_budget(job.memory_bytes as usize);
        if let Some(filter) = filter {
            sandbox::apply_filter(filter).ok()?;
        }
        Some(())
    };
    if enter().is_none() {
        sandbox::exit_now(EXIT_PANIC);
    }
    let mut out = sandbox::file_at(sandbox::OUTCOMES_FD);
    let code = vm.compile(&job.program, Mode::Exec, "<program>".to_owned());
    for at in order {
        let outcome = match &code {
            Ok(code) => run_call(vm, code, &job.calls[*at], job.repeat),
            Err(error) => exception(&vm.new_syntax_error(error, None)),
        };
        if out.write_all(&frame(&outcome)).is_err() {
            sandbox::exit_now(EXIT_PANIC);
        }
    }
    sandbox::exit_now(0)
}

fn run_call(vm: &VirtualMachine, code: &PyRef<PyCode>, call: &Call, repeat: bool) -> Outcome {
    let args = match Value::parse_args(&call.args) {
        Ok(args) => args,
        Err(e) => return Outcome::BadArgs(e.to_string()),
    };
    let scope = vm.new_scope_with_builtins();
    let result = scope
        .globals
        .set_item("__name__", vm.ctx.new_str("__program__").into(), vm)
        .and_then(|()| vm.run_code_obj(code.clone(), scope.clone()))
        .and_then(|_| call_f(vm, &scope, &args));
    let value = match read_result(vm, result) {
        Ok(value) => value,
        Err(outcome) => return outcome,
    };
    if repeat {
        match read_result(vm, call_f(vm, &scope, &args)) {
            Ok(again) if again.py_eq(&value) && again.repr() == value.repr() => {}
            _ => return Outcome::NotDeterministic,
        }
    }
    let text = value.repr();
    if text.len() > MAX_OUTPUT {
        return Outcome::OutputTooLarge;
    }
    let matches = call.expect.as_ref().map(|e| Value::parse(e).is_ok_and(|e| e.py_eq(&value)));
    Outcome::Value { text, matches }
}

fn call_f(vm: &VirtualMachine, scope: &Scope, args: &[Value]) -> Result<PyObjectRef, PyBaseExceptionRef> {
    let f = scope.globals.get_item("f", vm)?;
    let args = args.iter().map(|a| to_python(vm, a)).collect::<Result<Vec<_>, _>>()?;
    f.call(args, vm)
}

fn read_result(vm: &VirtualMachine, result: Result<PyObjectRef, PyBaseExceptionRef>) -> Result<Value, Outcome> {
    let object = result.map_err(|e| exception(&e))?;
    let value = from_python(vm, &object).map_err(|e| match e {
        Unsupported::TooLarge => Outcome::OutputTooLarge,
        Unsupported::Type(name) => Outcome::UnsupportedValue(name),
    })?;
    if value.py_eq(&value) { Ok(value) } else { Err(Outcome::UnsupportedValue("nan".to_owned())) }
}

fn exception(e: &PyBaseExceptionRef) -> Outcome {
    let class = e.class().name().to_string();
    // Only messages that are plain arguments are read: no user code runs here.
    let message = e.args().as_slice().first().and_then(|a| a.downcast_ref::<vm::builtins::PyStr>()).map(|s| {
        let text = s.to_string_lossy();
        text.chars().take(MAX_MESSAGE).collect()
    });
    Outcome::Exception { class, message: message.unwrap_or_default() }
}
