//! Python literals: the only way in for what a model wrote. Nothing here executes anything.

use malachite_bigint::BigInt;
use std::str::FromStr as _;

use crate::exec::constructors::{Arguments, construct, constructor, distinct_members, distinct_pairs};
use crate::exec::moment::Moment;
use crate::exec::value::{Factory, MAX_DEPTH, MAX_DIGITS, MAX_TEXT, Value};

/// Why a text is not a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a Python literal: {what} at byte {at}")]
pub struct ParseError {
    what: &'static str,
    at: usize,
}

impl Value {
    /// Reads one literal. Besides displays, constructors of the supported types are allowed with literal arguments
    /// (`frozenset({1})`, `deque([1], maxlen=2)`, `Fraction(1, 2)`, `datetime.date(2020, 1, 2)`), with or without their
    /// module's name, and the names `inf`, `nan`, `infj`, `nanj` and `timezone.utc`.
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
            return self.set(items);
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

    fn set(&self, items: Vec<Value>) -> Result<Value, ParseError> {
        distinct_members(items).map(Value::Set).ok_or_else(|| self.fail("a member that cannot be hashed"))
    }

    fn dict(&self, pairs: Vec<(Value, Value)>) -> Result<Value, ParseError> {
        distinct_pairs(pairs).map(Value::Dict).ok_or_else(|| self.fail("a key that cannot be hashed"))
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
            let bad = leading_zero || clean.len() > MAX_DIGITS;
            return BigInt::from_str(&clean).ok().filter(|_| !bad).map(Value::Int).ok_or(fail);
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
            'N' if !bytes => return Err(self.fail("a character by its name")),
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
        let name = self.word(true);
        match name {
            "None" => return Ok(Value::None),
            "True" => return Ok(Value::Bool(true)),
            "False" => return Ok(Value::Bool(false)),
            "inf" => return Ok(Value::Float(f64::INFINITY)),
            "nan" => return Ok(Value::Float(f64::NAN)),
            // As Python writes complex numbers that Python itself does not read back.
            "infj" => return Ok(Value::Complex(0.0, f64::INFINITY)),
            "nanj" => return Ok(Value::Complex(0.0, f64::NAN)),
            "timezone.utc" | "datetime.timezone.utc" => return Ok(Value::Moment(Moment::Zone(0))),
            _ => {}
        }
        let name = constructor(name).ok_or_else(|| self.fail("an unknown name"))?;
        self.expect(b'(', "a name that is no call")?;
        let args = self.arguments(name, depth)?;
        construct(name, args).ok_or_else(|| self.fail("a constructor with other arguments"))
    }

    /// Passes over a name, with dots in it or without.
    fn word(&mut self, dots: bool) -> &'a str {
        self.skip_space();
        let rest = self.rest();
        let part = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || (dots && *b == b'.');
        let len = rest.bytes().take_while(part).count();
        self.at += len;
        &rest[..len]
    }

    /// Arguments up to the closing parenthesis.
    fn arguments(&mut self, name: &str, depth: usize) -> Result<Arguments, ParseError> {
        let mut args = Arguments::default();
        let mut comma = true;
        if name == "defaultdict" && self.peek() != Some(b')') {
            args.factory = self.factory()?;
            comma = self.eat(b',');
        }
        while !self.eat(b')') {
            if !comma {
                return Err(self.fail("a missing comma"));
            }
            let before = self.at;
            let word = self.word(false);
            let named = !word.is_empty() && !word.as_bytes()[0].is_ascii_digit() && self.eat(b'=');
            if named {
                let value = self.value(depth + 1)?;
                if args.keywords.iter().any(|(n, _)| n == word) {
                    return Err(self.fail("a repeated keyword"));
                }
                args.keywords.push((word.to_owned(), value));
            } else {
                if !args.keywords.is_empty() {
                    return Err(self.fail("a value after a keyword"));
                }
                self.at = before;
                args.positional.push(self.value(depth + 1)?);
            }
            comma = self.eat(b',');
        }
        Ok(args)
    }

    /// The first argument of a defaultdict: a builtin type by its name or as Python prints it, or `None`.
    fn factory(&mut self) -> Result<Option<Factory>, ParseError> {
        let printed = self.eat(b'<');
        if printed && (self.word(false) != "class" || !self.eat(b'\'')) {
            return Err(self.fail("no builtin type"));
        }
        let name = self.word(false);
        if printed && !(self.eat(b'\'') && self.eat(b'>')) {
            return Err(self.fail("no builtin type"));
        }
        match Factory::named(name) {
            None if name == "None" && !printed => Ok(None),
            None => Err(self.fail("no builtin type")),
            found => Ok(found),
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
    fn sets_in_sets_are_written_in_no_time() {
        let nested = |n: usize| format!("{}frozenset(){}", "frozenset({".repeat(n), "})".repeat(n));
        let deepest = (1..100).map(nested).take_while(|text| Value::parse(text).is_ok()).last().expect("one");
        assert!(deepest.matches("frozenset").count() > 30, "{deepest}");
        assert_eq!(Value::parse(&deepest).expect("a literal").repr(), deepest);
    }

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
            "infj",
            "(1+infj)",
            "(-inf-infj)",
            "(nan+nanj)",
            "range(0, 3)",
            "\"it's\"",
            "'\\x00\\u2028'",
            "100000000000000.0",
            "-0.0",
            "{1, 2, 10, 'a', 'b'}",
            "'\\u200b\u{e9}\u{1f600}'",
            "deque([1, 2], maxlen=3)",
            "deque([])",
            "Counter({'a': 2, 'b': 1})",
            "Counter()",
            "defaultdict(<class 'list'>, {'a': [1]})",
            "defaultdict(None, {})",
            "OrderedDict({'b': 1, 'a': 2})",
            "OrderedDict()",
            "Fraction(-1, 2)",
            "Decimal('1.50')",
            "Decimal('-Infinity')",
            "datetime.date(2020, 2, 29)",
            "datetime.datetime(2020, 1, 2, 3, 4, 5, 6)",
            "datetime.time(1, 2, tzinfo=datetime.timezone.utc)",
            "datetime.timedelta(days=-1, seconds=5)",
            "datetime.timedelta(0)",
            "datetime.timezone(datetime.timedelta(seconds=3600))",
        ] {
            let value = Value::parse(text).expect(text);
            assert_eq!(value.repr(), text);
            assert_eq!(Value::from_json(&value.to_json()).map(|v| v.repr()).as_deref(), Some(text), "as JSON");
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
            ("Fraction(2, 4)", "0.5"),
            ("Decimal('0.5')", "Fraction('1/2')"),
            ("{0.5: 1}", "{Decimal('0.50'): True}"),
            ("Counter('aab')", "Counter({'a': 2, 'b': 1, 'c': 0})"),
            ("Counter(a=1)", "{'a': 1}"),
            ("defaultdict(int, {'a': 1})", "{'a': 1}"),
            ("OrderedDict(a=1, b=2)", "{'b': 2, 'a': 1}"),
            ("collections.deque([1, 2])", "deque((1, 2), 5)"),
            ("deque([1, 2, 3], maxlen=2)", "deque([2, 3])"),
            ("datetime.timedelta(hours=24)", "timedelta(days=1)"),
            ("datetime(2020, 1, 1)", "datetime.datetime(2020, 1, 1, 0, 0)"),
            ("[frozenset({1, (2, 'a')})]", "[{(2.0, 'a'), True}]"),
            ("bytes(b'a')", "b'a'"),
            ("complex(1, 2)", "(1+2j)"),
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
            ("Decimal('0.1')", "0.1"),
            ("Counter({'c': 0})", "{}"),
            ("OrderedDict(a=1, b=2)", "OrderedDict(b=2, a=1)"),
            ("deque([1])", "[1]"),
            ("Decimal('nan')", "Decimal('nan')"),
            ("{'a': [nan]}", "{'a': [nan]}"),
            ("datetime.date(2020, 1, 1)", "datetime.datetime(2020, 1, 1)"),
            ("datetime.datetime(2020, 1, 1)", "datetime.datetime(2020, 1, 1, tzinfo=timezone.utc)"),
            ("datetime.timedelta(0)", "0"),
            ("Fraction(1, 3)", "0.3333333333333333"),
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
            "'\\N{BULLET}'",
            &"9".repeat(MAX_DIGITS + 1),
            &format!("Fraction('1/{}')", "9".repeat(MAX_DIGITS + 1)),
            "1.2.3",
            "infinity",
            "--",
            "deque(1)",
            "deque([1], maxlen=-1)",
            "Counter([[1]])",
            "defaultdict(lambda: 0, {})",
            "defaultdict(<function f>, {})",
            "defaultdict(eval, {})",
            "collections.namedtuple('A', 'x')",
            "collections.eval('1')",
            "os.system('x')",
            "Fraction(1, 0)",
            "Fraction(0.5)",
            "Decimal('x')",
            "datetime.date(2020, 2, 30)",
            "datetime.date(2020, 1)",
            "datetime.date.today()",
            "datetime.datetime.now()",
            "datetime.timedelta(1.5)",
            "timezone.max",
            "dict(a=1, a=2)",
            "dict(**{'a': 1})",
            "float('1_0')",
            "range(1, 2, 0)",
            "set([[]])",
            "Counter(a)",
            &deep,
            &long,
        ] {
            assert!(Value::parse(text).is_err(), "{}", &text[..text.len().min(40)]);
        }
        assert_eq!(Value::parse_args("1, 'a',").map(|v| v.len()), Ok(2));
        assert_eq!(Value::parse_args(""), Ok(Vec::new()));
    }
}
