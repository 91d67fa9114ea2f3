//! Small typed Python functions with inputs and a short English message, drawn from the grammar.
//!
//! Invariants: a draw is a pure function of the random stream; a program has the form `def f(...)`, ends by itself on
//! every input (loops run over data, a small range, or a positive number that shrinks), and has neither randomness nor
//! set order in its result. It may still raise (`max` of an empty list): who wants outputs executes it. Not here:
//! outputs (`exec`) and documents (`corpus`).

use std::sync::LazyLock;

use super::grammar::{BODIES, RULES, fillings};
use crate::base::rng::Rng;

/// Type of a parameter or an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ty {
    /// `int`
    Int,
    /// `str`
    Str,
    /// `list[int]`
    Ints,
    /// `list[str]`
    Strs,
    /// `dict[str, int]`
    Dict,
    /// `bool`
    Bool,
}

impl Ty {
    /// Every type.
    pub const ALL: [Ty; 6] = [Ty::Int, Ty::Str, Ty::Ints, Ty::Strs, Ty::Dict, Ty::Bool];

    /// The type that a template's letter names, in either case.
    fn of_letter(letter: char) -> Option<Ty> {
        "islwdb".find(letter.to_ascii_lowercase()).map(|at| Ty::ALL[at])
    }

    fn names(self) -> &'static [&'static str] {
        match self {
            Ty::Int => &["n", "x", "a", "b", "num", "y"],
            Ty::Str => &["s", "text", "word", "t", "name"],
            Ty::Ints => &["nums", "xs", "lst", "arr", "items", "values"],
            Ty::Strs => &["words", "names", "strs", "parts"],
            Ty::Dict => &["d", "data", "table"],
            Ty::Bool => &["flag", "on"],
        }
    }
}

/// A program of the generator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Python source: `def f(...):` and its body, without a final line break.
    pub code: String,
    /// Types of the parameters, in order.
    pub params: Vec<Ty>,
    /// What it computes, in English.
    pub message: String,
    /// 1: one expression, 2: nested, branches or an assignment, 3: loops and accumulators.
    pub level: u8,
}

/// A variable that an expression may use, and how the message speaks of it.
#[derive(Clone)]
struct Var {
    name: String,
    ty: Ty,
    says: String,
}

/// Code and its description.
#[derive(Clone)]
struct Phrase {
    code: String,
    says: String,
}

/// What a template needs of the scope.
struct Needs {
    num_vars: [usize; 6],
    exprs: [bool; 6],
}

impl Needs {
    fn of(code: &str) -> Needs {
        let mut needs = Needs { num_vars: [0; 6], exprs: [false; 6] };
        let mut seen = Vec::new();
        for hole in pieces(code).filter_map(|piece| piece.hole) {
            if let Some(ty) = Ty::of_letter(hole.letter) {
                if hole.letter.is_ascii_uppercase() {
                    needs.exprs[ty as usize] = true;
                } else if !seen.contains(&hole) {
                    seen.push(hole);
                    needs.num_vars[ty as usize] += 1;
                }
            }
        }
        needs
    }
}

static RULE_NEEDS: LazyLock<Vec<Needs>> = LazyLock::new(|| RULES.iter().map(|rule| Needs::of(rule.code)).collect());
static BODY_NEEDS: LazyLock<Vec<Needs>> = LazyLock::new(|| BODIES.iter().map(|body| Needs::of(body.0)).collect());

/// A hole of a template: its letter and digit (0 when it has none).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hole {
    letter: char,
    digit: u8,
}

/// Literal text and the hole after it.
struct TemplatePiece<'a> {
    text: &'a str,
    hole: Option<Hole>,
    rest: &'a str,
}

/// A template as literal texts, each followed by a hole but the last.
fn pieces(template: &str) -> impl Iterator<Item = TemplatePiece<'_>> {
    let mut rest = Some(template);
    std::iter::from_fn(move || {
        let now = rest?;
        let Some(at) = now.find('$') else {
            rest = None;
            return Some(TemplatePiece { text: now, hole: None, rest: "" });
        };
        let letter = char::from(now.as_bytes()[at + 1]);
        let digit = now.as_bytes().get(at + 2).copied().filter(u8::is_ascii_digit);
        let after = &now[at + 2 + usize::from(digit.is_some())..];
        rest = Some(after);
        let hole = Hole { letter, digit: digit.map_or(0, |d| d - b'0') };
        Some(TemplatePiece { text: &now[..at], hole: Some(hole), rest: after })
    })
}

/// How tightly an expression's outermost operator binds: 0 comparison, condition, `in`; 1 sum; 2 product; 3 the rest.
fn tightness(code: &str) -> u8 {
    let (mut depth, mut quoted) = (0i32, false);
    let outer: String = code
        .chars()
        .filter(|&c| {
            match c {
                '\'' => quoted = !quoted,
                '(' | '[' | '{' if !quoted => depth += 1,
                ')' | ']' | '}' if !quoted => depth -= 1,
                _ => return !quoted && depth == 0,
            }
            false
        })
        .collect();
    let sign = if code.starts_with('-') { 2 } else { 3 };
    outer.split(' ').fold(sign, |tight, word| match word {
        "+" | "-" => tight.min(1),
        "*" | "//" | "%" => tight.min(2),
        "if" | "else" | "in" | "not" | "and" | "or" | "==" | "!=" | "<" | ">" | "<=" | ">=" => 0,
        _ => tight,
    })
}

/// How tightly an expression must bind to stand between two texts of a template without brackets.
fn needed_tightness(before: &str, after: &str) -> u8 {
    let left = match before.trim_end().chars().last() {
        Some('+' | '-') => 2,
        Some('*' | '/' | '%') => 3,
        Some('=' | '<' | '>') => 1,
        _ if before.ends_with(" in ") || before.ends_with("else ") => 1,
        _ => 0,
    };
    let next = after.trim_start();
    let right = match next.chars().next() {
        Some('.' | '[') => 3,
        Some('*' | '/' | '%') => 2,
        Some('+' | '-' | '=' | '<' | '>') => 1,
        _ if next.starts_with("if ") || next.starts_with("else ") || next.starts_with("in ") => 1,
        _ => 0,
    };
    left.max(right)
}

/// Draws code for a scope of variables.
struct Writer<'r> {
    rng: &'r mut Rng,
    scope: Vec<Var>,
}

impl Writer<'_> {
    fn num_vars(&self, ty: Ty) -> usize {
        self.scope.iter().filter(|var| var.ty == ty).count()
    }

    fn fits(&self, needs: &Needs, depth: usize) -> bool {
        Ty::ALL.iter().all(|&ty| {
            let at = ty as usize;
            needs.num_vars[at] <= self.num_vars(ty) && (!needs.exprs[at] || self.can_make(ty, depth))
        })
    }

    /// Whether an expression of the type can be made with at most `depth` nested rules.
    fn can_make(&self, ty: Ty, depth: usize) -> bool {
        self.num_vars(ty) > 0
            || depth > 0
                && RULES.iter().zip(&*RULE_NEEDS).any(|(rule, needs)| rule.gives == ty && self.fits(needs, depth - 1))
    }

    /// An expression of a type out of at most `depth` nested rules; `None` when the scope allows none.
    fn expression(&mut self, ty: Ty, depth: usize) -> Option<Phrase> {
        if depth > 0 {
            let fitting: Vec<usize> =
                (0..RULES.len()).filter(|&at| RULES[at].gives == ty && self.fits(&RULE_NEEDS[at], depth - 1)).collect();
            if !fitting.is_empty() {
                let rule = &RULES[*self.rng.choose(&fitting)];
                return self.fill(rule.code, rule.says, depth - 1);
            }
        }
        self.variable(ty, &[])
    }

    /// A variable of a type, not one of those already used where another exists.
    fn variable(&mut self, ty: Ty, used: &[(Hole, Phrase)]) -> Option<Phrase> {
        let free: Vec<&Var> = self
            .scope
            .iter()
            .filter(|var| var.ty == ty && !used.iter().any(|(_, phrase)| phrase.code == var.name))
            .collect();
        if free.is_empty() {
            return None;
        }
        let var = self.rng.choose(&free);
        Some(Phrase { code: var.name.clone(), says: var.says.clone() })
    }

    /// Fills a template; sub-expressions may nest `depth` rules.
    fn fill(&mut self, code: &str, says: &str, depth: usize) -> Option<Phrase> {
        let mut filled: Vec<(Hole, Phrase)> = Vec::new();
        self.fill_with(code, says, depth, &mut filled)
    }

    fn fill_with(&mut self, code: &str, says: &str, depth: usize, filled: &mut Vec<(Hole, Phrase)>) -> Option<Phrase> {
        let mut out = Phrase { code: String::new(), says: String::new() };
        for piece in pieces(code) {
            out.code.push_str(piece.text);
            let Some(hole) = piece.hole else { continue };
            let phrase = self.hole(hole, depth, filled)?;
            let is_expression = hole.letter.is_ascii_uppercase();
            let bare = !is_expression || tightness(&phrase.code) >= needed_tightness(&out.code, piece.rest);
            if bare {
                out.code.push_str(&phrase.code);
            } else {
                out.code.push('(');
                out.code.push_str(&phrase.code);
                out.code.push(')');
            }
        }
        for piece in pieces(says) {
            out.says.push_str(piece.text);
            if let Some(hole) = piece.hole {
                out.says.push_str(&self.hole(hole, depth, filled)?.says);
            }
        }
        Some(out)
    }

    /// What stands in a hole: what stood in the equal hole before, else a new draw.
    fn hole(&mut self, hole: Hole, depth: usize, filled: &mut Vec<(Hole, Phrase)>) -> Option<Phrase> {
        if let Some((_, phrase)) = filled.iter().find(|(old, _)| *old == hole) {
            return Some(phrase.clone());
        }
        let phrase = match Ty::of_letter(hole.letter) {
            Some(ty) if hole.letter.is_ascii_uppercase() => {
                let nested = self.num_vars(ty) == 0 || self.rng.below(2) == 0;
                self.expression(ty, if nested { depth } else { 0 })?
            }
            Some(ty) => self.variable(ty, filled)?,
            None => {
                let (code, says) = *self.rng.choose(fillings(hole.letter));
                // Holes inside a filling are its own, but the accumulator is the template's.
                let accumulator = Hole { letter: 'a', digit: 0 };
                let mut own: Vec<_> = filled.iter().filter(|(old, _)| *old == accumulator).cloned().collect();
                self.fill_with(code, says, depth, &mut own)?
            }
        };
        filled.push((hole, phrase.clone()));
        Some(phrase)
    }

    /// A type for a result, by how often results of it are wanted.
    fn result_type(&mut self) -> Ty {
        Ty::ALL[self.rng.weighted(&[30.0, 24.0, 22.0, 10.0, 6.0, 8.0])]
    }

    /// A body of the level.
    fn body(&mut self, level: u8) -> Option<Phrase> {
        match level {
            1 => self.returned(1),
            2 => match self.rng.weighted(&[45.0, 20.0, 15.0, 20.0]) {
                0 => self.returned(2),
                1 => self.branches("if $B:\n    return $1\nreturn $2"),
                2 => self.branches("return $1 if $B else $2"),
                _ => self.assignment(),
            },
            _ => {
                let fitting: Vec<usize> = (0..BODIES.len()).filter(|&at| self.fits(&BODY_NEEDS[at], 1)).collect();
                if fitting.is_empty() {
                    return None;
                }
                let (code, says) = BODIES[*self.rng.choose(&fitting)];
                self.fill(code, says, 1)
            }
        }
    }

    /// A body over one of these templates.
    fn body_of(&mut self, templates: &[(&str, &str)]) -> Option<Phrase> {
        let fitting: Vec<&(&str, &str)> = templates.iter().filter(|t| self.fits(&Needs::of(t.0), 1)).collect();
        if fitting.is_empty() {
            return None;
        }
        let (code, says) = **self.rng.choose(&fitting);
        self.fill(code, says, 1)
    }

    fn returned(&mut self, depth: usize) -> Option<Phrase> {
        let ty = self.result_type();
        let value = self.expression(ty, depth)?;
        let whether = if ty == Ty::Bool { "whether " } else { "" };
        Some(Phrase { code: format!("return {}", value.code), says: format!("{whether}{}", value.says) })
    }

    fn branches(&mut self, code: &str) -> Option<Phrase> {
        let test = self.expression(Ty::Bool, 1)?;
        let ty = self.result_type();
        let (yes, no) = (self.expression(ty, 1)?, self.expression(ty, 1)?);
        if yes.code == no.code {
            return None;
        }
        let code = code.replace("$B", &test.code).replace("$1", &yes.code).replace("$2", &no.code);
        Some(Phrase { code, says: format!("{} if {}, else {}", yes.says, test.says, no.says) })
    }

    fn assignment(&mut self) -> Option<Phrase> {
        let ty = [Ty::Int, Ty::Ints, Ty::Str, Ty::Strs][self.rng.weighted(&[40.0, 30.0, 20.0, 10.0])];
        let first = self.expression(ty, 1)?;
        let name = (*self.rng.choose(&["z", "tmp", "res", "mid"])).to_owned();
        self.scope.push(Var { name: name.clone(), ty, says: first.says });
        let second = self.returned(1)?;
        let used = has_word(&second.code, &name);
        used.then(|| Phrase { code: format!("{name} = {}\n{}", first.code, second.code), says: second.says })
    }
}

/// Whether a name occurs as a whole word of the code.
fn has_word(code: &str, name: &str) -> bool {
    code.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).any(|word| word == name)
}

/// A program of the given level (1 to 3), or of a level drawn with weights 40, 35, 25.
pub fn program(rng: &mut Rng, level: Option<u8>) -> Program {
    let level = level.unwrap_or_else(|| [1, 2, 3][rng.weighted(&[40.0, 35.0, 25.0])]);
    loop {
        if let Some(program) = attempt(rng, level) {
            return program;
        }
    }
}

/// A program of a level over one of these templates, (code, description), instead of the grammar's own.
pub fn program_of(rng: &mut Rng, level: u8, templates: &[(&str, &str)]) -> Program {
    loop {
        if let Some(program) = attempt_with(rng, level, |writer| writer.body_of(templates)) {
            return program;
        }
    }
}

fn attempt(rng: &mut Rng, level: u8) -> Option<Program> {
    attempt_with(rng, level, |writer| writer.body(level))
}

/// One draw; `None` when the parameters do not fit the body or one of them stays unused.
fn attempt_with(rng: &mut Rng, level: u8, body: impl FnOnce(&mut Writer<'_>) -> Option<Phrase>) -> Option<Program> {
    let num_params = [1, 1, 2, 2, 3][rng.weighted(&[50.0, 12.0, 28.0, 5.0, 5.0])];
    let mut scope: Vec<Var> = Vec::new();
    while scope.len() < num_params {
        let ty = Ty::ALL[rng.weighted(&[27.0, 26.0, 22.0, 12.0, 8.0, 5.0])];
        let name = *rng.choose(ty.names());
        if scope.iter().all(|var| var.name != name) {
            scope.push(Var { name: name.to_owned(), ty, says: name.to_owned() });
        }
    }
    let params: Vec<(String, Ty)> = scope.iter().map(|var| (var.name.clone(), var.ty)).collect();
    let body = body(&mut Writer { rng, scope })?;
    if !params.iter().all(|(name, _)| has_word(&body.code, name)) || body.says.len() > 100 {
        return None;
    }
    let names: Vec<&str> = params.iter().map(|(name, _)| name.as_str()).collect();
    let code = format!("def f({}):\n    {}", names.join(", "), body.code.replace('\n', "\n    "));
    Some(Program { code, params: params.into_iter().map(|(_, ty)| ty).collect(), message: body.says, level })
}

/// Words of string values; the rest of them are random letters.
pub const WORDS: [&str; 48] = [
    "cat", "dog", "sun", "red", "blue", "tree", "fish", "bird", "moon", "star", "apple", "pear", "plum", "lime",
    "corn", "rice", "milk", "tea", "hat", "cup", "box", "pen", "key", "map", "car", "bus", "van", "ship", "road",
    "hill", "lake", "rain", "snow", "wind", "fire", "gold", "iron", "rock", "sand", "leaf", "ada", "bob", "eve",
    "level", "noon", "wow", "code", "desk",
];

fn int_value(rng: &mut Rng) -> i64 {
    let below = |rng: &mut Rng, n: usize| i64::try_from(rng.below(n)).expect("a small number");
    match rng.weighted(&[50.0, 30.0, 8.0, 12.0]) {
        0 => below(rng, 10),
        1 => 10 + below(rng, 41),
        2 => 51 + below(rng, 50),
        _ => -1 - below(rng, 10),
    }
}

fn str_value(rng: &mut Rng) -> String {
    if rng.below(2) == 0 {
        return (*rng.choose(&WORDS)).to_owned();
    }
    let letters: &[u8] = if rng.below(10) < 7 { b"abcdexyz" } else { b"abcdefghijklmnopqrstuvwxyz" };
    (0..1 + rng.below(6)).map(|_| char::from(*rng.choose(letters))).collect()
}

/// A literal of the type, as Python's `repr` writes it.
pub fn value(rng: &mut Rng, ty: Ty) -> String {
    match ty {
        Ty::Int => int_value(rng).to_string(),
        Ty::Str => format!("'{}'", str_value(rng)),
        Ty::Bool => (*rng.choose(&["True", "False"])).to_owned(),
        Ty::Ints => {
            let len = *rng.choose(&[1, 2, 3, 3, 4, 4, 5, 6]);
            let items: Vec<String> = (0..len).map(|_| int_value(rng).to_string()).collect();
            format!("[{}]", items.join(", "))
        }
        Ty::Strs => {
            let len = *rng.choose(&[1, 2, 2, 3, 3, 4]);
            let items: Vec<String> = (0..len).map(|_| value(rng, Ty::Str)).collect();
            format!("[{}]", items.join(", "))
        }
        Ty::Dict => {
            let mut items: Vec<(String, i64)> = Vec::new();
            for _ in 0..*rng.choose(&[1, 2, 2, 3]) {
                let key = str_value(rng);
                if items.iter().all(|(old, _)| *old != key) {
                    items.push((key, int_value(rng)));
                }
            }
            let items: Vec<String> = items.into_iter().map(|(key, value)| format!("'{key}': {value}")).collect();
            format!("{{{}}}", items.join(", "))
        }
    }
}

/// A call's arguments for the parameters: comma-separated literals.
pub fn input(rng: &mut Rng, params: &[Ty]) -> String {
    let values: Vec<String> = params.iter().map(|&ty| value(rng, ty)).collect();
    values.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Purpose;

    fn rng(a: u64) -> Rng {
        Rng::new(11, Purpose::Test, a, 0)
    }

    #[test]
    fn equal_streams_give_equal_programs_and_levels_have_their_form() {
        for level in 1..=3 {
            for a in 0..200 {
                let program = super::program(&mut rng(a), Some(level));
                assert_eq!(program, super::program(&mut rng(a), Some(level)));
                assert!(program.code.starts_with("def f(") && !program.code.contains('$'), "{}", program.code);
                assert!(!program.message.is_empty() && !program.message.contains('$'), "{}", program.message);
                assert!(level > 1 || program.code.lines().count() == 2, "{}", program.code);
                assert_eq!(input(&mut rng(a), &program.params), input(&mut rng(a), &program.params));
            }
        }
    }

    #[test]
    fn programs_are_many() {
        let codes: std::collections::BTreeSet<String> =
            (0..2_000).map(|a| super::program(&mut rng(a), None).code).collect();
        assert!(codes.len() > 1_400, "{}", codes.len());
    }

    #[test]
    fn brackets_appear_where_operators_need_them() {
        assert_eq!([tightness("a"), tightness("a + b"), tightness("a // 2"), tightness("a if b else c")], [3, 1, 2, 0]);
        assert_eq!(
            [tightness("f(a + b)"), tightness("-a"), tightness("[v for v in x]"), tightness("', '.join(x)")],
            [3, 2, 3, 3]
        );
        assert_eq!(needed_tightness("", " * 2"), 2);
        assert_eq!(needed_tightness("", ".upper()"), 3);
        assert_eq!(needed_tightness("len(", ")"), 0);
        assert_eq!(needed_tightness("[v for v in ", " if v > 2]"), 1);
        assert_eq!(needed_tightness("a - ", ""), 2);
    }

    #[test]
    fn every_hole_of_the_grammar_can_be_filled() {
        for (at, (code, says)) in
            RULES.iter().map(|rule| (rule.code, rule.says)).chain(BODIES.iter().copied()).enumerate()
        {
            let scope = Ty::ALL
                .iter()
                .flat_map(|&ty| ty.names()[..2].iter().map(move |name| (ty, *name)))
                .map(|(ty, name)| Var { name: name.to_owned(), ty, says: name.to_owned() })
                .collect();
            let phrase = Writer { rng: &mut rng(at as u64), scope }.fill(code, says, 1);
            assert!(phrase.is_some_and(|p| !p.code.contains('$') && !p.says.contains('$')), "{code}");
        }
    }
}
