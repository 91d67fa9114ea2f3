//! The worker process: a zygote with a warm interpreter that forks one child per run of calls (see `child`).
//!
//! A child leaves each outcome in a shared slot as it is known. When it dies, the zygote runs the call that it died in once
//! more, alone and with a full budget, so that no call's verdict depends on the calls before it; the calls behind it get a
//! new child. A child that something else killed, as a machine does that is out of memory, is no program's doing and runs
//! again. The zygote reads the slot only when the child is gone.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustpython_vm as vm;
use vm::compiler::Mode;
use vm::{Interpreter, InterpreterBuilder, PyObjectRef, PyResult, Settings, VirtualMachine};

use crate::exec::arithmetic;
use crate::exec::child::{self, EXIT_NOT_ENTERED, EXIT_PANIC, MAX_MESSAGE, MAX_OUTPUT, Warm};
use crate::exec::convert::Types;
use crate::exec::filter::filter;
use crate::exec::identity::{self, for_each_class};
use crate::exec::patches;
use crate::exec::protocol::{
    Call, Job, JobResult, Layer, Limits, MAX_CPU_S, Outcome, Reverse, receive, send, take_frames,
};
use crate::exec::sandbox::{self, Ending, Slot};

/// First argument of a process that is to be a zygote; the second is the hash seed, the third the sandbox mode.
pub const MARKER: &str = "--azr-executor-zygote";
/// Hash seeds of a supervisor's two zygotes.
pub const HASH_SEEDS: [u32; 2] = [0x5eed_0001, 0x0bad_5eed];
/// Deepest recursion of Python code, the same in every build.
const RECURSION_LIMIT: usize = 1000;

/// Results that a slot holds; the outcomes of a few hundred calls. When it is full, the remaining calls get a new child.
const SLOT_BYTES: usize = 1 << 20;

/// How often a child is made, or made again because something else killed it, before the zygote gives up; and the first
/// pause between two tries, each twice the last.
const CHILD_TRIES: u32 = 8;
const CHILD_PAUSE: Duration = Duration::from_millis(10);

/// Address space of each of a zygote's arenas, and of the one for jobs and results. A fork looks through all of it.
const ARENA_BYTES: usize = 64 << 20;
const JOBS_ARENA_BYTES: usize = 256 << 20;

/// RustPython keeps freed tuples up to this length for their next use.
const LONGEST_FREE_TUPLE: usize = 20;
/// And so many of them.
const NUM_FREE_TUPLES: usize = 2000;
/// And of other types no more than so many.
const NUM_FREE_OBJECTS: usize = 200;

/// Names of variables that programs have again and again.
const COMMON_NAMES: &str = "\
a acc ans answer arr b base c cache char chars coeff compute cost count counter counts cumulative current cur d data depth \
dfs digit digits dp e elem element elements end even factor fib fibonacci filtered final first freq frequency g graph grid \
group groups h helper i idx index inner item items j k key keys kv l last left length level lines list lo lst m mapping mat \
matrix max_len max_val memo merged mid min_val mod mul n name nested nested_list new_list next node nodes num numbers nums \
odd op out outer output p pair pairs part parts path pattern pos power prefix prev prime primes processed product q \
queue r rem remainder res rest result results reversed_str right row rows s score seen self seq size sorted_items stack \
start state step string sub substr suffix sum_val t target temp text tmp token tokens total transform transformed tree u \
unique v val vals value values visited w width window word words x xs y ys z zipped \
<module> <program> <lambda> <listcomp> <genexpr> : , . - _ + * / % = | ; ! ? ( ) [ ]";

/// Recursion and exceptions as deep as ordinary programs have them.
const DEEP_PROGRAM: &str = "\
def down(n):
    if n == 0:
        raise ValueError('deepest')
    try:
        down(n - 1)
    except ValueError as error:
        raise KeyError(n) from error
try:
    down(100)
except KeyError:
    pass
";

/// Modules that many programs import; what they are made of is used all the time.
const HOT_MODULES: &[&str] =
    &["collections", "itertools", "functools", "heapq", "math", "re", "string", "bisect", "typing", "copy", "operator"];
/// Modules that few programs import. They are loaded too, so that children share their memory, but apart from the others:
/// pages that a child never writes to cost a fork next to nothing.
const COLD_MODULES: &[&str] =
    &["random", "statistics", "fractions", "decimal", "datetime", "json", "dataclasses", "enum", "time"];

/// RustPython 0.5.0 without host files has no FileIO, which `io` (and so `dataclasses`, `statistics`) wants to name.
const NO_FILES: &str = "\
import _io
class FileIO(_io._RawIOBase):
    def __init__(self, *args, **kwargs):
        raise PermissionError(1, 'Operation not permitted')
_io.FileIO = FileIO
";

/// A program of the usual kind.
const WARM_PROGRAM: &str = "\
def f(xs, k):
    d = {}
    for x in xs:
        key = x.lower().strip('.,')
        d[key] = d.get(key, 0) + 1
    items = sorted(d.items(), key=lambda p: (-p[1], p[0]))
    return ' | '.join([f'{a}:{b}' for a, b in items[:k]]), [i * 2 for i in range(k)], sum(d.values())
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

/// What the zygote says once it is ready: its layers, in force or not.
pub type Ready = Vec<Layer>;

fn zygote(hash_seed: u32, strict: bool) -> ! {
    sandbox::reset_signals();
    sandbox::die_with_parent();
    std::panic::set_hook(Box::new(|_| sandbox::exit_now(EXIT_PANIC)));
    // The supervisor's pipes arrive as standard input and output; programs must not see them there.
    let plan = || -> std::io::Result<Slot> {
        sandbox::duplicate(0, sandbox::JOBS_FD)?;
        sandbox::duplicate(1, sandbox::RESULTS_FD)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for fd in 0..3 {
            sandbox::duplicate(null.as_raw_fd(), fd)?;
        }
        Slot::new(SLOT_BYTES)
    };
    let (Ok(slot), Ok(())) = (plan(), sandbox::set_stack()) else { sandbox::exit_now(1) };
    sandbox::close_from(sandbox::RESULTS_FD + 1);
    let (mut jobs, mut results) = (sandbox::file_at(sandbox::JOBS_FD), sandbox::file_at(sandbox::RESULTS_FD));
    sandbox::code_to_huge_pages();
    sandbox::start_arena(ARENA_BYTES, true);
    shift_layout(hash_seed);
    interpreter(hash_seed).enter(|vm| {
        vm.recursion_limit.set(RECURSION_LIMIT);
        let Ok(mut warm) = warm_up(vm, hash_seed == HASH_SEEDS[1]) else { sandbox::exit_now(1) };
        sandbox::no_new_huge_pages();
        let layers = enter_sandbox();
        let complete = layers.iter().all(|l| l.in_force || !l.required);
        warm.filter = filter(false).ok();
        let ready = send(&mut results, &layers).is_ok();
        if !ready || (strict && !(complete && warm.filter.is_some())) {
            sandbox::exit_now(1);
        }
        while let Ok(job) = receive::<Job>(&mut jobs) {
            if send(&mut results, &run_job(&warm, &job, &slot)).is_err() {
                break;
            }
        }
        sandbox::exit_now(0)
    })
}

/// Takes some memory of every small size for good, as much as the seed says: objects of two zygotes then lie at different
/// addresses even where the kernel does not choose these by chance.
fn shift_layout(seed: u32) {
    for size in (16..=1024).step_by(16) {
        for _ in 0..1 + seed as usize % 13 {
            std::mem::forget(Vec::<u8>::with_capacity(size));
        }
    }
}

fn import(vm: &VirtualMachine, modules: &[&str]) {
    let imports = modules.iter().map(|module| format!("import {module}\n"));
    for source in std::iter::once(NO_FILES.to_owned()).chain(imports) {
        if let Ok(code) = vm.compile(&source, Mode::Exec, "<warm>".to_owned()) {
            let _ = vm.run_code_obj(code, vm.new_scope_with_builtins());
        }
    }
}

/// RustPython 0.5.0 panics when it is asked for the name of some of its own types, unless the name is known.
fn intern_type_names(vm: &VirtualMachine) -> PyResult<()> {
    for_each_class(vm, &vm.ctx.types.object_type.to_owned().into(), &mut |class| {
        let name = class.slot_name().to_owned();
        vm.ctx.intern_str(name.rsplit('.').next().unwrap_or(&name));
    })
}

/// Runs a program a few times: what the interpreter makes at the first use lies with what is used all the time.
fn exercise(vm: &VirtualMachine) {
    let program = format!("{WARM_PROGRAM}f(['a', 'b', 'a'], 2)\n");
    for _ in 0..5 {
        if let Ok(code) = vm.compile(&program, Mode::Exec, "<program>".to_owned()) {
            let _ = vm.run_code_obj(code, vm.new_scope_with_builtins());
        }
    }
}

fn warm_up(vm: &VirtualMachine, turned: bool) -> PyResult<Warm<'_>> {
    stretch(vm);
    import(vm, &[]);
    patches::install_expressions(vm)?;
    import(vm, HOT_MODULES);
    exercise(vm);
    let patched = patches::install(vm)?;
    arithmetic::install(vm);
    intern_type_names(vm)?;
    let last_pop: PyObjectRef = patched.globals.get_item("pop", vm)?;
    sandbox::start_arena(ARENA_BYTES, true);
    import(vm, COLD_MODULES);
    // What is drawn without a seed is the same in all zygotes of all executors. Native JSON writes control characters wrong.
    run_and_keep(vm, "import random\nrandom.seed(0)\n");
    run_and_keep(vm, "import json.encoder as e\ne.encode_basestring_ascii = e.py_encode_basestring_ascii\n");
    let start_clocks = patched.globals.get_item("stop_clocks", vm)?.call((), vm)?;
    identity::install(vm, turned)?;
    sandbox::start_arena(ARENA_BYTES, true);
    let warm = Warm { vm, types: Types::load(vm)?, filter: None, last_pop, start_clocks };
    let job = Job {
        program: WARM_PROGRAM.to_owned(),
        calls: vec![Call { args: "['a', 'b', 'a'], 2".to_owned(), expect: None }],
        source: false,
        reverse: Reverse::No,
        repeat: true,
        limits: Limits { cpu_ms: 0, wall_ms: 0, memory_bytes: 0 },
        stop_when_late: false,
        apart: false,
    };
    for _ in 0..20 {
        child::run_calls(&warm, &job, &[0], &mut |_| true);
    }
    vm::gc_state::gc_state().collect(2);
    sandbox::start_arena(ARENA_BYTES, true);
    empty_free_lists(vm);
    // What is there now stays for good: collections in children need not look at it, nor write to it.
    vm::gc_state::gc_state().freeze();
    // Jobs and results have an arena of their own: a page that the zygote writes to is one that its children do not share.
    sandbox::start_arena(JOBS_ARENA_BYTES, false);
    Ok(warm)
}

/// Takes what earlier arenas left in the interpreter's lists of free objects for good. A child that took an object from
/// there would write to a page that nothing else on it needs; the next ones are made side by side.
fn empty_free_lists(vm: &VirtualMachine) {
    let until_new = |make: &dyn Fn() -> PyObjectRef| {
        // The longest list and the object after it.
        for _ in 0..=NUM_FREE_TUPLES {
            let object = make();
            let new = sandbox::is_new(std::ptr::from_ref::<vm::PyObject>(&object).cast());
            std::mem::forget(object);
            if new {
                break;
            }
        }
    };
    run_and_keep(vm, "kept = [(range(i), slice(i), complex(i)) for i in range(10)]");
    for len in 1..=LONGEST_FREE_TUPLE {
        until_new(&|| vm.ctx.new_tuple(vec![vm.ctx.none(); len]).into());
    }
    until_new(&|| vm.ctx.new_list(Vec::new()).into());
    until_new(&|| vm.ctx.new_dict().into());
    until_new(&|| vm.ctx.new_float(0.5).into());
    until_new(&|| vm.ctx.new_bigint(&(1u64 << 40).into()).into());
}

/// Runs trusted source and keeps what it made for good.
fn run_and_keep(vm: &VirtualMachine, source: &str) {
    if let Ok(code) = vm.compile(source, Mode::Exec, "<warm>".to_owned()) {
        let scope = vm.new_scope_with_builtins();
        let _ = vm.run_code_obj(code, scope.clone());
        std::mem::forget(scope);
    }
}

/// Lets what grows with use grow before anything else lies behind it: the names that many programs use, the stacks of
/// frames and exceptions, the lists of free objects.
fn stretch(vm: &VirtualMachine) {
    for name in COMMON_NAMES.split_ascii_whitespace() {
        vm.ctx.intern_str(name);
    }
    run_and_keep(vm, DEEP_PROGRAM);
    let fill = |num: usize, make: &dyn Fn() -> PyObjectRef| drop((0..num).map(|_| make()).collect::<Vec<_>>());
    for len in 1..=6 {
        fill(NUM_FREE_TUPLES, &|| vm.ctx.new_tuple(vec![vm.ctx.none(); len]).into());
    }
    fill(NUM_FREE_OBJECTS, &|| vm.ctx.new_list(Vec::new()).into());
    fill(NUM_FREE_OBJECTS, &|| vm.ctx.new_dict().into());
    fill(NUM_FREE_OBJECTS, &|| vm.ctx.new_float(0.5).into());
    fill(NUM_FREE_OBJECTS, &|| vm.ctx.new_bigint(&(1u64 << 40).into()).into());
}

/// Enters the zygote's layers; returns them all, in force or not.
fn enter_sandbox() -> Ready {
    let layer = |name: &str, required, done: Result<String, String>| {
        let in_force = done.is_ok();
        let detail = match done {
            Ok(what) | Err(what) => what,
        };
        Layer { name: name.to_owned(), in_force, required, detail }
    };
    // Where memory runs out, the trainer stays. A kernel that does not want to know stops nobody.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let plain = |done: std::io::Result<()>, what: &str| done.map(|()| what.to_owned()).map_err(|e| e.to_string());
    vec![
        layer("no_new_privs", true, plain(sandbox::no_new_privileges(), "no program can give rights back")),
        layer("capabilities", false, plain(sandbox::drop_capabilities(), "none are left, whoever the user is")),
        layer("rlimits", false, plain(sandbox::set_rlimits(), "address space, files, locked memory, queues")),
        layer("landlock", true, sandbox::enter_landlock()),
        layer(
            "seccomp",
            true,
            filter(true)
                .and_then(|f| sandbox::apply_filter(&f))
                .map(|()| "an allow-list; children get a shorter one".to_owned()),
        ),
    ]
}

fn run_job(warm: &Warm<'_>, job: &Job, slot: &Slot) -> JobResult {
    let mut order: Vec<usize> = (0..job.calls.len()).collect();
    if job.reverse != Reverse::No {
        order.reverse();
    }
    let mut result = JobResult { calls: vec![Outcome::Crash; job.calls.len()], ..JobResult::default() };
    let (mut done, mut killed) = (0, 0);
    while done < order.len() {
        let end = if job.apart { done + 1 } else { order.len() };
        let (outcomes, death) = match run_child(warm, job, &order[done..end], slot, &mut result) {
            Ok(ran) => ran,
            Err(e) => {
                result.no_child = Some(e.to_string());
                break;
            }
        };
        let known = outcomes.len().min(end - done);
        for (at, outcome) in order[done..].iter().zip(outcomes) {
            result.calls[*at] = outcome;
        }
        done += known;
        if known == 0 && matches!(death, Death::Foreign | Death::NotEntered) && killed < CHILD_TRIES {
            std::thread::sleep(CHILD_PAUSE * (1 << killed));
            killed += 1;
        } else if known == 0 {
            let outcome = match death {
                Death::Own(outcome) => outcome,
                Death::None | Death::Foreign => Outcome::Crash,
                Death::NotEntered => {
                    result.no_child = Some("a process cannot enter its sandbox".to_owned());
                    break;
                }
            };
            let late = matches!(outcome, Outcome::TimeoutCpu | Outcome::TimeoutWall);
            let until = if job.stop_when_late && late { order.len() } else { done + 1 };
            order[done..until].iter().for_each(|at| result.calls[*at] = outcome.clone());
            done = until;
        }
    }
    result
}

/// How a child came to its end.
#[derive(PartialEq)]
enum Death {
    /// It had nothing left to do.
    None,
    /// By its program.
    Own(Outcome),
    /// By a signal that no program can bring about.
    Foreign,
    /// Before there was a program.
    NotEntered,
}

/// A child, after some time if the machine has no room for one now.
fn fork() -> std::io::Result<Option<i32>> {
    for i in 0..CHILD_TRIES {
        if let Ok(pid) = sandbox::fork() {
            return Ok(pid);
        }
        std::thread::sleep(CHILD_PAUSE * (1 << i));
    }
    sandbox::fork()
}

/// Runs calls in a fresh child: the outcomes that it left, and its end.
///
/// # Errors
/// When there can be no child.
fn run_child(
    warm: &Warm<'_>,
    job: &Job,
    order: &[usize],
    slot: &Slot,
    result: &mut JobResult,
) -> std::io::Result<(Vec<Outcome>, Death)> {
    slot.clear();
    let zygote = std::process::id();
    let Some(pid) = fork()? else { child::run(warm, job, order, slot, zygote) };
    // The limit is that of one call: as long as outcomes come, the child may go on.
    let (mut seen, mut late) = (0, false);
    let ended = loop {
        match sandbox::wait_for(pid, Some(Duration::from_millis(job.limits.wall_ms))) {
            Ok(Some(ended)) => break Some(ended),
            Ok(None) if slot.len() > seen => seen = slot.len(),
            Ok(None) => {
                late = true;
                sandbox::kill(pid);
                break sandbox::wait_for(pid, None).ok().flatten();
            }
            Err(_) => break None,
        }
    };
    let (ending, cpu_us) = ended.unwrap_or((Ending::Exited(EXIT_PANIC), 0));
    let (bytes, peak) = slot.take();
    result.cpu_us += cpu_us;
    let death = match ending {
        Ending::Exited(0) => Death::None,
        _ if late => Death::Own(Outcome::TimeoutWall),
        Ending::Exited(sandbox::EXIT_OUT_OF_MEMORY) => Death::Own(Outcome::OutOfMemory),
        Ending::Killed(libc::SIGPROF | libc::SIGXCPU) => Death::Own(Outcome::TimeoutCpu),
        Ending::Killed(libc::SIGSYS) => Death::Own(Outcome::Policy),
        Ending::Killed(_) if cpu_us >= (1000 * job.limits.cpu_ms).min(1_000_000 * MAX_CPU_S) => {
            Death::Own(Outcome::TimeoutCpu)
        }
        Ending::Killed(libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGHUP | libc::SIGQUIT) => Death::Foreign,
        Ending::Exited(EXIT_NOT_ENTERED) => Death::NotEntered,
        _ => Death::Own(Outcome::Crash),
    };
    let peak = if death == Death::Own(Outcome::OutOfMemory) { job.limits.memory_bytes } else { peak };
    result.memory_bytes = result.memory_bytes.max(peak);
    Ok((take_frames(&bytes, order.len() * (2 * MAX_OUTPUT + MAX_MESSAGE)), death))
}
