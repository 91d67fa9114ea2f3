//! Formulas in numbers, named constants and one-letter variables, as LaTeX or plain text, and their values.

use std::iter::Peekable;
use std::vec::IntoIter;

/// Deepest nesting of a formula.
const MAX_DEPTH: usize = 64;

/// Values under two assignments of the variables: formulas that agree under both are the same. None for what is no formula.
pub fn evaluate(text: &str) -> Option<[f64; 2]> {
    let tokens = tokens(text)?;
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

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Number(f64),
    /// A number with a name.
    Constant(f64),
    /// A single digit, as an argument without braces takes it.
    Digit(f64),
    Variable(char),
    Function(&'static str),
    Symbol(char),
}

/// Functions by name.
pub fn function(name: &str) -> Option<&'static str> {
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
            let mut number = if bare { c.to_string() } else { run(at, |c| c.is_ascii_digit() || c == '.') };
            at += number.len();
            if let Some(exponent) = exponent(&chars[at..]).filter(|_| !bare) {
                at += exponent.len();
                number.push_str(&exponent);
            }
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
                "pi" => out.push(Token::Constant(std::f64::consts::PI)),
                "infinity" | "inf" => out.push(Token::Constant(f64::INFINITY)),
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

/// The exponent of a number as computers write it, `e-5`; not where letters go on, as in `2e3x`.
fn exponent(rest: &[char]) -> Option<String> {
    rest.first().filter(|c| "eE".contains(**c))?;
    let sign = usize::from(rest.get(1).is_some_and(|c| "+-".contains(*c)));
    let digits = rest[1 + sign..].iter().take_while(|c| c.is_ascii_digit()).count();
    let end = 1 + sign + digits;
    (digits > 0 && !rest.get(end).is_some_and(|c| c.is_alphabetic())).then(|| rest[..end].iter().collect())
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
        let mut after_number = matches!(self.tokens.peek(), Some(Token::Number(_)));
        let mut value = self.signed()?;
        loop {
            let divides = self.tokens.peek() == Some(&Token::Symbol('/'));
            if divides || self.tokens.peek() == Some(&Token::Symbol('*')) {
                self.tokens.next();
                after_number = matches!(self.tokens.peek(), Some(Token::Number(_)));
                let factor = self.signed()?;
                value = if divides { value / factor } else { value * factor };
                continue;
            }
            match self.tokens.peek() {
                // Two numbers side by side are no product.
                Some(Token::Number(_)) if after_number => return None,
                Some(
                    Token::Number(_)
                    | Token::Constant(_)
                    | Token::Variable(_)
                    | Token::Function(_)
                    | Token::Symbol('(' | '{'),
                ) => {
                    after_number = matches!(self.tokens.peek(), Some(Token::Number(_)));
                    value *= self.power()?;
                }
                _ => return Some(value),
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
            Token::Number(value) | Token::Constant(value) | Token::Digit(value) => Some(value),
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
