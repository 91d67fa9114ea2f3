//! The lines of `azr exec`: one JSON object each, in a form of its own or as public corpora have it.

use serde_json::{Map, Value as Json};

use crate::exec::json::from_python;
use crate::exec::protocol::{Call, Limits, MAX_MEMORY_MIB, Profile, Request};
use crate::exec::source::rename;
use crate::exec::value::Value;

/// A line that was read.
#[derive(Debug, PartialEq)]
pub struct Item {
    /// The line's `id` or `task_id`, given back with the verdict.
    pub id: Option<Json>,
    /// What to run.
    pub request: Request,
    /// Limits where the line has its own.
    pub limits: Option<Limits>,
    /// Whether the calls are tests, which pass when nothing is raised.
    pub tests: bool,
}

/// Reads a line. Limits that a line leaves open are the profile's.
///
/// # Errors
/// What is wrong with it.
pub fn read(line: &str, profile: Profile, limits: impl Fn(Profile) -> Limits) -> Result<Item, String> {
    let json: Json = from_python(line).map_err(|e| format!("no JSON: {e}"))?;
    let map = json.as_object().ok_or("no JSON object")?;
    let profile = match map.get("profile") {
        None => profile,
        Some(name) => serde_json::from_value(name.clone()).map_err(|_| "`profile` is run, answer or propose")?,
    };
    let entry = text(map, &["entry", "entry_point"])?.unwrap_or("f");
    let mut program = program(map)?;
    let (calls, tests) = calls(map, entry, profile)?;
    if profile != Profile::Run && entry != "f" {
        program = rename(&program, entry, "f").ok_or("`program` does not parse")?;
    }
    let limits = match map.get("limits") {
        None => None,
        Some(own) => Some(own_limits(own, limits(profile))?),
    };
    let id = map.get("id").or_else(|| map.get("task_id")).cloned();
    Ok(Item { id, request: Request { program, calls, profile }, limits, tests })
}

fn text<'a>(map: &'a Map<String, Json>, names: &[&str]) -> Result<Option<&'a str>, String> {
    match names.iter().find_map(|n| map.get(*n).map(|v| (n, v))) {
        None | Some((_, Json::Null)) => Ok(None),
        Some((_, Json::String(s))) => Ok(Some(s)),
        Some((name, _)) => Err(format!("`{name}` is no string")),
    }
}

fn program(map: &Map<String, Json>) -> Result<String, String> {
    let mut parts: Vec<&str> = Vec::new();
    if let Some(imports) = map.get("imports").and_then(Json::as_array) {
        parts.extend(imports.iter().filter_map(Json::as_str));
    }
    let whole = text(map, &["program", "code", "snippet"])?;
    let prompt = text(map, &["prompt"])?;
    let completion = text(map, &["completion", "canonical_solution"])?;
    let completed = prompt.zip(completion).map(|(p, c)| format!("{p}{c}"));
    match (whole, &completed) {
        (Some(whole), _) => parts.push(whole),
        (None, Some(completed)) => parts.push(completed),
        _ => return Err("no `program`".to_owned()),
    }
    // What tests need is made of what the program defines (MBPP).
    parts.extend(text(map, &["test_setup_code"])?);
    parts.retain(|p| !p.is_empty());
    Ok(parts.join("\n"))
}

/// The calls, and whether they are tests.
fn calls(map: &Map<String, Json>, entry: &str, profile: Profile) -> Result<(Vec<Call>, bool), String> {
    let list = |name: &str| map.get(name).and_then(Json::as_array);
    let call = |args: Option<&Json>, expect: Option<&Json>| -> Result<Call, String> {
        let args = arguments(args)?;
        let args = if profile == Profile::Run { format!("{entry}({args})") } else { args };
        let expect = expect.filter(|e| !e.is_null()).map(python).transpose()?;
        Ok(Call { args, expect })
    };
    if let Some(calls) = list("calls") {
        let each = |c: &Json| {
            let args = c.get("args").or_else(|| c.get("input"));
            call(args, c.get("expect").or_else(|| c.get("output")))
        };
        return Ok((calls.iter().map(each).collect::<Result<_, _>>()?, false));
    }
    if let Some(inputs) = list("inputs") {
        let outputs = list("outputs").or_else(|| list("expected"));
        if outputs.is_some_and(|o| o.len() != inputs.len()) {
            return Err("`inputs` and `outputs` differ in length".to_owned());
        }
        let output = |i: usize| outputs.map(|o| &o[i]);
        let each = |(i, input)| call(Some(input), output(i));
        return Ok((inputs.iter().enumerate().map(each).collect::<Result<_, _>>()?, false));
    }
    if map.contains_key("input") {
        let output = map.get("output").or_else(|| map.get("expect"));
        return Ok((vec![call(map.get("input"), output)?], false));
    }
    if profile != Profile::Run {
        return Err("no `calls`, `inputs` or `input`, which the profile needs".to_owned());
    }
    let source = |source: &str| Call { args: source.to_owned(), expect: None };
    let mut tests: Vec<Call> = Vec::new();
    for name in ["tests", "test_list", "challenge_test_list"] {
        tests.extend(list(name).into_iter().flatten().filter_map(Json::as_str).map(source));
    }
    if let Some(test) = text(map, &["test"])? {
        tests.push(source(&format!("{test}\ncheck({entry})\n")));
    }
    if tests.is_empty() {
        tests.push(source("None"));
    }
    Ok((tests, true))
}

/// Arguments as Python text: a string is that already, an array holds one JSON value per argument.
fn arguments(json: Option<&Json>) -> Result<String, String> {
    match json {
        None => Ok(String::new()),
        Some(Json::String(text)) => Ok(text.clone()),
        Some(Json::Array(items)) => Ok(items.iter().map(literal).collect::<Result<Vec<_>, _>>()?.join(", ")),
        Some(_) => Err("arguments are neither a string of Python nor an array".to_owned()),
    }
}

/// Python text of what is expected: a string is that already, anything else is a JSON value.
fn python(json: &Json) -> Result<String, String> {
    json.as_str().map_or_else(|| literal(json), |text| Ok(text.to_owned()))
}

fn literal(json: &Json) -> Result<String, String> {
    Value::from_json(json).map(|v| v.repr()).ok_or_else(|| format!("{json} is no Python value"))
}

fn own_limits(json: &Json, mut limits: Limits) -> Result<Limits, String> {
    let map = json.as_object().ok_or("`limits` is no object")?;
    for (name, value) in map {
        let value = value.as_u64().filter(|v| (1..1 << 32).contains(v)).ok_or("a limit is no whole number above 0")?;
        match name.as_str() {
            "cpu_ms" => limits.cpu_ms = value,
            "wall_ms" => limits.wall_ms = value,
            "memory_mib" if value > MAX_MEMORY_MIB => return Err(format!("memory_mib is at most {MAX_MEMORY_MIB}")),
            "memory_mib" => limits.memory_bytes = value << 20,
            _ => return Err(format!("unknown limit `{name}`; known are cpu_ms, wall_ms, memory_mib")),
        }
    }
    if !map.contains_key("wall_ms") {
        limits.wall_ms = limits.wall_ms.max(limits.cpu_ms.saturating_mul(60));
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { cpu_ms: 1000, wall_ms: 10_000, memory_bytes: 1 << 28 };

    fn run(line: &str) -> Result<Item, String> {
        read(line, Profile::Run, |_| LIMITS)
    }

    fn call_texts(line: &str) -> Vec<(String, Option<String>)> {
        run(line).expect(line).request.calls.into_iter().map(|c| (c.args, c.expect)).collect()
    }

    #[test]
    fn every_form_of_a_corpus_becomes_calls() {
        let owned = |pairs: &[(&str, Option<&str>)]| -> Vec<(String, Option<String>)> {
            pairs.iter().map(|(a, e)| ((*a).to_owned(), e.map(str::to_owned))).collect()
        };
        for (line, calls) in [
            (
                r#"{"program":"p","calls":[{"args":"1, 2","expect":"3"},{"args":[1,"a"]}]}"#,
                &[("f(1, 2)", Some("3")), ("f(1, 'a')", None)][..],
            ),
            (
                r#"{"program":"p","entry":"g","inputs":["1","2"],"outputs":["1",[1,2.0]]}"#,
                &[("g(1)", Some("1")), ("g(2)", Some("[1, 2.0]"))],
            ),
            (r#"{"code":"p","input":"'x'","output":"'y'"}"#, &[("f('x')", Some("'y'"))]),
            (
                r#"{"code":"p","test_list":["assert f(1)"],"challenge_test_list":["assert f(2)"]}"#,
                &[("assert f(1)", None), ("assert f(2)", None)],
            ),
            (
                r#"{"prompt":"def g(x):","canonical_solution":" return x","test":"def check(c): pass","entry_point":"g"}"#,
                &[("def check(c): pass\ncheck(g)\n", None)],
            ),
            (r#"{"program":"p"}"#, &[("None", None)]),
        ] {
            assert_eq!(call_texts(line), owned(calls), "{line}");
        }
        let item = run(r#"{"task_id":7,"imports":["import re"],"test_setup_code":"x = A()","snippet":"p","input":""}"#)
            .expect("a line");
        assert_eq!((item.id, item.request.program.as_str()), (Some(Json::from(7)), "import re\np\nx = A()"));
    }

    #[test]
    fn limits_and_profile_are_the_lines_own() {
        let item = run(r#"{"program":"def g(x): return g","entry":"g","input":"1","profile":"answer","limits":{"cpu_ms":2000,"memory_mib":8}}"#).expect("a line");
        assert_eq!(item.limits, Some(Limits { cpu_ms: 2000, wall_ms: 120_000, memory_bytes: 8 << 20 }));
        assert_eq!(item.request.program, "def f(x): return f");
        assert_eq!(item.request.calls[0].args, "1");
    }

    #[test]
    fn broken_lines_say_what_is_wrong() {
        for (line, what) in [
            ("{", "no JSON"),
            ("[]", "no JSON object"),
            ("{}", "no `program`"),
            (r#"{"program":1}"#, "no string"),
            (r#"{"program":"p","profile":"x"}"#, "`profile`"),
            (r#"{"program":"p","profile":"answer"}"#, "the profile needs"),
            (r#"{"program":"p","inputs":["1"],"outputs":[]}"#, "differ in length"),
            (r#"{"program":"p","input":1}"#, "neither"),
            (r#"{"program":"p","input":[{"$x":1}]}"#, "no Python value"),
            (r#"{"program":"p","limits":{"cpu_ms":0}}"#, "above 0"),
            (r#"{"program":"p","limits":{"cpu":1}}"#, "unknown limit"),
        ] {
            let error = run(line).expect_err(line);
            assert!(error.contains(what), "{line}: {error}");
        }
    }
}
