//! Python literals: the only way in for what a model wrote. Nothing here executes anything.

use malachite_bigint::BigInt;
use std::str::FromStr as _;

use crate::exec::value::{MAX_DEPTH, MAX_TEXT, Value};

/// Why a text is not a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a Python literal: {what} at byte {at}")]
pub struct ParseError {
    what: &'static str,
    at: usize,
}

impl Value {
    /// Reads one literal. Besides displays, the constructors `set`, `frozenset`, `list`, `tuple`, `dict`, `range`, `float`,
    /// `int`, `str` and `bool` of literals are allowed, and the names `inf` and `nan`.
    ///
    /// # Errors
    /// When the text is anything else, too long or too deep.
    pub fn parse(text: &str) -> Result<Value, ParseError> {
        let mut parser = Parser::new(text)?;
        let value = parser.value(0)?;
        // `1, 2` is a tuple.
        if parser.peek() == Some(b',') {
            let mut items = vec![value];
            parser.more_items(&mut items)?;
            parser.end()?;
            return Ok(Value::Tuple(items));
        }
        parser.end()?;
        Ok(value)
    }

    /// Reads the arguments of a call: literals separated by commas.
    ///
    /// # Errors
    /// When the text is anything else, too long or too deep.
    pub fn parse_args(text: &str) -> Result<Vec<Value>, ParseError> {
        let mut parser = Parser::new(text)?;
        if parser.peek().is_none() {
            return Ok(Vec::new());
        }
        let mut items = vec![parser.value(0)?];
        parser.more_items(&mut items)?;
        parser.end()?;
        Ok(items)
    }
}

/// Whether a model's answer is the gold value: both read as literals, compared as Python values.
pub fn answers_equal(gold: &str, answer: &str) -> bool {
    match (Value::parse(gold), Value::parse(answer)) {
        (Ok(gold), Ok(answer)) => gold.py_eq(&answer),
        _ => false,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Result<Self, ParseError> {
        let parser = Parser { text: text.trim(), at: 0 };
        if parser.text.len() > MAX_TEXT { Err(parser.fail("too long")) } else { Ok(parser) }
    }

    fn fail(&self, what: &'static str) -> ParseError {
        ParseError { what, at: self.at }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
    }

    fn peek(&mut self) -> Option<u8> {
        self.skip_space();
        self.text.as_bytes().get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), ParseError> {
        if self.eat(byte) { Ok(()) } else { Err(self.fail(what)) }
    }

    fn end(&mut self) -> Result<(), ParseError> {
        if self.peek().is_none() { Ok(()) } else { Err(self.fail("more text")) }
    }

    /// Items after the first, up to the end of the text.
    fn more_items(&mut self, items: &mut Vec<Value>) -> Result<(), ParseError> {
        while self.eat(b',') {
            if self.peek().is_none() {
                break;
            }
            items.push(self.value(0)?);
        }
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Value, ParseError> {
        let left = self.signed(depth)?;
        // Complex numbers are written as sums.
        match (&left, self.peek()) {
            (Value::Int(_) | Value::Float(_), Some(sign @ (b'+' | b'-'))) => {
                self.at += 1;
                let right = self.signed(depth)?;
                let real = match &left {
                    Value::Float(f) => *f,
                    Value::Int(i) => i.to_string().parse().map_err(|_| self.fail("a number out of range"))?,
                    _ => unreachable!("matched above"),
                };
                match right {
                    Value::Complex(0.0, im) => Ok(Value::Complex(real, if sign == b'-' { -im } else { im })),
                    _ => Err(self.fail("an expression")),
                }
            }
            _ => Ok(left),
        }
    }

    fn signed(&mut self, depth: usize) -> Result<Value, ParseError> {
        if depth > MAX_DEPTH {
            return Err(self.fail("nested too deeply"));
        }
        let negative = match self.peek() {
            Some(b'-') => true,
            Some(b'+') => false,
            _ => return self.atom(depth),
        };
        self.at += 1;
        match self.signed(depth + 1)? {
            Value::Int(i) => Ok(Value::Int(if negative { -i } else { i })),
            Value::Bool(b) => Ok(Value::Int(BigInt::from(if negative { -i32::from(b) } else { i32::from(b) }))),
            Value::Float(f) => Ok(Value::Float(if negative { -f } else { f })),
            Value::Complex(re, im) => Ok(if negative { Value::Complex(-re, -im) } else { Value::Complex(re, im) }),
            _ => Err(self.fail("a sign before something that is no number")),
        }
    }

    fn atom(&mut self, depth: usize) -> Result<Value, ParseError> {
        match self.peek().ok_or_else(|| self.fail("nothing"))? {
            b'[' => {
                self.at += 1;
                Ok(Value::List(self.items(b']', depth)?.0))
            }
            b'(' => {
                self.at += 1;
                let (mut items, comma) = self.items(b')', depth)?;
                let single = items.len() == 1 && !comma;
                Ok(if single { items.remove(0) } else { Value::Tuple(items) })
            }
            b'{' => {
                self.at += 1;
                self.braces(depth)
            }
            b'0'..=b'9' | b'.' => self.number(),
            b'"' | b'\'' => self.strings(),
            b'_' | b'a'..=b'z' | b'A'..=b'Z' => self.name(depth),
            _ => Err(self.fail("an unknown character")),
        }
    }

    fn items(&mut self, close: u8, depth: usize) -> Result<(Vec<Value>, bool), ParseError> {
        let (mut items, mut comma) = (Vec::new(), false);
        while !self.eat(close) {
            if !items.is_empty() && !comma {
                return Err(self.fail("a missing comma"));
            }
            items.push(self.value(depth + 1)?);
            comma = self.eat(b',');
        }
        Ok((items, comma))
    }

    fn braces(&mut self, depth: usize) -> Result<Value, ParseError> {
        if self.eat(b'}') {
            return Ok(Value::Dict(Vec::new()));
        }
        let first = self.value(depth + 1)?;
        if !self.eat(b':') {
            let mut items = vec![first];
            if self.eat(b',') {
                items.extend(self.items(b'}', depth)?.0);
            } else {
                self.expect(b'}', "a missing brace")?;
            }
            return self.set(items).map(Value::Set);
        }
        let mut pairs = vec![(first, self.value(depth + 1)?)];
        while self.eat(b',') && self.peek() != Some(b'}') {
            let key = self.value(depth + 1)?;
            self.expect(b':', "a missing colon")?;
            pairs.push((key, self.value(depth + 1)?));
        }
        self.expect(b'}', "a missing brace")?;
        self.dict(pairs)
    }

    /// Members without repeats, in order of first appearance.
    fn set(&self, items: Vec<Value>) -> Result<Vec<Value>, ParseError> {
        let mut seen = std::collections::HashSet::new();
        let mut distinct = Vec::with_capacity(items.len());
        for item in items {
            if !item.is_hashable() {
                return Err(self.fail("a member that cannot be hashed"));
            }
            if item.canonical().is_none_or(|c| seen.insert(c)) {
                distinct.push(item);
            }
        }
        Ok(distinct)
    }

    /// A dict in which the last value of a repeated key stands.
    fn dict(&self, pairs: Vec<(Value, Value)>) -> Result<Value, ParseError> {
        let mut index = std::collections::HashMap::new();
        let mut distinct: Vec<(Value, Value)> = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            if !key.is_hashable() {
                return Err(self.fail("a key that cannot be hashed"));
            }
            match key.canonical().and_then(|c| index.insert(c, distinct.len())) {
                Some(at) => {
                    distinct[at].1 = value;
                    index.insert(key.canonical().expect("found by it"), at);
                }
                None => distinct.push((key, value)),
            }
        }
        Ok(Value::Dict(distinct))
    }

    fn number(&mut self) -> Result<Value, ParseError> {
        let rest = self.rest();
        for (prefix, radix) in [("0x", 16), ("0X", 16), ("0b", 2), ("0B", 2), ("0o", 8), ("0O", 8)] {
            if let Some(digits) = rest.strip_prefix(prefix) {
                let len = digits.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
                // Python allows one underscore right after the prefix.
                let clean =
                    join_digits(digits[..len].strip_prefix('_').unwrap_or(&digits[..len]), u8::is_ascii_hexdigit);
                self.at += prefix.len() + len;
                let value = clean.and_then(|c| BigInt::parse_bytes(c.as_bytes(), radix).filter(|_| !c.is_empty()));
                return value.map(Value::Int).ok_or_else(|| self.fail("a malformed number"));
            }
        }
        let bytes = rest.as_bytes();
        let mut len = 0;
        while let Some(b) = bytes.get(len) {
            let exponent_sign = matches!(b, b'+' | b'-') && len > 0 && matches!(bytes[len - 1], b'e' | b'E');
            if !(b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_') || exponent_sign) {
                break;
            }
            len += 1;
        }
        self.at += len;
        let fail = self.fail("a malformed number");
        let Some(clean) = join_digits(&rest[..len], u8::is_ascii_digit) else { return Err(fail) };
        let plain = |s: &str| s.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'));
        if let Some(imaginary) = clean.strip_suffix(['j', 'J']) {
            let im = imaginary.parse().ok().filter(|_| plain(imaginary));
            return im.map(|im| Value::Complex(0.0, im)).ok_or(fail);
        }
        if clean.bytes().all(|b| b.is_ascii_digit()) {
            let leading_zero = clean.len() > 1 && clean.starts_with('0') && clean.bytes().any(|b| b != b'0');
            return BigInt::from_str(&clean).ok().filter(|_| !leading_zero).map(Value::Int).ok_or(fail);
        }
        clean.parse().ok().filter(|_| plain(&clean)).map(Value::Float).ok_or(fail)
    }

    /// One or more adjacent strings.
    fn strings(&mut self) -> Result<Value, ParseError> {
        let first = self.string("")?;
        self.join_strings(first)
    }

    fn join_strings(&mut self, first: Value) -> Result<Value, ParseError> {
        let mut joined = first;
        loop {
            let next = match self.peek() {
                Some(b'"' | b'\'') => self.string("")?,
                Some(b'r' | b'R' | b'b' | b'B' | b'u' | b'U') => match self.string_prefix() {
                    Some(prefix) => self.string(prefix)?,
                    None => return Ok(joined),
                },
                _ => return Ok(joined),
            };
            match (&mut joined, next) {
                (Value::Str(a), Value::Str(b)) => a.push_str(&b),
                (Value::Bytes(a), Value::Bytes(b)) => a.extend(b),
                _ => return Err(self.fail("str beside bytes")),
            }
        }
    }

    /// Passes over a string prefix when a quote follows it.
    fn string_prefix(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let len = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let known = ["r", "b", "u", "rb", "br"].contains(&rest[..len].to_ascii_lowercase().as_str());
        if !known || !matches!(rest.as_bytes().get(len), Some(b'"' | b'\'')) {
            return None;
        }
        self.at += len;
        Some(&rest[..len])
    }

    fn string(&mut self, prefix: &str) -> Result<Value, ParseError> {
        let (raw, bytes) = (prefix.contains(['r', 'R']), prefix.contains(['b', 'B']));
        let rest = self.rest();
        let quote = &rest[..1];
        let triple = rest.starts_with(&quote.repeat(3));
        let fence = if triple { quote.repeat(3) } else { quote.to_owned() };
        self.at += fence.len();
        let mut out: Vec<u32> = Vec::new();
        loop {
            let rest = self.rest();
            if rest.starts_with(&fence) {
                self.at += fence.len();
                break;
            }
            let c = rest.chars().next().ok_or_else(|| self.fail("a string without end"))?;
            self.at += c.len_utf8();
            match c {
                '\n' if !triple => return Err(self.fail("a string without end")),
                '\\' if raw => {
                    let next = self.rest().chars().next().ok_or_else(|| self.fail("a string without end"))?;
                    self.at += next.len_utf8();
                    out.extend([u32::from(c), u32::from(next)]);
                }
                '\\' => out.extend(self.escape(bytes)?),
                c if bytes && !c.is_ascii() => return Err(self.fail("bytes outside ASCII")),
                c => out.push(u32::from(c)),
            }
        }
        if bytes {
            return Ok(Value::Bytes(out.into_iter().map(|c| c as u8).collect()));
        }
        let text: Option<String> = out.into_iter().map(char::from_u32).collect();
        text.map(Value::Str).ok_or_else(|| self.fail("a lone surrogate"))
    }

    /// The character after a backslash; none for a line continuation.
    fn escape(&mut self, bytes: bool) -> Result<Vec<u32>, ParseError> {
        let c = self.rest().chars().next().ok_or_else(|| self.fail("a string without end"))?;
        self.at += c.len_utf8();
        let digits = match c {
            'n' => return Ok(vec![10]),
            't' => return Ok(vec![9]),
            'r' => return Ok(vec![13]),
            'a' => return Ok(vec![7]),
            'b' => return Ok(vec![8]),
            'f' => return Ok(vec![12]),
            'v' => return Ok(vec![11]),
            '\\' | '\'' | '"' => return Ok(vec![u32::from(c)]),
            '\n' => return Ok(Vec::new()),
            '0'..='7' => {
                let len = 1 + self.rest().bytes().take(2).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let text = &self.text[self.at - 1..self.at - 1 + len];
                self.at += len - 1;
                let code = u32::from_str_radix(text, 8).map_err(|_| self.fail("a malformed escape"))?;
                return Ok(vec![if bytes { code & 0xff } else { code }]);
            }
            'x' => 2,
            'u' if !bytes => 4,
            'U' if !bytes => 8,
            _ => return Ok(vec![u32::from('\\'), u32::from(c)]),
        };
        let text = self.rest().get(..digits).filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = text.and_then(|t| u32::from_str_radix(t, 16).ok()).ok_or_else(|| self.fail("a malformed escape"))?;
        self.at += digits;
        Ok(vec![code])
    }

    fn name(&mut self, depth: usize) -> Result<Value, ParseError> {
        if let Some(prefix) = self.string_prefix() {
            let first = self.string(prefix)?;
            return self.join_strings(first);
        }
        let rest = self.rest();
        let len = rest.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
        let name = &rest[..len];
        self.at += len;
        match name {
            "None" => return Ok(Value::None),
            "True" => return Ok(Value::Bool(true)),
            "False" => return Ok(Value::Bool(false)),
            "inf" => return Ok(Value::Float(f64::INFINITY)),
            "nan" => return Ok(Value::Float(f64::NAN)),
            "set" | "frozenset" | "list" | "tuple" | "dict" | "range" | "float" | "int" | "str" | "bool" => {}
            _ => return Err(self.fail("an unknown name")),
        }
        self.expect(b'(', "a name that is no call")?;
        if name == "dict" {
            return self.dict_call(depth);
        }
        let args = self.items(b')', depth)?.0;
        self.construct(name, args)
    }

    fn dict_call(&mut self, depth: usize) -> Result<Value, ParseError> {
        let mut pairs = Vec::new();
        if self.peek() == Some(b'{') {
            let value = self.value(depth + 1)?;
            self.expect(b')', "a missing parenthesis")?;
            return if matches!(value, Value::Dict(_)) { Ok(value) } else { Err(self.fail("dict of no dict")) };
        }
        while !self.eat(b')') {
            self.skip_space();
            let rest = self.rest();
            let len = rest.bytes().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
            if len == 0 || rest.as_bytes()[0].is_ascii_digit() {
                return Err(self.fail("a keyword that is no name"));
            }
            self.at += len;
            self.expect(b'=', "a missing =")?;
            pairs.push((Value::Str(rest[..len].to_owned()), self.value(depth + 1)?));
            if !self.eat(b',') && self.peek() != Some(b')') {
                return Err(self.fail("a missing comma"));
            }
        }
        self.dict(pairs)
    }

    fn construct(&self, name: &str, mut args: Vec<Value>) -> Result<Value, ParseError> {
        let fail = self.fail("a constructor with other arguments");
        if name == "range" {
            let mut ints = Vec::with_capacity(3);
            for arg in args {
                let Value::Int(i) = arg else { return Err(fail) };
                ints.push(i);
            }
            let (zero, one) = (BigInt::from(0), BigInt::from(1));
            return match <[BigInt; 3]>::try_from(ints) {
                Ok([_, _, step]) if step == zero => Err(fail),
                Ok([start, stop, step]) => Ok(Value::Range(start, stop, step)),
                Err(ints) => match <[BigInt; 2]>::try_from(ints) {
                    Ok([start, stop]) => Ok(Value::Range(start, stop, one)),
                    Err(ints) => match <[BigInt; 1]>::try_from(ints) {
                        Ok([stop]) => Ok(Value::Range(zero, stop, one)),
                        Err(_) => Err(fail),
                    },
                },
            };
        }
        if args.len() > 1 {
            return Err(fail);
        }
        let arg = args.pop();
        let items = |arg: Option<Value>| match arg {
            None => Some(Vec::new()),
            Some(Value::List(v) | Value::Tuple(v) | Value::Set(v) | Value::FrozenSet(v)) => Some(v),
            Some(Value::Str(s)) => Some(s.chars().map(|c| Value::Str(c.to_string())).collect()),
            Some(Value::Dict(d)) => Some(d.into_iter().map(|(k, _)| k).collect()),
            _ => None,
        };
        match (name, arg) {
            ("float", Some(Value::Str(s))) => {
                let float = s.trim().parse().ok().filter(|_| s.is_ascii());
                float.map(Value::Float).ok_or(fail)
            }
            ("float", Some(v @ Value::Float(_))) | ("int", Some(v @ Value::Int(_))) => Ok(v),
            ("str", Some(v @ Value::Str(_))) | ("bool", Some(v @ Value::Bool(_))) => Ok(v),
            ("str", None) => Ok(Value::Str(String::new())),
            ("set", arg) => self.set(items(arg).ok_or(fail)?).map(Value::Set),
            ("frozenset", arg) => self.set(items(arg).ok_or(fail)?).map(Value::FrozenSet),
            ("list", arg) => items(arg).map(Value::List).ok_or(fail),
            ("tuple", arg) => items(arg).map(Value::Tuple).ok_or(fail),
            _ => Err(fail),
        }
    }
}

/// The text without its underscores; none where one is not between two digits.
fn join_digits(text: &str, is_digit: impl Fn(&u8) -> bool) -> Option<String> {
    let bytes = text.as_bytes();
    let digit = |i: usize| bytes.get(i).is_some_and(&is_digit);
    let misplaced = |(i, b): (usize, &u8)| *b == b'_' && (i == 0 || !digit(i - 1) || !digit(i + 1));
    (!bytes.iter().enumerate().any(misplaced)).then(|| text.replace('_', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_read_back_as_python_writes_them() {
        for text in [
            "None",
            "True",
            "-12345678901234567890123",
            "1.5",
            "1e+16",
            "1e-05",
            "0.0001",
            "'a\\n\\'\"'",
            "b'x\\x00'",
            "[1, [2, (3,)], ()]",
            "{'a': 1, (1, 2): [None]}",
            "{1, 2}",
            "set()",
            "frozenset({1})",
            "(1+2j)",
            "2j",
            "inf",
            "range(0, 3)",
            "\"it's\"",
            "'\\x00\\u2028'",
            "100000000000000.0",
            "-0.0",
        ] {
            assert_eq!(Value::parse(text).map(|v| v.repr()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn equality_is_pythons() {
        for (a, b) in [
            ("True", "1"),
            ("1", "1.0"),
            ("1", "(1+0j)"),
            ("{1, 2}", "{2, 1}"),
            ("{'a': 1, 'b': 2}", "dict(b=2, a=1.0)"),
            ("{1}", "frozenset([1])"),
            ("0", "-0.0"),
            ("10000000000000000", "1e16"),
            ("'a' 'b'", "\"ab\""),
            ("range(0)", "range(5, 2)"),
            ("1, 2", "(1, 2)"),
            ("[1, 2]", "[True, 2.0]"),
            ("{True: 1}", "{1: 1}"),
            ("r'\\n'", "'\\\\n'"),
            ("0x1f", "31"),
            ("1_000", "1000"),
            ("0x_1_f", "31"),
        ] {
            assert!(answers_equal(a, b), "{a} == {b}");
        }
        for (a, b) in [
            ("[1]", "(1,)"),
            ("'1'", "1"),
            ("nan", "nan"),
            ("[nan]", "[nan]"),
            ("{1: 2}", "{1, 2}"),
            ("b'a'", "'a'"),
            ("1.5", "1"),
            ("None", "False"),
            ("['a', 'b']", "['a,b']"),
            ("9007199254740993", "9007199254740992.0"),
        ] {
            assert!(!answers_equal(a, b), "{a} != {b}");
        }
    }

    #[test]
    fn anything_that_is_no_literal_is_refused() {
        let deep = "[".repeat(500) + &"]".repeat(500);
        let long = format!("'{}'", "a".repeat(MAX_TEXT));
        for text in [
            "",
            "f(1)",
            "eval('1')",
            "1 + 1",
            "[1 2]",
            "{[]: 1}",
            "{1: 2, 3}",
            "'abc",
            "x",
            "1 if 1 else 2",
            "(1",
            "01",
            "lambda: 0",
            "__import__('os')",
            "0) or True or f(0",
            "gold_output",
            "'\\ud800'",
            "1__",
            "1__0",
            "1_.5",
            "1e_5",
            "0x_",
            "1.2.3",
            "infinity",
            "--",
            &deep,
            &long,
        ] {
            assert!(Value::parse(text).is_err(), "{}", &text[..text.len().min(40)]);
        }
        assert_eq!(Value::parse_args("1, 'a',").map(|v| v.len()), Ok(2));
        assert_eq!(Value::parse_args(""), Ok(Vec::new()));
    }
}
