//! Identities of objects that say nothing of where these lie: numbers in the order in which a program asked for them.
//!
//! An address differs from process to process, and half of its bits agree by chance: a program that made its result of one
//! would pass as deterministic now and fail then. Numbers are the same in every run of a zygote, and in the other zygote
//! every bit of them is another, so that whatever comes of them is found out always.

use std::cell::RefCell;
use std::collections::HashMap;

use rustpython_vm as vm;
use vm::builtins::{PyList, PyStrRef, PyType};
use vm::compiler::Mode;
use vm::{AsObject, PyObject, PyObjectRef, PyResult, VirtualMachine};

/// Types whose text names an address. So does that of every type that has none of its own.
const SHOW_ADDRESS: &[&str] = &[
    "async_generator",
    "builtin_function_or_method",
    "code",
    "coroutine",
    "function",
    "generator",
    "lock",
    "memoryview",
    "method-wrapper",
    "object",
    "RLock",
    "weakref",
];
/// The method by which an object has its text.
const METHOD: &str = "def __repr__(self, /, text=text):\n    return text(self)\n";
/// Where numbers begin; addresses of user space have so many bits.
const FIRST: usize = 0x5000_0000_0000;
const BITS: usize = 0x7fff_ffff_fff0;

type Text = fn(&PyObject, &VirtualMachine) -> PyResult<PyStrRef>;

#[derive(Default)]
struct Identities {
    /// Numbers by address, in the order in which they were asked for.
    numbers: HashMap<usize, usize>,
    /// Texts of types, by the type's address, as the interpreter writes them.
    texts: HashMap<usize, Text>,
    /// What to turn in each number.
    turned: usize,
}

thread_local! {
    static IDENTITIES: RefCell<Identities> = RefCell::default();
}

/// Gives `id` and the texts of objects numbers for addresses; with `turned` with all their bits turned.
pub fn install(vm: &VirtualMachine, turned: bool) -> PyResult<()> {
    let plain = vm.ctx.types.object_type.slots.repr.load();
    for_each_class(vm, &vm.ctx.types.object_type.to_owned().into(), &mut |class: &PyType| {
        let text = class.slots.repr.load();
        let inherits = text.map(|t| t as usize) == plain.map(|t| t as usize);
        let key = std::ptr::from_ref(class).addr();
        if let Some(text) = text
            && IDENTITIES.with_borrow(|known| !known.texts.contains_key(&key))
            && (inherits || SHOW_ADDRESS.contains(&&*class.name()))
        {
            IDENTITIES.with_borrow_mut(|known| known.texts.insert(key, text));
            class.slots.repr.store(Some(numbered_text));
        }
    })?;
    IDENTITIES.with_borrow_mut(|known| known.turned = if turned { BITS } else { 0 });
    // Classes to come take their text from the method.
    let text = vm.new_function("text", |object: PyObjectRef, vm: &VirtualMachine| numbered_text(&object, vm));
    let code = vm.compile(METHOD, Mode::Exec, "<patches>".to_owned());
    let scope = vm.new_scope_with_builtins();
    scope.globals.set_item("text", text.into(), vm)?;
    vm.run_code_obj(code.map_err(|e| vm.new_syntax_error(&e, None))?, scope.clone())?;
    let method = scope.globals.get_item("__repr__", vm)?;
    vm.ctx.types.object_type.set_attr(vm.ctx.intern_str("__repr__"), method);
    let id = vm.new_function("id", |object: PyObjectRef| number(object.get_id()));
    vm.builtins.set_attr("id", id, vm)
}

/// Every class that is there, some of them more than once: `class` and those made from it.
pub fn for_each_class(vm: &VirtualMachine, class: &PyObjectRef, see: &mut dyn FnMut(&PyType)) -> PyResult<()> {
    if let Some(class) = class.downcast_ref::<PyType>() {
        see(class);
    }
    let subclasses = vm.ctx.types.type_type.get_attr(vm.ctx.intern_str("__subclasses__"));
    let subclasses = subclasses.map(|f| f.call((class.clone(),), vm)).transpose()?;
    for subclass in subclasses.iter().filter_map(|s| s.downcast_ref::<PyList>()).flat_map(|s| s.borrow_vec().to_vec()) {
        if !subclass.is(class) && !subclass.is(vm.ctx.types.type_type) {
            for_each_class(vm, &subclass, see)?;
        }
    }
    Ok(())
}

fn number(address: usize) -> usize {
    IDENTITIES.with_borrow_mut(|known| {
        let next = FIRST + 16 * known.numbers.len();
        *known.numbers.entry(address).or_insert(next) ^ known.turned
    })
}

/// The interpreter's text of an object, with a number for each address.
fn numbered_text(object: &PyObject, vm: &VirtualMachine) -> PyResult<PyStrRef> {
    let of_class =
        |class: &PyType| IDENTITIES.with_borrow(|known| known.texts.get(&std::ptr::from_ref(class).addr()).copied());
    let own = object.class().mro_collect().iter().find_map(|class| of_class(class));
    let Some(text) = own.or_else(|| of_class(vm.ctx.types.object_type)) else {
        return Err(vm.new_runtime_error("no text"));
    };
    let text = text(object, vm)?.to_string_lossy().into_owned();
    Ok(vm.ctx.new_str(numbered(&text)))
}

fn numbered(text: &str) -> String {
    let mut parts = text.split("0x");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let len = part.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(part.len());
        match usize::from_str_radix(&part[..len], 16) {
            Ok(address) => out.push_str(&format!("{:#x}{}", number(address), &part[len..])),
            Err(_) => out.extend(["0x", part]),
        }
    }
    out
}
