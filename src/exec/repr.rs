//! Values as Python writes them.
//!
//! One difference is deliberate: members of sets are written in a fixed order (numbers by size, then the rest by their
//! text), because Python's order is an accident of insertion and hashing. So equal sets have equal texts.

use std::cmp::Ordering;

use malachite_bigint::BigInt;

use crate::exec::number::write_text;
use crate::exec::value::Value;

impl Value {
    /// The literal that Python's `repr` gives.
    pub fn repr(&self) -> String {
        let mut out = String::new();
        self.write_repr(&mut out);
        out
    }

    fn write_repr(&self, out: &mut String) {
        match self {
            Value::None => out.push_str("None"),
            Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
            Value::Int(i) => write_text(out, i),
            Value::Float(f) => out.push_str(&float_repr(*f)),
            Value::Complex(re, im) => write_complex(*re, *im, out),
            Value::Str(s) => write_str(s, out),
            Value::Bytes(b) => write_bytes(b, out),
            Value::List(items) => write_items("[", items.iter(), "]", out),
            Value::Tuple(items) => write_items("(", items.iter(), if items.len() == 1 { ",)" } else { ")" }, out),
            Value::Dict(pairs) => write_pairs("", pairs, "", out),
            Value::Set(items) if items.is_empty() => out.push_str("set()"),
            Value::Set(items) => write_members("{", items, "}", out),
            Value::FrozenSet(items) if items.is_empty() => out.push_str("frozenset()"),
            Value::FrozenSet(items) => write_members("frozenset({", items, "})", out),
            Value::Range(start, stop, step) if *step == BigInt::from(1) => {
                write_text(out, format_args!("range({start}, {stop})"));
            }
            Value::Range(start, stop, step) => write_text(out, format_args!("range({start}, {stop}, {step})")),
            Value::Deque(items, None) => write_items("deque([", items.iter(), "])", out),
            Value::Deque(items, Some(most)) => {
                write_items("deque([", items.iter(), &format!("], maxlen={most})"), out);
            }
            Value::Counter(pairs) if pairs.is_empty() => out.push_str("Counter()"),
            Value::Counter(pairs) => write_pairs("Counter(", &most_common(pairs), ")", out),
            Value::DefaultDict(factory, pairs) => {
                let factory = factory.map_or("None".to_owned(), |f| format!("<class '{}'>", f.name()));
                write_pairs(&format!("defaultdict({factory}, "), pairs, ")", out);
            }
            Value::OrderedDict(pairs) if pairs.is_empty() => out.push_str("OrderedDict()"),
            Value::OrderedDict(pairs) => write_pairs("OrderedDict(", pairs, ")", out),
            Value::Fraction(p, q) => write_text(out, format_args!("Fraction({p}, {q})")),
            Value::Decimal(d) => write_text(out, format_args!("Decimal('{}')", d.text())),
            Value::Moment(m) => write_text(out, m),
        }
    }
}

fn write_items<'a>(open: &str, items: impl Iterator<Item = &'a Value>, close: &str, out: &mut String) {
    out.push_str(open);
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        item.write_repr(out);
    }
    out.push_str(close);
}

fn write_pairs(open: &str, pairs: &[(Value, Value)], close: &str, out: &mut String) {
    out.push_str(open);
    out.push('{');
    for (i, (key, value)) in pairs.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        key.write_repr(out);
        out.push_str(": ");
        value.write_repr(out);
    }
    out.push('}');
    out.push_str(close);
}

/// Writes the members of a set in their order; each becomes text once, however deep sets nest.
fn write_members(open: &str, items: &[Value], close: &str, out: &mut String) {
    let size = |v: &Value| match v {
        Value::Bool(b) => Some(f64::from(u8::from(*b))),
        Value::Int(i) => i.to_string().parse().ok(),
        // The sign of a nan is not written.
        Value::Float(f) => Some(if f.is_nan() { f64::NAN } else { *f }),
        _ => None,
    };
    let mut keyed: Vec<_> = items.iter().map(|v| (size(v), v.repr())).collect();
    keyed.sort_by(|(a, s), (b, t)| match (a, b) {
        (Some(a), Some(b)) => a.total_cmp(b).then_with(|| s.cmp(t)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => s.cmp(t),
    });
    let texts: Vec<String> = keyed.into_iter().map(|(_, text)| text).collect();
    out.push_str(open);
    out.push_str(&texts.join(", "));
    out.push_str(close);
}

/// A Counter's pairs as Python prints them: the largest counts first, equal ones as they were inserted. Python gives up
/// on order when counts cannot be compared, and so does this.
fn most_common(pairs: &[(Value, Value)]) -> Vec<(Value, Value)> {
    let mut sorted = pairs.to_vec();
    if pairs.iter().all(|(_, v)| matches!(v, Value::Int(_) | Value::Bool(_))) {
        let count = |v: &Value| match v {
            Value::Int(i) => i.clone(),
            Value::Bool(b) => BigInt::from(u8::from(*b)),
            _ => unreachable!("all counts are whole"),
        };
        sorted.sort_by_key(|(_, v)| std::cmp::Reverse(count(v)));
    }
    sorted
}

fn write_complex(re: f64, im: f64, out: &mut String) {
    let part = |f: f64| float_repr(f).trim_end_matches(".0").to_owned();
    if re == 0.0 && re.is_sign_positive() {
        write_text(out, format_args!("{}j", part(im)));
    } else {
        let sign = if im.is_sign_negative() && !im.is_nan() { "" } else { "+" };
        write_text(out, format_args!("({}{sign}{}j)", part(re), part(im)));
    }
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

/// Whether Python's `repr` shows a character as it is.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    // Rust's debug text knows which code points are assigned and visible; behind a letter it keeps accents as they are.
    !c.is_whitespace() && !format!("a{c}").escape_debug().to_string().contains("\\u")
}

fn write_str(text: &str, out: &mut String) {
    let quote = quote_for(text);
    out.push(quote);
    for c in text.chars() {
        let code = u32::from(c);
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            _ if code < 0x100 => write_text(out, format_args!("\\x{code:02x}")),
            _ if code < 0x1_0000 => write_text(out, format_args!("\\u{code:04x}")),
            _ => write_text(out, format_args!("\\U{code:08x}")),
        }
    }
    out.push(quote);
}

fn write_bytes(bytes: &[u8], out: &mut String) {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { b'"' } else { b'\'' };
    out.push('b');
    out.push(char::from(quote));
    for b in bytes {
        match *b {
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b if b == quote => {
                out.push('\\');
                out.push(char::from(b));
            }
            b @ 0x20..0x7f => out.push(char::from(b)),
            b => write_text(out, format_args!("\\x{b:02x}")),
        }
    }
    out.push(char::from(quote));
}
