//! Normal forms of programs: two programs with the same one are the same up to names, comments and layout.

use std::collections::{HashMap, HashSet};

use rustpython_ruff_python_ast::token::TokenKind;
use rustpython_ruff_python_ast::visitor::{self, Visitor};
use rustpython_ruff_python_ast::{Alias, ExceptHandler, Expr, ExprContext, Parameter, Stmt};
use rustpython_ruff_text_size::{Ranged, TextRange};

use crate::exec::policy::parse;

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
