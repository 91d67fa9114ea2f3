//! Prompts of both formats: `azr` for models that read English, `compact` for the embedded model.
//!
//! Compact, with the response after the arrow (P program, I input, O output, M message):
//!
//! ```text
//! propose   <|propose_deduction|> (<|code|>P<|input|>I<|output|>O)* <|code|>     -> P<|input|>I<|end|>
//!           <|propose_induction|><|code|>P<|input|>                               -> I(<|input|>I)*9<|message|>M<|end|>
//! abduction <|abduce|><|code|>P<|output|>O<|input|>                               -> I<|end|>
//! deduction <|deduce|><|code|>P<|input|>I<|output|>                               -> O<|end|>
//! induction <|induce|> (<|input|>I<|output|>O)*5 <|message|>M<|code|>             -> P<|end|>
//! ```
//!
//! Not here: the way back ([`super::parse`]) and tokens ([`super::codec`]).

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::selfplay::task::{Config, Role, Task, TaskKind};

/// Special tokens of the compact format.
pub const SPECIAL_TOKENS: [&str; 14] = azr_tokenizer::train::SPECIALS;

/// Number of inputs that an induction proposal must have.
pub const NUM_INDUCTION_INPUTS: usize = 10;

/// How prompts and answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// English with fenced blocks, thought in `<think>`, answer in `<answer>`.
    Azr,
    /// Special tokens between the parts.
    Compact,
}

/// A part of a prompt or of a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// A special token.
    Special(&'static str),
    /// Text in which nothing is special.
    Text(String),
}

fn text(text: &str) -> Piece {
    Piece::Text(text.to_owned())
}

/// Prompt for a proposal. References are shown with input and output; induction has one, shown as a program alone. So is a
/// reference without an execution: code to draw ideas from.
/// `composites` are definitions of `g_0`, `g_1`, ... that the new `f` must call (azr format only).
pub fn proposer(format: Format, kind: TaskKind, references: &[&Task], composites: &[String]) -> Vec<Piece> {
    match format {
        Format::Azr => vec![Piece::Text(framed(&azr_proposer(kind, references, composites)))],
        Format::Compact => {
            let mut pieces = Vec::new();
            let head = match kind {
                TaskKind::Abduction => "<|propose_abduction|>",
                TaskKind::Deduction => "<|propose_deduction|>",
                TaskKind::Error => "<|propose_error|>",
                TaskKind::Induction => "<|propose_induction|>",
            };
            pieces.push(Piece::Special(head));
            for task in references {
                pieces.extend([Piece::Special("<|code|>"), text(&task.program)]);
                if let Some(pair) = task.pairs.first().filter(|_| kind != TaskKind::Induction) {
                    pieces.extend([Piece::Special("<|input|>"), text(&pair.input)]);
                    pieces.extend([Piece::Special("<|output|>"), text(&pair.output)]);
                }
            }
            pieces.push(Piece::Special(if kind == TaskKind::Induction { "<|input|>" } else { "<|code|>" }));
            pieces
        }
    }
}

/// Prompt for a solution.
pub fn solver(format: Format, task: &Task) -> Vec<Piece> {
    if format == Format::Azr {
        return vec![Piece::Text(framed(&solver_text(task)))];
    }
    let special = Piece::Special;
    match task.kind {
        TaskKind::Abduction => vec![
            special("<|abduce|>"),
            special("<|code|>"),
            text(&task.program),
            special("<|output|>"),
            text(task.gold_output()),
            special("<|input|>"),
        ],
        TaskKind::Deduction | TaskKind::Error => vec![
            special(if task.kind == TaskKind::Error { "<|predict_error|>" } else { "<|deduce|>" }),
            special("<|code|>"),
            text(&task.program),
            special("<|input|>"),
            text(task.input()),
            special("<|output|>"),
        ],
        TaskKind::Induction => {
            let mut pieces = vec![special("<|induce|>")];
            for pair in task.shown_pairs() {
                pieces.extend([special("<|input|>"), text(&pair.input), special("<|output|>"), text(&pair.output)]);
            }
            pieces.extend([special("<|message|>"), text(&task.message), special("<|code|>")]);
            pieces
        }
    }
}

/// Special tokens after which nothing useful can follow in a configuration's response: sampling ends there.
pub fn stops(format: Format, config: Config) -> Vec<&'static str> {
    if format == Format::Azr {
        return Vec::new();
    }
    let goes_on: &[&str] = match (config.role, config.kind) {
        (Role::Propose, TaskKind::Induction) => &["<|input|>", "<|message|>"],
        (Role::Propose, _) => &["<|input|>"],
        (Role::Solve, _) => &[],
    };
    SPECIAL_TOKENS.into_iter().filter(|name| !goes_on.contains(name)).collect()
}

/// Puts a task into the azr format's frame, which starts a thought.
pub fn framed(task: &str) -> String {
    format!(
        "The following is a conversation between a User and an Assistant. The User gives a task. The Assistant first \
         reasons about it, step by step, and then gives the answer. The reasoning stands between <think> and </think>, \
         the answer between <answer> and </answer>: <think> reasoning </think> <answer> answer </answer>.\n\
         User: {task}\nAssistant: <think>"
    )
}

const PROGRAM_RULES: &str = "\
Rules for the program:
- Its entry point is a function named `f` with at least one parameter, and `f` returns a value.
- It is deterministic: the same arguments always give the same result.
- Something is kept track of over several transformations of the data.
- No randomness, no clock, no files, no network, no printing, no reading of input, no state outside the function.
- It ends within a few seconds.
- Imports and classes stand at the top; the last line is the return of `f`.
- It may import only modules of the standard library that compute (math, re, itertools, collections and the like).
";

const INPUT_RULES: &str = "\
Rules for the input:
- Exactly one test input: the arguments of `f`, separated by commas.
- Strings stand in quotes. Every argument is a literal value.
";

/// A small example of a program with its input, which shows the layout.
const EXAMPLE: &str = "\
```python
def f(name, info):
    total = sum(ord(c) for c in name)
    return {'name': name[::-1], 'score': total % info['modulus']}
```
```input
'John', {'modulus': 20}
```
";

fn snippets(references: &[&Task]) -> String {
    let mut out = String::new();
    for (i, task) in references.iter().enumerate() {
        let (program, input, output) = (&task.program, task.input(), task.gold_output());
        let _ = write!(
            out,
            "<snippet_{i}>\n```python\n{program}\n```\n```input\n{input}\n```\n```output\n{output}\n```\n</snippet_{i}>\n"
        );
    }
    out
}

fn azr_proposer(kind: TaskKind, references: &[&Task], composites: &[String]) -> String {
    if kind == TaskKind::Induction {
        let program = references.first().map_or("", |t| t.program.as_str());
        return format!(
            "## Task: write inputs and a message for a program\n\
             Below is a Python program. Write {NUM_INDUCTION_INPUTS} inputs for it and a message. A test subject will see \
             the message and some pairs of input and output, and has to find the program. The inputs should differ as \
             much as possible and together show everything that the program does. The message should help without \
             giving the program away: it must not contain code.\n\
             Rules:\n\
             - Every input is a list of literal arguments for `f`, separated by commas, with strings in quotes.\n\
             - Each input stands in a block of its own that starts with ```input and ends with ```.\n\
             - The message stands in a block that starts with ```message and ends with ```.\n\
             ## The program\n```python\n{program}\nf(<arguments>)\n```\n\
             Aim for a task that is hard, yet can be solved from the message and the pairs."
        );
    }
    let (goal, subject) = match kind {
        TaskKind::Abduction => (
            "The test subject will see the program and its output, and has to find an input that gives this output. It \
             should take real reasoning to work backwards from the output.",
            "recovering an input",
        ),
        TaskKind::Deduction => (
            "The test subject will see the program and the input, and has to predict the output. It should take real \
             reasoning to follow the program.",
            "predicting the output",
        ),
        _ => (
            "The test subject will see the program and the input, and has to name the class of the exception that it \
             raises, or NoError when it raises none. The program may raise an exception or not.",
            "predicting the exception",
        ),
    };
    let mut composite_rules = String::new();
    if !composites.is_empty() {
        composite_rules.push_str(
            "The program must call every one of these functions, which exist already; do not define them again:\n",
        );
        for source in composites {
            let _ = write!(composite_rules, "```python\n{source}\n```\n");
        }
    }
    let (earlier, ground): (Vec<&Task>, Vec<&Task>) = references.iter().partition(|t| !t.pairs.is_empty());
    let mut shown = String::new();
    for task in ground {
        let _ = write!(shown, "## Code to draw ideas from\n```python\n{}\n```\n", task.program);
    }
    if !earlier.is_empty() {
        let _ = write!(shown, "## Earlier programs, which yours must differ from\n{}", snippets(&earlier));
    }
    format!(
        "## Task: write a new Python program with one test input\n\
         Together they are a question of an intelligence test whose point is {subject}. {goal}\n\
         {PROGRAM_RULES}{composite_rules}{INPUT_RULES}\
         ## Layout\n{EXAMPLE}\
         ## What counts\n\
         - It runs. It is hard for a strong solver. It is new and inventive beside the earlier programs.\n\
         - It does not use: random, time, datetime, os, sys, threading, subprocess, open, eval, exec, input, print.\n\
         {shown}\
         First plan what would make the question hard, then give the program in a ```python block and the input in an \
         ```input block."
    )
}

/// A task in English, without a frame.
pub fn solver_text(task: &Task) -> String {
    let program = &task.program;
    match task.kind {
        TaskKind::Abduction => format!(
            "## Task: find an input\nFind arguments with which the program returns the output below. Any arguments that \
             do are right.\n```python\n{program}\n```\n```output\n{}\n```\n\
             Give the arguments, separated by commas and with strings in quotes, without a call around them:\n\
             ```input\narguments\n```",
            task.gold_output()
        ),
        TaskKind::Deduction => format!(
            "## Task: predict the output\nWhat does the program return for the input below?\n\
             ```python\n{program}\n```\n```input\n{}\n```\n\
             Give the value as a Python literal, with strings in quotes:\n```output\nvalue\n```",
            task.input()
        ),
        TaskKind::Error => format!(
            "## Task: predict the exception\nWhich exception does the program raise for the input below?\n\
             ```python\n{program}\n```\n```input\n{}\n```\n\
             Give the name of its class, or NoError when it raises none:\n```output\nname\n```",
            task.input()
        ),
        TaskKind::Induction => {
            let mut pairs = String::new();
            for (i, pair) in task.shown_pairs().iter().enumerate() {
                let _ = write!(pairs, "```input_{i}\n{}\n```\n```output_{i}\n{}\n```\n", pair.input, pair.output);
            }
            format!(
                "## Task: find the program\nWrite a Python function `f` that gives every output below for its input. It \
                 will be judged by further pairs that you do not see.\n{pairs}```message\n{}\n```\n{PROGRAM_RULES}\
                 Special cases for the pairs that you see are not a solution.\n\
                 Give the whole program:\n```python\ndef f(a):\n    return a\n```",
                task.message
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pieces: &[Piece]) -> String {
        pieces
            .iter()
            .map(|p| match p {
                Piece::Special(name) => (*name).to_owned(),
                Piece::Text(text) => text.clone(),
            })
            .collect()
    }

    #[test]
    fn compact_prompts_are_as_documented() {
        let task = Task::identity(TaskKind::Deduction);
        let p = "def f(x):\n    return x";
        assert_eq!(
            shown(&proposer(Format::Compact, TaskKind::Deduction, &[&task], &[])),
            format!("<|propose_deduction|><|code|>{p}<|input|>'Hello world'<|output|>'Hello world'<|code|>")
        );
        assert_eq!(
            shown(&proposer(Format::Compact, TaskKind::Induction, &[&task], &[])),
            format!("<|propose_induction|><|code|>{p}<|input|>")
        );
        assert_eq!(
            shown(&solver(Format::Compact, &task)),
            format!("<|deduce|><|code|>{p}<|input|>'Hello world'<|output|>")
        );
        let induction = shown(&solver(Format::Compact, &Task::identity(TaskKind::Induction)));
        assert!(induction.ends_with("<|message|>The function returns its argument.<|code|>"), "{induction}");
    }

    #[test]
    fn code_to_draw_ideas_from_is_shown_as_a_program_alone() {
        let (task, mut code) = (Task::identity(TaskKind::Deduction), Task::identity(TaskKind::Deduction));
        code.program = "def f(a):\n    return [a]".into();
        code.pairs.clear();
        let [compact, azr] = [Format::Compact, Format::Azr]
            .map(|format| shown(&proposer(format, TaskKind::Deduction, &[&code, &task], &[])));
        assert!(
            compact.starts_with("<|propose_deduction|><|code|>def f(a):\n    return [a]<|code|>def f(x)"),
            "{compact}"
        );
        let (ideas, earlier) = azr.split_once("## Earlier programs").expect("a section each");
        assert!(ideas.contains("## Code to draw ideas from\n```python\ndef f(a):\n    return [a]\n```"), "{azr}");
        assert!(!earlier.contains("[a]") && earlier.contains("'Hello world'"), "{azr}");
    }

    #[test]
    fn solvers_never_see_what_they_must_find() {
        let mut task = Task::identity(TaskKind::Abduction);
        task.pairs[0] = Pair { input: "secret_input".into(), output: "secret_output".into() };
        use crate::selfplay::task::Pair;
        for format in [Format::Azr, Format::Compact] {
            task.kind = TaskKind::Abduction;
            assert!(!shown(&solver(format, &task)).contains("secret_input"));
            task.kind = TaskKind::Deduction;
            assert!(!shown(&solver(format, &task)).contains("secret_output"));
            let mut induction = Task::identity(TaskKind::Induction);
            for pair in &mut induction.pairs[3..] {
                pair.input = "secret_input".into();
            }
            induction.program = "secret_program".into();
            assert!(!shown(&solver(format, &induction)).contains("secret"));
        }
    }

    #[test]
    fn azr_prompts_end_in_an_open_thought() {
        for kind in TaskKind::ALL {
            let task = Task::identity(kind);
            assert!(shown(&solver(Format::Azr, &task)).ends_with("Assistant: <think>"));
            assert!(shown(&proposer(Format::Azr, kind, &[&task], &[])).ends_with("Assistant: <think>"));
        }
    }
}
