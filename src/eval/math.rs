//! Answers to mathematical questions: where a text has its answer, and whether two answers are the same.
//!
//! An answer is cleaned of layout, units and currency, split into the members of a list, tuple, interval or set, and the
//! members are compared by value: numbers, fractions, roots and formulas in one-letter variables are evaluated, anything
//! else is compared as text. What cannot be read as a value is never equal to one. Not here: which suites ask this way.

use std::iter::Peekable;
use std::vec::IntoIter;

/// Relative difference up to which two values that are not both whole are the same.
const TOLERANCE: f64 = 1e-6;
/// Deepest nesting of a formula.
const MAX_DEPTH: usize = 64;
/// Longest answer, in bytes: no suite's are longer.
const MAX_LEN: usize = 2000;
/// Units of one letter; longer words after a number are taken for a unit anyway.
const SHORT_UNITS: [&str; 6] = ["m", "g", "s", "h", "L", "C"];

/// The content of the text's last `\boxed`.
pub fn boxed(text: &str) -> Option<&str> {
    let at = text.rfind("\\boxed").map(|at| at + "\\boxed".len());
    let rest = text[at.or_else(|| text.rfind("\\fbox").map(|at| at + "\\fbox".len()))?..].trim_start();
    let Some(inner) = rest.strip_prefix('{') else {
        return rest.split(|c: char| c.is_whitespace() || c == '$').next().filter(|w| !w.is_empty());
    };
    let mut depth = 1;
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inner[..at]);
        }
    }
    None
}

/// The answer of a text: what is marked as one, else the last number.
pub fn final_answer(text: &str) -> Option<String> {
    marked_answer(text).or_else(|| last_number(text))
}

/// What a text marks as its answer: what is boxed, else what follows `####`, else what follows the last "answer is" or
/// "answer:".
pub fn marked_answer(text: &str) -> Option<String> {
    let marked = boxed(text).or_else(|| text.rsplit_once("####").and_then(|(_, after)| after.trim().lines().next()));
    if let Some(found) = marked {
        return Some(found.trim().to_owned()).filter(|a| !a.is_empty());
    }
    let lower = text.to_ascii_lowercase();
    let at = ["answer is", "answer:"].iter().filter_map(|m| lower.rfind(m).map(|at| at + m.len())).max()?;
    let line = text[at..].trim_start_matches([':', ' ', '*', '\n']).lines().next().unwrap_or("");
    // The sentence ends at a full stop that is no decimal point.
    let end = line.find(". ").unwrap_or(line.len());
    Some(line[..end].trim().trim_end_matches(['.', '*']).to_owned()).filter(|a| !a.is_empty())
}

fn last_number(text: &str) -> Option<String> {
    let inside = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',' | '/');
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let start =
        text[..end].rfind(|c| !inside(c)).map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
    let signed = text[..start].ends_with('-') && !text[..start - 1].ends_with(|c: char| c.is_alphanumeric());
    Some(text[start - usize::from(signed)..end].trim_start_matches(['.', ',', '/']).to_owned())
}

/// Whether an answer is the gold one. `tolerance` is a largest absolute difference that a suite allows.
pub fn same(gold: &str, answer: &str, tolerance: Option<f64>) -> bool {
    if gold.len().max(answer.len()) > MAX_LEN {
        return gold == answer;
    }
    let (gold, answer) = (clean(gold), clean(answer));
    if gold.is_empty() || answer.is_empty() {
        return false;
    }
    gold == answer || same_shape(&split(&gold), &split(&answer), tolerance, 0)
}

/// The parts of an answer.
#[derive(Debug, PartialEq)]
enum Shape {
    /// One value.
    One(String),
    /// A tuple, point or interval with its brackets.
    Ordered(char, Vec<String>, char),
    /// A set, or values without an order.
    Unordered(Vec<String>),
}

fn same_shape(gold: &Shape, answer: &Shape, tolerance: Option<f64>, depth: usize) -> bool {
    let part = |g: &str, a: &str| depth < MAX_DEPTH && same_shape(&split(g), &split(a), tolerance, depth + 1);
    match (gold, answer) {
        (Shape::One(g), Shape::One(a)) => same_value(g, a, tolerance),
        (Shape::Ordered(o, g, c), Shape::Ordered(p, a, d)) => {
            o == p && c == d && g.len() == a.len() && g.iter().zip(a).all(|(g, a)| part(g, a))
        }
        (Shape::Unordered(g), Shape::Unordered(a)) => {
            let mut left: Vec<&String> = a.iter().collect();
            g.len() == a.len()
                && g.iter().all(|g| left.iter().position(|a| part(g, a)).map(|at| left.swap_remove(at)).is_some())
        }
        // A set of one is that one.
        (Shape::Unordered(many), Shape::One(one)) | (Shape::One(one), Shape::Unordered(many)) => {
            many.len() == 1 && part(&many[0], one)
        }
        _ => false,
    }
}

fn split(text: &str) -> Shape {
    let text = text.trim();
    // Two of them have no one reading.
    if let Some((left, right)) = text.split_once("\\pm").filter(|(_, right)| !right.contains("\\pm")) {
        return Shape::Unordered(vec![format!("{left}+{right}"), format!("{left}-{right}")]);
    }
    if let Some(inner) = text.strip_prefix("\\{").and_then(|t| t.strip_suffix("\\}"))
        && let Some(parts) = at_commas(inner)
    {
        return Shape::Unordered(parts);
    }
    let (first, last) = (text.chars().next(), text.chars().last());
    if let (Some(open @ ('(' | '[')), Some(close @ (')' | ']'))) = (first, last)
        && let Some(parts) = at_commas(&text[1..text.len() - 1])
        && (parts.len() > 1 || open == '[')
    {
        return Shape::Ordered(open, parts, close);
    }
    match at_commas(&text.replace(" and ", ",").replace(" or ", ",")) {
        Some(parts) if parts.len() > 1 && !is_grouped(text) => Shape::Unordered(parts),
        _ => Shape::One(text.to_owned()),
    }
}

/// Parts between commas outside of all brackets; none when brackets close that were not opened.
fn at_commas(text: &str) -> Option<Vec<String>> {
    let (mut parts, mut part, mut depth) = (Vec::new(), String::new(), 0i32);
    for c in text.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(std::mem::take(&mut part));
                continue;
            }
            _ => {}
        }
        if depth < 0 {
            return None;
        }
        part.push(c);
    }
    parts.push(part);
    parts.iter_mut().for_each(|p| *p = p.trim().to_owned());
    parts.retain(|p| !p.is_empty());
    Some(parts)
}

/// Whether a text is a number whose digits stand in groups of three.
fn is_grouped(text: &str) -> bool {
    let whole = text.trim_start_matches(['-', '+']);
    let whole = whole.split(['.', ' ', '%', '\\']).next().unwrap_or("");
    let mut groups = whole.split(',');
    let digits = |g: &str| g.bytes().all(|b| b.is_ascii_digit());
    groups.next().is_some_and(|g| (1..=3).contains(&g.len()) && digits(g))
        && groups.clone().next().is_some()
        && groups.all(|g| g.len() == 3 && digits(g))
}

/// Commands that are layout alone, and what stands for them.
const LAYOUT: &[(&str, &str)] = &[
    ("\\left", ""),
    ("\\right", ""),
    ("\\displaystyle", ""),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\lbrace", "\\{"),
    ("\\rbrace", "\\}"),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\degree", ""),
    ("\u{b0}", ""),
    ("\u{2212}", "-"),
    ("\\$", ""),
    ("$", ""),
    ("\u{20ac}", ""),
    ("\\%", "%"),
    ("{,}", ","),
    ("\\!", ""),
    ("\\,", " "),
    ("\\;", " "),
    ("\\:", " "),
    ("\\ ", " "),
    ("~", " "),
    ("\\(", ""),
    ("\\)", ""),
    ("\\cup", "U"),
    ("\\infty", "infinity"),
    ("\u{221e}", "infinity"),
    ("\u{3c0}", "\\pi"),
];

/// Commands whose argument is words.
const WORDS: [&str; 6] = ["\\text{", "\\mbox{", "\\mathrm{", "\\textbf{", "\\mathbf{", "\\operatorname{"];

/// The answer without layout, and without the left side of an equation that only names it.
fn clean(text: &str) -> String {
    let mut text = text.trim().trim_end_matches(['.', ';']).to_owned();
    for word in WORDS {
        while let Some(at) = text.find(word) {
            let inner = at + word.len();
            let Some(end) = text[inner..].find('}').map(|e| inner + e) else { break };
            text = format!("{} {} {}", &text[..at], &text[inner..end], &text[end + 1..]);
        }
    }
    for (from, to) in LAYOUT {
        if text.contains(from) {
            text = text.replace(from, to);
        }
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.split_once('=') {
        Some((name, value)) if name.trim().len() <= 2 || name.trim().ends_with(')') && name.trim().len() <= 4 => {
            value.trim().to_owned()
        }
        _ => text.trim_end_matches('.').to_owned(),
    }
}

fn same_value(gold: &str, answer: &str, tolerance: Option<f64>) -> bool {
    let simple = |t: &str| t.to_lowercase().chars().filter(|c| !c.is_whitespace()).collect::<String>();
    if simple(gold) == simple(answer) {
        return true;
    }
    let (g, a) = (Number::read(gold), Number::read(answer));
    let (Some(g), Some(a)) = (g, a) else { return false };
    let close = |scale: f64| g.values.iter().zip(a.values).all(|(g, a)| is_close(*g, a * scale, tolerance));
    match (g.percent, a.percent) {
        (true, false) => close(1.0) || close(100.0),
        (false, true) => close(1.0) || close(0.01),
        _ => close(1.0),
    }
}

fn is_close(gold: f64, answer: f64, tolerance: Option<f64>) -> bool {
    if !gold.is_finite() || !answer.is_finite() {
        return gold == answer;
    }
    let whole = gold.fract() == 0.0 && answer.fract() == 0.0;
    let relative = if whole { 0.0 } else { TOLERANCE * gold.abs() };
    (gold - answer).abs() <= relative.max(tolerance.unwrap_or(0.0)).max(1e-12)
}

/// A value under two assignments of its variables: formulas that agree under both are the same.
struct Number {
    values: [f64; 2],
    percent: bool,
}

impl Number {
    fn read(text: &str) -> Option<Number> {
        let percent = text.ends_with('%');
        let text = text.trim_end_matches('%').trim();
        Some(Number { values: evaluate(without_unit(text).unwrap_or(text))?, percent })
    }
}

/// The value at the start of a text that goes on with a unit.
fn without_unit(text: &str) -> Option<&str> {
    let unit_from = |(at, c): (usize, char)| {
        let (value, unit) = (text[..at].trim(), &text[at..]);
        let (spaced, ends) =
            (text[..at].ends_with(' '), value.ends_with(|c: char| c.is_ascii_digit() || "})".contains(c)));
        let begins = c.is_alphabetic() && (spaced || text[..at].ends_with(|c: char| c.is_ascii_digit()));
        let letters = unit.chars().all(|c| c.is_alphanumeric() || " /^.'-{}".contains(c));
        let word: String = unit.chars().take_while(|c| c.is_alphabetic()).collect();
        let known = word.len() > 1 && function(&word).is_none() || spaced && SHORT_UNITS.contains(&word.as_str());
        (begins && letters && known && (ends || value.ends_with("\\pi"))).then_some(value)
    };
    text.char_indices().find_map(unit_from)
}

fn evaluate(text: &str) -> Option<[f64; 2]> {
    let text = mixed_number(text).unwrap_or_else(|| text.to_owned());
    let text = if is_grouped(&text) { text.replace(',', "") } else { text };
    let tokens = tokens(&text)?;
    let mut values = [0.0; 2];
    for (assignment, value) in values.iter_mut().enumerate() {
        let mut parser = Formula { tokens: tokens.clone().into_iter().peekable(), assignment, depth: 0 };
        *value = parser.sum()?;
        if parser.tokens.next().is_some() || value.is_nan() {
            return None;
        }
    }
    Some(values)
}

/// `1 1/2` and `1 \frac{1}{2}` with the plus that they leave out.
fn mixed_number(text: &str) -> Option<String> {
    let (sign, rest) = text.strip_prefix('-').map_or(("", text), |r| ("-", r.trim_start()));
    let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|at| *at > 0)?;
    let (whole, part) = (&rest[..digits], rest[digits..].trim_start());
    let spaced = rest[digits..].starts_with(' ');
    let is_digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    let fraction = match part.strip_prefix("\\frac") {
        Some(inner) => is_digits(&inner.replace(['{', '}', ' '], "")),
        None => spaced && part.split_once('/').is_some_and(|(n, d)| is_digits(n) && is_digits(d)),
    };
    fraction.then(|| format!("{sign}({whole}+{part})"))
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Number(f64),
    /// A single digit, as an argument without braces takes it.
    Digit(f64),
    Variable(char),
    Function(&'static str),
    Symbol(char),
}

/// Functions by name.
fn function(name: &str) -> Option<&'static str> {
    ["frac", "sqrt", "sin", "cos", "tan", "ln", "log", "exp", "abs", "arctan", "arcsin", "arccos"]
        .into_iter()
        .find(|f| *f == name)
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < chars.len() {
        let c = chars[at];
        let run = |from: usize, inside: fn(char) -> bool| {
            chars[from..].iter().take_while(|c| inside(**c)).collect::<String>()
        };
        if c.is_whitespace() {
            at += 1;
        } else if c.is_ascii_digit() || c == '.' && chars.get(at + 1).is_some_and(char::is_ascii_digit) {
            let bare = matches!(out.last(), Some(Token::Function("frac" | "sqrt") | Token::Digit(_)));
            let number = if bare { c.to_string() } else { run(at, |c| c.is_ascii_digit() || c == '.') };
            at += number.len();
            let value = number.parse().ok()?;
            // `\frac12`: the first digit after the command is one argument, the second the other.
            let after_frac = matches!(out.last(), Some(Token::Function("frac" | "sqrt")));
            out.push(if bare && after_frac { Token::Digit(value) } else { Token::Number(value) });
        } else if c == '\\' || c.is_alphabetic() {
            let start = at + usize::from(c == '\\');
            let word = run(start, char::is_alphabetic);
            at = start + word.chars().count();
            match word.as_str() {
                "cdot" | "times" => out.push(Token::Symbol('*')),
                "div" => out.push(Token::Symbol('/')),
                "pi" => out.push(Token::Number(std::f64::consts::PI)),
                "infinity" | "inf" => out.push(Token::Number(f64::INFINITY)),
                "" => return None,
                name => match function(name) {
                    Some(name) => out.push(Token::Function(name)),
                    // Two letters are a product; more are a word, which has no value.
                    None if c != '\\' && name.len() <= 2 => out.extend(name.chars().map(Token::Variable)),
                    None => return None,
                },
            }
        } else if "+-*/^()[]{}|!".contains(c) {
            let double = c == '*' && chars.get(at + 1) == Some(&'*');
            out.push(Token::Symbol(if double { '^' } else { c }));
            at += 1 + usize::from(double);
        } else {
            return None;
        }
    }
    Some(out)
}

/// Evaluates a formula.
struct Formula {
    tokens: Peekable<IntoIter<Token>>,
    assignment: usize,
    depth: usize,
}

impl Formula {
    fn take(&mut self, symbol: char) -> bool {
        self.tokens.next_if_eq(&Token::Symbol(symbol)).is_some()
    }

    fn sum(&mut self) -> Option<f64> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let mut value = self.product()?;
        loop {
            if self.take('+') {
                value += self.product()?;
            } else if self.take('-') {
                value -= self.product()?;
            } else {
                self.depth -= 1;
                return Some(value);
            }
        }
    }

    fn product(&mut self) -> Option<f64> {
        let mut value = self.signed()?;
        loop {
            if self.take('*') {
                value *= self.signed()?;
            } else if self.take('/') {
                value /= self.signed()?;
            } else if let Some(Token::Number(_) | Token::Variable(_) | Token::Function(_) | Token::Symbol('(' | '{')) =
                self.tokens.peek()
            {
                value *= self.power()?;
            } else {
                return Some(value);
            }
        }
    }

    fn signed(&mut self) -> Option<f64> {
        let mut sign = 1.0;
        loop {
            if self.take('-') {
                sign = -sign;
            } else if !self.take('+') {
                return Some(sign * self.power()?);
            }
        }
    }

    fn power(&mut self) -> Option<f64> {
        let mut value = self.atom()?;
        if self.take('!') {
            let n = (value.fract() == 0.0 && (0.0..=170.0).contains(&value)).then_some(value as u32)?;
            value = (1..=n).map(f64::from).product();
        }
        if self.take('^') {
            let negative = self.take('-');
            self.depth += 1;
            let exponent = if self.depth > MAX_DEPTH { None } else { self.power() }?;
            self.depth -= 1;
            value = value.powf(if negative { -exponent } else { exponent });
        }
        Some(value)
    }

    fn atom(&mut self) -> Option<f64> {
        match self.tokens.next()? {
            Token::Number(value) | Token::Digit(value) => Some(value),
            // Values without a pattern, larger than 1 so that roots and logarithms of them exist.
            Token::Variable('e') => Some(std::f64::consts::E),
            Token::Variable(name) => {
                let seed = (name as u32 as f64) * [0.618_033_988_75, 0.414_213_562_37][self.assignment];
                Some(1.25 + 2.0 * seed.fract())
            }
            Token::Symbol('(') => self.closed(')'),
            Token::Symbol('{') => self.closed('}'),
            Token::Symbol('|') => self.closed('|').map(f64::abs),
            Token::Function("frac") => Some(self.atom()? / self.atom()?),
            Token::Function("sqrt") if self.take('[') => {
                let degree = self.closed(']')?;
                Some(self.atom()?.powf(1.0 / degree))
            }
            Token::Function("sqrt") => Some(self.atom()?.sqrt()),
            Token::Function(name) => {
                let x = self.power()?;
                Some(match name {
                    "sin" => x.sin(),
                    "cos" => x.cos(),
                    "tan" => x.tan(),
                    "arctan" => x.atan(),
                    "arcsin" => x.asin(),
                    "arccos" => x.acos(),
                    "ln" => x.ln(),
                    "log" => x.log10(),
                    "exp" => x.exp(),
                    _ => x.abs(),
                })
            }
            Token::Symbol(_) => None,
        }
    }

    fn closed(&mut self, close: char) -> Option<f64> {
        let value = self.sum()?;
        self.take(close).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_answers_are_equal_however_they_are_written() {
        for (gold, answer) in [
            ("42", "42.0"),
            ("42", "$42$"),
            ("1,234", "1234"),
            ("1234567", "1{,}234{,}567"),
            ("18", "\\$18"),
            ("18", "18 dollars"),
            ("5", "5 \\text{ cm}^2"),
            ("5\\text{ cm}", "5"),
            ("3 m", "3"),
            ("4\\pi\\text{ cm}^2", "4\\pi"),
            ("5cm", "5"),
            ("\\frac{1}{2}", "1/2"),
            ("\\frac12", "0.5"),
            ("\\dfrac{3}{4}", "\\frac34"),
            ("-\\frac{1}{3}", "\\frac{-1}{3}"),
            ("1\\frac{1}{2}", "1.5"),
            ("1 1/2", "3/2"),
            ("-1 1/2", "-1.5"),
            ("50\\%", "50"),
            ("50%", "0.5"),
            ("0.25", "25\\%"),
            ("90^\\circ", "90"),
            ("(1, 2)", "\\left(1,2\\right)"),
            ("[0,\\infty)", "[0, \\infty)"),
            ("\\{1, 2, 3\\}", "\\{3,2,1\\}"),
            ("1, 2", "2 and 1"),
            ("-1,1", "\\pm 1"),
            ("2\\sqrt{3}", "\\sqrt{12}"),
            ("\\sqrt[3]{8}", "2"),
            ("x^2+2x+1", "(x+1)^2"),
            ("x+y", "y + x"),
            ("x = 7", "7"),
            ("f(x)=x+1", "1+x"),
            ("10\\pi", "\\pi \\cdot 10"),
            ("2^{10}", "1024"),
            ("3 \\times 10^{4}", "30000"),
            ("\\text{Evelyn}", "evelyn"),
            ("\\text{(A)}", "(A)"),
            ("5!", "120"),
            ("\\frac{x}{2}", "x/2"),
            (".5", "0.50"),
            ("11.", "11"),
            ("\\log 100", "2"),
        ] {
            assert!(same(gold, answer, None), "{gold} is {answer}");
            assert!(same(answer, gold, None), "{answer} is {gold}");
        }
    }

    #[test]
    fn different_answers_differ() {
        for (gold, answer) in [
            ("42", "43"),
            ("1000000", "1000001"),
            ("1,234", "1, 234"),
            ("0.5", "50"),
            ("\\frac{1}{2}", "\\frac{2}{1}"),
            ("(1,2)", "(2,1)"),
            ("(1,2)", "[1,2]"),
            ("(1,2)", "(1,2,3)"),
            ("\\{1,2\\}", "\\{1,1\\}"),
            ("1", "1, 2"),
            ("1\\frac{1}{2}", "0.5"),
            ("x+1", "x+2"),
            ("x^2", "2x"),
            ("east", "seat"),
            ("7", "seven"),
            ("7", ""),
            ("7", "7x"),
            ("7", "none"),
            ("3.14", "3.15"),
            ("\\text{yes}", "no"),
            ("5", "\\text{cm}"),
            ("2", "((((2"),
        ] {
            assert!(!same(gold, answer, None), "{gold} is not {answer}");
            assert!(!same(answer, gold, None), "{answer} is not {gold}");
        }
        assert!(same("3.14", "3.1416", Some(0.01)) && !same("3.14", "3.2", Some(0.01)));
        let deep = "(".repeat(900) + "1" + &")".repeat(900);
        assert!(!same("1", &deep, None) && !same(&"\\pm".repeat(600), &"\\pm".repeat(500), None));
    }

    #[test]
    fn the_answer_of_a_text_is_found() {
        for (text, answer) in [
            ("So \\boxed{1} and then \\boxed{\\frac{1}{2}}.", Some("\\frac{1}{2}")),
            ("Thus $\\boxed 5$ it is", Some("5")),
            ("48/2 = <<48/2=24>>24\n#### 72", Some("72")),
            ("The answer is: **12**.", Some("12")),
            ("The answer is 3.5. I am sure of it.", Some("3.5")),
            ("Final answer: x = 4\nmore", Some("x = 4")),
            ("She has 12 apples, then 1,200 left.", Some("1,200")),
            ("it falls to -3 degrees", Some("-3")),
            ("from 2-3 to 4", Some("4")),
            ("I do not know", None),
            ("\\boxed{", None),
            ("", None),
        ] {
            assert_eq!(final_answer(text).as_deref(), answer, "{text}");
        }
    }

    #[test]
    fn any_text_is_compared_without_a_panic_and_the_same_either_way() {
        use crate::base::rng::{Purpose, Rng};
        const PARTS: [&str; 32] = [
            "1", "23", ".", ",", "-", "+", "/", "^", "(", ")", "[", "]", "{", "}", "\\frac", "\\sqrt", "\\pm", "\\{",
            "\\}", "\\pi", "x", "e", " ", "%", "$", "=", "\\text{", "cm", "!", "\\boxed{", "\u{b0}", "####",
        ];
        let mut rng = Rng::new(3, Purpose::Test, 0, 0);
        let mut text = || (0..rng.below(12)).map(|_| *rng.choose(&PARTS)).collect::<String>();
        for _ in 0..20_000 {
            let (a, b) = (text(), text());
            assert_eq!(same(&a, &b, None), same(&b, &a, None), "{a:?} {b:?}");
            assert!(same(&a, &a, None) || clean(&a).is_empty(), "{a:?}");
            let _ = final_answer(&a);
        }
    }
}
