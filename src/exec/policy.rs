//! What a program may name, decided on its syntax tree before anything runs. The sandbox does not rely on it: the policy
//! keeps tasks deterministic and self-contained, and says early and clearly why a program is no task. The names and the
//! reasons are in `rules`.
//!
//! Parsing can recurse as deeply as a program nests, so callers need a large stack (see `pool`) and programs have a
//! greatest length.

use std::collections::HashSet;

use rustpython_ruff_python_ast::visitor::{self, Visitor};
use rustpython_ruff_python_ast::{Alias, Expr, ModModule, Pattern, Stmt};
use rustpython_ruff_python_parser::{Parsed, parse_module};

use crate::exec::protocol::{Rejection, Unsupported};
use crate::exec::rules::{ALLOWED_DUNDERS, ALLOWED_MODULES, BANNED_ATTRIBUTES, BANNED_MODULES, BANNED_NAMES, Rule};

/// Longest program, in bytes.
pub const MAX_PROGRAM: usize = 16 << 10;

/// Whether a program may run at all.
///
/// # Errors
/// Why not.
pub fn check(program: &str) -> Result<(), Rejection> {
    let parsed = parse(program).ok_or_else(|| Rejection::Syntax("it does not parse, or is too long".to_owned()))?;
    let mut imported = Imported::default();
    parsed.suite().iter().for_each(|stmt| imported.visit_stmt(stmt));
    let mut walk = PolicyWalk { rejection: None, modules: imported.0 };
    for stmt in parsed.suite() {
        walk.visit_stmt(stmt);
    }
    walk.rejection.map_or(Ok(()), Err)
}

pub(crate) fn parse(program: &str) -> Option<Parsed<ModModule>> {
    (program.len() <= MAX_PROGRAM).then(|| parse_module(program).ok()).flatten()
}

fn find(table: &'static [Rule], name: &str) -> Option<&'static str> {
    table.iter().find(|(n, _)| *n == name).map(|(_, reason)| *reason)
}

fn is_dunder(name: &str) -> bool {
    name.len() > 4 && name.starts_with("__") && name.ends_with("__")
}

/// Names that a program gives to modules.
#[derive(Default)]
struct Imported(HashSet<String>);

impl<'a> Visitor<'a> for Imported {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        if let Stmt::Import(import) = stmt {
            let bound = |alias: &'a Alias| alias.asname.as_ref().unwrap_or(&alias.name).split('.').next();
            self.0.extend(import.names.iter().filter_map(bound).map(str::to_owned));
        }
        visitor::walk_stmt(self, stmt);
    }
}

struct PolicyWalk {
    rejection: Option<Rejection>,
    modules: HashSet<String>,
}

impl PolicyWalk {
    fn refuse(&mut self, why: Rejection) {
        self.rejection.get_or_insert(why);
    }

    fn module(&mut self, path: &str) {
        let root = path.split('.').next().unwrap_or("");
        if let Some(reason) = find(BANNED_MODULES, root) {
            self.refuse(Rejection::Policy(format!("module {root}: {reason}")));
        } else if find(ALLOWED_MODULES, root).is_none() {
            self.refuse(Rejection::Unsupported(Unsupported::Module(root.to_owned())));
        } else if path != root && path != "collections.abc" {
            // Parts of modules are commands and helpers that hold whatever they need.
            self.refuse(Rejection::Unsupported(Unsupported::Module(path.to_owned())));
        }
    }

    fn name(&mut self, name: &str) {
        let dunder = is_dunder(name) && find(ALLOWED_DUNDERS, name).is_none();
        if let Some(reason) = find(BANNED_NAMES, name).or(dunder.then_some("reflection")) {
            self.refuse(Rejection::Policy(format!("name {name}: {reason}")));
        }
    }

    fn attribute(&mut self, name: &str) {
        let dunder = is_dunder(name) && find(ALLOWED_DUNDERS, name).is_none();
        if let Some(reason) = find(BANNED_ATTRIBUTES, name).or(dunder.then_some("reflection")) {
            self.refuse(Rejection::Policy(format!("name {name}: {reason}")));
        } else if find(BANNED_MODULES, name).is_some_and(|_| REACHABLE.contains(&name)) {
            // Standard modules hold others as attributes: collections.sys is sys.
            self.module(name);
        }
    }

    /// A module's attribute: standard modules hold others (statistics.random, collections._sys) and parts of them.
    fn member(&mut self, name: &str) {
        self.attribute(name);
        if find(BANNED_MODULES, name).is_some() {
            self.module(name);
        } else if name.starts_with('_') && !is_dunder(name) {
            self.refuse(Rejection::Policy(format!("name {name}: a module's own")));
        }
    }

    /// What a format string reaches into: `{0.__class__}`.
    fn format_text(&mut self, text: &str) {
        for field in text.split('{').skip(1) {
            let field = field.split(['}', ':', '!']).next().unwrap_or("");
            for name in field.split('.').skip(1) {
                self.attribute(name.split('[').next().unwrap_or(""));
            }
        }
    }
}

/// Modules that standard modules hold as attributes, none of which is a common name of anything else.
const REACHABLE: [&str; 7] = ["sys", "os", "builtins", "gc", "inspect", "io", "importlib"];

impl<'a> Visitor<'a> for PolicyWalk {
    fn visit_stmt(&mut self, stmt: &'a Stmt) {
        match stmt {
            Stmt::Import(import) => import.names.iter().for_each(|alias| self.module(&alias.name)),
            Stmt::ImportFrom(import) => {
                match &import.module {
                    Some(module) if import.level == 0 => self.module(module),
                    _ => self.refuse(Rejection::Policy("relative import: there is no package".to_owned())),
                }
                import.names.iter().for_each(|alias| self.member(&alias.name));
            }
            Stmt::ClassDef(def) => self.name(&def.name),
            _ => {}
        }
        visitor::walk_stmt(self, stmt);
    }

    fn visit_expr(&mut self, expr: &'a Expr) {
        match expr {
            Expr::Name(name) => self.name(&name.id),
            Expr::Attribute(attribute) => match attribute.value.as_name_expr() {
                Some(name) if self.modules.contains(name.id.as_str()) => self.member(&attribute.attr),
                _ => self.attribute(&attribute.attr),
            },
            Expr::StringLiteral(text) => self.format_text(text.value.to_str()),
            _ => {}
        }
        visitor::walk_expr(self, expr);
    }

    fn visit_pattern(&mut self, pattern: &'a Pattern) {
        if let Pattern::MatchClass(class) = pattern {
            class.arguments.keywords.iter().for_each(|k| self.attribute(&k.attr));
        }
        visitor::walk_pattern(self, pattern);
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
            ("from . import x", "relative import"),
            ("def f(x): return eval(x)", "name eval"),
            ("def f(x): return x.__class__.__bases__", "name __"),
            ("def f(x): return __import__('os')", "name __import__"),
            ("def f(x): return __loader__", "name __loader__"),
            ("def f(x): return (i for i in x).gi_frame", "name gi_frame"),
            ("def f(x): return '{0.__class__}'.format(x)", "name __class__"),
            ("def f(x):\n    match x:\n        case object(__class__=c): return c", "name __class__"),
            ("from collections import __builtins__ as b", "name __builtins__"),
            ("from typing import sys", "module sys"),
            ("import collections\ndef f(): return collections.sys", "module sys"),
            ("import collections as c\ndef f(): return c._sys", "name _sys"),
            ("def f():\n    import queue\n    return queue.time()", "module time"),
            ("from statistics import random", "module random"),
            ("from operator import attrgetter", "name attrgetter"),
            ("import types\ndef f(): return types.CodeType", "name CodeType"),
            ("def f(x): return hash(x) % 2", "name hash"),
            ("class __import__: pass", "name __import__"),
            ("from operator import *\ndef f(x): return attrgetter('a')(x)", "name attrgetter"),
            ("from json.tool import *", "unsupported module json.tool"),
            ("import array\ndef f(): return array.array('i', [1]).buffer_info()", "name buffer_info"),
            ("import types\ndef f(): return types.LambdaType", "name LambdaType"),
            ("def f(x): return (", "syntax"),
        ] {
            let rejection = check(program).expect_err(program).to_string();
            assert!(rejection.contains(reason), "{program}: {rejection}");
        }
        for program in [
            "import math\nfrom collections import Counter\ndef f(x):\n    return math.sqrt(x)",
            "class A:\n    def __init__(self): self.x = 1\ndef f(): return A().x",
            "class A:\n    def __eq__(self, o): return True\n    def __hash__(self): return 1\ndef f(): return A() == 1",
            "def f(s): return s.replace('os', 'eval')",
            "def f(s): return type(s).__name__",
            "def f(s):\n    _, __ = s\n    return __",
            "from __future__ import annotations\ndef f(s: int) -> int: return s",
            "def f(s): return '{:>5}|{0[a]}'.format(s)",
            "import collections.abc\nfrom fractions import Fraction\ndef f(s): return Fraction(1, s)",
        ] {
            assert_eq!(check(program), Ok(()), "{program}");
        }
    }

    #[test]
    fn every_rule_has_a_reason_and_stands_once() {
        for table in [ALLOWED_MODULES, BANNED_MODULES, BANNED_NAMES, BANNED_ATTRIBUTES, ALLOWED_DUNDERS] {
            let mut names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
            assert!(table.iter().all(|(_, reason)| !reason.is_empty()));
            let len = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), len, "a name stands twice");
        }
        assert!(ALLOWED_MODULES.iter().all(|(m, _)| find(BANNED_MODULES, m).is_none()));
    }
}
