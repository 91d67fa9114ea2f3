//! Values as JSON, for programs that do not speak Python. Lossless: what JSON has no form for is an object with one key that
//! begins with `$`.
//!
//! | Python | JSON |
//! |---|---|
//! | None, bool, str, list | null, true or false, string, array |
//! | int | number up to 2^53, beyond it `{"$int": "..."}` |
//! | float | number with a point or an exponent; `{"$float": "nan"}`, `"inf"`, `"-inf"` |
//! | dict | object where all keys are strings without `$` in front, else `{"$dict": [[key, value], ..]}` |
//! | tuple, set, frozenset, deque | `{"$tuple": [..]}` and so on; a deque may have `"maxlen"` beside it |
//! | Counter, OrderedDict, defaultdict | `{"$counter": [[key, value], ..]}` and so on; a defaultdict may have `"factory"` |
//! | complex, bytes, range, Fraction, Decimal, datetime values | `{"$literal": "1+2j"}`: as Python writes them |

use malachite_bigint::BigInt;
use serde_json::{Map, Value as Json, json};

use crate::exec::value::{Factory, MAX_DEPTH, Pairs, Value};

/// Largest int that is a JSON number: beyond it readers with doubles lose digits.
const MAX_NUMBER: u64 = 1 << 53;

/// Reads JSON, also as Python writes it, with NaN and Infinity for numbers.
///
/// # Errors
/// When it is neither.
pub fn from_python(text: &str) -> serde_json::Result<Json> {
    serde_json::from_str(text).or_else(|e| serde_json::from_str(&without_constants(text).ok_or(e)?))
}

/// The text with Python's constants in this module's form; none where it has no such constant.
fn without_constants(text: &str) -> Option<String> {
    const CONSTANTS: [(&str, &str); 3] = [("NaN", "nan"), ("-Infinity", "-inf"), ("Infinity", "inf")];
    let (mut out, mut rest, mut found) = (String::with_capacity(text.len()), text, false);
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        let constant = CONSTANTS.iter().find(|(name, _)| !in_string && rest.starts_with(name));
        let mut len = first.len_utf8();
        if let Some((name, value)) = constant {
            (found, len) = (true, name.len());
            out.push_str(&format!("{{\"$float\":\"{value}\"}}"));
        } else {
            in_string ^= first == '"';
            if in_string && first == '\\' {
                len += rest[1..].chars().next().map_or(0, char::len_utf8);
            }
            out.push_str(&rest[..len]);
        }
        rest = &rest[len..];
    }
    found.then_some(out)
}

impl Value {
    /// The value as JSON.
    pub fn to_json(&self) -> Json {
        let all = |items: &[Value]| Json::Array(items.iter().map(Value::to_json).collect());
        let pairs = |pairs: &[(Value, Value)]| {
            Json::Array(pairs.iter().map(|(k, v)| Json::Array(vec![k.to_json(), v.to_json()])).collect())
        };
        match self {
            Value::None => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Int(i) if i.bits() <= 53 => {
                let number: i64 = i.to_string().parse().expect("53 bits fit");
                if number.unsigned_abs() <= MAX_NUMBER { json!(number) } else { json!({"$int": i.to_string()}) }
            }
            Value::Int(i) => json!({"$int": i.to_string()}),
            Value::Float(f) if f.is_finite() => json!(f),
            Value::Float(_) => json!({"$float": self.repr()}),
            Value::Str(s) => json!(s),
            Value::List(items) => all(items),
            Value::Tuple(items) => json!({"$tuple": all(items)}),
            Value::Set(items) => json!({"$set": all(items)}),
            Value::FrozenSet(items) => json!({"$frozenset": all(items)}),
            Value::Deque(items, None) => json!({"$deque": all(items)}),
            Value::Deque(items, Some(most)) => json!({"$deque": all(items), "maxlen": most}),
            Value::Dict(items) => {
                let names: Option<Map<String, Json>> = items
                    .iter()
                    .map(|(k, v)| match k {
                        Value::Str(name) if !name.starts_with('$') => Some((name.clone(), v.to_json())),
                        _ => None,
                    })
                    .collect();
                names.map_or_else(|| json!({"$dict": pairs(items)}), Json::Object)
            }
            Value::Counter(items) => json!({"$counter": pairs(items)}),
            Value::OrderedDict(items) => json!({"$ordereddict": pairs(items)}),
            Value::DefaultDict(None, items) => json!({"$defaultdict": pairs(items)}),
            Value::DefaultDict(Some(f), items) => json!({"$defaultdict": pairs(items), "factory": f.name()}),
            Value::Complex(..)
            | Value::Bytes(_)
            | Value::Range(..)
            | Value::Fraction(..)
            | Value::Decimal(_)
            | Value::Moment(_) => json!({"$literal": self.repr()}),
        }
    }

    /// Reads what [`Value::to_json`] writes; `None` for anything else.
    pub fn from_json(json: &Json) -> Option<Value> {
        read(json, 0)
    }
}

fn read(json: &Json, depth: usize) -> Option<Value> {
    if depth > MAX_DEPTH {
        return None;
    }
    Some(match json {
        Json::Null => Value::None,
        Json::Bool(b) => Value::Bool(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::Int(BigInt::from(i)),
            (_, Some(u)) => Value::Int(BigInt::from(u)),
            _ => Value::Float(n.as_f64()?),
        },
        Json::String(s) => Value::Str(s.clone()),
        Json::Array(items) => Value::List(read_all(items, depth)?),
        Json::Object(map) => match map.iter().next() {
            Some((tag, inner)) if tag.starts_with('$') => return tagged(tag, inner, map, depth),
            _ => {
                let pair = |(k, v): (&String, &Json)| Some((Value::Str(k.clone()), read(v, depth + 1)?));
                Value::Dict(map.iter().map(pair).collect::<Option<_>>()?)
            }
        },
    })
}

fn read_all(items: &[Json], depth: usize) -> Option<Vec<Value>> {
    items.iter().map(|i| read(i, depth + 1)).collect()
}

fn tagged(tag: &str, inner: &Json, map: &Map<String, Json>, depth: usize) -> Option<Value> {
    let items = || read_all(inner.as_array()?, depth);
    let pairs = || -> Option<Pairs> {
        let pair = |p: &Json| match p.as_array()?.as_slice() {
            [k, v] => Some((read(k, depth + 1)?, read(v, depth + 1)?)),
            _ => None,
        };
        inner.as_array()?.iter().map(pair).collect()
    };
    let beside = |name: &str| if map.len() == 2 { map.get(name) } else { None };
    if map.len() > 1 && beside("maxlen").is_none() && beside("factory").is_none() {
        return None;
    }
    let value = match tag {
        "$int" => Value::Int(inner.as_str()?.parse().ok()?),
        "$float" => match inner.as_str()? {
            "nan" => Value::Float(f64::NAN),
            "inf" => Value::Float(f64::INFINITY),
            "-inf" => Value::Float(f64::NEG_INFINITY),
            _ => return None,
        },
        "$tuple" => Value::Tuple(items()?),
        "$set" => Value::Set(items()?),
        "$frozenset" => Value::FrozenSet(items()?),
        "$deque" => {
            let most = match beside("maxlen") {
                Some(most) => Some(most.as_u64()?),
                None => None,
            };
            Value::Deque(items()?, most)
        }
        "$dict" => Value::Dict(pairs()?),
        "$counter" => Value::Counter(pairs()?),
        "$ordereddict" => Value::OrderedDict(pairs()?),
        "$defaultdict" => {
            let factory = match beside("factory") {
                Some(name) => Some(Factory::named(name.as_str()?)?),
                None => None,
            };
            Value::DefaultDict(factory, pairs()?)
        }
        "$literal" => Value::parse(inner.as_str()?).ok()?,
        _ => return None,
    };
    // Members and keys are distinct and can be hashed, whatever the JSON said: the literal parser is the judge of that.
    match &value {
        Value::Set(_) | Value::FrozenSet(_) => Value::parse(&value.repr()).ok(),
        v if v.pairs().is_some() => Value::parse(&value.repr()).ok(),
        _ => Some(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::constructors::{distinct_members, distinct_pairs};
    use crate::exec::moment::{Clock, Date, Moment};
    use crate::exec::number::{Decimal, Exponent, reduced};
    use proptest::prelude::*;

    #[test]
    fn pythons_constants_are_read_outside_of_strings_only() {
        let read = |text: &str| from_python(text).ok().and_then(|json| Value::from_json(&json)).map(|v| v.repr());
        assert_eq!(read(r#"[NaN, -Infinity, {"NaN": Infinity}]"#).as_deref(), Some("[nan, -inf, {'NaN': inf}]"));
        assert_eq!(read(r#"["\"NaN", "Infinity\\", NaN]"#).as_deref(), Some(r#"['"NaN', 'Infinity\\', nan]"#));
        for text in ["[NaN", "nan", "[NaNs]", "{Infinity: 1}", ""] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    fn leaf() -> impl Strategy<Value = Value> {
        let big = prop::collection::vec(any::<u8>(), 0..20).prop_map(|b| Value::Int(BigInt::from_signed_bytes_be(&b)));
        let ratio = (any::<i64>(), 1i64..).prop_map(|(p, q)| {
            let (p, q) = reduced(&BigInt::from(p), &BigInt::from(q));
            Value::Fraction(p, q)
        });
        let decimal =
            (any::<bool>(), "[0-9]{1,20}", -30i64..30).prop_map(|(s, d, e)| Value::Decimal(Decimal::new(s, &d, e)));
        let special = any::<bool>().prop_map(|negative| {
            Value::Decimal(Decimal { negative, digits: "0".to_owned(), exponent: Exponent::Infinity })
        });
        let moment = (1i64..9999, 1i64..13, 1i64..29, 0i64..86_400_000_000, prop::option::of(-1439i64..1440)).prop_map(
            |(y, m, d, us, zone)| {
                let date = Date::new(y, m, d).expect("a date");
                let (s, us) = (us / 1_000_000, us % 1_000_000);
                let clock = Clock::new([s / 3600, s / 60 % 60, s % 60, us], zone.map(|z| z * 60_000_000));
                Value::Moment(match (y % 5, clock.expect("a time")) {
                    (0, _) => Moment::Date(date),
                    (1, clock) => Moment::Time(clock),
                    (2, _) => Moment::Delta(i128::from(y - 5000) * i128::from(us + 1)),
                    (3, _) => Moment::Zone(zone.unwrap_or(0) * 60_000_000),
                    (_, clock) => Moment::DateTime(date, clock),
                })
            },
        );
        prop_oneof![
            Just(Value::None),
            any::<bool>().prop_map(Value::Bool),
            any::<i32>().prop_map(|i| Value::Int(BigInt::from(i))),
            big,
            any::<f64>().prop_filter("nan equals nothing", |f| !f.is_nan()).prop_map(Value::Float),
            (any::<i16>(), any::<f32>().prop_filter("nan", |f| f.is_finite() && *f != 0.0))
                .prop_map(|(re, im)| Value::Complex(f64::from(re), f64::from(im))),
            any::<String>().prop_map(Value::Str),
            any::<Vec<u8>>().prop_map(Value::Bytes),
            (any::<i8>(), any::<i8>(), 1i8..).prop_map(|(a, b, c)| Value::Range(a.into(), b.into(), c.into())),
            ratio,
            decimal,
            special,
            moment,
        ]
    }

    fn value() -> impl Strategy<Value = Value> {
        leaf().prop_recursive(4, 40, 6, |inner| {
            let items = prop::collection::vec(inner.clone(), 0..6);
            let pairs = prop::collection::vec((inner.clone(), inner), 0..6);
            let hashable = |items: Vec<Value>| items.into_iter().filter(Value::is_hashable).collect::<Vec<_>>();
            let keyed = |pairs: Pairs| {
                distinct_pairs(pairs.into_iter().filter(|(k, _)| k.is_hashable()).collect()).expect("hashable keys")
            };
            prop_oneof![
                items.clone().prop_map(Value::List),
                items.clone().prop_map(Value::Tuple),
                items.clone().prop_map(move |v| Value::Set(distinct_members(hashable(v)).expect("hashable"))),
                items.clone().prop_map(move |v| Value::FrozenSet(distinct_members(hashable(v)).expect("hashable"))),
                (items, prop::option::of(6u64..9)).prop_map(|(v, most)| Value::Deque(v, most)),
                (pairs, 0..5).prop_map(move |(p, kind)| match kind {
                    0 => Value::Dict(keyed(p)),
                    1 => Value::Counter(keyed(p)),
                    2 => Value::OrderedDict(keyed(p)),
                    3 => Value::DefaultDict(None, keyed(p)),
                    _ => Value::DefaultDict(Factory::named("list"), keyed(p)),
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_value_survives_text_and_json(value in value()) {
            let text = value.repr();
            let read = Value::parse(&text);
            prop_assert!(read.is_ok(), "{} {:?}", text, read);
            let read = read.expect("just seen");
            prop_assert!(read.py_eq(&value) && value.py_eq(&read), "{}", text);
            prop_assert_eq!(read.repr(), text.clone());
            let json = Value::from_json(&value.to_json());
            prop_assert!(json.is_some_and(|j| j.py_eq(&value) && j.repr() == text), "{}", text);
        }

        #[test]
        fn equality_is_symmetric_and_agrees_with_set_membership(a in value(), b in value()) {
            prop_assert_eq!(a.py_eq(&b), b.py_eq(&a));
            if a.is_hashable() && b.is_hashable() {
                let both = distinct_members(vec![a.clone(), b.clone()]).expect("hashable");
                prop_assert_eq!(both.len() == 1, a.py_eq(&b));
            }
        }
    }
}
