//! Answers to mathematical questions: where a text has its answer, and whether two answers are the same.
//!
//! An answer is cleaned of layout, units and currency, split into the members of a list, tuple, interval or set, and the
//! members are compared by value: numbers, fractions, roots and formulas in one-letter variables are evaluated, anything
//! else is compared as text. What cannot be read as a value is never equal to one. Not here: which suites ask this way.

use super::formula::{self, function};

/// Relative difference up to which two values are the same, by how many of them are whole.
const TOLERANCE: [f64; 3] = [1e-6, 1e-9, 0.0];
/// The same where doubles are too large to tell whole numbers apart.
const LARGE_TOLERANCE: f64 = 1e-12;
/// Deepest nesting of a formula.
const MAX_DEPTH: usize = 64;
/// Longest answer, in bytes: no suite's are longer.
const MAX_LEN: usize = 2000;
/// Units that are too short for any word after a number to be taken for one; those of two letters need no space before them.
const SHORT_UNITS: [&str; 29] = [
    "m", "g", "s", "h", "L", "C", "cm", "mm", "km", "kg", "mg", "ft", "in", "yd", "mi", "lb", "oz", "ml", "mL", "hr",
    "am", "pm", "sq", "lbs", "hrs", "mph", "min", "sec", "cc",
];

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
    if let Some(found) = boxed(text) {
        return Some(found.trim().to_owned()).filter(|a| !a.is_empty());
    }
    let lower = text.to_ascii_lowercase();
    let marked = ["answer is", "answer:"].iter().filter_map(|m| lower.rfind(m).map(|at| at + m.len())).max();
    // A heading may begin as a mark does: the later of the two counts.
    if let Some(at) = text.rfind("####").filter(|at| marked.is_none_or(|m| m < *at)) {
        return text[at + 4..].trim().lines().next().map(|l| l.trim().to_owned()).filter(|a| !a.is_empty());
    }
    let mut rest = &text[marked?..];
    loop {
        let trimmed = rest.trim_start_matches([':', ' ', '*', '\n', '$']);
        let trimmed = trimmed.strip_prefix("\\[").or(trimmed.strip_prefix("\\(")).unwrap_or(trimmed);
        if trimmed.len() == rest.len() {
            break;
        }
        rest = trimmed;
    }
    let line = rest.lines().next().unwrap_or("");
    // The sentence ends at a full stop that is no decimal point, or where it says why.
    let ends = [". ", "**", ", because", ", since", "\\]", "\\)"];
    let end = ends.iter().filter_map(|e| line.find(e)).min().unwrap_or(line.len());
    Some(line[..end].trim().trim_end_matches(['.', '*', '$']).trim().to_owned()).filter(|a| !a.is_empty())
}

fn last_number(text: &str) -> Option<String> {
    let inside = |c: char| c.is_ascii_digit() || matches!(c, '.' | ',' | '/');
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let start =
        text[..end].rfind(|c| !inside(c)).map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
    let signed = text[..start].ends_with('-') && !text[..start - 1].ends_with(|c: char| c.is_alphanumeric());
    let number = text[start..end].trim_start_matches([',', '/']);
    // A point may begin a number, several do not.
    let number = if number.starts_with("..") { number.trim_start_matches('.') } else { number };
    Some(format!("{}{number}", if signed { "-" } else { "" }))
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
    /// Rows of cells.
    Matrix(Vec<Vec<String>>),
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
        (Shape::Matrix(g), Shape::Matrix(a)) => {
            let lens = |m: &[Vec<String>]| m.iter().map(Vec::len).collect::<Vec<_>>();
            lens(g) == lens(a) && g.iter().flatten().zip(a.iter().flatten()).all(|(g, a)| part(g, a))
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
    if let Some(rows) = MATRICES
        .iter()
        .find_map(|m| text.strip_prefix(&format!("\\begin{{{m}}}"))?.strip_suffix(&format!("\\end{{{m}}}")))
    {
        let rows = rows.trim().trim_end_matches(ROW).split(ROW);
        return Shape::Matrix(rows.map(|row| row.split('&').map(|cell| cell.trim().to_owned()).collect()).collect());
    }
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
        Some(parts) if parts.len() > 1 && !is_grouped(text) => {
            Shape::Unordered(parts.into_iter().map(|p| unnamed(&p).to_owned()).collect())
        }
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

/// Environments of rows and cells.
const MATRICES: [&str; 4] = ["pmatrix", "bmatrix", "vmatrix", "matrix"];
/// What stands for the end of a row while layout is taken away.
const ROW: char = '\u{1}';

/// Commands that are layout alone, and what stands for them.
const LAYOUT: &[(&str, &str)] = &[
    ("\\\\", "\u{1}"),
    (",\\! ", ","),
    (",\\!", ","),
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
    let text = without_groups(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    unnamed(&text).trim_end_matches('.').to_owned()
}

/// The right side of an equation whose left side only names it.
fn unnamed(text: &str) -> &str {
    let Some((name, value)) = text.split_once('=') else { return text };
    let name = name.trim();
    let compares = name.ends_with(['<', '>', '!']);
    let symbol = name.strip_prefix('\\').is_some_and(|n| n.chars().all(char::is_alphabetic));
    let names = name.len() <= 2 || symbol || name.ends_with(')') && name.len() <= 4;
    if names && !compares { value.trim() } else { text }
}

/// Digits in groups of three between spaces, joined: `10 000`. A mixed number's fraction is no group.
fn without_groups(text: &str) -> String {
    let words: Vec<&str> = text.split(' ').collect();
    let mut out = String::new();
    for (i, word) in words.iter().enumerate() {
        let head = i.checked_sub(1).and_then(|i| words.get(i));
        let head = head.map_or("", |w| w.trim_start_matches(['-', '+', '(', '[', '{', '$']));
        let digits = |w: &str| !w.is_empty() && w.bytes().all(|b| b.is_ascii_digit());
        let len = word.bytes().take_while(u8::is_ascii_digit).count();
        let ends = !word[len..].starts_with('/');
        let joins = len == 3 && ends && digits(head) && head.len() <= 3;
        out.push_str(if i > 0 && !joins { " " } else { "" });
        out.push_str(word);
    }
    out
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
    let scale = gold.abs().max(answer.abs());
    let num_whole = [gold, answer].iter().filter(|x| x.fract() == 0.0).count();
    let relative = if scale > 9e15 { LARGE_TOLERANCE } else { TOLERANCE[num_whole] };
    let floor = if gold == 0.0 { 1e-12 } else { 0.0 };
    (gold - answer).abs() <= (relative * scale).max(tolerance.unwrap_or(0.0)).max(floor)
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
        let mut exponent = false;
        let letters = unit.chars().all(|c| {
            exponent = c == '^' || exponent && (c.is_ascii_digit() || "{-}".contains(c));
            exponent || c.is_alphabetic() || " /.'-".contains(c)
        });
        let word: String = unit.chars().take_while(|c| c.is_alphabetic()).collect();
        let short = SHORT_UNITS.contains(&word.as_str()) && (spaced || word.len() > 1);
        let known = short || word.len() > if spaced { 2 } else { 3 } && function(&word).is_none();
        (begins && letters && known && (ends || value.ends_with("\\pi"))).then_some(value)
    };
    text.char_indices().find_map(unit_from)
}

fn evaluate(text: &str) -> Option<[f64; 2]> {
    let text = mixed_number(text).unwrap_or_else(|| text.to_owned());
    formula::evaluate(&if is_grouped(&text) { text.replace(',', "") } else { text })
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
            ("1e5", "100000"),
            ("4e33", "4 \\times 10^{33}"),
            ("1.6e-19", "1.6 \\times 10^{-19}"),
            ("2e^3", "e^3 \\cdot 2"),
            ("3pi", "3\\pi"),
            ("3 pi", "3\\pi"),
            ("4xy^2", "4y^2x"),
            ("\\frac{3xy}{2}", "\\frac{3yx}{2}"),
            ("\\frac{3 m}{2}-1", "1.5m - 1"),
            ("3", "3 miles per hour"),
            ("5", "5 m/s^{-2}"),
            ("10000", "10\\,000"),
            ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
            ("11,\\! 111,\\! 111,\\! 100", "11,111,111,100"),
            ("\\begin{pmatrix} -7 \\\\ 16 \\end{pmatrix}", "\\begin{pmatrix}-7\\\\16\\end{pmatrix}"),
            (
                "\\begin{pmatrix} 1/2 & 2 \\\\ 3 & 4 \\end{pmatrix}",
                "\\begin{pmatrix}\\frac{1}{2}&2\\\\3&4\\\\\\end{pmatrix}",
            ),
            ("5,6", "x=5, x=6"),
            ("30", "\\theta = 30^\\circ"),
            ("2", "\\sqrt{2} \\cdot \\sqrt{2}"),
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
            ("2xy", "2"),
            ("2ab", "2xy"),
            ("4xy^2", "4"),
            ("3pi", "3"),
            ("3", "3 hours 20 minutes"),
            ("2", "2 out of 5"),
            ("3", "3 to 5"),
            ("1.6 \\times 10^{-19}", "9.1\\times 10^{-31}"),
            ("1000000", "1000000.5"),
            ("0", "10 000"),
            ("6", "2 3"),
            ("x<=5", "x>=5"),
            ("x<=5", "5"),
            ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ] {
            assert!(!same(gold, answer, None), "{gold} is not {answer}");
            assert!(!same(answer, gold, None), "{answer} is not {gold}");
        }
        assert!(!same("6.67 \\times 10^{-34}", "0", None), "however small");
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
            ("It costs $.75", Some(".75")),
            ("and so ...75", Some("75")),
            ("The answer is **18** apples.", Some("18")),
            ("The answer is 18, because 9 + 9 is", Some("18")),
            ("the answer is\n\\[\n18\n\\]", Some("18")),
            ("#### Step 1: add\nThe answer is 5", Some("5")),
            ("The answer is 4.\n#### 5", Some("5")),
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
