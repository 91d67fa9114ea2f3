//! Python values of exact builtin types: read from literals, written as Python writes them, compared as Python compares.
//!
//! Nothing here executes anything. Equality is Python's (`True == 1 == 1.0`, sets and dicts without order, a set equals
//! a frozenset), except that a value holding nan equals nothing, not even itself: a task whose answer is nan cannot be
//! checked and is refused.

use malachite_bigint::BigInt;
use std::fmt::{self, Write as _};

/// Deepest nesting of a value.
pub const MAX_DEPTH: usize = 64;
/// Longest literal, in bytes.
pub const MAX_TEXT: usize = 64 << 10;

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
    Dict(Vec<(Value, Value)>),
    /// A set in insertion order, members distinct.
    Set(Vec<Value>),
    /// A frozenset in insertion order, members distinct.
    FrozenSet(Vec<Value>),
    /// A range: start, stop, step.
    Range(BigInt, BigInt, BigInt),
}

impl Value {
    /// The text that Python's `repr` gives.
    pub fn repr(&self) -> String {
        let mut out = String::new();
        self.write_repr(&mut out);
        out
    }

    /// Python's `==`.
    pub fn py_eq(&self, other: &Value) -> bool {
        match (self.canonical(), other.canonical()) {
            (Some(a), Some(b)) => a == b,
            _ => false,
        }
    }

    /// Whether the value can be a member of a set.
    pub fn is_hashable(&self) -> bool {
        match self {
            Value::List(_) | Value::Dict(_) | Value::Set(_) => false,
            Value::Tuple(items) => items.iter().all(Value::is_hashable),
            _ => true,
        }
    }

    /// A text that two values share when they are equal; none when nan is inside.
    pub(crate) fn canonical(&self) -> Option<String> {
        let mut out = String::new();
        self.write_canonical(&mut out).then_some(out)
    }

    fn write_canonical(&self, out: &mut String) -> bool {
        let all = |items: &[Value]| items.iter().map(Value::canonical).collect::<Option<Vec<String>>>();
        match self {
            Value::None => out.push('N'),
            Value::Bool(b) => out.push_str(if *b { "1" } else { "0" }),
            Value::Int(i) => write_text(out, i),
            Value::Float(f) => return canonical_float(*f, out),
            Value::Complex(re, im) => {
                let ok = canonical_float(*re, out);
                if *im != 0.0 {
                    out.push('+');
                    let ok = canonical_float(*im, out) && ok;
                    out.push('j');
                    return ok;
                }
                return ok;
            }
            Value::Str(s) => write_text(out, format_args!("s{}:{s}", s.len())),
            Value::Bytes(b) => write_text(out, format_args!("b{b:?}")),
            Value::List(items) | Value::Tuple(items) => {
                let Some(items) = all(items) else { return false };
                let open = if matches!(self, Value::List(_)) { "[" } else { "(" };
                write_text(out, format_args!("{open}{})", items.join(",")));
            }
            Value::Set(items) | Value::FrozenSet(items) => {
                let Some(mut items) = all(items) else { return false };
                items.sort_unstable();
                items.dedup();
                write_text(out, format_args!("{{{}}}", items.join(",")));
            }
            Value::Dict(items) => {
                let mut pairs = Vec::with_capacity(items.len());
                for (key, value) in items {
                    let (Some(key), Some(value)) = (key.canonical(), value.canonical()) else { return false };
                    pairs.push(format!("{key}:{value}"));
                }
                pairs.sort_unstable();
                write_text(out, format_args!("d{{{}}}", pairs.join(",")));
            }
            Value::Range(start, stop, step) => {
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
        }
        true
    }

    fn write_repr(&self, out: &mut String) {
        let list = |out: &mut String, items: &[Value]| {
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                item.write_repr(out);
            }
        };
        match self {
            Value::None => out.push_str("None"),
            Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
            Value::Int(i) => write_text(out, i),
            Value::Float(f) => out.push_str(&float_repr(*f)),
            Value::Complex(re, im) => {
                let part = |f: f64| float_repr(f).trim_end_matches(".0").to_owned();
                if *re == 0.0 && re.is_sign_positive() {
                    write_text(out, format_args!("{}j", part(*im)));
                } else {
                    let sign = if im.is_sign_negative() { "" } else { "+" };
                    write_text(out, format_args!("({}{sign}{}j)", part(*re), part(*im)));
                }
            }
            Value::Str(s) => write_str_repr(s.chars().map(u32::from), s, out),
            Value::Bytes(b) => {
                out.push('b');
                let text: String = b.iter().filter(|b| b.is_ascii()).map(|b| *b as char).collect();
                write_bytes_repr(b, &text, out);
            }
            Value::List(items) => {
                out.push('[');
                list(out, items);
                out.push(']');
            }
            Value::Tuple(items) => {
                out.push('(');
                list(out, items);
                out.push_str(if items.len() == 1 { ",)" } else { ")" });
            }
            Value::Dict(items) => {
                out.push('{');
                for (i, (key, value)) in items.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    key.write_repr(out);
                    out.push_str(": ");
                    value.write_repr(out);
                }
                out.push('}');
            }
            Value::Set(items) if items.is_empty() => out.push_str("set()"),
            Value::Set(items) => {
                out.push('{');
                list(out, items);
                out.push('}');
            }
            Value::FrozenSet(items) if items.is_empty() => out.push_str("frozenset()"),
            Value::FrozenSet(items) => {
                out.push_str("frozenset({");
                list(out, items);
                out.push_str("})");
            }
            Value::Range(start, stop, step) if *step == BigInt::from(1) => {
                write_text(out, format_args!("range({start}, {stop})"));
            }
            Value::Range(start, stop, step) => write_text(out, format_args!("range({start}, {stop}, {step})")),
        }
    }
}

fn write_text(out: &mut String, text: impl fmt::Display) {
    write!(out, "{text}").expect("a String takes any text");
}

fn canonical_float(f: f64, out: &mut String) -> bool {
    if f.is_nan() {
        return false;
    }
    if f.is_finite() && f.fract() == 0.0 {
        write_text(out, integral(f));
    } else {
        write_text(out, format_args!("f{:x}", f.to_bits()));
    }
    true
}

/// The integer that a whole float is.
fn integral(f: f64) -> BigInt {
    let bits = f.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i64 - 1075;
    let mantissa = if exponent == -1075 { (bits & ((1 << 52) - 1)) << 1 } else { (bits & ((1 << 52) - 1)) | 1 << 52 };
    let magnitude = if exponent >= 0 {
        BigInt::from(mantissa) << exponent as u64
    } else {
        BigInt::from(mantissa) >> (-exponent) as u64
    };
    if f < 0.0 { -magnitude } else { magnitude }
}

/// Python's float repr: the shortest digits that read back, exponent form outside 1e-4..1e16.
fn float_repr(f: f64) -> String {
    if f.is_nan() {
        return "nan".to_owned();
    }
    if f.is_infinite() {
        return if f > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{f:e}");
    let (digits, exponent) = scientific.split_once('e').expect("scientific notation has an exponent");
    let exponent: i32 = exponent.parse().expect("an exponent is a number");
    if f == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{f}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn quote_for(text: &str) -> char {
    if text.contains('\'') && !text.contains('"') { '"' } else { '\'' }
}

fn write_str_repr(chars: impl Iterator<Item = u32>, text: &str, out: &mut String) {
    let quote = quote_for(text);
    out.push(quote);
    for code in chars {
        let c = char::from_u32(code).expect("a str holds characters");
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if code < 0x20 || (0x7f..0xa1).contains(&code) || code == 0xad => {
                write_text(out, format_args!("\\x{:02x}", c as u32))
            }
            c if c.is_control() || (c.is_whitespace() && code > 0x20) => {
                if code < 0x1_0000 {
                    write_text(out, format_args!("\\u{code:04x}"));
                } else {
                    write_text(out, format_args!("\\U{code:08x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

fn write_bytes_repr(bytes: &[u8], text: &str, out: &mut String) {
    let quote = quote_for(text);
    out.push(quote);
    for b in bytes {
        match *b {
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b if b as char == quote => {
                out.push('\\');
                out.push(quote);
            }
            b @ 0x20..0x7f => out.push(b as char),
            b => write_text(out, format_args!("\\x{b:02x}")),
        }
    }
    out.push(quote);
}
