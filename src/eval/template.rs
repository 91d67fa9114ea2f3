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
        // A base model goes on when it has answered.
        let plain = matches!(self, Template::Text { frame: Frame::Plain, .. });
        let goes_on = plain && (text.contains(NEXT_QUESTION) || boxed(&text).is_some());
        if self.thinks() && !finished && !goes_on && !text.contains("<answer>") {
            return None;
        }
        answer_of(question, self.answer_part(&text))
    }

    /// Special tokens that end a turn of its chat.
    pub fn turn_ends(self) -> &'static [&'static str] {
        match self {
            Template::Text { frame: Frame::ChatMl, .. } => &["<|im_end|>"],
            Template::Text { frame: Frame::Llama3, .. } => &["<|eot_id|>"],
            _ => &[],
        }
    }

    fn thinks(self) -> bool {
        matches!(self, Template::Text { thinks: true, .. })
    }

    /// What stands after the thought, inside the answer's tags where there are any.
    fn answer_part(self, text: &str) -> &str {
        // Where the prompt has opened the answer, it ends at the first mark; what comes then is of another turn.
        let text = if self.thinks() { text } else { text.split("</answer>").next().unwrap_or("") };
        let part = text.rsplit_once("</think>").map_or(text, |(_, after)| after);
        let part = part.rsplit_once("<answer>").map_or(part, |(_, after)| after);
        let part = part.split("</answer>").next().unwrap_or("");
        part.split(NEXT_QUESTION).next().unwrap_or("")
    }
}

/// How a base model goes on with questions of its own.
const NEXT_QUESTION: &str = "\nQuestion:";

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
        Question::Code(code) => last_program(part, &code.entry).or_else(|| trimmed().filter(|t| t.contains("return"))),
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

/// The program among the fences: the last that defines the function asked for, else the last that says that it is Python,
/// else the last; examples and what they print may come after it. It may be open, and keeps its indentation: a completion
/// begins inside a function.
fn last_program(part: &str, entry: &str) -> Option<String> {
    let block = |block: &str| {
        let (tag, body) = block.split_once('\n')?;
        let body = body.trim_end().trim_start_matches(['\n', '\r']);
        (["", "python", "py", "python3"].contains(&tag.trim()) && !body.is_empty())
            .then(|| (!tag.trim().is_empty(), body.to_owned()))
    };
    let blocks: Vec<(bool, String)> = part.split("```").skip(1).step_by(2).filter_map(block).collect();
    let defines = |body: &str| body.contains(&format!("def {entry}("));
    let last = |wanted: &dyn Fn(&(bool, String)) -> bool| blocks.iter().rev().find(|b| wanted(b));
    let found = last(&|b| defines(&b.1)).or_else(|| last(&|b| b.0)).or_else(|| last(&|_| true))?;
    Some(found.1.clone())
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
                code(""),
                "</think><answer>```python\ndef g(x):\n    return x\n```\nExample:\n```python\nprint(g(1))\n```\nOutput:\n```\n1\n```</answer>",
                Some("def g(x):\n    return x"),
            ),
            (DIRECT, math(), "2}</answer>\nUser: and 3?</think> <answer>\\boxed{3}</answer>", Some("2")),
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
        // A base model that has answered and goes on until it is cut off.
        let plain = Template::Text { frame: Frame::Plain, thinks: true };
        let cut = |text: &str| plain.read(&math(), "", &[Piece::Text(text.to_owned())], false);
        assert_eq!(cut(" 1 + 1 is \\boxed{2}.\n\nQuestion: 2 + 3 is \\boxed{5}, and").as_deref(), Some("2"));
        assert_eq!(cut(" The answer is 2.\nQuestion: What").as_deref(), Some("2"));
        assert_eq!(cut(" first 2, then"), None);
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
