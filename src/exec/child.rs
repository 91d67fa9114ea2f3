//! The child process: one program, its calls, and nothing else it can reach.
//!
//! Calls run one after another, each in a fresh module, and each outcome goes to the slot as soon as it is known. What a
//! call should give is not known here: a supervisor compares. (Only source from elsewhere, which may expect any expression,
//! is compared here, and then as values.)

use std::cell::RefCell;
use std::collections::BTreeMap;

use rustpython_vm as vm;
use seccompiler::BpfProgram;
use vm::builtins::{PyBaseExceptionRef, PyCode, PyFrozenSet, PySet, PyStrRef};
use vm::compiler::Mode;
use vm::scope::Scope;
use vm::{AsObject, PyObject, PyObjectRef, PyRef, PyResult, VirtualMachine};

use crate::exec::convert::{Types, plain_name};
use crate::exec::filter::of_process;
use crate::exec::protocol::{Call, Job, Outcome, Reverse, Unsupported, frame};
use crate::exec::sandbox::{self, Slot};
use crate::exec::value::Value;

/// Exit status of a child whose interpreter panicked.
pub const EXIT_PANIC: i32 = 78;
/// Exit status of a child that could not enter its layers.
pub const EXIT_NOT_ENTERED: i32 = 79;
/// Longest output literal, in bytes. Longer ones are refused, never cut.
pub const MAX_OUTPUT: usize = 4096;
/// Longest exception message kept, in bytes.
pub const MAX_MESSAGE: usize = 300;

/// A warm interpreter and what belongs to it.
pub struct Warm<'a> {
    /// The interpreter.
    pub vm: &'a VirtualMachine,
    /// Types of values.
    pub types: Types,
    /// The filter that children enter; none only where the architecture has none and that was accepted.
    pub filter: Option<BpfProgram>,
    /// `set.pop` for sets that give their members in reverse order.
    pub last_pop: PyObjectRef,
    /// Makes the clocks go, which stand still.
    pub start_clocks: PyObjectRef,
}

/// Enters the child's layers, runs the calls and ends the process. `zygote` is the number of its parent.
pub fn run(warm: &Warm<'_>, job: &Job, order: &[usize], slot: &Slot, zygote: u32) -> ! {
    let enter = || -> Option<()> {
        // A zygote that is killed takes its child along, and one that was killed before this has its child end now.
        sandbox::die_with_parent();
        (std::os::unix::process::parent_id() == zygote).then_some(())?;
        sandbox::close_from(3);
        sandbox::set_child_rlimits().ok()?;
        sandbox::set_cpu_timer(job.limits.cpu_ms).ok()?;
        sandbox::map_stack();
        sandbox::set_memory_budget(job.limits.memory_bytes as usize);
        if let Some(filter) = &warm.filter {
            sandbox::apply_filter(&of_process(filter, std::process::id())).ok()?;
        }
        Some(())
    };
    if enter().is_none() {
        sandbox::exit_now(EXIT_NOT_ENTERED);
    }
    // A task's programs may not name a clock, and whoever reaches one all the same learns nothing from it.
    if job.source && warm.start_clocks.call((), warm.vm).is_err() {
        sandbox::exit_now(EXIT_NOT_ENTERED);
    }
    if job.reverse == Reverse::CallsAndSets {
        reverse_sets(warm);
    }
    let mut left = order.len();
    run_calls(warm, job, order, &mut |outcome| {
        left -= 1;
        let taken = slot.append(&frame(outcome), sandbox::memory_peak());
        // What the last call leaves behind goes with the process.
        if left == 0 {
            sandbox::exit_now(0);
        }
        taken
    });
    sandbox::exit_now(0)
}

thread_local! {
    /// Hashes of the members of sets, numbered as they were first met.
    static MET: RefCell<BTreeMap<i64, usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// Members of a set, from the last that was met to the first. So every two change places, but one in the middle stays.
fn last_to_first(object: &PyObject, vm: &VirtualMachine) -> PyResult<Vec<PyObjectRef>> {
    let members = match (object.downcast_ref::<PySet>(), object.downcast_ref::<PyFrozenSet>()) {
        (Some(set), _) => set.elements(),
        (_, Some(set)) => set.elements(),
        _ => Vec::new(),
    };
    let hashes = members.iter().map(|m| m.hash(vm)).collect::<PyResult<Vec<_>>>()?;
    let mut ranked: Vec<_> = MET.with_borrow_mut(|met| {
        let mut rank = |hash| {
            let next = met.len();
            *met.entry(hash).or_insert(next)
        };
        hashes.into_iter().map(&mut rank).zip(members).enumerate().collect()
    });
    // Members of equal hash go by their places.
    ranked.sort_by_key(|(place, (rank, _))| std::cmp::Reverse((*rank, *place)));
    Ok(ranked.into_iter().map(|(_, (_, member))| member).collect())
}

fn reversed_text(object: &PyObject, vm: &VirtualMachine) -> PyResult<PyStrRef> {
    let texts = last_to_first(object, vm)?.iter().map(|m| m.repr(vm)).collect::<PyResult<Vec<_>>>()?;
    let texts: Vec<_> = texts.iter().map(|text| text.to_string_lossy()).collect();
    let class = object.class().name().to_string();
    Ok(vm.ctx.new_str(match (texts.is_empty(), class.as_str()) {
        (true, _) => format!("{class}()"),
        (false, "set") => format!("{{{}}}", texts.join(", ")),
        (false, _) => format!("{class}({{{}}})", texts.join(", ")),
    }))
}

/// From now on sets give their members, and show them in their text, from the last that was met to the first. Equal
/// programs whose results differ by it depend on an order that Python does not promise. (Merely reversed, a set made from
/// another set would be as it was.)
fn reverse_sets(warm: &Warm<'_>) {
    let types = &warm.vm.ctx.types;
    for set in [types.set_type, types.frozenset_type] {
        set.slots.iter.store(Some(|object, vm| {
            PyObjectRef::from(vm.ctx.new_list(last_to_first(&object, vm)?)).get_iter(vm).map(Into::into)
        }));
        set.slots.repr.store(Some(reversed_text));
    }
    types.set_type.set_attr(warm.vm.ctx.intern_str("pop"), warm.last_pop.clone());
}

/// Compiles the program, runs the calls in the given order and hands over each outcome, until it is not taken.
pub fn run_calls(warm: &Warm<'_>, job: &Job, order: &[usize], give: &mut dyn FnMut(&Outcome) -> bool) {
    let code = warm.vm.compile(&job.program, Mode::Exec, "<program>".to_owned());
    // The module of the call before.
    let mut module = None;
    for at in order {
        drop(module.take());
        let call = &job.calls[*at];
        let outcome = match &code {
            Ok(code) if job.source => run_source(warm, code, call),
            Ok(code) => run_call(warm, code, call, job.repeat, &mut module),
            Err(error) => exception(&warm.vm.new_syntax_error(error, None)),
        };
        if !give(&outcome) {
            return;
        }
    }
}

/// Runs the program in a fresh module.
fn run_module(vm: &VirtualMachine, code: &PyRef<PyCode>, name: &str) -> PyResult<Scope> {
    let scope = vm.new_scope_with_builtins();
    scope.globals.set_item("__name__", vm.ctx.new_str(name).into(), vm)?;
    vm.run_code_obj(code.clone(), scope.clone())?;
    Ok(scope)
}

/// Leaves the module to its caller, who may have no use for taking it down.
fn run_call(warm: &Warm<'_>, code: &PyRef<PyCode>, call: &Call, repeat: bool, module: &mut Option<Scope>) -> Outcome {
    let args = match Value::parse_args(&call.args) {
        Ok(args) => args,
        Err(e) => return Outcome::BadArgs(e.to_string()),
    };
    let scope = match run_module(warm.vm, code, "__program__") {
        Ok(scope) => module.insert(scope),
        Err(e) => return exception(&e),
    };
    let value = match call_f(warm, scope, &args) {
        Ok(value) => value,
        Err(outcome) => return outcome,
    };
    // Globals that a call changed, and random numbers, show when it is made again.
    if repeat {
        match call_f(warm, scope, &args) {
            Ok(again) if again.py_eq(&value) && again.repr() == value.repr() => {}
            _ => return Outcome::NotDeterministic,
        }
    }
    written(&value, None)
}

/// Calls `f` on arguments of its own: what it does to them touches no other call.
fn call_f(warm: &Warm<'_>, scope: &Scope, args: &[Value]) -> Result<Value, Outcome> {
    let call = || {
        let f = scope.globals.get_item("f", warm.vm)?;
        let args = args.iter().map(|a| warm.types.to_python(warm.vm, a)).collect::<PyResult<Vec<_>>>()?;
        f.call(args, warm.vm)
    };
    let value = read_result(warm, call())?;
    if value.holds_nan() { Err(Outcome::Unsupported(Unsupported::Value("nan".to_owned()))) } else { Ok(value) }
}

/// Runs the call's source in the program's module: its value if it is an expression, else `None`.
fn run_source(warm: &Warm<'_>, code: &PyRef<PyCode>, call: &Call) -> Outcome {
    let vm = warm.vm;
    let run = || -> PyResult<(Scope, PyObjectRef)> {
        let scope = run_module(vm, code, "__main__")?;
        let value = match vm.compile(call.args.trim(), Mode::Eval, "<call>".to_owned()) {
            Ok(expression) => vm.run_code_obj(expression, scope.clone())?,
            Err(_) => {
                let statements = vm.compile(&call.args, Mode::Exec, "<call>".to_owned());
                vm.run_code_obj(statements.map_err(|e| vm.new_syntax_error(&e, None))?, scope.clone())?;
                vm.ctx.none()
            }
        };
        Ok((scope, value))
    };
    let (scope, object) = match run() {
        Ok(found) => found,
        Err(e) => return unsupported_module(&e).unwrap_or_else(|| exception(&e)),
    };
    let value = match read_result(warm, Ok(object)) {
        Ok(value) => value,
        Err(outcome) => return outcome,
    };
    let Some(expect) = &call.expect else { return written(&value, None) };
    let expected = match Value::parse(expect) {
        Ok(expected) => Some(expected),
        Err(_) => {
            let expression = vm.compile(expect.trim(), Mode::Eval, "<expected>".to_owned()).ok();
            expression.and_then(|e| read_result(warm, vm.run_code_obj(e, scope)).ok())
        }
    };
    written(&value, Some(expected.is_some_and(|e| e.py_eq(&value))))
}

fn written(value: &Value, matches: Option<bool>) -> Outcome {
    let text = value.repr();
    if text.len() > MAX_OUTPUT { Outcome::OutputTooLarge } else { Outcome::Value { text, matches } }
}

fn read_result(warm: &Warm<'_>, result: PyResult) -> Result<Value, Outcome> {
    let object = result.map_err(|e| exception(&e))?;
    warm.types.from_python(warm.vm, &object).map_err(Outcome::from)
}

fn exception(e: &PyBaseExceptionRef) -> Outcome {
    Outcome::Exception { class: plain_name(&e.class().name()), message: message(e).unwrap_or_default() }
}

/// A message that is a plain argument: no code of the program's runs for it.
fn message(e: &PyBaseExceptionRef) -> Option<String> {
    let args = e.args();
    let text = args.as_slice().first()?.downcast_ref::<vm::builtins::PyStr>()?.to_string_lossy().into_owned();
    let mut len = text.len().min(MAX_MESSAGE);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    Some(text[..len].to_owned())
}

/// Source from elsewhere is not searched for modules that are not there; it fails when it imports one.
fn unsupported_module(e: &PyBaseExceptionRef) -> Option<Outcome> {
    let name = message(e)?.strip_prefix("No module named '")?.strip_suffix('\'')?.to_owned();
    (&*e.class().name() == "ModuleNotFoundError").then_some(Outcome::Unsupported(Unsupported::Module(name)))
}
