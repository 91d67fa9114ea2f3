//! Gaps of RustPython 0.5.0 that are closed in Python (`shim/patches.py`, `shim/expressions.py`). Methods that programs use all
//! the time keep the interpreter's own, and only calls that it gets wrong go to the patch.

use rustpython_vm as vm;
use vm::builtins::{PyClassMethod, PyStr, PyType};
use vm::compiler::Mode;
use vm::function::{FuncArgs, PyMethodFlags};
use vm::scope::Scope;
use vm::{Py, PyObjectRef, PyPayload, PyResult, VirtualMachine};

const PATCHES: &str = include_str!("shim/patches.py");
const EXPRESSIONS: &str = include_str!("shim/expressions.py");

/// Whether the interpreter gets a call wrong; the first argument is the object whose method it is.
type Wrong = fn(&[PyObjectRef]) -> bool;

/// Closes the gaps in regular expressions, before other modules have made theirs.
pub fn install_expressions(vm: &VirtualMachine) -> PyResult<()> {
    let scope = run_shim(vm, EXPRESSIONS)?;
    for (class, method) in [("pattern", "findall"), ("match", "groups"), ("match", "groupdict")] {
        set_method(vm, &scope, class, method)?;
    }
    Ok(())
}

/// Closes all others; the patches' names are in the scope.
pub fn install(vm: &VirtualMachine) -> PyResult<Scope> {
    let scope = run_shim(vm, PATCHES)?;
    let patch = |name: &'static str| scope.globals.get_item(name, vm);
    let types = &vm.ctx.types;
    let fromkeys = PyClassMethod::from(patch("fromkeys")?).into_ref(&vm.ctx);
    types.dict_type.set_attr(vm.ctx.intern_str("fromkeys"), fromkeys.into());
    for (class, method, name) in [
        (types.str_type, "expandtabs", "expandtabs"),
        (types.bool_type, "__format__", "format_bool"),
        (types.bool_type, "__round__", "round_bool"),
        (types.dict_type, "__reversed__", "reversed_dict"),
        (types.dict_keys_type, "__reversed__", "reversed_dict"),
        (types.dict_values_type, "__reversed__", "reversed_dict"),
        (types.dict_items_type, "__reversed__", "reversed_dict"),
    ] {
        class.set_attr(vm.ctx.intern_str(method), patch(name)?);
    }
    set_method(vm, &scope, "deque", "remove")?;
    guard(vm, types.float_type, "__format__", patch("format_float")?, |args| !ends_with(args, &["f", "F", "%"]));
    guard(vm, types.int_type, "__format__", patch("format_int")?, |args| ends_with(args, &["e", "E", "g", "G"]));
    guard(vm, types.str_type, "__format__", patch("format_str")?, |args| text(args, 1).is_none_or(|s| s.contains('.')));
    for name in ["strip", "lstrip", "rstrip"] {
        guard(vm, types.str_type, name, patch(name)?, |args| text(args, 1).is_some_and(|s| !s.is_ascii()));
    }
    for name in ["count", "replace", "zfill", "swapcase"] {
        guard(vm, types.str_type, name, patch(name)?, |args| text(args, 0).is_some_and(|s| !s.is_ascii()));
    }
    Ok(scope)
}

/// Gives a class that a shim names the method of that name.
fn set_method(vm: &VirtualMachine, scope: &Scope, class: &str, method: &'static str) -> PyResult<()> {
    let class = scope.globals.get_item(class, vm)?.downcast::<PyType>();
    let class = class.map_err(|_| vm.new_type_error("a shim names no class"))?;
    class.set_attr(vm.ctx.intern_str(method), scope.globals.get_item(method, vm)?);
    Ok(())
}

/// The argument's text; None where it is no str, or has surrogates.
fn text(args: &[PyObjectRef], at: usize) -> Option<&str> {
    args.get(at)?.downcast_ref::<PyStr>()?.to_str()
}

fn ends_with(args: &[PyObjectRef], ends: &[&str]) -> bool {
    text(args, 1).is_some_and(|s| ends.iter().any(|end| s.ends_with(end)))
}

/// Sends the calls of a method that the interpreter gets wrong to the patch.
fn guard(vm: &VirtualMachine, class: &'static Py<PyType>, name: &'static str, patch: PyObjectRef, wrong: Wrong) {
    let Some(plain) = class.get_attr(vm.ctx.intern_str(name)) else { return };
    let call = move |args: FuncArgs, vm: &VirtualMachine| {
        let method = if wrong(&args.args) { &patch } else { &plain };
        method.call(args, vm)
    };
    let method = vm.ctx.new_method_def(name, call, PyMethodFlags::METHOD, None).build_method(class, vm);
    class.set_attr(vm.ctx.intern_str(name), method.into());
}

/// Runs a shim; its names are in the scope.
fn run_shim(vm: &VirtualMachine, source: &str) -> PyResult<Scope> {
    let code = vm.compile(source, Mode::Exec, "<patches>".to_owned()).map_err(|e| vm.new_syntax_error(&e, None))?;
    let scope = vm.new_scope_with_builtins();
    vm.run_code_obj(code, scope.clone())?;
    Ok(scope)
}
