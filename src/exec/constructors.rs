//! Calls that a literal may contain: constructors of the types that have no display of their own, of literal arguments.
//! Each takes what Python's takes, as far as it can be said with literals; for anything else there is no value.

use std::collections::{HashMap, HashSet};
use std::str::FromStr as _;

use malachite_bigint::BigInt;

use crate::exec::moment::{Clock, Date, Moment};
use crate::exec::number::{Decimal, reduced};
use crate::exec::value::{Factory, MAX_DIGITS, Pairs, Value};

/// Modules whose constructors may be written with the module's name before them.
const MODULES: [(&str, &[&str]); 4] = [
    ("collections", &["deque", "Counter", "defaultdict", "OrderedDict"]),
    ("fractions", &["Fraction"]),
    ("decimal", &["Decimal"]),
    ("datetime", &["date", "time", "datetime", "timedelta", "timezone"]),
];

/// Constructors of builtin types.
const BUILTINS: [&str; 12] =
    ["set", "frozenset", "list", "tuple", "dict", "range", "float", "int", "str", "bool", "complex", "bytes"];

/// The constructor that a name, with or without its module, stands for.
pub(crate) fn constructor(name: &str) -> Option<&str> {
    let Some((module, rest)) = name.split_once('.') else {
        let known = BUILTINS.contains(&name) || MODULES.iter().any(|(_, names)| names.contains(&name));
        return known.then_some(name);
    };
    MODULES.iter().any(|(m, names)| *m == module && names.contains(&rest)).then_some(rest)
}

/// Arguments of a constructor.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) factory: Option<Factory>,
    pub(crate) positional: Vec<Value>,
    pub(crate) keywords: Vec<(String, Value)>,
}

impl Arguments {
    /// Ints by position, then by name; those that are missing are `None`.
    fn ints(&self, names: &[&str]) -> Option<Vec<Option<i64>>> {
        let mut values: Vec<Option<i64>> = vec![None; names.len()];
        for (i, value) in self.positional.iter().enumerate() {
            *values.get_mut(i)? = Some(small(value)?);
        }
        for (name, value) in &self.keywords {
            let at = names.iter().position(|n| n == name)?;
            if values[at].replace(small(value)?).is_some() {
                return None;
            }
        }
        Some(values)
    }

    fn take_keyword(&mut self, name: &str) -> Option<Value> {
        let at = self.keywords.iter().position(|(n, _)| n == name)?;
        Some(self.keywords.remove(at).1)
    }
}

fn small(value: &Value) -> Option<i64> {
    match value {
        Value::Int(i) if i.bits() < 60 => i.to_string().parse().ok(),
        Value::Bool(b) => Some(i64::from(*b)),
        _ => None,
    }
}

/// The value that a constructor makes of its arguments.
pub(crate) fn construct(name: &str, mut args: Arguments) -> Option<Value> {
    match name {
        "date" => Some(Value::Moment(Moment::Date(date(&args.ints(&["year", "month", "day"])?)?))),
        "time" => {
            let zone = zone(args.take_keyword("tzinfo"))?;
            let parts = args.ints(&["hour", "minute", "second", "microsecond"])?;
            Some(Value::Moment(Moment::Time(clock(&parts, zone)?)))
        }
        "datetime" => {
            let zone = zone(args.take_keyword("tzinfo"))?;
            let parts = args.ints(&["year", "month", "day", "hour", "minute", "second", "microsecond"])?;
            Some(Value::Moment(Moment::DateTime(date(&parts[..3])?, clock(&parts[3..], zone)?)))
        }
        "timedelta" => delta(&args),
        "dict" => keyword_pairs(args).map(Value::Dict),
        "OrderedDict" => keyword_pairs(args).map(Value::OrderedDict),
        "defaultdict" => {
            let factory = args.factory;
            keyword_pairs(args).map(|pairs| Value::DefaultDict(factory, pairs))
        }
        "Counter" => counter(args),
        "deque" => {
            let most = match args
                .take_keyword("maxlen")
                .or_else(|| (args.positional.len() == 2).then(|| args.positional.remove(1)))
            {
                None | Some(Value::None) => None,
                Some(most) => Some(u64::try_from(small(&most)?).ok()?),
            };
            let mut items = iterated(one(args)?)?;
            if let Some(most) = most {
                items.drain(..items.len().saturating_sub(usize::try_from(most).ok()?));
            }
            Some(Value::Deque(items, most))
        }
        _ if args.keywords.is_empty() => plain(name, args.positional),
        _ => None,
    }
}

/// Constructors without keywords.
fn plain(name: &str, mut args: Vec<Value>) -> Option<Value> {
    match (name, args.as_slice()) {
        ("range", _) => return range(args),
        ("Fraction", [Value::Int(p)]) => return Some(Value::Fraction(p.clone(), BigInt::from(1))),
        ("Fraction", [Value::Int(p), Value::Int(q)]) if *q != BigInt::from(0) => {
            let (p, q) = reduced(p, q);
            return Some(Value::Fraction(p, q));
        }
        ("complex", [re, im]) => return Some(Value::Complex(float(re)?, float(im)?)),
        ("complex", [Value::Complex(re, im)]) => return Some(Value::Complex(*re, *im)),
        ("complex", [re]) => return Some(Value::Complex(float(re)?, 0.0)),
        _ if args.len() > 1 => return None,
        _ => {}
    }
    let arg = args.pop();
    match (name, arg) {
        ("Fraction", Some(Value::Str(s))) => {
            let (p, q) = s.split_once('/').unwrap_or((&s, "1"));
            let whole = |s: &str| BigInt::from_str(s.trim()).ok().filter(|_| s.len() <= MAX_DIGITS);
            let (p, q) = (whole(p)?, whole(q)?);
            (q != BigInt::from(0)).then(|| reduced(&p, &q)).map(|(p, q)| Value::Fraction(p, q))
        }
        ("Decimal", Some(Value::Str(s))) => Decimal::parse(&s).map(Value::Decimal),
        ("Decimal", Some(Value::Int(i))) => Decimal::parse(&i.to_string()).map(Value::Decimal),
        ("timezone", Some(Value::Moment(Moment::Delta(micros)))) => Moment::zone(micros).map(Value::Moment),
        ("float", Some(Value::Str(s))) => {
            // Rust reads a few spellings that Python does not.
            let text = s.trim();
            let plain = text.bytes().all(|b| b.is_ascii_digit() || b"+-.eEinfatyINFATY".contains(&b));
            text.parse().ok().filter(|_| plain).map(Value::Float)
        }
        ("float", Some(v @ Value::Float(_))) | ("int", Some(v @ Value::Int(_))) => Some(v),
        ("str", Some(v @ Value::Str(_))) | ("bool", Some(v @ Value::Bool(_))) => Some(v),
        ("bytes", Some(v @ Value::Bytes(_))) => Some(v),
        ("str", None) => Some(Value::Str(String::new())),
        ("bytes", None) => Some(Value::Bytes(Vec::new())),
        ("set", arg) => distinct_members(iterated(arg)?).map(Value::Set),
        ("frozenset", arg) => distinct_members(iterated(arg)?).map(Value::FrozenSet),
        ("list", arg) => iterated(arg).map(Value::List),
        ("tuple", arg) => iterated(arg).map(Value::Tuple),
        _ => None,
    }
}

fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Float(f) => Some(*f),
        other => small(other).map(|i| i as f64),
    }
}

fn one(mut args: Arguments) -> Option<Option<Value>> {
    (args.positional.len() <= 1 && args.keywords.is_empty()).then(|| args.positional.pop())
}

/// What iterating over an argument gives.
fn iterated(arg: Option<Value>) -> Option<Vec<Value>> {
    Some(match arg {
        None => Vec::new(),
        Some(Value::List(v) | Value::Tuple(v) | Value::Set(v) | Value::FrozenSet(v) | Value::Deque(v, _)) => v,
        Some(Value::Str(s)) => s.chars().map(|c| Value::Str(c.to_string())).collect(),
        Some(Value::Dict(d)) => d.into_iter().map(|(k, _)| k).collect(),
        _ => return None,
    })
}

/// Members without repeats, in order of first appearance; none when one cannot be hashed.
pub(crate) fn distinct_members(items: Vec<Value>) -> Option<Vec<Value>> {
    let mut seen = HashSet::new();
    let mut distinct = Vec::with_capacity(items.len());
    for item in items {
        if !item.is_hashable() {
            return None;
        }
        if item.canonical().is_none_or(|c| seen.insert(c)) {
            distinct.push(item);
        }
    }
    Some(distinct)
}

/// Pairs in which the last value of a repeated key stands at the key's first place; none when a key cannot be hashed.
pub(crate) fn distinct_pairs(pairs: Pairs) -> Option<Pairs> {
    let mut index: HashMap<String, usize> = HashMap::new();
    let mut distinct: Pairs = Vec::with_capacity(pairs.len());
    for (key, value) in pairs {
        if !key.is_hashable() {
            return None;
        }
        let canonical = key.canonical();
        match canonical.as_ref().and_then(|c| index.get(c)) {
            Some(at) => distinct[*at].1 = value,
            None => {
                index.extend(canonical.map(|c| (c, distinct.len())));
                distinct.push((key, value));
            }
        }
    }
    Some(distinct)
}

/// Pairs of a dict or of a sequence of pairs, then those of the keywords.
fn keyword_pairs(mut args: Arguments) -> Option<Pairs> {
    let names = std::mem::take(&mut args.keywords);
    let mut pairs = match one(args)? {
        None => Vec::new(),
        Some(Value::Dict(pairs) | Value::OrderedDict(pairs) | Value::Counter(pairs) | Value::DefaultDict(_, pairs)) => {
            pairs
        }
        Some(Value::List(items) | Value::Tuple(items)) => items.into_iter().map(pair).collect::<Option<_>>()?,
        _ => return None,
    };
    pairs.extend(names.into_iter().map(|(name, value)| (Value::Str(name), value)));
    distinct_pairs(pairs)
}

fn pair(value: Value) -> Option<(Value, Value)> {
    match value {
        Value::Tuple(items) | Value::List(items) => <[Value; 2]>::try_from(items).ok().map(|[k, v]| (k, v)),
        _ => None,
    }
}

/// A Counter: of a dict it takes the counts, of anything else it counts the members.
fn counter(args: Arguments) -> Option<Value> {
    if matches!(args.positional.as_slice(), [] | [Value::Dict(_) | Value::Counter(_)]) {
        return keyword_pairs(args).map(Value::Counter);
    }
    let mut counts: Vec<(Value, u64)> = Vec::new();
    let mut index: HashMap<String, usize> = HashMap::new();
    for item in iterated(one(args)?)? {
        if !item.is_hashable() {
            return None;
        }
        let at = *index.entry(item.canonical()?).or_insert(counts.len());
        match counts.get_mut(at) {
            Some((_, count)) => *count += 1,
            None => counts.push((item, 1)),
        }
    }
    Some(Value::Counter(counts.into_iter().map(|(v, n)| (v, Value::Int(BigInt::from(n)))).collect()))
}

fn range(args: Vec<Value>) -> Option<Value> {
    let int = |v: Value| match v {
        Value::Int(i) => Some(i),
        _ => None,
    };
    let mut ints = args.into_iter().map(int).collect::<Option<Vec<_>>>()?;
    let one = BigInt::from(1);
    let (start, stop, step) = match ints.len() {
        1 => (BigInt::from(0), ints.remove(0), one),
        2 => (ints.remove(0), ints.remove(0), one),
        3 => (ints.remove(0), ints.remove(0), ints.remove(0)),
        _ => return None,
    };
    (step != BigInt::from(0)).then_some(Value::Range(start, stop, step))
}

fn date(parts: &[Option<i64>]) -> Option<Date> {
    match parts {
        [Some(year), Some(month), Some(day)] => Date::new(*year, *month, *day),
        _ => None,
    }
}

fn clock(parts: &[Option<i64>], zone: Option<i64>) -> Option<Clock> {
    let mut clock = [0; 4];
    clock.iter_mut().zip(parts).for_each(|(c, p)| *c = p.unwrap_or(0));
    Clock::new(clock, zone)
}

/// Offset of a `tzinfo=` argument; the outer `None` means that it is no time zone.
fn zone(arg: Option<Value>) -> Option<Option<i64>> {
    match arg {
        None | Some(Value::None) => Some(None),
        Some(Value::Moment(Moment::Zone(offset))) => Some(Some(offset)),
        _ => None,
    }
}

fn delta(args: &Arguments) -> Option<Value> {
    const UNITS: [(&str, i128); 7] = [
        ("days", 86_400_000_000),
        ("seconds", 1_000_000),
        ("microseconds", 1),
        ("milliseconds", 1_000),
        ("minutes", 60_000_000),
        ("hours", 3_600_000_000),
        ("weeks", 604_800_000_000),
    ];
    let counts = args.ints(&UNITS.map(|(name, _)| name))?;
    let micros = counts.iter().zip(UNITS).map(|(n, (_, unit))| i128::from(n.unwrap_or(0)) * unit).sum();
    Moment::delta(micros).map(Value::Moment)
}
