//! Python values: what crosses the border between programs and the trainer, compared as Python compares.
//!
//! Nothing here executes anything. Equality is Python's (`True == 1 == 1.0 == Fraction(1)`, sets and dicts without order,
//! a set equals a frozenset, a Counter ignores zero counts beside another Counter, two OrderedDicts compare in order),
//! computed on decoded values, never by a program's classes.
//!
//! The nan rule: Python compares members of containers by identity first, so that `x == x` may hold for a list with nan
//! inside and fail for its copy. A decoded value has no identity: here a value that holds nan equals nothing, not even
//! itself. A task whose answer holds nan cannot be checked and is refused.
//!
//! Writing is in `repr`, reading in `literal`, JSON in `json`.

use malachite_bigint::BigInt;
use std::collections::HashMap;

use crate::exec::moment::Moment;
use crate::exec::number::{Decimal, float_key, ratio_key, write_text};

/// Deepest nesting of a value.
pub const MAX_DEPTH: usize = 64;
/// Most decimal digits of a whole number, as in Python: beyond, reading and writing take long.
pub const MAX_DIGITS: usize = 4300;
/// Longest literal, in bytes.
pub const MAX_TEXT: usize = 64 << 10;

/// The builtin type that a defaultdict makes its missing values with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factory(&'static str);

impl Factory {
    /// Types whose call without arguments gives an empty value.
    const NAMES: [&'static str; 8] = ["int", "list", "set", "dict", "str", "float", "tuple", "bool"];

    /// The factory of this name, if it is a builtin type.
    pub fn named(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|n| *n == name).map(Factory)
    }

    /// The type's name.
    pub fn name(self) -> &'static str {
        self.0
    }
}

/// Key and value pairs.
pub type Pairs = Vec<(Value, Value)>;

/// A Python value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An int of any size.
    Int(BigInt),
    /// A float.
    Float(f64),
    /// A complex number.
    Complex(f64, f64),
    /// A str.
    Str(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A list.
    List(Vec<Value>),
    /// A tuple.
    Tuple(Vec<Value>),
    /// A dict in insertion order, keys distinct.
    Dict(Pairs),
    /// A set, members distinct, in any order.
    Set(Vec<Value>),
    /// A frozenset, members distinct, in any order.
    FrozenSet(Vec<Value>),
    /// A range: start, stop, step.
    Range(BigInt, BigInt, BigInt),
    /// `collections.deque`: items and greatest length.
    Deque(Vec<Value>, Option<u64>),
    /// `collections.Counter`.
    Counter(Pairs),
    /// `collections.defaultdict`: factory and items.
    DefaultDict(Option<Factory>, Pairs),
    /// `collections.OrderedDict`.
    OrderedDict(Pairs),
    /// `fractions.Fraction` in lowest terms, denominator above 0.
    Fraction(BigInt, BigInt),
    /// `decimal.Decimal`.
    Decimal(Decimal),
    /// A value of the module `datetime`.
    Moment(Moment),
}

impl Value {
    /// Python's `==`.
    pub fn py_eq(&self, other: &Value) -> bool {
        use Value::{Counter, Deque, FrozenSet, List, OrderedDict, Set, Tuple};
        match (self, other) {
            (List(a), List(b)) | (Tuple(a), Tuple(b)) | (Deque(a, _), Deque(b, _)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.py_eq(b))
            }
            (Set(a) | FrozenSet(a), Set(b) | FrozenSet(b)) => match (members(a), members(b)) {
                (Some(a), Some(b)) => a == b,
                _ => false,
            },
            (Counter(a), Counter(b)) => counts_equal(a, b),
            (OrderedDict(a), OrderedDict(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|((k, v), (l, w))| k.py_eq(l) && v.py_eq(w))
            }
            _ => match (self.pairs(), other.pairs()) {
                (Some(a), Some(b)) => a.len() == b.len() && pairs_equal(a, b),
                (None, None) => match (self.canonical(), other.canonical()) {
                    (Some(a), Some(b)) => a == b,
                    _ => false,
                },
                _ => false,
            },
        }
    }

    /// Whether nan is anywhere inside.
    pub fn holds_nan(&self) -> bool {
        match self {
            Value::Float(f) => f.is_nan(),
            Value::Complex(re, im) => re.is_nan() || im.is_nan(),
            Value::Decimal(d) => d.is_nan(),
            _ => {
                let pairs = self.pairs().unwrap_or_default();
                self.items().unwrap_or_default().iter().any(Value::holds_nan)
                    || pairs.iter().any(|(k, v)| k.holds_nan() || v.holds_nan())
            }
        }
    }

    /// Whether the value can be a member of a set.
    pub fn is_hashable(&self) -> bool {
        match self {
            Value::List(_) | Value::Set(_) | Value::Deque(..) => false,
            Value::Tuple(items) => items.iter().all(Value::is_hashable),
            _ => self.pairs().is_none(),
        }
    }

    /// Members of a sequence or set.
    pub(crate) fn items(&self) -> Option<&[Value]> {
        match self {
            Value::List(v) | Value::Tuple(v) | Value::Set(v) | Value::FrozenSet(v) | Value::Deque(v, _) => Some(v),
            _ => None,
        }
    }

    /// Pairs of a dict or of a kind of dict.
    pub(crate) fn pairs(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Dict(v) | Value::Counter(v) | Value::DefaultDict(_, v) | Value::OrderedDict(v) => Some(v),
            _ => None,
        }
    }

    /// A text that two hashable values share when they are equal; none when nan is inside or the value cannot be hashed.
    pub(crate) fn canonical(&self) -> Option<String> {
        let mut out = String::new();
        self.write_canonical(&mut out).then_some(out)
    }

    fn write_canonical(&self, out: &mut String) -> bool {
        match self {
            Value::None => out.push('N'),
            Value::Bool(b) => out.push_str(if *b { "1" } else { "0" }),
            Value::Int(i) => write_text(out, i),
            Value::Float(f) => return float_key(*f, out),
            Value::Complex(re, im) => {
                let ok = float_key(*re, out);
                if *im != 0.0 {
                    out.push('+');
                    let ok = float_key(*im, out) && ok;
                    out.push('j');
                    return ok;
                }
                return ok;
            }
            Value::Fraction(p, q) => ratio_key(p, q, out),
            Value::Decimal(d) => return d.key(out),
            Value::Str(s) => write_text(out, format_args!("s{}:{s}", s.len())),
            Value::Bytes(b) => write_text(out, format_args!("b{b:?}")),
            Value::Moment(m) => m.key(out),
            Value::Tuple(items) => {
                let Some(items) = items.iter().map(Value::canonical).collect::<Option<Vec<String>>>() else {
                    return false;
                };
                write_text(out, format_args!("({})", items.join(",")));
            }
            Value::FrozenSet(items) => {
                let Some(items) = members(items) else { return false };
                write_text(out, format_args!("{{{}}}", items.join(",")));
            }
            Value::Range(start, stop, step) => range_key(start, stop, step, out),
            Value::List(_) | Value::Set(_) | Value::Deque(..) => return false,
            Value::Dict(_) | Value::Counter(_) | Value::DefaultDict(..) | Value::OrderedDict(_) => return false,
        }
        true
    }
}

/// Canonical texts of the members of a set, sorted.
fn members(items: &[Value]) -> Option<Vec<String>> {
    let mut keys = items.iter().map(Value::canonical).collect::<Option<Vec<String>>>()?;
    keys.sort_unstable();
    keys.dedup();
    Some(keys)
}

fn index(pairs: &[(Value, Value)]) -> Option<HashMap<String, &Value>> {
    pairs.iter().map(|(k, v)| Some((k.canonical()?, v))).collect()
}

fn pairs_equal(a: &[(Value, Value)], b: &[(Value, Value)]) -> bool {
    match (index(a), index(b)) {
        (Some(a), Some(b)) => a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|other| v.py_eq(other))),
        _ => false,
    }
}

/// Two Counters: a missing count is 0.
fn counts_equal(a: &[(Value, Value)], b: &[(Value, Value)]) -> bool {
    let zero = Value::Int(BigInt::from(0));
    let covered = |a: &HashMap<String, &Value>, b: &HashMap<String, &Value>| {
        a.iter().all(|(k, v)| v.py_eq(b.get(k).unwrap_or(&&zero)))
    };
    match (index(a), index(b)) {
        (Some(a), Some(b)) => covered(&a, &b) && covered(&b, &a),
        _ => false,
    }
}

/// Ranges are equal when they give the same numbers.
fn range_key(start: &BigInt, stop: &BigInt, step: &BigInt, out: &mut String) {
    let zero = BigInt::from(0);
    let len = if *step > zero && start < stop {
        (stop - start - BigInt::from(1)) / step + BigInt::from(1)
    } else if *step < zero && start > stop {
        (start - stop - BigInt::from(1)) / -step + BigInt::from(1)
    } else {
        zero.clone()
    };
    let (first, by) = if len == zero { (&zero, &zero) } else { (start, step) };
    let by = if len == BigInt::from(1) { &zero } else { by };
    write_text(out, format_args!("r{len},{first},{by}"));
}
