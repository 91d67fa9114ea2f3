//! Suites of questions, read from files in their public formats. Nothing is downloaded.
//!
//! A file holds JSON lines, one JSON array, or (DROP as published) one JSON object of passages. A record's format is
//! recognised from its fields. Not here: how a question is put to a model (`template`) and graded (`grade`).

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use crate::exec::json::from_python;
use crate::exec::source::rename;
use crate::exec::value::Value;
use crate::selfplay::task::{Pair, Task, TaskKind};

/// A program to write, and how it is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Code {
    /// What to write, in words; empty where the stub says it.
    pub text: String,
    /// Beginning of the program that a completion goes on from (HumanEval), or empty.
    pub stub: String,
    /// Function that the tests call.
    pub entry: String,
    /// Source that stands before the answer.
    pub setup: String,
    /// Sources that must run without an exception, each in a fresh module after the answer.
    pub tests: Vec<String>,
    /// Cases that the question shows: expression, and value where the question gives it as one.
    pub visible: Vec<(String, Option<String>)>,
}

/// What is asked, and what is right.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// A task of self-play: predict an output or an input, or find the program.
    Task(Task),
    /// A program.
    Code(Code),
    /// A number, formula or short text; any of the golds is right.
    Math {
        /// The problem.
        problem: String,
        /// Right answers.
        golds: Vec<String>,
        /// Largest absolute error, where the suite names one.
        tolerance: Option<f64>,
    },
    /// Yes or no.
    YesNo {
        /// The question.
        question: String,
        /// What is right.
        gold: bool,
    },
    /// Words of a passage, numbers or dates.
    Spans {
        /// The passage.
        passage: String,
        /// The question.
        question: String,
        /// Right answers, each of one or more spans.
        golds: Vec<Vec<String>>,
    },
    /// A question without a known answer.
    Open(String),
}

/// One question of a suite.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Name of the suite.
    pub suite: String,
    /// Id in the suite.
    pub id: String,
    /// The question.
    pub question: Question,
}

/// A record's layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// CRUXEval: `code`, `input`, `output`. Two questions each: `-i` asks for the input, `-o` for the output.
    Cruxeval,
    /// LiveCodeBench execution: `code`, `input` (a call), `output`, `function_name`.
    Livecodebench,
    /// HumanEval, HumanEval+ of EvalPlus (`base_input`, `plus_input`) and as a data set (`test`).
    Humaneval,
    /// MBPP, its sanitised form, and MBPP+ as a data set (`test`).
    Mbpp,
    /// GSM8K: `question`, `answer` ending in `#### gold`.
    Gsm8k,
    /// MATH, MATH-500, AMC, AIME, Minerva, OlympiadBench: a problem with an answer, or a solution that boxes it.
    Math,
    /// StrategyQA: `question`, Boolean `answer`.
    Strategyqa,
    /// DROP as published, or one line per question.
    Drop,
    /// A task as self-play stores it: `kind`, `program`, `pairs`.
    Azr,
}

impl Format {
    /// Formats by name.
    pub const NAMED: [(&'static str, Format); 9] = [
        ("cruxeval", Format::Cruxeval),
        ("livecodebench", Format::Livecodebench),
        ("humaneval", Format::Humaneval),
        ("mbpp", Format::Mbpp),
        ("gsm8k", Format::Gsm8k),
        ("math", Format::Math),
        ("strategyqa", Format::Strategyqa),
        ("drop", Format::Drop),
        ("azr", Format::Azr),
    ];

    /// The format that a record's fields tell.
    pub fn of(record: &Map<String, Json>) -> Option<Format> {
        let has = |names: &[&str]| names.iter().all(|n| record.contains_key(*n));
        let problem = field(record, &PROBLEM).is_some();
        Some(if has(&["kind", "program", "pairs"]) {
            Format::Azr
        } else if has(&["code", "input", "output", "function_name"]) || has(&["code", "input", "output", "numsteps"]) {
            Format::Livecodebench
        } else if has(&["code", "input", "output"]) {
            Format::Cruxeval
        } else if has(&["prompt", "entry_point"]) {
            Format::Humaneval
        } else if has(&["test_list"]) {
            Format::Mbpp
        } else if has(&["passage"]) {
            Format::Drop
        } else if problem && record.get("answer").is_some_and(Json::is_boolean) {
            Format::Strategyqa
        } else if problem && record.get("answer").and_then(Json::as_str).is_some_and(|a| a.contains("####")) {
            Format::Gsm8k
        } else if problem && (field(record, &ANSWER).is_some() || has(&["solution"])) {
            Format::Math
        } else {
            return None;
        })
    }
}

const PROBLEM: [&str; 4] = ["problem", "question", "Problem", "Question"];
const ANSWER: [&str; 3] = ["final_answer", "answer", "Answer"];
const ID: [&str; 9] = ["id", "task_id", "unique_id", "question_id", "qid", "query_id", "ID", "url", "problem_id"];

/// Reads files. Suites are called as their files are, with the folder's name before where two are called alike.
///
/// # Errors
/// As [`read`]; and when two suites have one name all the same.
pub fn read_all(paths: &[&Path], format: Option<Format>, limit: Option<usize>) -> Result<Vec<Item>> {
    let stem = |p: &Path| p.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let folder =
        |p: &Path| p.parent().and_then(Path::file_name).map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let alike = |p: &Path| paths.iter().filter(|q| stem(q) == stem(p)).count() > 1;
    let mut names: Vec<String> = Vec::new();
    let mut items = Vec::new();
    for path in paths {
        let name = if alike(path) { format!("{}-{}", folder(path), stem(path)) } else { stem(path) };
        if names.contains(&name) {
            return Err(
                Error::usage(format!("two suites are called {name}")).with_hint("give one of the files another name")
            );
        }
        items.extend(read(path, &name, format, limit)?);
        names.push(name);
    }
    Ok(items)
}

/// Reads a file; questions carry `name` as suite. `limit` keeps the first so many of each suite.
///
/// # Errors
/// When the file cannot be read, or a record is not what its format has.
fn read(path: &Path, name: &str, format: Option<Format>, limit: Option<usize>) -> Result<Vec<Item>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let items = parse(&text, name, format).map_err(|what| {
        Error::config(format!("{}: {what}", path.display()))
            .with_hint("suites are JSON lines in their public formats; name one with --format, see azr eval --help")
    })?;
    if items.is_empty() {
        return Err(Error::config(format!("{} holds no question", path.display())));
    }
    let mut counts = std::collections::BTreeMap::new();
    Ok(items
        .into_iter()
        .filter(|i| {
            let count: &mut usize = counts.entry(i.suite.clone()).or_default();
            *count += 1;
            limit.is_none_or(|l| *count <= l)
        })
        .collect())
}

/// One question: a record of any format, a task without the part that is asked for (`code` with `input` or `output`, or
/// `inputs` with `outputs`), or words.
///
/// # Errors
/// When it is a record that no format has.
pub fn read_question(text: &str) -> Result<Question, String> {
    let Ok(Json::Object(mut map)) = from_python(text.trim()) else {
        return Ok(Question::Open(text.trim().to_owned()));
    };
    if let Some(program) = map.remove("program").filter(|_| !map.contains_key("pairs")) {
        map.insert("code".to_owned(), program);
    }
    let part = |name: &str| map.get(name).map(plain).unwrap_or_default();
    let (code, input, output) = (map.contains_key("code"), map.contains_key("input"), map.contains_key("output"));
    let kind = match (code, input, output) {
        (true, true, false) => TaskKind::Deduction,
        (true, false, true) => TaskKind::Abduction,
        _ if map.contains_key("inputs") => TaskKind::Induction,
        _ => {
            let found = parse(&Json::Object(map).to_string(), "", None)?;
            return found.into_iter().last().map(|i| i.question).ok_or("it holds no question".to_owned());
        }
    };
    let mut pairs = vec![Pair { input: part("input"), output: part("output") }];
    if kind == TaskKind::Induction {
        let list = |name: &str| map.get(name).and_then(Json::as_array).cloned().unwrap_or_default();
        let (inputs, outputs) = (list("inputs"), list("outputs"));
        if inputs.is_empty() || inputs.len() != outputs.len() {
            return Err("`inputs` and `outputs` are lists of one length".to_owned());
        }
        pairs = inputs.iter().zip(&outputs).map(|(i, o)| Pair { input: plain(i), output: plain(o) }).collect();
        // A task shows the first half of its pairs.
        pairs.extend(pairs.clone());
    }
    let (program, message) = (part("code"), part("message"));
    Ok(Question::Task(Task { program, pairs, message, normal_form: String::new(), ..Task::identity(kind) }))
}

/// Questions of a text.
///
/// # Errors
/// Which record is wrong, and why.
pub fn parse(text: &str, suite: &str, format: Option<Format>) -> Result<Vec<Item>, String> {
    let mut items = Vec::new();
    for (number, record) in records(text)?.into_iter().enumerate() {
        let at = |what: String| format!("record {}: {what}", number + 1);
        let map = record.as_object().ok_or_else(|| at("no JSON object".to_owned()))?;
        let format = format.or_else(|| Format::of(map)).ok_or_else(|| {
            let names: Vec<&str> = map.keys().map(String::as_str).collect();
            at(format!("no known format has the fields {}", names.join(", ")))
        })?;
        let id = field(map, &ID).map_or_else(|| number.to_string(), plain);
        for (suffix, id, question) in questions(map, format, id).map_err(at)? {
            items.push(Item { suite: format!("{suite}{suffix}"), id, question });
        }
    }
    Ok(items)
}

fn records(text: &str) -> Result<Vec<Json>, String> {
    let lines = || text.lines().filter(|l| !l.trim().is_empty());
    if let Ok(records) = lines().map(from_python).collect::<Result<Vec<Json>, _>>()
        && records.iter().all(Json::is_object)
        && !(records.len() == 1 && is_passages(&records[0]))
    {
        return Ok(records);
    }
    match from_python(text) {
        Ok(Json::Array(records)) => Ok(records),
        Ok(Json::Object(map)) if is_passages(&Json::Object(map.clone())) => {
            Ok(map.into_iter().map(|(_, v)| v).collect())
        }
        Ok(record @ Json::Object(_)) => Ok(vec![record]),
        Ok(_) => Err("it holds neither records nor passages".to_owned()),
        Err(_) => {
            let bad = lines().enumerate().find_map(|(i, l)| from_python(l).err().map(|e| (i, e)));
            Err(bad.map_or_else(|| "no JSON".to_owned(), |(i, e)| format!("line {} is no JSON: {e}", i + 1)))
        }
    }
}

/// Whether an object holds passages by name, as DROP is published.
fn is_passages(json: &Json) -> bool {
    json.as_object().is_some_and(|m| !m.is_empty() && m.values().all(|v| v.get("qa_pairs").is_some()))
}

type Found = Vec<(&'static str, String, Question)>;

fn questions(map: &Map<String, Json>, format: Format, id: String) -> Result<Found, String> {
    let problem = || field(map, &PROBLEM).map(plain).ok_or("no problem or question");
    let question = match format {
        Format::Cruxeval => {
            let task = |kind| execution(map, kind).map(Question::Task);
            return Ok(vec![("-i", id.clone(), task(TaskKind::Abduction)?), ("-o", id, task(TaskKind::Deduction)?)]);
        }
        Format::Livecodebench => {
            let mut task = execution(map, TaskKind::Deduction)?;
            // The input is a call of the function.
            let name = text(map, "function_name").unwrap_or("f");
            let call = task.pairs[0].input.trim();
            if let Some(args) = call.strip_prefix(name).and_then(|r| r.trim().strip_prefix('(')?.strip_suffix(')')) {
                task.program = rename(&task.program, name, "f").unwrap_or(task.program);
                task.pairs[0].input = args.to_owned();
            }
            Question::Task(task)
        }
        Format::Humaneval => Question::Code(humaneval(map)?),
        Format::Mbpp => Question::Code(mbpp(map)?),
        Format::Gsm8k => {
            let answer = text(map, "answer").ok_or("no answer")?;
            let gold = answer.rsplit_once("####").ok_or("the answer has no ####")?.1.trim();
            Question::Math { problem: problem()?, golds: vec![gold.to_owned()], tolerance: None }
        }
        Format::Math => math(map, problem()?)?,
        Format::Strategyqa => {
            let gold = map.get("answer").and_then(|a| a.as_bool().or_else(|| super::words::yes_or_no(a.as_str()?)));
            Question::YesNo { question: problem()?, gold: gold.ok_or("the answer is neither yes nor no")? }
        }
        Format::Drop => return drop_questions(map, &id),
        Format::Azr => {
            let mut json = map.clone();
            for (name, value) in [("message", Json::from("")), ("step", 0.into()), ("normal_form", "".into())] {
                json.entry(name).or_insert(value);
            }
            json.entry("num_composites").or_insert(0.into());
            let task: Task = serde_json::from_value(Json::Object(json)).map_err(|e| format!("no task: {e}"))?;
            let least = if task.kind == TaskKind::Induction { 2 } else { 1 };
            if task.pairs.len() < least {
                return Err(format!("a task of {} needs {least} pairs", task.kind.name()));
            }
            Question::Task(task)
        }
    };
    Ok(vec![("", id, question)])
}

/// A task about one execution.
fn execution(map: &Map<String, Json>, kind: TaskKind) -> Result<Task, String> {
    let need = |name: &str| text(map, name).map(str::to_owned).ok_or(format!("no text `{name}`"));
    Ok(Task {
        program: need("code")?,
        pairs: vec![Pair { input: need("input")?, output: need("output")? }],
        normal_form: String::new(),
        ..Task::identity(kind)
    })
}

/// Stand-in for the few functions of numpy that the tests of the + suites use, which the executor has not.
const NUMPY: &str = "\
class np:
    float32 = float64 = float
    class ndarray: pass
    @staticmethod
    def allclose(a, b, rtol=1e-07, atol=1e-08):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(np.allclose(x, y, rtol, atol) for x, y in zip(a, b))
        return a == b or abs(a - b) <= atol + rtol * abs(b)
";

fn with_numpy(test: &str) -> String {
    test.replace("import numpy as np\n", NUMPY)
}

fn humaneval(map: &Map<String, Json>) -> Result<Code, String> {
    let stub = text(map, "prompt").ok_or("no prompt")?.to_owned();
    let entry = text(map, "entry_point").ok_or("no entry_point")?.to_owned();
    if !stub.contains(&format!("def {entry}")) {
        return Err(format!(
            "its prompt does not begin `{entry}`: EvalPlus's own MBPP+ is not read, as a data set it is"
        ));
    }
    let test = match (text(map, "test"), map.get("plus_input").or_else(|| map.get("base_input"))) {
        (_, Some(_)) => evalplus_test(map, &stub, &entry)?,
        (Some(test), None) => format!("{}\ncheck({entry})\n", with_numpy(test)),
        _ => return Err("neither test nor plus_input".to_owned()),
    };
    let visible = doctests(&stub);
    Ok(Code { text: String::new(), stub, entry, setup: String::new(), tests: vec![test], visible })
}

/// The test of an EvalPlus record: the answer must do on every input as the reference solution does.
fn evalplus_test(map: &Map<String, Json>, stub: &str, entry: &str) -> Result<String, String> {
    let solution = text(map, "canonical_solution").ok_or("no canonical_solution")?;
    let mut inputs = Vec::new();
    for name in ["base_input", "plus_input"] {
        for input in map.get(name).and_then(Json::as_array).into_iter().flatten() {
            inputs.push(Value::from_json(input).ok_or(format!("`{name}` holds what is no value"))?.repr());
        }
    }
    let reference = Value::Str(format!("{stub}{solution}")).repr();
    let atol = map.get("atol").and_then(Json::as_f64).unwrap_or(0.0);
    Ok(format!(
        "{NUMPY}\
import copy
_names = {{}}
exec({reference}, _names)
for _input in [{}]:
    _expected = _names['{entry}'](*copy.deepcopy(_input))
    _found = {entry}(*copy.deepcopy(_input))
    _list = _expected if isinstance(_expected, (list, tuple)) else [_expected]
    _atol = {atol:?} or (1e-06 if _list and all(isinstance(_x, float) for _x in _list) else 0)
    assert _found == _expected or _atol and np.allclose(_found, _expected, 1e-07, _atol)
",
        inputs.join(", ")
    ))
}

/// Examples `>>> expression` of a docstring with the value in the line after each.
fn doctests(stub: &str) -> Vec<(String, Option<String>)> {
    let lines: Vec<&str> = stub.lines().map(str::trim).collect();
    let example = |pair: &[&str]| {
        let expression = pair[0].strip_prefix(">>>")?.trim();
        Some((expression.to_owned(), Value::parse(pair[1]).ok().map(|v| v.repr())))
    };
    lines.windows(2).filter_map(example).collect()
}

fn mbpp(map: &Map<String, Json>) -> Result<Code, String> {
    let list = |name: &str| -> Vec<String> {
        let items = map.get(name).and_then(Json::as_array).into_iter().flatten();
        items.filter_map(Json::as_str).map(str::to_owned).collect()
    };
    let shown = list("test_list");
    let visible: Vec<(String, Option<String>)> = shown.iter().filter_map(|t| asserted(t)).collect();
    let entry = visible.iter().find_map(|(call, _)| function_of(call)).ok_or("no test calls a function")?;
    let mut tests = shown.clone();
    tests.extend(list("challenge_test_list"));
    tests.extend(text(map, "test").map(with_numpy));
    // What tests need is made of what the answer defines.
    if let Some(setup) = text(map, "test_setup_code").filter(|s| !s.is_empty()) {
        tests.iter_mut().for_each(|t| *t = format!("{setup}\n{t}"));
    }
    let words = text(map, "text").or_else(|| text(map, "prompt")).ok_or("no text or prompt")?;
    let words = format!("{words}\nThe program must pass these tests:\n```python\n{}\n```", shown.join("\n"));
    Ok(Code { text: words, stub: String::new(), entry, setup: list("test_imports").join("\n"), tests, visible })
}

/// The two sides of `assert left == right`.
fn asserted(test: &str) -> Option<(String, Option<String>)> {
    let claim = test.trim().strip_prefix("assert")?.trim();
    match claim.rsplit_once("==") {
        Some((call, value)) => Some((call.trim().to_owned(), Some(value.trim().to_owned()))),
        None => Some((claim.to_owned(), None)),
    }
}

/// The function that an expression calls first, builtins such as `set(..)` and `math.isclose(..)` around it aside.
fn function_of(expression: &str) -> Option<String> {
    const AROUND: [&str; 12] =
        ["set", "list", "tuple", "sorted", "len", "str", "int", "float", "round", "isclose", "not", "abs"];
    let mut names = expression.match_indices('(').filter_map(|(at, _)| {
        let name = expression[..at].rsplit(|c: char| !(c.is_alphanumeric() || c == '_')).next()?;
        (!name.is_empty() && !AROUND.contains(&name)).then(|| name.to_owned())
    });
    names.next()
}

fn math(map: &Map<String, Json>, problem: String) -> Result<Question, String> {
    let solved = || text(map, "solution").and_then(super::math::boxed).map(|b| Json::from(b.to_owned()));
    let found = field(map, &ANSWER).cloned().or_else(solved).ok_or("no answer, and none boxed in a solution")?;
    let mut golds: Vec<String> = match &found {
        Json::Array(answers) => answers.iter().map(plain).collect(),
        // AMC's answers are floats of whole numbers.
        Json::Number(n) => {
            vec![n.as_f64().filter(|f| f.fract() == 0.0).map_or_else(|| n.to_string(), |f| f.to_string())]
        }
        other => vec![plain(other)],
    };
    golds.retain(|g| !g.trim().is_empty());
    if golds.is_empty() {
        return Err("an empty answer".to_owned());
    }
    if map.get("is_multiple_answer").and_then(Json::as_bool) == Some(true) && golds.len() > 1 {
        golds = vec![golds.join(", ")];
    }
    let tolerance = map.get("error").and_then(|e| e.as_f64().or_else(|| e.as_str()?.parse().ok()));
    Ok(Question::Math { problem, golds, tolerance })
}

fn drop_questions(map: &Map<String, Json>, id: &str) -> Result<Found, String> {
    let passage = text(map, "passage").ok_or("no passage")?;
    let one = |q: &Json, id: String| -> Result<(&'static str, String, Question), String> {
        let question = q.get("question").and_then(Json::as_str).ok_or("no question")?.to_owned();
        let mut golds: Vec<Vec<String>> = Vec::new();
        let answers = q.get("answer").into_iter();
        let more = q.get("validated_answers").map(annotators).unwrap_or_default();
        golds.extend(answers.chain(&more).filter_map(drop_answer));
        if let Some(spans) = q.pointer("/answers_spans/spans").and_then(Json::as_array) {
            let spans: Vec<String> = spans.iter().map(plain).collect();
            let mut distinct = spans.clone();
            distinct.sort();
            distinct.dedup();
            // As a data set, the spans of all annotators follow each other. Numbers and dates stand alone, and what comes more
            // than once is of several; else they are one's, who gave them together.
            let types = q.pointer("/answers_spans/types").and_then(Json::as_array);
            let alone = types.is_some_and(|types| types.iter().any(|t| t != "span"));
            if alone || distinct.len() < spans.len() || distinct.len() == 1 {
                golds.extend(distinct.iter().map(|s| vec![s.clone()]));
            }
            if !alone && distinct.len() > 1 {
                golds.push(distinct);
            }
        }
        if golds.is_empty() {
            return Err(format!("question {id} has no answer"));
        }
        let question = Question::Spans { passage: passage.to_owned(), question, golds };
        Ok(("", id, question))
    };
    match map.get("qa_pairs").and_then(Json::as_array) {
        None => Ok(vec![one(&Json::Object(map.clone()), id.to_owned())?]),
        Some(pairs) => {
            let id_of = |(i, q): (usize, &Json)| q.get("query_id").map_or_else(|| format!("{id}.{i}"), plain);
            pairs.iter().enumerate().map(|(i, q)| one(q, id_of((i, q)))).collect()
        }
    }
}

/// Answers of further annotators, which a data set keeps as a record of lists.
fn annotators(answers: &Json) -> Vec<Json> {
    let Some(lists) = answers.as_object() else { return answers.as_array().cloned().unwrap_or_default() };
    let len = lists.values().filter_map(|l| Some(l.as_array()?.len())).max().unwrap_or(0);
    let one = |i: usize| lists.iter().filter_map(|(name, l)| Some((name.clone(), l.get(i)?.clone()))).collect();
    (0..len).map(|i| Json::Object(one(i))).collect()
}

/// A number, spans or a date; none where an annotator gave nothing.
fn drop_answer(answer: &Json) -> Option<Vec<String>> {
    if let Some(text) = answer.as_str() {
        return Some(vec![text.to_owned()]);
    }
    let number = answer.get("number").map(plain).filter(|n| !n.is_empty());
    let spans = answer.get("spans").and_then(Json::as_array).filter(|s| !s.is_empty());
    let date =
        ["day", "month", "year"].map(|part| answer.pointer(&format!("/date/{part}")).map(plain).unwrap_or_default());
    let date = date.iter().filter(|p| !p.is_empty()).cloned().collect::<Vec<_>>().join(" ");
    match (number, spans) {
        (Some(number), _) => Some(vec![number]),
        (None, Some(spans)) => Some(spans.iter().map(plain).collect()),
        _ => (!date.is_empty()).then_some(vec![date]),
    }
}

fn field<'a>(map: &'a Map<String, Json>, names: &[&str]) -> Option<&'a Json> {
    names.iter().find_map(|n| map.get(*n).filter(|v| !v.is_null()))
}

fn text<'a>(map: &'a Map<String, Json>, name: &str) -> Option<&'a str> {
    map.get(name).and_then(Json::as_str)
}

/// A string's content, or any other value as JSON.
fn plain(json: &Json) -> String {
    json.as_str().map_or_else(|| json.to_string(), str::to_owned)
}
