//! Files that a run reads beside its weights: curated tasks, code to draw ideas from, constraints. They are read whenever a run
//! starts or goes on; a resumption has the same bits only while they stay as they are.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::exec::normal_form::normal_form;
use crate::exec::pool::Pool;
use crate::exec::protocol::{Call, Outcome, Profile, Request, Verdict};
use crate::exec::source::{FunctionRule, cleaned, functions_of, is_allowed, with_entry_point};
use crate::exec::value::Value;
use crate::pipeline::generate::{Rules, outputs};
use crate::selfplay::buffer::Buffers;
use crate::selfplay::codec::Codec;
use crate::selfplay::constraint::{Constraints, Hits};
use crate::selfplay::parse::Draft;
use crate::selfplay::prompt::{self, Format, Piece};
use crate::selfplay::task::{Config, Role, Task, TaskKind};

/// Texts that one request hands to a constraint that is a program.
const TEXTS_PER_REQUEST: usize = 16;

/// Records of a JSON lines file with the numbers of their lines; blank lines are none.
fn json_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<(usize, T)>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let records: Vec<(usize, T)> = lines
        .map(|(n, line)| serde_json::from_str(line).map(|r| (n, r)).map_err(|e| bad_line(path, n, &e.to_string())))
        .collect::<Result<_>>()?;
    if records.is_empty() {
        return Err(Error::config(format!("{} holds nothing", path.display())));
    }
    Ok(records)
}

fn bad_line(path: &Path, line: usize, why: &str) -> Error {
    Error::config(format!("{} line {line}: {why}", path.display()))
}

/// A curated task as it is written: with one input, or with several and a message (induction).
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Curated {
    program: String,
    #[serde(default)]
    input: String,
    #[serde(default)]
    inputs: Vec<String>,
    #[serde(default)]
    message: String,
}

impl Curated {
    fn draft(self, rules: &Rules) -> Result<Draft, String> {
        let (kind, inputs) = match (self.input.is_empty(), self.inputs.len()) {
            (false, 0) if self.message.is_empty() => (TaskKind::Deduction, vec![self.input]),
            (true, 2..) if !self.message.is_empty() => (TaskKind::Induction, self.inputs),
            _ => return Err("a task has an `input`, or two or more `inputs` and a `message`".to_owned()),
        };
        let program = with_entry_point(&self.program, rules.parse.function_rule)?;
        Ok(Draft { kind, program, inputs, message: self.message, num_composites: 0 })
    }
}

/// Tasks of a file of JSON lines, by type: a program with one input is a task of deduction and one of abduction. They are
/// validated as proposals are, but for the gate: whoever writes a task earns nothing by it.
///
/// # Errors
/// When the file cannot be read, holds nothing, or holds a line that is no valid task.
pub fn edge_cases(path: &Path, rules: &Rules, codec: &Codec, pool: &Pool) -> Result<Buffers> {
    let drafts: Vec<(usize, Draft)> = json_lines::<Curated>(path)?
        .into_iter()
        .map(|(n, c)| c.draft(rules).map(|d| (n, d)).map_err(|why| bad_line(path, n, &why)))
        .collect::<Result<_>>()?;
    let request = |(_, d): &(usize, Draft)| Request {
        program: d.program.clone(),
        calls: d.inputs.iter().map(|args| Call { args: args.clone(), expect: None }).collect(),
        profile: Profile::Propose,
    };
    let verdicts = pool.run(drafts.iter().map(request).collect())?;
    let mut buffers = Buffers::new(drafts.len());
    for ((line, draft), verdict) in drafts.into_iter().zip(verdicts) {
        let outputs = outputs(draft.kind, &verdict, draft.inputs.len()).map_err(|why| bad_line(path, line, &why))?;
        let task = draft.into_task(outputs, verdict.normal_form.unwrap_or_default(), 0);
        let kinds: &[TaskKind] = match task.kind {
            TaskKind::Induction => &[TaskKind::Induction],
            _ => &[TaskKind::Abduction, TaskKind::Deduction],
        };
        for &kind in kinds {
            let task = Task { kind, ..task.clone() };
            let len = codec.encode(&prompt::solver(rules.format, &task)).len();
            if rules.room(Config { kind, role: Role::Solve }, len).is_none() {
                return Err(bad_line(path, line, &format!("the solver's prompt has {len} tokens, which is too long")));
            }
            buffers.push(Arc::new(task));
        }
    }
    Ok(buffers)
}

/// Constraints of a file: a program where its name ends in `.py`, else patterns as JSON lines.
///
/// # Errors
/// When the file cannot be read, holds nothing, a line is no constraint, or the program gives no number for an empty text.
pub fn constraints(path: &Path, pool: &Pool) -> Result<Constraints> {
    if path.extension().is_none_or(|e| e != "py") {
        return json_lines(path).map(|patterns| Constraints::Patterns(patterns.into_iter().map(|(_, p)| p).collect()));
    }
    let source = fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let verdict = pool.run(vec![scoring(&source, &[String::new()])])?.remove(0);
    let refused = |why: String| {
        Error::config(format!("{}: {why}", path.display()))
            .with_hint("its `f(text)` gives a number, which is the penalty")
    };
    if let Some(rejection) = &verdict.rejection {
        return Err(refused(rejection.to_string()));
    }
    match verdict.calls.first() {
        Some(Outcome::Value { text, .. }) if text.parse::<f64>().is_ok_and(f64::is_finite) => {}
        other => return Err(refused(other.map_or_else(String::new, |o| format!("for an empty text, {o}")))),
    }
    let name = path.file_stem().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    Ok(Constraints::Program { name, source })
}

/// What a constraint that is a program makes of texts, in their order.
///
/// # Errors
/// When the executor fails.
pub fn score(name: &str, source: &str, texts: &[String], pool: &Pool) -> Result<Vec<Hits>> {
    let chunks: Vec<&[String]> = texts.chunks(TEXTS_PER_REQUEST).collect();
    let verdicts = pool.run(chunks.iter().map(|chunk| scoring(source, chunk)).collect())?;
    let value = |verdict: &Verdict, i: usize| match verdict.calls.get(i) {
        Some(Outcome::Value { text, .. }) => Hits::scored(name, Some(text)),
        _ => Hits::scored(name, None),
    };
    let of = |(chunk, verdict): (&&[String], &Verdict)| (0..chunk.len()).map(|i| value(verdict, i)).collect::<Vec<_>>();
    Ok(chunks.iter().zip(&verdicts).flat_map(of).collect())
}

fn scoring(source: &str, texts: &[String]) -> Request {
    let calls = texts.iter().map(|t| Call { args: Value::Str(t.clone()).repr(), expect: None }).collect();
    Request { program: source.to_owned(), calls, profile: Profile::Answer }
}

/// Functions of the Python files in a folder and the folders in it, different ones, in the order of the files' names. The
/// compact format shows them as it shows any program, so there they are named `f`, cleaned, and within the import policy.
///
/// # Errors
/// When a folder cannot be read, or no function can be shown.
pub fn ground(dir: &Path, rules: &Rules, codec: &Codec) -> Result<Vec<Arc<Task>>> {
    let mut files = Vec::new();
    python_files(dir, &mut files)?;
    files.sort();
    let usable = |function: String| {
        let program = match rules.format {
            Format::Azr => with_entry_point(&function, FunctionRule::Any).ok().map(|_| function),
            Format::Compact => cleaned(&function)
                .and_then(|program| with_entry_point(&program, FunctionRule::Any).ok())
                .filter(|program| is_allowed(program)),
        }?;
        // The other half is for references and instructions.
        (codec.encode(&[Piece::Text(program.clone())]).len() <= rules.max_prompt / 2).then_some(program)
    };
    let mut known = HashSet::new();
    let mut found = Vec::new();
    for file in files {
        let bytes = fs::read(&file).map_err(|e| Error::io("read", &file, &e))?;
        let programs = functions_of(&String::from_utf8_lossy(&bytes)).into_iter().filter_map(usable);
        for program in programs.filter(|p| known.insert(p.clone())) {
            let normal_form = normal_form(&program).unwrap_or_default();
            let task = Task { program, pairs: Vec::new(), normal_form, ..Task::identity(TaskKind::Deduction) };
            found.push(Arc::new(task));
        }
    }
    if found.is_empty() {
        return Err(Error::config(format!("{} holds no function that can be shown", dir.display())).with_hint(
            "selfplay.ground names a folder of .py files; a top-level function must parse and take up at most half of \
             rollout.max_prompt, and in the compact format keep to the import policy",
        ));
    }
    Ok(found)
}

fn python_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |e: &std::io::Error| Error::io("read", dir, e);
    for entry in fs::read_dir(dir).map_err(|e| failed(&e))? {
        let entry = entry.map_err(|e| failed(&e))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(|e| failed(&e))?);
        // A link to a folder may lead in a circle.
        if kind.is_dir() {
            python_files(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "py") && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}
