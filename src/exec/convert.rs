//! Between Python objects and [`Value`]: only objects of exact builtin and standard types pass.
//!
//! Types are known by identity, from before any untrusted program ran: a class that calls itself `Fraction` is no Fraction.
//! Builtin types are read natively. The types that the standard library writes in Python are read through attributes of
//! exact types; what a program changes in those classes can alter what it returns, as anything else it does can, but never
//! how two values are compared.

use malachite_bigint::BigInt;
use rustpython_vm as vm;
use vm::builtins::{PyBytes, PyComplex, PyDict, PyFloat, PyFrozenSet, PyInt, PyList, PyRange, PySet, PyStr, PyTuple};
use vm::function::{FuncArgs, KwArgs};
use vm::{AsObject, PyObject, PyObjectRef, PyPayload, PyResult, VirtualMachine};

use crate::exec::moment::{Clock, Date, Moment};
use crate::exec::number::{Decimal, Exponent};
use crate::exec::protocol::{Outcome, Unsupported};
use crate::exec::value::{Factory, MAX_DEPTH, Pairs, Value};

/// Most elements of a value, all levels together.
const MAX_ITEMS: usize = 10_000;
/// Longest str or bytes, and most digits of an int, that a value may hold.
const MAX_LEN: usize = 8192;

/// Longest class name kept, in characters.
const MAX_NAME: usize = 64;

/// A class's name as a program's text could have it: names made by `type` can be anything, of any length.
pub fn plain_name(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric() || "_.".contains(*c)).take(MAX_NAME).collect()
}

/// Why an object is not a value.
#[derive(Debug)]
pub enum Refusal {
    /// Too long, too deep or too many elements.
    TooLarge,
    /// Its exact type has no literal.
    Type(String),
}

impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::TooLarge => Outcome::OutputTooLarge,
            Refusal::Type(name) => Outcome::Unsupported(Unsupported::Value(name)),
        }
    }
}

fn no_literal(what: &str) -> Refusal {
    Refusal::Type(what.to_owned())
}

/// The types that values have besides the builtin ones with a fast native path, as they were before any program ran.
pub struct Types {
    builtins: Vec<(Factory, PyObjectRef)>,
    complex: PyObjectRef,
    frozenset: PyObjectRef,
    range: PyObjectRef,
    deque: PyObjectRef,
    counter: PyObjectRef,
    defaultdict: PyObjectRef,
    ordered_dict: PyObjectRef,
    ordered_keys: PyObjectRef,
    fraction: PyObjectRef,
    decimal: PyObjectRef,
    date: PyObjectRef,
    time: PyObjectRef,
    datetime: PyObjectRef,
    timedelta: PyObjectRef,
    timezone: PyObjectRef,
}

impl Types {
    /// Looks the types up.
    ///
    /// # Errors
    /// When the standard library lacks one.
    pub fn load(vm: &VirtualMachine) -> PyResult<Self> {
        let from = |module: &'static str, name: &'static str| vm.import(module, 0)?.get_attr(name, vm);
        let builtin = |name: &'static str| vm.builtins.get_attr(name, vm);
        let ordered_dict = from("collections", "OrderedDict")?;
        let names = ["int", "list", "set", "dict", "str", "float", "tuple", "bool"];
        let factory = |name: &'static str| Ok((Factory::named(name).expect("a factory"), builtin(name)?));
        Ok(Types {
            builtins: names.into_iter().map(factory).collect::<PyResult<_>>()?,
            complex: builtin("complex")?,
            frozenset: builtin("frozenset")?,
            range: builtin("range")?,
            deque: from("collections", "deque")?,
            counter: from("collections", "Counter")?,
            defaultdict: from("collections", "defaultdict")?,
            ordered_keys: ordered_dict.get_attr("__iter__", vm)?,
            ordered_dict,
            fraction: from("fractions", "Fraction")?,
            decimal: from("decimal", "Decimal")?,
            date: from("datetime", "date")?,
            time: from("datetime", "time")?,
            datetime: from("datetime", "datetime")?,
            timedelta: from("datetime", "timedelta")?,
            timezone: from("datetime", "timezone")?,
        })
    }

    /// Builds the object of a value.
    ///
    /// # Errors
    /// When the interpreter raises (out of memory).
    pub fn to_python(&self, vm: &VirtualMachine, value: &Value) -> PyResult {
        let all = |items: &[Value]| items.iter().map(|v| self.to_python(vm, v)).collect::<PyResult<Vec<_>>>();
        let list = |items: &[Value]| all(items).map(|items| vm.ctx.new_list(items));
        let big = |i: &BigInt| vm.ctx.new_bigint(i);
        Ok(match value {
            Value::None => vm.ctx.none(),
            Value::Bool(b) => vm.ctx.new_bool(*b).into(),
            Value::Int(i) => big(i).into(),
            Value::Float(f) => vm.ctx.new_float(*f).into(),
            Value::Complex(re, im) => self.complex.call((vm.ctx.new_float(*re), vm.ctx.new_float(*im)), vm)?,
            Value::Str(s) => vm.ctx.new_str(s.as_str()).into(),
            Value::Bytes(b) => vm.ctx.new_bytes(b.clone()).into(),
            Value::List(items) => list(items)?.into(),
            Value::Tuple(items) => vm.ctx.new_tuple(all(items)?).into(),
            Value::Dict(pairs) => self.dict(vm, pairs)?,
            Value::Set(items) => {
                let set = PySet::default().into_ref(&vm.ctx);
                for item in items {
                    set.add(self.to_python(vm, item)?, vm)?;
                }
                set.into()
            }
            Value::FrozenSet(items) => self.frozenset.call((list(items)?,), vm)?,
            Value::Range(start, stop, step) => self.range.call((big(start), big(stop), big(step)), vm)?,
            Value::Deque(items, None) => self.deque.call((list(items)?,), vm)?,
            Value::Deque(items, Some(most)) => self.deque.call((list(items)?, vm.ctx.new_int(*most)), vm)?,
            Value::Counter(pairs) => self.counter.call((self.dict(vm, pairs)?,), vm)?,
            Value::OrderedDict(pairs) => self.ordered_dict.call((self.dict(vm, pairs)?,), vm)?,
            Value::DefaultDict(factory, pairs) => {
                let known = factory.and_then(|f| self.builtins.iter().find(|(g, _)| *g == f));
                let factory = known.map_or_else(|| vm.ctx.none(), |(_, class)| class.clone());
                self.defaultdict.call((factory, self.dict(vm, pairs)?), vm)?
            }
            Value::Fraction(p, q) => self.fraction.call((big(p), big(q)), vm)?,
            Value::Decimal(d) => self.decimal.call((vm.ctx.new_str(d.text()),), vm)?,
            Value::Moment(moment) => self.moment(vm, moment)?,
        })
    }

    fn dict(&self, vm: &VirtualMachine, pairs: &[(Value, Value)]) -> PyResult {
        let dict = vm.ctx.new_dict();
        for (key, value) in pairs {
            dict.set_item(&*self.to_python(vm, key)?, self.to_python(vm, value)?, vm)?;
        }
        Ok(dict.into())
    }

    fn moment(&self, vm: &VirtualMachine, moment: &Moment) -> PyResult {
        let ints = |parts: &[i64]| parts.iter().map(|p| vm.ctx.new_int(*p).into()).collect::<Vec<PyObjectRef>>();
        let delta = |micros: i128| {
            let parts = [micros.div_euclid(86_400_000_000), 0, micros.rem_euclid(86_400_000_000)].map(|p| p as i64);
            self.timedelta.call(ints(&parts), vm)
        };
        let zoned = |class: &PyObjectRef, parts: Vec<PyObjectRef>, zone: Option<i64>| {
            let zone = zone.map(|z| self.timezone.call((delta(i128::from(z))?,), vm)).transpose()?;
            let keywords: KwArgs = zone.into_iter().map(|z| ("tzinfo".to_owned(), z)).collect();
            class.call(FuncArgs::new(parts, keywords), vm)
        };
        match moment {
            Moment::Date(date) => self.date.call(ints(&date.parts()), vm),
            Moment::Time(clock) => zoned(&self.time, ints(&clock.parts()), clock.zone()),
            Moment::DateTime(date, clock) => {
                zoned(&self.datetime, ints(&[&date.parts()[..], &clock.parts()[..]].concat()), clock.zone())
            }
            Moment::Delta(micros) => delta(*micros),
            Moment::Zone(offset) => self.timezone.call((delta(i128::from(*offset))?,), vm),
        }
    }

    /// Reads an object of exact types.
    ///
    /// # Errors
    /// When the object, or one inside it, has another type or is too large.
    pub fn from_python(&self, vm: &VirtualMachine, object: &PyObject) -> Result<Value, Refusal> {
        Reader { vm, types: self, left: MAX_ITEMS }.read(object, 0)
    }
}

struct Reader<'a> {
    vm: &'a VirtualMachine,
    types: &'a Types,
    left: usize,
}

impl Reader<'_> {
    fn read(&mut self, object: &PyObject, depth: usize) -> Result<Value, Refusal> {
        if depth > MAX_DEPTH || self.left == 0 {
            return Err(Refusal::TooLarge);
        }
        self.left -= 1;
        if let Some(value) = self.scalar(object)? {
            return Ok(value);
        }
        let types = &self.vm.ctx.types;
        let class = object.class();
        let exact = |t: &vm::Py<vm::builtins::PyType>| class.is(t);
        if exact(types.list_type)
            && let Some(l) = object.downcast_ref::<PyList>()
        {
            let items = l.borrow_vec().to_vec();
            return self.all(&items, depth).map(Value::List);
        }
        if exact(types.tuple_type)
            && let Some(t) = object.downcast_ref::<PyTuple>()
        {
            return self.all(t.as_slice(), depth).map(Value::Tuple);
        }
        if exact(types.set_type)
            && let Some(s) = object.downcast_ref::<PySet>()
        {
            return self.all(&s.elements(), depth).map(Value::Set);
        }
        if exact(types.frozenset_type)
            && let Some(s) = object.downcast_ref::<PyFrozenSet>()
        {
            return self.all(&s.elements(), depth).map(Value::FrozenSet);
        }
        if let Some(d) = object.downcast_ref::<PyDict>() {
            return self.mapping(object, d, depth);
        }
        self.standard(object, depth)
    }

    fn all(&mut self, items: &[PyObjectRef], depth: usize) -> Result<Vec<Value>, Refusal> {
        if items.len() > self.left {
            return Err(Refusal::TooLarge);
        }
        items.iter().map(|o| self.read(o, depth + 1)).collect()
    }

    /// A value without parts, if the object is one.
    fn scalar(&self, object: &PyObject) -> Result<Option<Value>, Refusal> {
        let types = &self.vm.ctx.types;
        let class = object.class();
        let exact = |t: &vm::Py<vm::builtins::PyType>| class.is(t);
        Ok(Some(if exact(types.none_type) {
            Value::None
        } else if exact(types.bool_type) {
            Value::Bool(object.is(&self.vm.ctx.true_value))
        } else if exact(types.int_type)
            && let Some(i) = object.downcast_ref::<PyInt>()
        {
            Value::Int(int(i.as_bigint())?)
        } else if exact(types.float_type)
            && let Some(f) = object.downcast_ref::<PyFloat>()
        {
            Value::Float(f.to_f64())
        } else if exact(types.complex_type)
            && let Some(c) = object.downcast_ref::<PyComplex>()
        {
            let c = c.to_complex();
            Value::Complex(c.re, c.im)
        } else if exact(types.str_type)
            && let Some(s) = object.downcast_ref::<PyStr>()
        {
            let text = s.to_str().ok_or_else(|| no_literal("str with a lone surrogate"))?;
            if text.len() > MAX_LEN {
                return Err(Refusal::TooLarge);
            }
            Value::Str(text.to_owned())
        } else if exact(types.bytes_type)
            && let Some(b) = object.downcast_ref::<PyBytes>()
        {
            if b.as_bytes().len() > MAX_LEN {
                return Err(Refusal::TooLarge);
            }
            Value::Bytes(b.as_bytes().to_vec())
        } else if exact(types.range_type)
            && let Some(r) = object.downcast_ref::<PyRange>()
        {
            Value::Range(int(r.start.as_bigint())?, int(r.stop.as_bigint())?, int(r.step.as_bigint())?)
        } else {
            return Ok(None);
        }))
    }

    /// A dict, or one of the standard library's kinds of dict.
    fn mapping(&mut self, object: &PyObject, dict: &vm::Py<PyDict>, depth: usize) -> Result<Value, Refusal> {
        let (class, types) = (object.class(), self.types);
        if class.is(&types.ordered_dict) {
            // Written in Python, with an order of its own beside the dict's.
            let keys = types.ordered_keys.call((object.to_owned(),), self.vm).map_err(|_| no_literal("OrderedDict"))?;
            let keys = self.iterate(&keys)?;
            let value = |k: &PyObjectRef| dict.get_item_opt(&**k, self.vm).ok().flatten();
            let values = keys.iter().map(value).collect::<Option<Vec<_>>>().ok_or_else(|| no_literal("OrderedDict"))?;
            return self.pairs(&keys, &values, depth).map(Value::OrderedDict);
        }
        let (keys, values): (Vec<_>, Vec<_>) = dict.into_iter().unzip();
        if class.is(self.vm.ctx.types.dict_type) {
            self.pairs(&keys, &values, depth).map(Value::Dict)
        } else if class.is(&types.counter) {
            self.pairs(&keys, &values, depth).map(Value::Counter)
        } else if class.is(&types.defaultdict) {
            let factory = self.attribute(object, "default_factory")?;
            let known = types.builtins.iter().find(|(_, class)| factory.is(class)).map(|(f, _)| *f);
            if known.is_none() && !self.vm.is_none(&factory) {
                return Err(no_literal("defaultdict with a factory that is no builtin type"));
            }
            self.pairs(&keys, &values, depth).map(|pairs| Value::DefaultDict(known, pairs))
        } else {
            Err(Refusal::Type(plain_name(&class.name())))
        }
    }

    fn pairs(&mut self, keys: &[PyObjectRef], values: &[PyObjectRef], depth: usize) -> Result<Pairs, Refusal> {
        Ok(self.all(keys, depth)?.into_iter().zip(self.all(values, depth)?).collect())
    }

    fn iterate(&self, object: &PyObject) -> Result<Vec<PyObjectRef>, Refusal> {
        let mut items = Vec::new();
        let iter = object.to_owned().get_iter(self.vm).map_err(|_| no_literal("iterator"))?;
        for item in iter.iter::<PyObjectRef>(self.vm).map_err(|_| no_literal("iterator"))? {
            items.push(item.map_err(|_| no_literal("iterator"))?);
            if items.len() > self.left {
                return Err(Refusal::TooLarge);
            }
        }
        Ok(items)
    }

    /// A value of one of the standard library's other types.
    fn standard(&mut self, object: &PyObject, depth: usize) -> Result<Value, Refusal> {
        let (class, types) = (object.class(), self.types);
        let refused = || Refusal::Type(plain_name(&class.name()));
        if class.is(&types.deque) {
            let most = self.attribute(object, "maxlen")?;
            let most = if self.vm.is_none(&most) { None } else { Some(self.small(&most)? as u64) };
            let items = self.iterate(object)?;
            return self.all(&items, depth).map(|items| Value::Deque(items, most));
        }
        if class.is(&types.fraction) {
            return Ok(Value::Fraction(self.big(object, "_numerator")?, self.big(object, "_denominator")?));
        }
        if class.is(&types.decimal) {
            return self.decimal(object).map(Value::Decimal);
        }
        let date = || {
            let [y, m, d] = ["year", "month", "day"].map(|name| self.part(object, name));
            Date::new(y?, m?, d?).ok_or_else(refused)
        };
        let clock = || {
            let [h, m, s, us, fold] =
                ["hour", "minute", "second", "microsecond", "fold"].map(|name| self.part(object, name));
            let zone = self.attribute(object, "tzinfo")?;
            let zone = if self.vm.is_none(&zone) { None } else { Some(self.zone(&zone)?) };
            let clock = Clock::new([h?, m?, s?, us?], zone).filter(|_| matches!(fold, Ok(0)));
            clock.ok_or_else(refused)
        };
        let moment = if class.is(&types.date) {
            Moment::Date(date()?)
        } else if class.is(&types.time) {
            Moment::Time(clock()?)
        } else if class.is(&types.datetime) {
            Moment::DateTime(date()?, clock()?)
        } else if class.is(&types.timedelta) {
            Moment::delta(self.micros(object)?).ok_or_else(refused)?
        } else if class.is(&types.timezone) {
            Moment::Zone(self.zone(object)?)
        } else {
            return Err(refused());
        };
        Ok(Value::Moment(moment))
    }

    fn attribute(&self, object: &PyObject, name: &'static str) -> Result<PyObjectRef, Refusal> {
        object
            .get_attr(name, self.vm)
            .map_err(|_| Refusal::Type(format!("{} without {name}", plain_name(&object.class().name()))))
    }

    fn big(&self, object: &PyObject, name: &'static str) -> Result<BigInt, Refusal> {
        match self.scalar(&*self.attribute(object, name)?)? {
            Some(Value::Int(i)) => Ok(i),
            _ => Err(no_literal(name)),
        }
    }

    fn small(&self, object: &PyObject) -> Result<i64, Refusal> {
        match self.scalar(object)? {
            Some(Value::Int(i)) if i.bits() < 60 => Ok(i.to_string().parse().expect("60 bits fit")),
            _ => Err(no_literal("number")),
        }
    }

    fn part(&self, object: &PyObject, name: &'static str) -> Result<i64, Refusal> {
        self.small(&*self.attribute(object, name)?)
    }

    fn micros(&self, delta: &PyObject) -> Result<i128, Refusal> {
        let [days, seconds, micros] = ["days", "seconds", "microseconds"].map(|name| self.part(delta, name));
        Ok((i128::from(days?) * 86_400 + i128::from(seconds?)) * 1_000_000 + i128::from(micros?))
    }

    /// Offset of a fixed, unnamed time zone.
    fn zone(&self, zone: &PyObject) -> Result<i64, Refusal> {
        let named = || -> Result<bool, Refusal> { Ok(!self.vm.is_none(&*self.attribute(zone, "_name")?)) };
        if !zone.class().is(&self.types.timezone) || named()? {
            return Err(Refusal::Type(plain_name(&zone.class().name())));
        }
        let offset = self.attribute(zone, "_offset")?;
        match Moment::zone(self.micros(&offset)?) {
            Some(Moment::Zone(offset)) => Ok(offset),
            _ => Err(no_literal("timezone")),
        }
    }

    fn decimal(&self, object: &PyObject) -> Result<Decimal, Refusal> {
        let refused = || no_literal("Decimal");
        let negative = self.part(object, "_sign")? == 1;
        let text = |name| match self.scalar(&*self.attribute(object, name)?)? {
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(Value::Int(_)) => Ok(None),
            _ => Err(refused()),
        };
        let special = |exponent| Ok(Decimal { negative, digits: "0".to_owned(), exponent });
        match text("_exp")?.as_deref() {
            Some("F") => special(Exponent::Infinity),
            Some("n") => special(Exponent::Nan),
            Some(_) => Err(refused()),
            None => {
                let digits = text("_int")?.filter(|d| d.bytes().all(|b| b.is_ascii_digit())).ok_or_else(refused)?;
                Ok(Decimal::new(negative, &digits, self.part(object, "_exp")?))
            }
        }
    }
}

fn int(i: &BigInt) -> Result<BigInt, Refusal> {
    // Three bits and a bit more per decimal digit.
    if i.bits() > MAX_LEN as u64 * 3 { Err(Refusal::TooLarge) } else { Ok(i.clone()) }
}
