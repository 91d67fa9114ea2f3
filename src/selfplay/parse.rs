//! From a completion to a draft task or an answer: format test and extraction, for both formats.
//!
//! Format and content are judged apart, as the algorithm wants it: a draft may be taken from a badly formatted
//! completion (and then earns -1), a probe's answer is read without a look at its format. Not here: whether a program
//! runs or an answer is right.

use crate::exec::source::{FunctionRule, calls_composites, cleaned, with_entry_point};
use crate::selfplay::prompt::{Format, NUM_INDUCTION_INPUTS, Piece};
use crate::selfplay::task::{Pair, Record, Task, TaskKind};

/// Extraction rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Which functions a proposed program may define.
    pub function_rule: FunctionRule,
    /// Seeding: proposals are read from the whole completion, no format is asked for, and programs are cleaned.
    pub seeding: bool,
}

/// A proposed task that has not run yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// Task type.
    pub kind: TaskKind,
    /// Python source that defines `f`.
    pub program: String,
    /// One input, or ten for induction.
    pub inputs: Vec<String>,
    /// What the program does (induction).
    pub message: String,
    /// Number of programs that it is composed of.
    pub num_composites: usize,
}

impl Draft {
    /// The task, once its outputs are known.
    pub fn into_task(self, outputs: Vec<String>, normal_form: String, step: u64) -> Task {
        assert_eq!(outputs.len(), self.inputs.len(), "an output per input");
        let pairs = self.inputs.into_iter().zip(outputs).map(|(input, output)| Pair { input, output }).collect();
        Task {
            kind: self.kind,
            program: self.program,
            pairs,
            message: self.message,
            step,
            normal_form,
            num_composites: self.num_composites,
            record: Record::default(),
        }
    }
}

/// What a proposer's completion says.
#[derive(Debug, Clone)]
pub struct ReadProposal {
    /// Whether it keeps to the format.
    pub format_ok: bool,
    /// The draft, or why there is none.
    pub draft: Result<Draft, String>,
}

/// What a solver's completion says.
#[derive(Debug, Clone)]
pub struct ReadAnswer {
    /// Whether it keeps to the format.
    pub format_ok: bool,
    /// The answer, if one can be found.
    pub answer: Option<String>,
}

/// Reads a proposal. `source` is the program shown to an induction proposer; `composites` are the definitions that the
/// new program must call.
pub fn proposal(
    format: Format,
    kind: TaskKind,
    pieces: &[Piece],
    finished: bool,
    source: Option<&Task>,
    composites: &[String],
    rules: Rules,
) -> ReadProposal {
    let (format_ok, found) = match format {
        Format::Compact => compact_proposal(kind, pieces, finished),
        Format::Azr => azr_proposal(kind, &plain(pieces), rules),
    };
    let draft = found.and_then(|(program, inputs, message)| {
        let mut draft = Draft { kind, program, inputs, message, num_composites: composites.len() };
        if kind == TaskKind::Induction {
            let task = source.ok_or("it was shown no program")?;
            draft.program.clone_from(&task.program);
            draft.num_composites = task.num_composites;
        } else {
            draft.program = with_entry_point(&draft.program, rules.function_rule)?;
            if rules.seeding {
                draft.program = cleaned(&draft.program).ok_or("it does not parse")?;
            }
            if !composites.is_empty() {
                if !calls_composites(&draft.program, composites.len()) {
                    return Err("it does not call every given function, or defines one anew".to_owned());
                }
                draft.program = format!("{}\n\n{}", composites.join("\n\n"), draft.program);
            }
        }
        Ok(draft)
    });
    ReadProposal { format_ok: format_ok || rules.seeding, draft }
}

/// Reads a solver's answer.
pub fn answer(format: Format, kind: TaskKind, pieces: &[Piece], finished: bool) -> ReadAnswer {
    match format {
        Format::Compact => match pieces {
            [Piece::Text(text), rest @ ..] => ReadAnswer {
                format_ok: finished && rest == [Piece::Special("<|end|>")],
                answer: Some(text.trim().to_owned()).filter(|t| !t.is_empty()),
            },
            _ => ReadAnswer { format_ok: false, answer: None },
        },
        Format::Azr => {
            let text = plain(pieces);
            let part = answer_part(&text);
            let fences = fences(part);
            let last = |tags: &[&str]| fences.iter().rev().find(|f| tags.contains(&f.tag.as_str()));
            let found = match kind {
                TaskKind::Induction => last(CODE_TAGS).map(|f| f.body.clone()),
                TaskKind::Abduction => {
                    Some(last(&["input"]).map_or_else(|| loose(part, "# Input:"), |f| f.body.clone()))
                }
                _ => Some(last(&["output"]).map_or_else(|| loose(part, "# Output:"), |f| f.body.clone())),
            };
            let answer = found.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
            let has_code = kind != TaskKind::Induction || answer.is_some();
            ReadAnswer { format_ok: thought_and_answered(&text) && has_code, answer }
        }
    }
}

/// Whether an answer to an error task names the exception, its message and letter case aside.
pub fn names_error(gold: &str, answer: &str) -> bool {
    let word = answer.split_whitespace().next().unwrap_or("");
    word.split(':').next().unwrap_or("").eq_ignore_ascii_case(gold)
}

type Parts = Result<(String, Vec<String>, String), String>;

fn compact_proposal(kind: TaskKind, pieces: &[Piece], finished: bool) -> (bool, Parts) {
    let mut texts: Vec<(&str, &str)> = Vec::new();
    let mut mark = "";
    for piece in pieces {
        match piece {
            Piece::Text(text) => texts.push((mark, text)),
            Piece::Special(name) => mark = name,
        }
    }
    let ended = finished && mark == "<|end|>" && pieces.last() == Some(&Piece::Special("<|end|>"));
    let empty = || (String::new(), Vec::new(), String::new());
    if !ended {
        return (false, Err("it does not end as a proposal does".to_owned()));
    }
    let mut parts = empty();
    let (format_ok, parts) = if kind == TaskKind::Induction {
        let (inputs, message): (Vec<_>, Vec<_>) = texts.iter().partition(|(mark, _)| *mark != "<|message|>");
        parts.1 = inputs.iter().rev().take(NUM_INDUCTION_INPUTS).rev().map(|(_, t)| t.trim().to_owned()).collect();
        parts.2 = message.iter().map(|(_, t)| t.trim()).collect();
        let good = inputs.len() >= NUM_INDUCTION_INPUTS && message.len() == 1 && !parts.2.is_empty();
        (good, good.then_some(parts).ok_or("it has too few inputs or no message"))
    } else {
        match texts.as_slice() {
            [("", program), ("<|input|>", input)] if pieces.len() == 4 => {
                parts.0 = (*program).to_owned();
                parts.1 = vec![input.trim().to_owned()];
                (true, Ok(parts))
            }
            _ => (false, Err("it is not a program and an input")),
        }
    };
    (format_ok, parts.map_err(str::to_owned))
}

fn azr_proposal(kind: TaskKind, text: &str, rules: Rules) -> (bool, Parts) {
    let format_ok = thought_and_answered(text);
    let part = if rules.seeding { text } else { answer_part(text) };
    let fences = fences(part);
    let bodies = |tag: &'static str| fences.iter().filter(move |f| f.tag == tag).map(|f| f.body.trim().to_owned());
    if kind == TaskKind::Induction {
        let inputs: Vec<String> = bodies("input").collect();
        let message = bodies("message").next().unwrap_or_default();
        if inputs.len() < NUM_INDUCTION_INPUTS || message.is_empty() {
            let reason = format!("it has {} inputs, or no message", inputs.len());
            return (format_ok, Err(reason));
        }
        let inputs = inputs[inputs.len() - NUM_INDUCTION_INPUTS..].to_vec();
        return (format_ok, Ok((String::new(), inputs, message)));
    }
    let program = fences.iter().find(|f| CODE_TAGS.contains(&f.tag.as_str()));
    let Some(program) = program else { return (format_ok, Err("it has no program".to_owned())) };
    let input = bodies("input").next().unwrap_or_else(|| loose_line(part, "# Input:").unwrap_or_default());
    if input.is_empty() {
        return (format_ok, Err("it has no input".to_owned()));
    }
    (format_ok, Ok((program.body.trim_matches('\n').to_owned(), vec![input], String::new())))
}

fn plain(pieces: &[Piece]) -> String {
    pieces
        .iter()
        .map(|p| match p {
            Piece::Text(text) => text.as_str(),
            Piece::Special(name) => name,
        })
        .collect()
}

/// `<think>..</think>` (opened by the prompt), space, `<answer>..</answer>`, and then anything.
fn thought_and_answered(text: &str) -> bool {
    text.match_indices("</think>").any(|(at, tag)| {
        let rest = text[at + tag.len()..].trim_start();
        rest.strip_prefix("<answer>").is_some_and(|a| a.contains("</answer>"))
    })
}

/// Text after the last `<answer>` up to its end.
fn answer_part(text: &str) -> &str {
    let Some(at) = text.rfind("<answer>") else { return "" };
    let rest = &text[at + "<answer>".len()..];
    rest.find("</answer>").map_or(rest, |end| &rest[..end])
}

const CODE_TAGS: &[&str] = &["python", "py", "python3", ""];

struct Fence {
    tag: String,
    body: String,
}

/// Fenced blocks in order: tag in lower case, and what stands between it and the closing fence.
fn fences(text: &str) -> Vec<Fence> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("```") {
        let after = &rest[at + 3..];
        let tag_len = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
        let (tag, body) = after.split_at(tag_len);
        let Some(end) = body.find("```") else { break };
        found.push(Fence { tag: tag.to_lowercase(), body: body[..end].trim_start_matches([' ', '\r']).to_owned() });
        rest = &body[end + 3..];
    }
    found
}

fn loose_line(text: &str, label: &str) -> Option<String> {
    let rest = &text[text.find(label)? + label.len()..];
    Some(rest.trim().lines().next().unwrap_or("").trim().to_owned())
}

/// What stands after a label, else the whole text.
fn loose(text: &str, label: &str) -> String {
    loose_line(text, label).unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { function_rule: FunctionRule::Any, seeding: false };

    fn azr(text: &str) -> Vec<Piece> {
        vec![Piece::Text(text.to_owned())]
    }

    fn propose(kind: TaskKind, text: &str) -> ReadProposal {
        let task = Task::identity(kind);
        proposal(Format::Azr, kind, &azr(text), true, Some(&task), &[], RULES)
    }

    #[test]
    fn the_format_needs_a_closed_thought_right_before_a_closed_answer() {
        for (text, ok) in [
            (" t</think> <answer>a</answer> more", true),
            ("t</think></think>\n<answer>a</answer>", true),
            ("t</think> so <answer>a</answer>", false),
            ("t</think><answer>a", false),
            ("<answer>a</answer>", false),
        ] {
            assert_eq!(answer(Format::Azr, TaskKind::Deduction, &azr(text), true).format_ok, ok, "{text}");
        }
    }

    #[test]
    fn proposers_give_their_first_fences_and_solvers_their_last() {
        let two = "x</think><answer>```python\ndef f(x):\n    return 1\n```\n```input\n1\n```\n\
                   ```python\ndef f(x):\n    return 2\n```\n```input\n2\n```</answer>";
        let draft = propose(TaskKind::Deduction, two).draft.expect("a draft");
        assert_eq!(
            (draft.program.as_str(), draft.inputs.as_slice()),
            ("def f(x):\n    return 1", &["1".to_owned()][..])
        );
        let read = |kind| answer(Format::Azr, kind, &azr(two), true).answer;
        assert_eq!(read(TaskKind::Abduction).as_deref(), Some("2"));
        assert_eq!(read(TaskKind::Induction).as_deref(), Some("def f(x):\n    return 2"));
    }

    #[test]
    fn only_the_last_answer_counts_and_a_second_assistant_is_text() {
        let text =
            "Assistant: a</think><answer>```output\n1\n```</answer> Assistant: <answer>```output\n2\n```</answer>";
        assert_eq!(answer(Format::Azr, TaskKind::Deduction, &azr(text), true).answer.as_deref(), Some("2"));
        assert_eq!(
            answer(Format::Azr, TaskKind::Deduction, &azr("</think><answer> 7 </answer>"), true).answer.as_deref(),
            Some("7")
        );
    }

    #[test]
    fn an_input_fence_before_the_program_is_no_program() {
        let text = "x</think><answer>```input\n1\n```\n```python3\ndef f(x):\n    return 1\n```</answer>";
        let draft = propose(TaskKind::Abduction, text).draft.expect("a draft");
        assert_eq!(draft.program, "def f(x):\n    return 1");
    }

    #[test]
    fn induction_keeps_the_last_ten_inputs() {
        let inputs: String = (0..12).map(|i| format!("```input\n{i}\n```\n")).collect();
        let text = format!("x</think><answer>{inputs}```message\nAdds.\n```</answer>");
        let draft = propose(TaskKind::Induction, &text).draft.expect("a draft");
        assert_eq!((draft.inputs.len(), draft.inputs[0].as_str(), draft.message.as_str()), (10, "2", "Adds."));
        let few = text.replacen("```input", "```other", 3);
        assert!(propose(TaskKind::Induction, &few).draft.is_err());
    }

    #[test]
    fn a_draft_may_be_good_where_the_format_is_bad() {
        let read =
            propose(TaskKind::Deduction, "<answer>```python\ndef f(x):\n    return 1\n```\n```input\n1\n```</answer>");
        assert!(!read.format_ok && read.draft.is_ok());
    }

    #[test]
    fn what_follows_the_answer_is_no_fault_of_a_proposal_or_an_answer() {
        let text = "x</think> <answer>```python\ndef f(x):\n    return x\n```\n```input\n1\n```\n```output\n1\n```</answer> and so on";
        let read = proposal(Format::Azr, TaskKind::Deduction, &azr(text), false, None, &[], RULES);
        assert!(read.format_ok && read.draft.is_ok());
        assert!(answer(Format::Azr, TaskKind::Deduction, &azr(text), false).format_ok);
    }

    #[test]
    fn compact_pieces_become_drafts_and_answers() {
        let text = |t: &str| Piece::Text(t.to_owned());
        let good = [text("def f(x):\n    return x"), Piece::Special("<|input|>"), text("1"), Piece::Special("<|end|>")];
        let read = |pieces: &[Piece], finished| {
            proposal(Format::Compact, TaskKind::Deduction, pieces, finished, None, &[], RULES)
        };
        assert!(read(&good, true).format_ok && read(&good, true).draft.is_ok());
        assert!(!read(&good[..3], false).format_ok && read(&good[..3], false).draft.is_err());
        assert!(read(&good[2..], true).draft.is_err());
        let reply = |pieces: &[Piece]| answer(Format::Compact, TaskKind::Deduction, pieces, true);
        assert_eq!(reply(&good[2..]).answer.as_deref(), Some("1"));
        assert!(reply(&good[2..]).format_ok && !reply(&good[..2]).format_ok && !reply(&[]).format_ok);
    }

    #[test]
    fn errors_are_named_by_class() {
        assert!(names_error("ValueError", "valueerror: bad x") && names_error("NoError", " NoError\n"));
        assert!(!names_error("ValueError", "") && !names_error("ValueError", "an ValueError"));
    }

    #[test]
    fn composites_are_put_before_the_program() {
        let composites = ["def g_0(x):\n    return x + 1".to_owned()];
        let read = |program: &str| {
            let text = format!("x</think><answer>```python\n{program}\n```\n```input\n1\n```</answer>");
            proposal(Format::Azr, TaskKind::Deduction, &azr(&text), true, None, &composites, RULES).draft
        };
        let draft = read("def f(x):\n    return g_0(x) * 2").expect("calls g_0");
        assert!(draft.program.starts_with("def g_0") && draft.num_composites == 1);
        assert!(read("def f(x):\n    return x").is_err());
    }
}
