//! Reading and rewriting of Python sources: entry point, renaming, cleaning, composition, and how complex they are.
//!
//! Sources come from a model. Each function parses on a stack of its own that is deep enough for whatever nests within
//! [`MAX_PROGRAM`] bytes, and gives `None` for what does not parse.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;

use rustpython_ruff_python_ast::token::TokenKind;
use rustpython_ruff_python_ast::visitor::{self, Visitor};
use rustpython_ruff_python_ast::{Expr, Keyword, ModModule, Parameter, PatternKeyword, Stmt, StmtFunctionDef};
use rustpython_ruff_python_parser::{Parsed, parse_module};
use rustpython_ruff_text_size::{Ranged, TextRange, TextSize};

use crate::exec::policy::{MAX_PROGRAM, check};

/// Stack for one parse, in bytes; only what is touched is real.
const STACK: usize = 512 << 20;

type Module = Parsed<ModModule>;

/// Parses on a deep stack and hands the tree to `f` there.
fn with_tree<T: Send>(source: &str, f: impl FnOnce(&Module) -> T + Send) -> Option<T> {
    if source.len() > MAX_PROGRAM {
        return None;
    }
    let work = || parse_module(source).ok().map(|module| f(&module));
    // No thread of its own, which a busy machine may refuse. A parser that panics on hostile text has not parsed it.
    stacker::grow(STACK, || std::panic::catch_unwind(AssertUnwindSafe(work)).ok().flatten())
}

fn functions(module: &Module) -> impl Iterator<Item = &StmtFunctionDef> {
    module.suite().iter().filter_map(|stmt| match stmt {
        Stmt::FunctionDef(def) => Some(def),
        _ => None,
    })
}

/// Whether the import policy lets a source run.
pub fn is_allowed(source: &str) -> bool {
    with_tree(source, |_| check(source).is_ok()).unwrap_or(false)
}

/// Top-level functions of a file of any length, as it spells them; those with decorators, which mean nothing elsewhere, are
/// left out. Found by their lines alone: what does not parse by itself is the caller's to refuse.
pub fn functions_of(file: &str) -> Vec<String> {
    let mut found: Vec<Vec<&str>> = Vec::new();
    let (mut inside, mut decorated) = (false, false);
    for line in file.lines() {
        let goes_on = line.trim().is_empty() || line.starts_with([' ', '\t', ')', '#']);
        if !goes_on {
            inside = line.starts_with("def ") && !decorated;
            decorated = line.starts_with('@');
            if inside {
                found.push(Vec::new());
            }
        }
        if let Some(lines) = found.last_mut().filter(|_| inside) {
            lines.push(line);
        }
    }
    let whole = |mut lines: Vec<&str>| {
        while lines.last().is_some_and(|l| l.trim().is_empty() || l.starts_with('#')) {
            lines.pop();
        }
        lines.join("\n")
    };
    found.into_iter().map(whole).collect()
}

/// Which functions a program may define.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FunctionRule {
    /// Helpers, nested functions and classes; the entry point is the top-level `f`, or the only top-level function.
    Any,
    /// A single `def` at any depth, as the reference ran it.
    Single,
}

/// The program with its entry point named `f`.
///
/// # Errors
/// Why it has none.
pub fn with_entry_point(source: &str, rule: FunctionRule) -> Result<String, String> {
    let found = with_tree(source, |module| {
        let names: Vec<String> = functions(module).map(|f| f.name.to_string()).collect();
        let mut count = CountDefs(0);
        module.suite().iter().for_each(|s| count.visit_stmt(s));
        (names, count.0)
    });
    let (names, num_defs) = found.ok_or("it does not parse, or is too long")?;
    if rule == FunctionRule::Single && num_defs != 1 {
        return Err(format!("it has {num_defs} function definitions, not one"));
    }
    match names.as_slice() {
        names if names.iter().any(|n| n == "f") => Ok(source.to_owned()),
        [only] => rename(source, only, "f").ok_or_else(|| "it does not parse".to_owned()),
        _ => Err("it defines no function `f`".to_owned()),
    }
}

/// Whether a source is one call of a name, and nothing beside it.
pub fn is_one_call(source: &str, of: &str) -> bool {
    let found = with_tree(source, |module| match module.suite().as_slice() {
        [Stmt::Expr(only)] => match &*only.value {
            Expr::Call(call) => {
                call.range().len().to_usize() == source.len()
                    && matches!(&*call.func, Expr::Name(name) if name.id.as_str() == of)
            }
            _ => false,
        },
        _ => false,
    });
    found.unwrap_or(false)
}

struct CountDefs(usize);

impl<'a> Visitor<'a> for CountDefs {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        self.0 += usize::from(stmt.is_function_def_stmt());
        visitor::walk_stmt(self, stmt);
    }
}

/// The source with a name replaced wherever it stands as a name (not as an attribute, in a string, as a class's own, or as a
/// keyword that is no parameter of the program's). What has the new name already gets another one.
pub fn rename(source: &str, from: &str, to: &str) -> Option<String> {
    with_tree(source, |module| {
        let mut labels = Labels::default();
        module.suite().iter().for_each(|s| labels.visit_stmt(s));
        let kept = labels.kept();
        let mut other = format!("{to}_");
        while source.contains(&other) {
            other.push('_');
        }
        let (mut out, mut copied, mut after_dot) = (String::new(), 0, false);
        for token in module.tokens() {
            let range = token.range();
            let text = &source[range];
            let name = token.kind() == TokenKind::Name && !after_dot && !kept.contains(&range.start());
            if name && from != to && (text == from || text == to) {
                out.push_str(&source[copied..range.start().to_usize()]);
                out.push_str(if text == from { to } else { &other });
                copied = range.end().to_usize();
            }
            after_dot = token.kind() == TokenKind::Dot;
        }
        out.push_str(&source[copied..]);
        out
    })
}

/// Names that name no variable: methods and other members of classes, keywords of calls, attributes of patterns.
#[derive(Default)]
struct Labels {
    members: Vec<TextSize>,
    keywords: Vec<(String, TextSize)>,
    parameters: BTreeSet<String>,
}

impl Labels {
    /// Where they stand. A keyword counts as the variable that a function of the program makes of it.
    fn kept(self) -> BTreeSet<TextSize> {
        let foreign = |(name, at): (String, TextSize)| (!self.parameters.contains(&name)).then_some(at);
        self.members.into_iter().chain(self.keywords.into_iter().filter_map(foreign)).collect()
    }
}

impl<'a> Visitor<'a> for Labels {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        for member in stmt.as_class_def_stmt().into_iter().flat_map(|class| &class.body) {
            match member {
                Stmt::FunctionDef(def) => self.members.push(def.name.start()),
                Stmt::Assign(assign) => self.members.extend(assign.targets.iter().map(Ranged::start)),
                Stmt::AnnAssign(assign) => self.members.push(assign.target.start()),
                _ => {}
            }
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_keyword(&mut self, keyword: &'a Keyword) {
        self.keywords.extend(keyword.arg.iter().map(|name| (name.to_string(), name.start())));
        visitor::walk_keyword(self, keyword);
    }

    fn visit_parameter(&mut self, parameter: &'a Parameter) {
        self.parameters.insert(parameter.name.to_string());
        visitor::walk_parameter(self, parameter);
    }

    fn visit_pattern_keyword(&mut self, keyword: &'a PatternKeyword) {
        self.members.push(keyword.attr.start());
        visitor::walk_pattern_keyword(self, keyword);
    }
}

/// The source without comments, docstrings and blank lines, and without top-level statements other than imports and
/// definitions: how seeds are stored.
pub fn cleaned(source: &str) -> Option<String> {
    with_tree(source, |module| {
        let mut cut: Vec<TextRange> = Vec::new();
        for token in module.tokens() {
            if token.kind() == TokenKind::Comment {
                cut.push(token.range());
            }
        }
        let keeps =
            |s: &Stmt| matches!(s, Stmt::Import(_) | Stmt::ImportFrom(_) | Stmt::FunctionDef(_) | Stmt::ClassDef(_));
        cut.extend(module.suite().iter().filter(|s| !keeps(s)).map(Ranged::range));
        let mut docstrings = Docstrings(Vec::new());
        module.suite().iter().for_each(|s| docstrings.visit_stmt(s));
        cut.extend(docstrings.0);
        let mut text = String::new();
        for (at, c) in source.char_indices() {
            if !cut.iter().any(|r| (r.start().to_usize()..r.end().to_usize()).contains(&at)) {
                text.push(c);
            }
        }
        let lines: Vec<&str> =
            text.lines().map(str::trim_end).filter(|l| !l.trim_matches([';', ' ']).is_empty()).collect();
        lines.join("\n")
    })
}

struct Docstrings(Vec<TextRange>);

impl<'a> Visitor<'a> for Docstrings {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        let body = match stmt {
            Stmt::FunctionDef(def) => &def.body,
            Stmt::ClassDef(def) => &def.body,
            _ => return visitor::walk_stmt(self, stmt),
        };
        if let Some(Stmt::Expr(first)) = body.first()
            && first.value.is_string_literal_expr()
            && body.len() > 1
        {
            self.0.push(first.range());
        }
        visitor::walk_stmt(self, stmt);
    }
}

/// Whether the program's `f` calls each of `g_0 .. g_{count-1}` and defines none of them anew.
pub fn calls_composites(source: &str, count: usize) -> bool {
    with_tree(source, |module| {
        let mut names = Names::default();
        module.suite().iter().for_each(|s| names.visit_stmt(s));
        let mut called = Names::default();
        functions(module).filter(|f| f.name.as_str() == "f").flat_map(|f| &f.body).for_each(|s| called.visit_stmt(s));
        (0..count).all(|i| {
            let name = format!("g_{i}");
            called.called.contains(&name) && !names.defined.contains(&name)
        })
    })
    .unwrap_or(false)
}

#[derive(Default)]
struct Names {
    called: BTreeSet<String>,
    defined: BTreeSet<String>,
}

impl<'a> Visitor<'a> for Names {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::FunctionDef(def) => {
                self.defined.insert(def.name.to_string());
            }
            Stmt::ClassDef(def) => {
                self.defined.insert(def.name.to_string());
            }
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Call(call) => {
                if let Expr::Name(name) = call.func.as_ref() {
                    self.called.insert(name.id.to_string());
                }
            }
            Expr::Name(name) if name.ctx.is_store() => {
                self.defined.insert(name.id.to_string());
            }
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }
}

/// How complex a source is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Complexity {
    /// Cognitive complexity (Campbell 2018): branches and loops, more the deeper they nest, and runs of and/or.
    pub cognitive: f64,
    /// Highest cyclomatic complexity (McCabe 1976) of a function.
    pub cyclomatic: f64,
    /// Halstead volume (1977): length x log2(vocabulary).
    pub volume: f64,
    /// Halstead effort: volume x difficulty.
    pub effort: f64,
}

/// Complexity of a source.
pub fn complexity(source: &str) -> Option<Complexity> {
    with_tree(source, |module| {
        let mut walk = Walk::default();
        module.suite().iter().for_each(|s| walk.visit_stmt(s));
        let cyclomatic = walk.functions.iter().copied().fold(1, usize::max) as f64;
        let (mut operators, mut operands) = (BTreeMap::new(), BTreeMap::new());
        for token in module.tokens() {
            let text = &source[token.range()];
            match token.kind() {
                TokenKind::Comment
                | TokenKind::Newline
                | TokenKind::NonLogicalNewline
                | TokenKind::Indent
                | TokenKind::Dedent
                | TokenKind::EndOfFile => {}
                TokenKind::Name | TokenKind::Int | TokenKind::Float | TokenKind::Complex | TokenKind::String => {
                    *operands.entry(text).or_insert(0usize) += 1;
                }
                _ => *operators.entry(text).or_insert(0usize) += 1,
            }
        }
        let total = |m: &BTreeMap<&str, usize>| m.values().sum::<usize>() as f64;
        let (n1, n2) = (operators.len() as f64, operands.len() as f64);
        let volume = (total(&operators) + total(&operands)) * (n1 + n2).max(1.0).log2();
        let effort = volume * n1 / 2.0 * total(&operands) / n2.max(1.0);
        Complexity { cognitive: walk.cognitive as f64, cyclomatic, volume, effort }
    })
}

#[derive(Default)]
struct Walk {
    depth: usize,
    cognitive: usize,
    functions: Vec<usize>,
    open: Vec<usize>,
}

impl Walk {
    fn decide(&mut self, paths: usize) {
        if let Some(&f) = self.open.last() {
            self.functions[f] += paths;
        }
    }
}

impl<'a> Visitor<'a> for Walk {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::FunctionDef(_) => {
                self.functions.push(1);
                self.open.push(self.functions.len() - 1);
                let nested = usize::from(self.open.len() > 1);
                self.depth += nested;
                visitor::walk_stmt(self, stmt);
                self.depth -= nested;
                self.open.pop();
            }
            Stmt::If(branch) => {
                self.cognitive += 1 + self.depth + branch.elif_else_clauses.len();
                self.decide(1 + branch.elif_else_clauses.iter().filter(|c| c.test.is_some()).count());
                self.nested(stmt);
            }
            Stmt::For(_) | Stmt::While(_) => {
                self.cognitive += 1 + self.depth;
                self.decide(1);
                self.nested(stmt);
            }
            Stmt::Try(attempt) => {
                self.cognitive += attempt.handlers.len() * (1 + self.depth);
                self.decide(attempt.handlers.len());
                self.nested(stmt);
            }
            Stmt::Match(choice) => {
                self.cognitive += 1 + self.depth;
                self.decide(choice.cases.len());
                self.nested(stmt);
            }
            _ => visitor::walk_stmt(self, stmt),
        }
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::If(_) => {
                self.cognitive += 1 + self.depth;
                self.decide(1);
            }
            Expr::BoolOp(operation) => {
                self.cognitive += 1;
                self.decide(operation.values.len() - 1);
            }
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_comprehension(&mut self, comprehension: &'a rustpython_ruff_python_ast::Comprehension) {
        self.decide(1 + comprehension.ifs.len());
        visitor::walk_comprehension(self, comprehension);
    }
}

impl Walk {
    fn nested<'a>(&mut self, stmt: &'a Stmt)
    where
        Self: Visitor<'a>,
    {
        self.depth += 1;
        visitor::walk_stmt(self, stmt);
        self.depth -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renaming_keeps_names_apart() {
        let renamed = |source| rename(source, "g", "f");
        let source = "def f(x): return x\ndef g(x): return f(x) + x.g + x.f";
        let expected = "def f_(x): return x\ndef f(x): return f_(x) + x.g + x.f";
        assert_eq!(renamed(source).as_deref(), Some(expected));
        assert_eq!(renamed("def g(f, f_): return f").as_deref(), Some("def f(f__, f_): return f__"));
        assert_eq!(rename("def f(x): return f(x)", "f", "f").as_deref(), Some("def f(x): return f(x)"));
        assert_eq!(renamed("def g(:"), None);
        for (source, expected) in [
            ("def g(x): return dict(f=x, g=1)", "def f(x): return dict(f=x, g=1)"),
            ("def g(g=1): return g\ng(g=2)", "def f(f=1): return f\nf(f=2)"),
            (
                "class A:\n    f = 1\n    def g(self): return self.g\ndef g(f): return A().f",
                "class A:\n    f = 1\n    def g(self): return self.g\ndef f(f_): return A().f",
            ),
            (
                "def g(x):\n    match x:\n        case A(f=y): return y",
                "def f(x):\n    match x:\n        case A(f=y): return y",
            ),
        ] {
            assert_eq!(renamed(source).as_deref(), Some(expected));
        }
        let key = "def key(x): return sorted(x, key=len)";
        assert_eq!(rename(key, "key", "f").as_deref(), Some("def f(x): return sorted(x, key=len)"));
    }

    #[test]
    fn the_only_function_becomes_the_entry_point_with_its_calls() {
        let source = "def fact(n):\n    return 1 if n < 2 else n * fact(n - 1)  # fact\n";
        let renamed = with_entry_point(source, FunctionRule::Any).expect("one function");
        assert_eq!(renamed, "def f(n):\n    return 1 if n < 2 else n * f(n - 1)  # fact\n");
        let two = "def g(x):\n    return x\ndef f(x):\n    return g(x)";
        assert_eq!(with_entry_point(two, FunctionRule::Any).as_deref(), Ok(two));
        assert!(with_entry_point(two, FunctionRule::Single).is_err());
        assert!(with_entry_point("def g(x): return x\ndef h(x): return x", FunctionRule::Any).is_err());
        assert!(with_entry_point("f = lambda x: x", FunctionRule::Any).is_err());
        assert!(with_entry_point("def f(:", FunctionRule::Any).is_err());
    }

    #[test]
    fn cleaning_leaves_imports_and_definitions() {
        let source = "import math  # why\nX = 1\n\ndef f(x):\n    \"\"\"Doc.\"\"\"\n    # step\n    s = '# no'\n    return s\nprint(f(1))\n";
        assert_eq!(cleaned(source).as_deref(), Some("import math\ndef f(x):\n    s = '# no'\n    return s"));
    }

    #[test]
    fn functions_are_cut_out_of_a_file() {
        let file = "import os\n@cache\ndef a(x):\n    return x\n\ndef b(\n    x,\n):\n    # why\n\n    return x\n\n# next\nclass C:\n    def c(self):\n        pass\n\nasync def d():\n    pass\ndef e(x): return os\nprint(1)\n";
        assert_eq!(functions_of(file), ["def b(\n    x,\n):\n    # why\n\n    return x", "def e(x): return os"]);
        assert!(is_allowed("def f(x):\n    return x") && !is_allowed("import os\ndef f(x):\n    return x"));
        assert!(!is_allowed("def f(x"));
    }

    #[test]
    fn composites_must_be_called_and_not_redefined() {
        assert!(calls_composites("def f(x):\n    return g_0(x) + g_1(x)", 2));
        assert!(!calls_composites("def f(x):\n    return g_0(x)", 2));
        assert!(!calls_composites("def g_0(x):\n    return 1\ndef f(x):\n    return g_0(x)", 1));
        assert!(!calls_composites("def f(x):\n    return x\ng_0(1)", 1));
    }

    #[test]
    fn nesting_counts_more_than_length() {
        let flat = complexity("def f(x):\n    a = x\n    b = a\n    c = b\n    return c").expect("parses");
        let deep = complexity("def f(x):\n    for i in x:\n        if i and x:\n            return 1\n    return 0")
            .expect("parses");
        assert_eq!((flat.cognitive, flat.cyclomatic), (0.0, 1.0));
        // for 1, if 1 + 1, and 1; paths: 1 + for + if + and.
        assert_eq!((deep.cognitive, deep.cyclomatic), (4.0, 4.0));
        assert!(flat.volume > 0.0 && deep.effort > flat.effort);
    }

    #[test]
    fn deep_nesting_is_no_crash() {
        let source = format!("def f(x):\n    return {}x{}", "(".repeat(7000), ")".repeat(7000));
        let _ = with_entry_point(&source, FunctionRule::Any);
        let _ = complexity(&format!("x = {}1", "-".repeat(16000)));
    }
}
