//! Arithmetic of floats and complex numbers as CPython has it, where RustPython 0.5.0 goes other ways: remainders of exact
//! multiples, quotients of remainders, rounding, powers that overflow or are whole, complex division, complex numbers as text.

use num_complex::Complex64;
use rustpython_vm as vm;
use vm::builtins::{PyComplex, PyFloat, PyInt, PyIntRef};
use vm::function::{OptionalOption, PyMethodFlags};
use vm::{PyObject, PyRef, PyResult, VirtualMachine};

use crate::exec::value::Value;

/// Largest whole exponent for which a complex power is a product.
const MAX_PRODUCT: f64 = 100.0;
/// Floats below this are whole numbers of 64 bits when rounded.
const MAX_I64: f64 = (1u64 << 63) as f64;
/// With more places the interpreter's own way is right.
const MAX_PLACES: usize = 300;

/// Puts these operations in the place of the interpreter's own.
pub fn install(vm: &VirtualMachine) {
    let float = &vm.ctx.types.float_type.slots.as_number;
    for slot in [&float.remainder, &float.right_remainder] {
        slot.store(Some(|a, b, vm| of_floats(a, b, vm, remainder)));
    }
    for slot in [&float.floor_divide, &float.right_floor_divide] {
        slot.store(Some(|a, b, vm| of_floats(a, b, vm, floor_divide)));
    }
    for slot in [&float.divmod, &float.right_divmod] {
        slot.store(Some(|a, b, vm| of_floats(a, b, vm, divmod)));
    }
    for slot in [&float.power, &float.right_power] {
        slot.store(Some(|a, b, modulus, vm| {
            if !vm.is_none(modulus) {
                let message = "pow() 3rd argument not allowed unless all arguments are integers";
                return Err(vm.new_type_error(message));
            }
            of_floats(a, b, vm, power)
        }));
    }
    install_round(vm);
    vm.ctx.types.complex_type.slots.repr.store(Some(|object, vm| {
        let complex = object.downcast_ref::<PyComplex>().map(|c| c.to_complex()).unwrap_or_default();
        Ok(vm.ctx.new_str(Value::Complex(complex.re, complex.im).repr()))
    }));
    let complex = &vm.ctx.types.complex_type.slots.as_number;
    for slot in [&complex.true_divide, &complex.right_true_divide] {
        slot.store(Some(|a, b, vm| of_complex(a, b, vm, complex_quotient)));
    }
    for slot in [&complex.power, &complex.right_power] {
        slot.store(Some(|a, b, modulus, vm| {
            if !vm.is_none(modulus) {
                return Err(vm.new_value_error("complex modulo"));
            }
            of_complex(a, b, vm, complex_power)
        }));
    }
}

/// Rounding to digits goes by the exact value's own.
fn install_round(vm: &VirtualMachine) {
    let (class, name) = (vm.ctx.types.float_type, "__round__");
    let Some(plain) = class.get_attr(vm.ctx.intern_str(name)) else { return };
    let round = move |float: PyRef<PyFloat>, digits: OptionalOption<PyIntRef>, vm: &VirtualMachine| {
        let value = float.to_f64();
        let Some(digits) = digits.flatten() else {
            let whole = value.round_ties_even();
            return if whole.abs() < MAX_I64 {
                Ok(vm.ctx.new_int(whole as i64).into())
            } else {
                plain.call((float,), vm)
            };
        };
        match usize::try_from(digits.as_bigint()) {
            Ok(places) if places <= MAX_PLACES && value.is_finite() => {
                let rounded = format!("{value:.places$}").parse().map_err(|_| vm.new_value_error("no float"))?;
                Ok(vm.ctx.new_float(rounded).into())
            }
            _ => plain.call((float, digits), vm),
        }
    };
    let method = vm.ctx.new_method_def(name, round, PyMethodFlags::METHOD, None).build_method(class, vm);
    class.set_attr(vm.ctx.intern_str(name), method.into());
}

/// The number as a float, if it is a real one.
fn real(object: &PyObject, vm: &VirtualMachine) -> PyResult<Option<f64>> {
    if let Some(float) = object.downcast_ref::<PyFloat>() {
        return Ok(Some(float.to_f64()));
    }
    let Some(int) = object.downcast_ref::<PyInt>() else { return Ok(None) };
    let float = match i64::try_from(int.as_bigint()) {
        Ok(int) => int as f64,
        // Digits are read with the nearest float as their result.
        Err(_) => int.as_bigint().to_string().parse().unwrap_or(f64::INFINITY),
    };
    if float.is_finite() { Ok(Some(float)) } else { Err(vm.new_overflow_error("int too large to convert to float")) }
}

type FloatOp = fn(f64, f64, &VirtualMachine) -> PyResult;
type ComplexOp = fn(Complex64, Complex64, &VirtualMachine) -> PyResult<Complex64>;

fn of_floats(a: &PyObject, b: &PyObject, vm: &VirtualMachine, op: FloatOp) -> PyResult {
    match (real(a, vm)?, real(b, vm)?) {
        (Some(a), Some(b)) => op(a, b, vm),
        _ => Ok(vm.ctx.not_implemented()),
    }
}

fn of_complex(a: &PyObject, b: &PyObject, vm: &VirtualMachine, op: ComplexOp) -> PyResult {
    let complex = |object: &PyObject| -> PyResult<Option<Complex64>> {
        match object.downcast_ref::<PyComplex>() {
            Some(complex) => Ok(Some(complex.to_complex())),
            None => Ok(real(object, vm)?.map(Complex64::from)),
        }
    };
    match (complex(a)?, complex(b)?) {
        (Some(a), Some(b)) => Ok(vm.ctx.new_complex(op(a, b, vm)?).into()),
        _ => Ok(vm.ctx.not_implemented()),
    }
}

fn remainder(a: f64, b: f64, vm: &VirtualMachine) -> PyResult {
    if b == 0.0 {
        return Err(vm.new_zero_division_error("float modulo"));
    }
    Ok(vm.ctx.new_float(quotient_and_remainder(a, b).1).into())
}

fn floor_divide(a: f64, b: f64, vm: &VirtualMachine) -> PyResult {
    if b == 0.0 {
        return Err(vm.new_zero_division_error("float floor division by zero"));
    }
    Ok(vm.ctx.new_float(quotient_and_remainder(a, b).0).into())
}

fn divmod(a: f64, b: f64, vm: &VirtualMachine) -> PyResult {
    if b == 0.0 {
        return Err(vm.new_zero_division_error("float divmod()"));
    }
    let (quotient, remainder) = quotient_and_remainder(a, b);
    Ok(vm.ctx.new_tuple(vec![vm.ctx.new_float(quotient).into(), vm.ctx.new_float(remainder).into()]).into())
}

/// The whole quotient towards negative infinity, and the remainder, which has the divisor's sign; for a divisor other than 0.
fn quotient_and_remainder(a: f64, b: f64) -> (f64, f64) {
    let mut remainder = a % b;
    let mut quotient = (a - remainder) / b;
    if remainder == 0.0 {
        remainder = 0f64.copysign(b);
    } else if (b < 0.0) != (remainder < 0.0) {
        remainder += b;
        quotient -= 1.0;
    }
    let whole = if quotient == 0.0 {
        0f64.copysign(a / b)
    } else {
        let floor = quotient.floor();
        if quotient - floor > 0.5 { floor + 1.0 } else { floor }
    };
    (whole, remainder)
}

fn power(a: f64, b: f64, vm: &VirtualMachine) -> PyResult {
    if a == 0.0 && b < 0.0 {
        return Err(vm.new_zero_division_error("0.0 cannot be raised to a negative power"));
    }
    if a < 0.0 && a.is_finite() && b.is_finite() && b.floor() != b {
        return Ok(vm.ctx.new_complex(complex_power(a.into(), b.into(), vm)?).into());
    }
    let result = a.powf(b);
    if result.is_infinite() && a.is_finite() && b.is_finite() {
        return Err(vm.new_overflow_error("(34, 'Numerical result out of range')"));
    }
    Ok(vm.ctx.new_float(result).into())
}

/// Smith's way, which scales by the larger part of the divisor.
fn complex_quotient(a: Complex64, b: Complex64, vm: &VirtualMachine) -> PyResult<Complex64> {
    if b.re == 0.0 && b.im == 0.0 {
        return Err(vm.new_zero_division_error("complex division by zero"));
    }
    Ok(if b.re.abs() >= b.im.abs() {
        let ratio = b.im / b.re;
        let scale = b.re + b.im * ratio;
        Complex64::new((a.re + a.im * ratio) / scale, (a.im - a.re * ratio) / scale)
    } else if b.im.abs() >= b.re.abs() {
        let ratio = b.re / b.im;
        let scale = b.re * ratio + b.im;
        Complex64::new((a.re * ratio + a.im) / scale, (a.im * ratio - a.re) / scale)
    } else {
        Complex64::new(f64::NAN, f64::NAN)
    })
}

fn complex_power(a: Complex64, b: Complex64, vm: &VirtualMachine) -> PyResult<Complex64> {
    let result = if b.im == 0.0 && b.re.floor() == b.re && b.re.abs() <= MAX_PRODUCT {
        let product = whole_power(a, b.re.abs() as u32);
        if b.re > 0.0 {
            product
        } else {
            let message = "0.0 to a negative or complex power";
            complex_quotient(1.0.into(), product, vm).map_err(|_| vm.new_zero_division_error(message))?
        }
    } else if a.re == 0.0 && a.im == 0.0 {
        if b.im != 0.0 || b.re < 0.0 {
            return Err(vm.new_zero_division_error("0.0 to a negative or complex power"));
        }
        Complex64::default()
    } else {
        let (size, angle) = (a.re.hypot(a.im), a.im.atan2(a.re));
        let (mut len, mut phase) = (size.powf(b.re), angle * b.re);
        if b.im != 0.0 {
            len /= (angle * b.im).exp();
            phase += b.im * size.ln();
        }
        Complex64::new(len * phase.cos(), len * phase.sin())
    };
    let finite = [a.re, a.im, b.re, b.im].iter().all(|x| x.is_finite());
    if finite && !(result.re.is_finite() && result.im.is_finite()) {
        return Err(vm.new_overflow_error("complex exponentiation"));
    }
    Ok(result)
}

/// By squaring.
fn whole_power(mut square: Complex64, mut exponent: u32) -> Complex64 {
    let product = |a: Complex64, b: Complex64| Complex64::new(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re);
    let mut result = Complex64::from(1.0);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = product(result, square);
        }
        exponent >>= 1;
        if exponent > 0 {
            square = product(square, square);
        }
    }
    result
}
