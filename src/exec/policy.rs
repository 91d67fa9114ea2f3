//! What a program may name, decided on its syntax tree before anything runs. The sandbox does not rely on it: the policy
//! keeps tasks deterministic and self-contained, and says early and clearly why a program is no task.
//!
//! Parsing can recurse as deeply as a program nests, so callers need a large stack (see `pool`) and programs have a
//! greatest length.

use std::collections::{HashMap, HashSet};

use rustpython_ruff_python_ast::token::TokenKind;
use rustpython_ruff_python_ast::visitor::{self, Visitor};
use rustpython_ruff_python_ast::{Alias, ExceptHandler, Expr, ExprContext, Parameter, Stmt};
use rustpython_ruff_python_parser::{Parsed, parse_module};
use rustpython_ruff_text_size::{Ranged, TextRange};

use crate::exec::protocol::Rejection;

/// Longest program, in bytes.
pub const MAX_PROGRAM: usize = 16 << 10;

/// Modules that a program may import.
const ALLOWED_MODULES: &[&str] = &[
    "abc",
    "array",
    "bisect",
    "cmath",
    "collections",
    "copy",
    "dataclasses",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "keyword",
    "math",
    "numbers",
    "operator",
    "pprint",
    "queue",
    "re",
    "statistics",
    "string",
    "struct",
    "textwrap",
    "types",
    "typing",
    "unicodedata",
    "zlib",
    "base64",
    "binascii",
    "difflib",
    "graphlib",
    "contextlib",
];

/// Modules that are there in Python but not for programs, with the reason.
const BANNED_MODULES: &[(&str, &str)] = &[
    ("bcrypt", "cryptography"),
    ("builtins", "changes the meaning of every program"),
    ("calendar", "depends on the clock"),
    ("ctypes", "native code"),
    ("datetime", "depends on the clock"),
    ("gc", "interpreter internals"),
    ("hashlib", "cryptography"),
    ("hmac", "cryptography"),
    ("importlib", "import system"),
    ("inspect", "interpreter internals"),
    ("io", "input and output"),
    ("logging", "input and output"),
    ("multiprocessing", "processes"),
    ("os", "operating system"),
    ("pathlib", "file system"),
    ("pebble", "processes"),
    ("random", "not deterministic"),
    ("secrets", "not deterministic"),
    ("shutil", "file system"),
    ("signal", "processes"),
    ("socket", "network"),
    ("subprocess", "processes"),
    ("sys", "interpreter internals"),
    ("tempfile", "file system"),
    ("threading", "threads"),
    ("time", "depends on the clock"),
    ("uuid", "not deterministic"),
];

/// Builtin names that a program may not use, with the reason.
const BANNED_NAMES: &[(&str, &str)] = &[
    ("__builtins__", "changes the meaning of every program"),
    ("__import__", "import system"),
    ("breakpoint", "debugger"),
    ("compile", "runs text as code"),
    ("delattr", "reflection"),
    ("eval", "runs text as code"),
    ("exec", "runs text as code"),
    ("exit", "ends the process"),
    ("getattr", "reflection"),
    ("globals", "reflection"),
    ("help", "input and output"),
    ("id", "an address: not deterministic"),
    ("input", "input and output"),
    ("locals", "reflection"),
    ("memoryview", "an address: not deterministic"),
    ("open", "file system"),
    ("quit", "ends the process"),
    ("setattr", "reflection"),
    ("vars", "reflection"),
];

/// Attributes with two underscores that programs commonly read without harm.
const ALLOWED_DUNDERS: &[&str] = &["__name__", "__init__", "__len__", "__doc__"];

/// Whether a program may run at all.
///
/// # Errors
/// Why not.
pub fn check(program: &str) -> Result<(), Rejection> {
    let parsed = parse(program).ok_or_else(|| Rejection::Syntax("it does not parse, or is too long".to_owned()))?;
    let mut walk = PolicyWalk { rejection: None };
    for stmt in parsed.suite() {
        walk.visit_stmt(stmt);
    }
    walk.rejection.map_or(Ok(()), Err)
}

fn parse(program: &str) -> Option<Parsed<rustpython_ruff_python_ast::ModModule>> {
    (program.len() <= MAX_PROGRAM).then(|| parse_module(program).ok()).flatten()
}

struct PolicyWalk {
    rejection: Option<Rejection>,
}

impl PolicyWalk {
    fn module(&mut self, path: &str) {
        let root = path.split('.').next().unwrap_or("");
        let found = if let Some((_, reason)) = BANNED_MODULES.iter().find(|(m, _)| *m == root) {
            Rejection::Policy(format!("module {root}: {reason}"))
        } else if ALLOWED_MODULES.contains(&root) {
            return;
        } else {
            Rejection::UnsupportedModule(root.to_owned())
        };
        self.rejection.get_or_insert(found);
    }

    fn name(&mut self, name: &str, attribute: bool) {
        let reason = if attribute {
            (name.starts_with("__") && name.ends_with("__") && !ALLOWED_DUNDERS.contains(&name)).then_some("reflection")
        } else {
            BANNED_NAMES.iter().find(|(n, _)| *n == name).map(|(_, reason)| *reason)
        };
        if let Some(reason) = reason {
            self.rejection.get_or_insert(Rejection::Policy(format!("name {name}: {reason}")));
        }
    }
}

impl<'a> Visitor<'a> for PolicyWalk {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::Import(import) => import.names.iter().for_each(|alias| self.module(&alias.name)),
            Stmt::ImportFrom(import) => match &import.module {
                Some(module) if import.level == 0 => self.module(module),
                _ => self.module("(relative)"),
            },
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Name(name) => self.name(&name.id, false),
            Expr::Attribute(attribute) => self.name(&attribute.attr, true),
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }
}

/// The program with its own names renamed in order of appearance, without comments, docstrings and layout: two programs
/// with the same normal form are the same up to renaming. None when the program does not parse.
pub fn normal_form(program: &str) -> Option<String> {
    let parsed = parse(program)?;
    let mut walk = NameWalk { bound: HashSet::new(), docstrings: Vec::new() };
    walk.body(parsed.suite());
    for stmt in parsed.suite() {
        walk.visit_stmt(stmt);
    }
    let (mut names, mut out, mut after_dot): (HashMap<&str, usize>, String, bool) = Default::default();
    let mut after_docstring = false;
    for token in parsed.tokens() {
        let kind = token.kind();
        let layout = matches!(kind, TokenKind::Comment | TokenKind::NonLogicalNewline);
        let docstring = walk.docstrings.iter().any(|d| d.contains_range(token.range()));
        // A docstring goes with the end of its line.
        if layout || docstring || after_docstring && kind == TokenKind::Newline {
            after_docstring = docstring || layout && after_docstring;
            continue;
        }
        after_docstring = false;
        let text = &program[token.range()];
        match kind {
            TokenKind::Newline => out.push(';'),
            TokenKind::Indent => out.push_str("{ "),
            TokenKind::Dedent => out.push_str("} "),
            TokenKind::Name if !after_dot && walk.bound.contains(text) => {
                let next = names.len();
                let index = *names.entry(text).or_insert(next);
                out.push_str(&format!("v{index} "));
            }
            _ => {
                out.push_str(text);
                out.push(' ');
            }
        }
        after_dot = kind == TokenKind::Dot;
    }
    Some(out)
}

struct NameWalk<'a> {
    bound: HashSet<&'a str>,
    docstrings: Vec<TextRange>,
}

impl<'a> NameWalk<'a> {
    /// Notes a body's docstring.
    fn body(&mut self, body: &'a [Stmt]) {
        if let Some(Stmt::Expr(first)) = body.first()
            && first.value.is_string_literal_expr()
            && body.len() > 1
        {
            self.docstrings.push(first.range());
        }
    }
}

impl<'a> Visitor<'a> for NameWalk<'a> {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::FunctionDef(def) => {
                self.bound.insert(def.name.as_str());
                self.body(&def.body);
            }
            Stmt::ClassDef(def) => {
                self.bound.insert(def.name.as_str());
                self.body(&def.body);
            }
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        if let Expr::Name(name) = expr
            && name.ctx == ExprContext::Store
        {
            self.bound.insert(name.id.as_str());
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_parameter(&mut self, parameter: &'a Parameter) {
        self.bound.insert(parameter.name.as_str());
        visitor::walk_parameter(self, parameter);
    }

    fn visit_alias(&mut self, alias: &'a Alias) {
        if let Some(name) = &alias.asname {
            self.bound.insert(name.as_str());
        }
    }

    fn visit_except_handler(&mut self, handler: &'a ExceptHandler) {
        let ExceptHandler::ExceptHandler(inner) = handler;
        if let Some(name) = &inner.name {
            self.bound.insert(name.as_str());
        }
        visitor::walk_except_handler(self, handler);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_refuses_by_name_with_a_reason() {
        for (program, reason) in [
            ("import os", "module os"),
            ("import os.path", "module os"),
            ("from sys import exit", "module sys"),
            ("def f():\n    import random\n    return random.random()", "module random"),
            ("import numpy as np", "unsupported module numpy"),
            ("from . import x", "unsupported module"),
            ("def f(x): return eval(x)", "name eval"),
            ("def f(x): return x.__class__.__bases__", "name __"),
            ("def f(x): return __import__('os')", "name __import__"),
            ("def f(x): return (", "syntax"),
        ] {
            let rejection = check(program).expect_err(program).to_string();
            assert!(rejection.contains(reason), "{program}: {rejection}");
        }
        for program in [
            "import math\nfrom collections import Counter\ndef f(x):\n    return math.sqrt(x)",
            "class A:\n    def __init__(self): self.x = 1\ndef f(): return A().x",
            "def f(s): return s.replace('os', 'eval')",
        ] {
            assert_eq!(check(program), Ok(()), "{program}");
        }
    }

    #[test]
    fn normal_forms_ignore_names_comments_and_layout_only() {
        let a = "def f(x, y):\n    \"\"\"Doc.\"\"\"\n    # add\n    total = x+y\n    return total";
        let b = "def f(a,b):\n\n  s = a + b  # sum\n  return s";
        assert_eq!(normal_form(a), normal_form(b));
        for other in ["def f(a, b):\n    s = a - b\n    return s", "def f(a, b):\n    s = a + b\n    return a"] {
            assert_ne!(normal_form(a), normal_form(other), "{other}");
        }
        assert_eq!(normal_form("def f(:"), None);
    }
}
