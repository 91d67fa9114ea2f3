//! Between Python objects and [`Value`]: only objects of exact builtin types pass, and no user code ever runs.

use malachite_bigint::BigInt;
use rustpython_vm as vm;
use vm::builtins::{
    PyBaseExceptionRef, PyBytes, PyComplex, PyDict, PyFloat, PyFrozenSet, PyInt, PyList, PyRange, PySet, PyStr, PyTuple,
};
use vm::{AsObject, PyObject, PyObjectRef, PyPayload, PyResult, VirtualMachine};

use crate::exec::value::{MAX_DEPTH, Value};

/// Most elements of a value, all levels together.
const MAX_ITEMS: usize = 10_000;
/// Longest str or bytes, and most digits of an int, that a value may hold.
const MAX_LEN: usize = 8192;

/// Why an object is not a value.
#[derive(Debug)]
pub enum Unsupported {
    /// Too long, too deep or too many elements.
    TooLarge,
    /// Its exact type has no literal.
    Type(String),
}

/// Builds the object of a value.
///
/// # Errors
/// When the interpreter raises (out of memory).
pub fn to_python(vm: &VirtualMachine, value: &Value) -> Result<PyObjectRef, PyBaseExceptionRef> {
    let all = |items: &[Value]| items.iter().map(|v| to_python(vm, v)).collect::<PyResult<Vec<_>>>();
    Ok(match value {
        Value::None => vm.ctx.none(),
        Value::Bool(b) => vm.ctx.new_bool(*b).into(),
        Value::Int(i) => vm.ctx.new_bigint(i).into(),
        Value::Float(f) => vm.ctx.new_float(*f).into(),
        Value::Complex(re, im) => {
            let complex = vm.builtins.get_attr("complex", vm)?;
            complex.call((vm.ctx.new_float(*re), vm.ctx.new_float(*im)), vm)?
        }
        Value::Str(s) => vm.ctx.new_str(s.as_str()).into(),
        Value::Bytes(b) => vm.ctx.new_bytes(b.clone()).into(),
        Value::List(items) => vm.ctx.new_list(all(items)?).into(),
        Value::Tuple(items) => vm.ctx.new_tuple(all(items)?).into(),
        Value::Dict(items) => {
            let dict = vm.ctx.new_dict();
            for (key, value) in items {
                dict.set_item(&*to_python(vm, key)?, to_python(vm, value)?, vm)?;
            }
            dict.into()
        }
        Value::Set(items) => {
            let set = PySet::default().into_ref(&vm.ctx);
            for item in items {
                set.add(to_python(vm, item)?, vm)?;
            }
            set.into()
        }
        Value::FrozenSet(items) => {
            let frozen = vm.builtins.get_attr("frozenset", vm)?;
            frozen.call((vm.ctx.new_list(all(items)?),), vm)?
        }
        Value::Range(start, stop, step) => {
            let range = vm.builtins.get_attr("range", vm)?;
            range.call((vm.ctx.new_bigint(start), vm.ctx.new_bigint(stop), vm.ctx.new_bigint(step)), vm)?
        }
    })
}

/// Reads an object of exact builtin types.
///
/// # Errors
/// When the object, or one inside it, has another type or is too large.
pub fn from_python(vm: &VirtualMachine, object: &PyObject) -> Result<Value, Unsupported> {
    let mut left = MAX_ITEMS;
    read(vm, object, 0, &mut left)
}

fn read(vm: &VirtualMachine, object: &PyObject, depth: usize, left: &mut usize) -> Result<Value, Unsupported> {
    if depth > MAX_DEPTH || *left == 0 {
        return Err(Unsupported::TooLarge);
    }
    *left -= 1;
    let types = &vm.ctx.types;
    let class = object.class();
    let exact = |t: &vm::Py<vm::builtins::PyType>| class.is(t);
    let mut all = |items: &[PyObjectRef]| -> Result<Vec<Value>, Unsupported> {
        if items.len() > *left {
            return Err(Unsupported::TooLarge);
        }
        items.iter().map(|o| read(vm, o, depth + 1, left)).collect()
    };
    if exact(types.none_type) {
        return Ok(Value::None);
    }
    if exact(types.bool_type) {
        return Ok(Value::Bool(object.is(&vm.ctx.true_value)));
    }
    if exact(types.int_type)
        && let Some(i) = object.downcast_ref::<PyInt>()
    {
        return int(i.as_bigint()).map(Value::Int);
    }
    if exact(types.float_type)
        && let Some(f) = object.downcast_ref::<PyFloat>()
    {
        return Ok(Value::Float(f.to_f64()));
    }
    if exact(types.complex_type)
        && let Some(c) = object.downcast_ref::<PyComplex>()
    {
        let c = c.to_complex();
        return Ok(Value::Complex(c.re, c.im));
    }
    if exact(types.str_type)
        && let Some(s) = object.downcast_ref::<PyStr>()
    {
        let text = s.to_str().ok_or_else(|| Unsupported::Type("str with a lone surrogate".to_owned()))?;
        return if text.len() > MAX_LEN { Err(Unsupported::TooLarge) } else { Ok(Value::Str(text.to_owned())) };
    }
    if exact(types.bytes_type)
        && let Some(b) = object.downcast_ref::<PyBytes>()
    {
        let bytes = b.as_bytes();
        return if bytes.len() > MAX_LEN { Err(Unsupported::TooLarge) } else { Ok(Value::Bytes(bytes.to_vec())) };
    }
    if exact(types.list_type)
        && let Some(l) = object.downcast_ref::<PyList>()
    {
        let items = l.borrow_vec().to_vec();
        return all(&items).map(Value::List);
    }
    if exact(types.tuple_type)
        && let Some(t) = object.downcast_ref::<PyTuple>()
    {
        return all(t.as_slice()).map(Value::Tuple);
    }
    if exact(types.dict_type)
        && let Some(d) = object.downcast_ref::<PyDict>()
    {
        let (keys, values): (Vec<_>, Vec<_>) = (&**d).into_iter().unzip();
        return Ok(Value::Dict(all(&keys)?.into_iter().zip(all(&values)?).collect()));
    }
    if exact(types.set_type)
        && let Some(s) = object.downcast_ref::<PySet>()
    {
        return all(&s.elements()).map(Value::Set);
    }
    if exact(types.frozenset_type)
        && let Some(s) = object.downcast_ref::<PyFrozenSet>()
    {
        return all(&s.elements()).map(Value::FrozenSet);
    }
    if exact(types.range_type)
        && let Some(r) = object.downcast_ref::<PyRange>()
    {
        return Ok(Value::Range(int(r.start.as_bigint())?, int(r.stop.as_bigint())?, int(r.step.as_bigint())?));
    }
    Err(Unsupported::Type(class.name().to_string()))
}

fn int(i: &BigInt) -> Result<BigInt, Unsupported> {
    // Three bits and a bit more per decimal digit.
    if i.bits() > MAX_LEN as u64 * 3 { Err(Unsupported::TooLarge) } else { Ok(i.clone()) }
}
