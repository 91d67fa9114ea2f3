//! Evaluation with the real executor: every suite's format with right and wrong answers, the built-in suite, the command.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use azr::eval::grade::grade;
use azr::eval::suites::{Item, Question, read_all};
use azr::eval::template::Template;
use azr::eval::{builtin, report};
use azr::exec::normal_form::normal_form;
use azr::pretrain::corpus::{CHUNK, compact_codec, documents, numbered};
use azr::selfplay::prompt::Piece;
use azr_tokenizer::Tokenizer;
use serde_json::Value;

use crate::command::{expect_code, json_lines, run, stderr};
use crate::exec::pool;
use crate::fixture::text;

fn suites() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suites")
}

#[test]
fn every_format_tells_right_answers_from_wrong_ones() {
    let mut items: BTreeMap<(String, String), Item> = BTreeMap::new();
    for entry in std::fs::read_dir(suites()).expect("the samples are there") {
        let path = entry.expect("an entry").path();
        if path.file_name().is_some_and(|n| n != "answers.jsonl") {
            let found = read_all(&[&path], None, None).unwrap_or_else(|e| panic!("{e}"));
            items.extend(found.into_iter().map(|i| ((i.suite.clone(), i.id.clone()), i)));
        }
    }
    let answers = json_lines(&suites().join("answers.jsonl"));
    let azr = Template::named("azr", &Tokenizer::embedded()).expect("a template");
    let mut work = Vec::new();
    let mut expected = Vec::new();
    for line in &answers {
        let name = |n: &str| line[n].as_str().expect("a name").to_owned();
        let item = &items[&(name("suite"), name("id"))];
        let (mut read, mut texts) = (Vec::new(), Vec::new());
        for (which, right) in [("right", 1.0), ("wrong", 0.0)] {
            for text in line[which].as_array().expect("a list").iter().map(|t| t.as_str().expect("a text")) {
                let piece = Piece::Text(text.to_owned());
                read.push(azr.read(&item.question, "", &[piece], true));
                texts.push((right, text));
            }
        }
        work.push((item, read));
        expected.push(texts);
    }
    assert_eq!(work.len(), items.len(), "every sample has answers");
    let (scores, num_calls) = grade(&pool(), &work).expect("the executor answers");
    assert!(num_calls > 20);
    for (((item, read), scores), texts) in work.iter().zip(scores).zip(expected) {
        for ((score, answer), (right, text)) in scores.iter().zip(read).zip(texts) {
            assert_eq!(score.right, right, "{} {}: {text:?} read as {answer:?}: {}", item.suite, item.id, score.detail);
        }
    }
}

#[test]
fn the_built_in_suite_holds_no_program_of_the_pre_training() {
    let pool = pool();
    let suite = |count| builtin::items(builtin::NAME, &pool, count).expect("the suite fills").expect("it exists");
    let items = suite(250);
    let mut programs: HashSet<String> = HashSet::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for item in &items {
        let Question::Task(task) = &item.question else { panic!("the suite holds tasks") };
        programs.insert(normal_form(&task.program).expect("it parses"));
        *counts.entry(task.kind.name()).or_default() += 1;
    }
    assert!(counts.len() == 3 && counts.values().all(|n| *n == 1000), "{counts:?}");
    assert!(programs.len() > 500, "{} programs", programs.len());
    // A smaller suite is its beginning.
    let few = suite(5);
    assert!(few.iter().all(|i| items.contains(i)) && few.len() == 60);
    // The embedded model saw 16 million tokens of seed 1; some more, because chunks differ in length.
    let codec = compact_codec(Tokenizer::embedded()).expect("the vocabulary has the special tokens");
    let tokens: usize = documents(&pool, &codec, 1, 0).expect("executed").iter().map(|d| d.tokens.len()).sum();
    let num_chunks = 17_000_000 / tokens as u64 + 1;
    let trained = (0..num_chunks * CHUNK).map(|i| numbered(1, i).0.code);
    let known: HashSet<String> = trained.collect();
    let seen: Vec<&String> = known.iter().filter(|c| programs.contains(&normal_form(c).expect("it parses"))).collect();
    assert!(seen.is_empty(), "pre-training saw {seen:#?}");
    assert!(known.len() > 20_000, "{} programs", known.len());
}

#[test]
fn the_command_evaluates_reports_and_compares() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = |name: &str| dir.path().join(name);
    let evaluate = |name: &str, more: &[&str]| {
        let out = out(name);
        let mut args = vec!["eval", "--suite", "builtin", "--limit", "4", "--out", text(&out)];
        args.extend(more);
        let output = run(&args);
        expect_code(&output, 0);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let table = evaluate("a", &[]);
    assert!(table.lines().any(|l| l.starts_with("builtin/induction/3 ")), "{table}");
    let results: Value =
        serde_json::from_slice(&std::fs::read(out("a").join("results.json")).expect("written")).expect("JSON");
    let accuracy = results["results"]["builtin"]["exact_match,none"].as_f64().expect("a number");
    assert!((0.0..=1.0).contains(&accuracy) && results["n-samples"]["builtin"]["effective"] == 48, "{results}");
    // The same again, with other threads: the same records to the byte.
    evaluate("b", &["--threads", "1", "--executors", "1"]);
    let records = |name: &str| std::fs::read(out(name).join("samples.jsonl")).expect("written");
    assert_eq!(records("a"), records("b"));
    // The likeliest token alone, at any temperature, is greedy.
    for (name, support) in [("k", ["--top-k", "1"]), ("p", ["--top-p", "1e-6"])] {
        evaluate(name, &[&["--temperature", "1.5"], &support[..]].concat());
        assert_eq!(records("a"), records(name), "{support:?}");
    }
    let sampled = evaluate("c", &["--samples", "4", "--protocol", "vote", "--paths", "3", "--json"]);
    let sampled: Value = serde_json::from_str(&sampled).expect("JSON");
    assert!(sampled["results"]["builtin"]["pass@4,none"].is_number(), "{sampled}");
    let calls = sampled["azr"].as_array().and_then(|rows| rows.iter().find(|r| r["suite"] == "builtin/induction"));
    assert!(calls.is_some_and(|r| r["executor_calls"].as_f64() > Some(0.0)), "{sampled}");
    let (a, c) = (out("a").join("samples.jsonl"), out("c").join("samples.jsonl"));
    let output = run(&["eval", "--compare", text(&a), text(&c)]);
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("McNemar"), "{output:?}");
}

#[test]
fn a_question_is_solved_with_its_trace_and_costs() {
    let record = r#"{"code": "def f(x):\n    return x", "input": "7"}"#;
    let output = run(&["solve", record, "--show-trace", "--json"]);
    expect_code(&output, 0);
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(found["answer"].is_string() && found["tokens"].as_u64() > Some(0), "{found}");
    assert!(stderr(&output).contains("--- completion"), "{}", stderr(&output));
    let abduction = r#"{"code": "def f(x):\n    return x + 1", "output": "3"}"#;
    let output = run(&["solve", abduction, "--protocol", "reflexion", "--json"]);
    expect_code(&output, 0);
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(found["executor_calls"].as_u64() > Some(0), "{found}");
    for (args, code, says) in [
        (vec!["solve", "What is 1 + 1?"], 2, "tasks only"),
        (vec!["solve", record, "--protocol", "react"], 2, "writes English"),
        (vec!["solve", "{\"x\": 1}"], 3, "no known format"),
        (vec!["eval", "--suite", "/nowhere"], 74, "cannot read"),
        (vec!["eval", "--samples", "2", "--temperature", "0"], 2, "greedy samples"),
        (vec!["eval", "--top-p", "0"], 2, "--top-p"),
        (vec!["eval", "--template", "chat"], 3, "lacks the special tokens"),
    ] {
        let output = run(&args);
        expect_code(&output, code);
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn the_gate_counts_and_explains_what_it_refuses() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let sets = [
        "selfplay.batch_size=24",
        "selfplay.seed_factor=1",
        "selfplay.num_probes=1",
        "selfplay.gate.identity=true",
        "selfplay.gate.constant=true",
        "selfplay.gate.coin_flips=true",
        "selfplay.gate.max_guess=0.7",
    ];
    let mut args = vec!["--steps", "2", "--out", text(&out)];
    args.extend(sets.iter().flat_map(|s| ["--set", s]));
    let output = run(&args);
    expect_code(&output, 0);
    let refused = |r: &&Value| r["verdict"].as_str().is_some_and(|v| v.starts_with("gate: "));
    let trace = json_lines(&out.join("trace.jsonl"));
    let explained = trace.iter().filter(refused).count() as u64;
    let metrics = json_lines(&out.join("metrics.jsonl"));
    let counts = metrics.iter().flat_map(|m| m["rejections"].as_object().expect("a map").clone());
    let counted: u64 = counts.filter(|(why, _)| why.starts_with("gate: ")).filter_map(|(_, n)| n.as_u64()).sum();
    assert!(explained > 0 && explained == counted, "{explained} {counted}");
    assert!(trace.iter().filter(refused).all(|r| r["success_rate"].is_null() && r["gold"].is_null()));
}

#[test]
fn a_run_that_collapses_goes_back_to_its_last_healthy_checkpoint() {
    // A learning rate that destroys the model within a step.
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let sets = [
        "selfplay.batch_size=4",
        "selfplay.seed_factor=1",
        "selfplay.num_probes=2",
        "train.learning_rate=0.1",
        "train.final_norm_rate=1",
        "alarm.patience=2",
        "alarm.on_collapse=rollback",
        "checkpoint.every_steps=1",
        "checkpoint.keep=0",
        "rollout.max_propose=32",
        "rollout.max_solve=16",
    ];
    let mut args = vec!["--steps", "40", "--out", text(&out)];
    args.extend(sets.iter().flat_map(|s| ["--set", s]));
    let output = run(&args);
    expect_code(&output, 1);
    assert!(stderr(&output).contains("the run collapses"), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("ALARM: "), "{output:?}");
    let metrics = json_lines(&out.join("metrics.jsonl"));
    let last = metrics.last().expect("a step");
    let step = last["step"].as_u64().expect("a number");
    let lasting = last["alarms"].as_object().expect("alarms").values().filter_map(Value::as_u64).max();
    let kept = azr::base::run_dir::RunDir::at(&out).checkpoints();
    assert_eq!(kept.last().copied(), Some(step - lasting.expect("a number")), "{kept:?}");
}

#[test]
fn any_model_answers_in_words() {
    // A tiny random model: what it says is noise, but prompts, turns and costs are those of a large one.
    let dir = tempfile::tempdir().expect("a folder");
    let weights = crate::fixture::folder("qwen2");
    for protocol in ["direct", "critique", "react", "reflexion"] {
        let out = dir.path().join(protocol);
        let suite = suites().join("mbpp.jsonl");
        let output = run(&[
            "eval",
            "--suite",
            text(&suite),
            "--weights",
            text(&weights),
            "--max-new",
            "8",
            "--protocol",
            protocol,
            "--rounds",
            "2",
            "--out",
            text(&out),
        ]);
        expect_code(&output, 0);
        let records = json_lines(&out.join("samples.jsonl"));
        assert_eq!(records.len(), 2, "{records:?}");
        let parsed: Vec<azr::eval::run::Record> =
            records.into_iter().map(|r| serde_json::from_value(r).expect("a record")).collect();
        assert_eq!(report::rows(&parsed, &[1], 1)[0].num_items, 2);
    }
}

#[test]
fn evaluation_while_training_is_logged_everywhere_and_changes_no_bit() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = |name: &str| dir.path().join(name);
    let suite = suites().join("cruxeval.jsonl");
    let train = |name: &str, more: &[&str]| {
        let out = out(name);
        let sets = ["selfplay.batch_size=4", "selfplay.seed_factor=2", "selfplay.num_probes=2", "eval.num_builtin=2"];
        let mut args = vec!["--steps", "3", "--out", text(&out)];
        args.extend(sets.iter().flat_map(|s| ["--set", s]));
        args.extend(more);
        let output = run(&args);
        expect_code(&output, 0);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let lines = train("with", &["--eval-every", "2", "--eval-suite", text(&suite), "--eval-suite", "builtin"]);
    train("without", &[]);
    let last = |name: &str| crate::command::hash(&crate::command::checkpoint(&out(name), 3));
    assert_eq!(last("with"), last("without"));
    // Before the first step, every second, and after the last.
    let metrics = json_lines(&out("with").join("metrics.jsonl"));
    let evaluated: Vec<u64> =
        metrics.iter().filter(|m| m["eval"].is_object()).filter_map(|m| m["step"].as_u64()).collect();
    assert_eq!(evaluated, [0, 2, 3]);
    for name in ["builtin", "builtin/abduction", "builtin/deduction", "builtin/induction", "cruxeval-i", "cruxeval-o"] {
        assert!(metrics[0]["eval"][name].is_number(), "{name} in {}", metrics[0]);
        assert!(lines.lines().any(|l| l.starts_with("step 2/3") && l.contains(&format!("{name} "))), "{lines}");
    }
    let events = std::fs::read_dir(out("with")).expect("there").flatten().map(|e| e.path());
    let events = events.into_iter().find(|p| p.to_string_lossy().contains("tfevents")).expect("TensorBoard events");
    let bytes = std::fs::read(events).expect("readable");
    let tag = b"eval/builtin/deduction";
    assert_eq!(bytes.windows(tag.len()).filter(|w| w == tag).count(), 3);
}
