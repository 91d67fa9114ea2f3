//! How a question is put to a model, and how its answer is read back: prompt templates as named presets.
//!
//! Each exists with thinking and, as `-direct`, without: there the prompt already begins the answer, with the fence or box
//! that the answer stands in. Not here: what is right (`grade`), and more than one prompt for a question (`protocol`).

use azr_tokenizer::Tokenizer;

use super::math::{boxed, final_answer, marked_answer};
use super::suites::{Code, Question};
use super::words::yes_or_no;
use crate::error::{Error, Result};
use crate::selfplay::parse;
use crate::selfplay::prompt::{self, Format, Piece, SPECIAL_TOKENS};
use crate::selfplay::task::TaskKind;

/// What stands around a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// The conversation of self-play.
    Azr,
    /// Qwen's turns.
    ChatMl,
    /// Llama 3's turns.
    Llama3,
    /// `Question:` and `Answer:`, for base models.
    Plain,
}

/// A prompt template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// Special tokens, for the embedded model: tasks of self-play only.
    Compact,
    /// English.
    Text {
        /// What stands around the question.
        frame: Frame,
        /// Whether the model reasons before it answers.
        thinks: bool,
    },
}

/// A prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What the model reads.
    pub pieces: Vec<Piece>,
    /// The beginning of the answer that the prompt ends with.
    pub opened: String,
}

const THINK_FIRST: &str = "\n\nReason step by step first. Then give the answer between <answer> and </answer>.";
const ANSWER_ONLY: &str = "\n\nGive the answer alone, between <answer> and </answer>.";

impl Template {
    /// Names of the presets; `auto` is compact where the tokenizer has its special tokens, else azr.
    pub const NAMES: [&'static str; 8] =
        ["auto", "compact", "azr", "azr-direct", "chat", "chat-direct", "plain", "plain-direct"];

    /// The preset of a name, for a model with this tokenizer.
    ///
    /// # Errors
    /// When the name is unknown or the tokenizer lacks its special tokens.
    pub fn named(name: &str, tokenizer: &Tokenizer) -> Result<Template> {
        let has = |tokens: &[&str]| tokens.iter().all(|t| tokenizer.token_id(t).is_some());
        let (base, thinks) = name.strip_suffix("-direct").map_or((name, true), |base| (base, false));
        let frame = match base {
            "auto" | "compact" if has(&SPECIAL_TOKENS) => return Ok(Template::Compact),
            "auto" | "azr" => Frame::Azr,
            "plain" => Frame::Plain,
            "chat" if has(&["<|im_start|>", "<|im_end|>"]) => Frame::ChatMl,
            "chat" if has(&["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]) => Frame::Llama3,
            "chat" | "compact" => {
                return Err(Error::config(format!("the tokenizer lacks the special tokens of the template {base}"))
                    .with_hint("use --template azr or --template plain"));
            }
            _ => return Err(Error::usage(format!("there is no template {name}"))),
        };
        Ok(Template::Text { frame, thinks })
    }

    /// The prompt of a question, with text from earlier turns after it.
    pub fn prompt(self, question: &Question, after: &str) -> Prompt {
        match (self, question) {
            (Template::Compact, Question::Task(task)) => {
                Prompt { pieces: prompt::solver(Format::Compact, task), opened: String::new() }
            }
            (Template::Compact, _) => {
                Prompt { pieces: vec![Piece::Text(question_text(question))], opened: String::new() }
            }
            (Template::Text { thinks, .. }, _) => {
                let opened = if thinks { String::new() } else { opening(question) };
                self.framed(&format!("{}{after}", question_text(question)), opened)
            }
        }
    }

    /// A text in the template's frame; the answer begins with `opened`.
    pub fn framed(self, text: &str, opened: String) -> Prompt {
        let Template::Text { frame, thinks } = self else {
            return Prompt { pieces: vec![Piece::Text(text.to_owned())], opened };
        };
        let owned = Piece::Text;
        let rule = if thinks { THINK_FIRST } else { ANSWER_ONLY };
        let begun = if thinks { String::new() } else { format!("<answer>{opened}") };
        let pieces = match frame {
            Frame::Azr if thinks => vec![owned(prompt::framed(text))],
            Frame::Azr => vec![owned(format!("{} </think> <answer>{opened}", prompt::framed(text)))],
            Frame::ChatMl => vec![
                Piece::Special("<|im_start|>"),
                owned(format!("user\n{text}{rule}")),
                Piece::Special("<|im_end|>"),
                owned("\n".to_owned()),
                Piece::Special("<|im_start|>"),
                owned(format!("assistant\n{begun}")),
            ],
            Frame::Llama3 => vec![
                Piece::Special("<|start_header_id|>"),
                owned("user".to_owned()),
                Piece::Special("<|end_header_id|>"),
                owned(format!("\n\n{text}{rule}")),
                Piece::Special("<|eot_id|>"),
                Piece::Special("<|start_header_id|>"),
                owned("assistant".to_owned()),
                Piece::Special("<|end_header_id|>"),
                owned(format!("\n\n{begun}")),
            ],
            Frame::Plain if thinks => vec![owned(format!("Question: {text}\n\nAnswer: Let us think step by step."))],
            Frame::Plain => vec![owned(format!("Question: {text}\n\nAnswer: {opened}"))],
        };
        Prompt { pieces, opened }
    }

    /// The answer in a completion, or none.
    pub fn read(self, question: &Question, opened: &str, completion: &[Piece], finished: bool) -> Option<String> {
        if self == Template::Compact {
            let kind = if let Question::Task(task) = question { task.kind } else { TaskKind::Deduction };
            let read = parse::answer(Format::Compact, kind, completion, finished);
            return read.answer.filter(|_| read.format_ok);
        }
        let text = format!("{opened}{}", words_of(completion));
        if self.thinks() && !finished && !text.contains("<answer>") {
            return None;
        }
        answer_of(question, self.answer_part(&text))
    }

    fn thinks(self) -> bool {
        matches!(self, Template::Text { thinks: true, .. })
    }

    /// What stands after the thought, inside the answer's tags where there are any.
    fn answer_part(self, text: &str) -> &str {
        let part = text.rsplit_once("</think>").map_or(text, |(_, after)| after);
        let part = part.rsplit_once("<answer>").map_or(part, |(_, after)| after);
        let part = part.split("</answer>").next().unwrap_or("");
        // A base model goes on with questions of its own.
        part.split("\nQuestion:").next().unwrap_or("")
    }
}

/// Completion as text.
pub fn words_of(pieces: &[Piece]) -> String {
    let words = pieces.iter().map(|p| match p {
        Piece::Text(text) => text.as_str(),
        Piece::Special(name) => name,
    });
    words.collect()
}

/// The question as a person would put it.
pub fn question_text(question: &Question) -> String {
    match question {
        Question::Task(task) => prompt::solver_text(task),
        Question::Code(Code { text, stub, .. }) => {
            let text = if text.is_empty() { "Complete this Python program." } else { text };
            let stub = if stub.is_empty() { String::new() } else { format!("\n```python\n{stub}\n```") };
            format!("{text}{stub}\nGive the whole program in a block that starts with ```python and ends with ```.")
        }
        Question::Math { problem, .. } => format!("{problem}\n\nPut the final answer into \\boxed{{}}."),
        Question::YesNo { question, .. } => format!("{question}\n\nAnswer yes or no."),
        Question::Spans { passage, question, .. } => format!(
            "{passage}\n\n{question}\n\nAnswer as briefly as possible: a number, a date, or words of the passage."
        ),
        Question::Open(text) => text.clone(),
    }
}

/// How an answer without thinking begins.
fn opening(question: &Question) -> String {
    match question {
        Question::Task(task) => match task.kind {
            TaskKind::Abduction => "```input\n".to_owned(),
            TaskKind::Induction => "```python\n".to_owned(),
            _ => "```output\n".to_owned(),
        },
        Question::Code(code) => format!("```python\n{}", code.stub),
        Question::Math { .. } => "\\boxed{".to_owned(),
        _ => String::new(),
    }
}

fn answer_of(question: &Question, part: &str) -> Option<String> {
    let trimmed = || Some(part.trim().to_owned()).filter(|t| !t.is_empty());
    match question {
        Question::Task(task) => fenced(task.kind, part),
        Question::Code(_) => last_program(part).or_else(|| trimmed().filter(|t| t.contains("return"))),
        Question::Math { .. } => final_answer(part),
        Question::YesNo { .. } => {
            let said = marked_answer(part).and_then(|a| yes_or_no(&a)).or_else(|| yes_or_no(part))?;
            Some(if said { "yes" } else { "no" }.to_owned())
        }
        Question::Spans { .. } => marked_answer(part).or_else(|| Some(trimmed()?.lines().next()?.to_owned())),
        Question::Open(_) => boxed(part).map(str::to_owned).or_else(trimmed),
    }
}

/// What self-play's reader finds in an answer, whose last fence may be open.
fn fenced(kind: TaskKind, part: &str) -> Option<String> {
    let open = part.matches("```").count() % 2 == 1;
    let whole = format!("<answer>{part}{}</answer>", if open { "\n```" } else { "" });
    parse::answer(Format::Azr, kind, &[Piece::Text(whole)], true).answer
}

/// The last fence with a program, which may be open, with its indentation: a completion begins inside a function.
fn last_program(part: &str) -> Option<String> {
    let blocks: Vec<&str> = part.split("```").skip(1).step_by(2).collect();
    let program = |block: &&str| {
        let (tag, body) = block.split_once('\n')?;
        let body = body.trim_end().trim_start_matches(['\n', '\r']);
        (["", "python", "py", "python3"].contains(&tag.trim()) && !body.is_empty()).then(|| body.to_owned())
    };
    blocks.iter().rev().find_map(program)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selfplay::task::Task;

    const AZR: Template = Template::Text { frame: Frame::Azr, thinks: true };
    const DIRECT: Template = Template::Text { frame: Frame::Azr, thinks: false };
    const PLAIN: Template = Template::Text { frame: Frame::Plain, thinks: false };

    fn math() -> Question {
        Question::Math { problem: "1 + 1?".into(), golds: vec!["2".into()], tolerance: None }
    }

    fn read(template: Template, question: &Question, text: &str) -> Option<String> {
        let opened = template.prompt(question, "").opened;
        template.read(question, &opened, &[Piece::Text(text.to_owned())], true)
    }

    #[test]
    fn answers_are_read_where_each_template_has_them() {
        let code = |stub: &str| {
            let (text, setup) = (String::new(), String::new());
            Question::Code(Code { text, stub: stub.into(), entry: "g".into(), setup, tests: vec![], visible: vec![] })
        };
        let task = |kind| Question::Task(Task::identity(kind));
        for (template, question, text, answer) in [
            (AZR, math(), "1 + 1 is \\boxed{3}? no </think> <answer>\\boxed{2}</answer>", Some("2")),
            (AZR, math(), "so it is 2", Some("2")),
            (DIRECT, math(), "2}</answer> \\boxed{3}", Some("2")),
            (PLAIN, math(), "2}\n\nQuestion: 1 + 2?\n\nAnswer: \\boxed{3}", Some("2")),
            (AZR, task(TaskKind::Deduction), "</think> <answer>```output\n[1]\n```</answer>", Some("[1]")),
            (DIRECT, task(TaskKind::Deduction), "[1]\n```</answer>", Some("[1]")),
            (DIRECT, task(TaskKind::Abduction), "'a', 1", Some("'a', 1")),
            (DIRECT, code("def g(x):\n"), "    return x\n```\nrest", Some("def g(x):\n    return x")),
            (
                AZR,
                code(""),
                "</think><answer>```python\ndef g(x):\n    return x\n```</answer>",
                Some("def g(x):\n    return x"),
            ),
            (AZR, code(""), "</think><answer>I cannot.</answer>", None),
            (
                AZR,
                Question::YesNo { question: "?".into(), gold: true },
                "x</think><answer>The answer is yes</answer>",
                Some("yes"),
            ),
            (AZR, Question::YesNo { question: "?".into(), gold: true }, "x</think><answer>maybe</answer>", None),
            (PLAIN, Question::Open("?".into()), " Paris\nQuestion: ?", Some("Paris")),
        ] {
            assert_eq!(read(template, &question, text).as_deref(), answer, "{template:?} {text}");
        }
        // A thought that was cut off has no answer, whatever numbers are in it.
        assert_eq!(AZR.read(&math(), "", &[Piece::Text("first 2, then".into())], false), None);
    }

    #[test]
    fn compact_answers_keep_to_the_format() {
        let question = Question::Task(Task::identity(TaskKind::Deduction));
        let text = || Piece::Text("'a'".into());
        let read = |pieces: &[Piece]| Template::Compact.read(&question, "", pieces, true);
        assert_eq!(read(&[text(), Piece::Special("<|end|>")]).as_deref(), Some("'a'"));
        assert_eq!(read(&[text(), Piece::Special("<|code|>")]), None);
    }

    #[test]
    fn presets_exist_for_the_tokenizers_that_have_their_tokens() {
        let embedded = Tokenizer::embedded();
        for name in Template::NAMES {
            assert_eq!(Template::named(name, &embedded).is_ok(), !name.starts_with("chat"), "{name}");
        }
        assert_eq!(Template::named("auto", &embedded).expect("compact"), Template::Compact);
        assert!(Template::named("haiku", &embedded).is_err());
    }

    #[test]
    fn a_direct_prompt_ends_as_its_answer_begins() {
        for template in [DIRECT, PLAIN] {
            let prompt = template.prompt(&math(), "");
            assert!(words_of(&prompt.pieces).ends_with(&prompt.opened) && prompt.opened == "\\boxed{");
        }
        assert!(words_of(&AZR.prompt(&math(), " more").pieces).contains("boxed{}. more"));
    }
}
