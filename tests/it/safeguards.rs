//! Safeguards of self-play that look beyond a single proposal: each does what it says, is counted and explained, and a run
//! with all of them is resumed to the bit.

use std::path::{Path, PathBuf};

use azr::selfplay::reward;
use serde_json::Value;

use crate::command::{checkpoint, expect_code, hash, json_lines, run, stderr};

/// A run that is small, so that tasks are soon drawn again.
const SMALL: [&str; 7] = [
    "selfplay.batch_size=6",
    "selfplay.seed_factor=2",
    "selfplay.num_probes=2",
    "selfplay.num_answers=1",
    "selfplay.gate.misleading=0",
    "selfplay.task_sampling=uniform",
    "checkpoint.every_steps=1",
];

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

/// Trains for so many steps with further settings.
fn train(out: &Path, steps: u64, sets: &[&str]) {
    let steps = steps.to_string();
    let mut args = vec!["--steps", &steps, "--seed", "5", "--out", text(out)];
    args.extend(SMALL.iter().chain(sets).flat_map(|s| ["--set", s]));
    expect_code(&run(&args), 0);
}

#[test]
fn an_error_after_a_step_does_not_lose_the_step() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    train(&out, 1, &[]);
    // A trace as large as a file may be: the next step's lines do not go on.
    let limit: u64 = 16 << 20;
    let pad = format!("{{\"step\": 1, \"pad\": \"{}\"}}\n", "x".repeat(limit as usize - 100));
    std::fs::write(out.join("trace.jsonl"), pad).expect("written");
    let resume = format!(
        "exec {} --resume {} --steps 3 --set checkpoint.every_steps=100",
        env!("CARGO_BIN_EXE_azr"),
        text(&out)
    );
    let script = format!("trap '' XFSZ; ulimit -f {}; {resume}", limit / 1024);
    let output = std::process::Command::new("bash").args(["-c", &script]).output().expect("there is a bash");
    expect_code(&output, 74);
    assert!(
        stderr(&output).contains("step 2 is saved") && stderr(&output).contains("trace.jsonl"),
        "{}",
        stderr(&output)
    );
    std::fs::remove_file(out.join("trace.jsonl")).expect("removed");
    train_on(&out, 3);
    let other = dir.path().join("S");
    train(&other, 3, &[]);
    let weights = |run: &Path| hash(&checkpoint(run, 3));
    assert_eq!(weights(&out), weights(&other), "what was saved is what an unbroken run has");
}

#[test]
fn a_run_goes_on_when_nobody_reads_its_lines() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let sets = SMALL.map(|s| format!("--set {s}")).join(" ");
    let run = format!("{} --steps 2 --seed 5 --out {} {sets}", env!("CARGO_BIN_EXE_azr"), text(&out));
    let script = format!("{run} >/dev/full 2>/dev/full; echo $?");
    let output = std::process::Command::new("bash").args(["-c", &script]).output().expect("there is a bash");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0");
    assert!(checkpoint(&out, 2).is_dir());
}

fn train_on(out: &Path, steps: u64) {
    expect_code(&run(&["--resume", text(out), "--steps", &steps.to_string()]), 0);
}

fn word<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key].as_str().unwrap_or("")
}

#[test]
fn what_has_become_too_easy_is_noted_and_not_drawn_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    train(&out, 6, &["selfplay.gate.too_easy=1"]);
    let metrics = json_lines(&out.join("metrics.jsonl"));
    let counted = metrics.last().expect("a step")["too_easy"]["deduction"].as_u64();
    assert!(counted > Some(0), "{metrics:?}");
    let trace = json_lines(&out.join("trace.jsonl"));
    let solved = |r: &&Value| word(r, "config") == "solve_deduction" && r["probe_of"].is_null();
    let noted: Vec<&Value> =
        trace.iter().filter(solved).filter(|r| word(r, "note").contains("no longer drawn")).collect();
    assert!(!noted.is_empty(), "a solution made its task too easy");
    for r in &noted {
        assert_eq!(r["accuracy"], 1.0, "{r}");
        let again =
            trace.iter().filter(solved).find(|s| s["step"].as_u64() > r["step"].as_u64() && s["prompt"] == r["prompt"]);
        assert_eq!(again, None, "{r}");
    }
    let proposed = |r: &&Value| word(r, "config") == "propose_deduction" && word(r, "note").contains("no longer drawn");
    assert!(trace.iter().filter(proposed).all(|r| r["success_rate"] == 1.0));
}

/// Writes a file and gives its path.
fn file(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).expect("written");
    path
}

/// Starts a run that cannot start; gives exit code and error.
fn refused(dir: &Path, set: &str) -> (Option<i32>, String) {
    let out = dir.join("refused");
    let output = run(&["--steps", "1", "--out", text(&out), "--set", set]);
    // It had its folder already when it looked at what it was given.
    std::fs::remove_dir_all(&out).expect("a folder");
    (output.status.code(), stderr(&output))
}

const EDGE_CASES: &str = r#"{"program": "def edge(x):\n    return -x if x < -7 else x * 41", "input": "-9"}

{"program": "def f(x):\n    return [x] * 3", "inputs": ["1", "'a'", "[]", "None"], "message": "curated threefold"}
"#;

#[test]
fn curated_tasks_get_their_share_of_the_solver() {
    let dir = tempfile::tempdir().expect("a folder");
    let (out, edge) = (dir.path().join("R"), file(dir.path(), "edge.jsonl", EDGE_CASES));
    let set = format!("selfplay.edge_cases={}", text(&edge));
    train(&out, 2, &[&set, "selfplay.edge_share=0.5"]);
    let trace = json_lines(&out.join("trace.jsonl"));
    for m in json_lines(&out.join("metrics.jsonl")) {
        assert_eq!(m["edge_cases"], 9, "half of six of three types");
        for (kind, shows) in
            [("abduction", "return -x if"), ("deduction", "return -x if"), ("induction", "curated threefold")]
        {
            let curated = |r: &&Value| r["step"] == m["step"] && r["edge_case"] == true;
            let solve = |r: &&Value| word(r, "config") == format!("solve_{kind}") && word(r, "prompt").contains(shows);
            assert_eq!(trace.iter().filter(curated).filter(solve).count(), 3, "{kind}");
        }
    }
    let stored = std::fs::read_to_string(checkpoint(&out, 2).join("azr/buffers.jsonl")).expect("buffers");
    assert!(!stored.contains("curated threefold"), "they do not enter the buffers");
}

#[test]
fn a_bad_line_of_curated_tasks_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let good = EDGE_CASES.lines().next().expect("a line");
    let cases = [
        ("{\"program\": 1}", "line 2"),
        (r#"{"program": "def f(x):\n    return x", "input": "1", "inputs": ["1"]}"#, "line 2: a task has"),
        (r#"{"program": "import os\ndef f(x):\n    return x", "input": "1"}"#, "line 2: "),
        (r#"{"program": "def f(x):\n    return x", "input": "g(1)"}"#, "line 2: "),
        (r#"{"program": "def f(x):\n    return 1 // x", "input": "0"}"#, "line 2: exception ZeroDivisionError"),
        (r#"{"program": "def f(x", "input": "0"}"#, "line 2: it does not parse"),
    ];
    for (line, says) in cases {
        let edge = file(dir.path(), "edge.jsonl", &format!("{good}\n{line}\n"));
        let (code, message) = refused(dir.path(), &format!("selfplay.edge_cases={}", text(&edge)));
        assert!(code == Some(3) && message.contains(&format!("edge.jsonl {says}")), "{code:?} {message}");
    }
    assert_eq!(refused(dir.path(), "selfplay.edge_cases=nowhere.jsonl").0, Some(74));
    let edge = file(dir.path(), "empty.jsonl", "\n");
    assert!(refused(dir.path(), &format!("selfplay.edge_cases={}", text(&edge))).1.contains("holds nothing"));
}

/// A folder of code: two functions that can be shown, and others that cannot.
fn code(dir: &Path) -> PathBuf {
    let root = dir.join("code");
    std::fs::create_dir_all(root.join("deep")).expect("made");
    let first = "import os\n\ndef double_all(items):\n    \"\"\"Twice.\"\"\"\n    return [i * 2 for i in items]\n\n\nclass C:\n    pass\n";
    file(&root, "a.py", first);
    file(
        &root.join("deep"),
        "b.py",
        "def tail(s):  # rest\n    return s[1:] + '!'\n\ndef spy(x):\n    return open(x)\n",
    );
    file(&root, "notes.txt", "def no(x):\n    return x\n");
    root
}

#[test]
fn proposals_are_shown_code_to_draw_ideas_from() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    train(&out, 1, &[&format!("selfplay.ground={}", text(&code(dir.path())))]);
    let shown = [
        "<|code|>def f(items):\n    return [i * 2 for i in items]<|code|>",
        "<|code|>def f(s):\n    return s[1:] + '!'<|code|>",
    ];
    let mut counts = [0, 0];
    for r in json_lines(&out.join("trace.jsonl")) {
        let starts: Vec<bool> = shown.iter().map(|s| word(&r, "prompt").contains(&format!("|>{s}"))).collect();
        let wanted = ["propose_abduction", "propose_deduction"].contains(&word(&r, "config"));
        assert_eq!(starts.iter().filter(|s| **s).count(), usize::from(wanted), "{r}");
        counts = std::array::from_fn(|i| counts[i] + usize::from(starts[i]));
        assert!(!word(&r, "prompt").contains("def no"), "{r}");
    }
    assert!(counts.iter().all(|n| *n > 0), "{counts:?}");

    let set = |path: &Path| format!("selfplay.ground={}", text(path));
    let (code, message) = refused(dir.path(), &set(&dir.path().join("nowhere")));
    assert!(code == Some(74) && message.contains("nowhere"), "{message}");
    let bare = dir.path().join("bare");
    std::fs::create_dir(&bare).expect("made");
    file(&bare, "a.py", "import os\ndef f(x):\n    return open(x)\n");
    let (code, message) = refused(dir.path(), &set(&bare));
    assert!(code == Some(3) && message.contains("holds no function that can be shown"), "{code:?} {message}");
}

const PATTERNS: &str = r#"{"name": "returns", "pattern": "return ", "penalty": 0.25}
{"name": "letter", "pattern": "[a-z]"}
{"name": "never", "pattern": "zzzzzzzz", "penalty": 1}
"#;

/// Checks that every completion of a run is marked, and pays, as `expected` says; gives the number of marked ones.
fn watched(out: &Path, expected: impl Fn(&str) -> (Vec<&'static str>, f64)) -> usize {
    let trace = json_lines(&out.join("trace.jsonl"));
    let mut num_hits = 0;
    for r in &trace {
        let (names, penalty) = expected(word(r, "completion"));
        let found: Vec<&str> = r["constraints"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        assert_eq!((found, r["penalty"].as_f64().unwrap_or(0.0)), (names.clone(), penalty), "{r}");
        if word(r, "config").starts_with("solve") && r["probe_of"].is_null() {
            let accuracy = r["accuracy"].as_f64().expect("a number");
            let plain = reward::solver(r["format_ok"] == true, accuracy);
            assert_eq!(r["reward"].as_f64(), Some(plain - penalty), "{r}");
        }
        num_hits += usize::from(!names.is_empty());
    }
    for m in json_lines(&out.join("metrics.jsonl")) {
        for (name, count) in m["constraints"].as_object().expect("hits") {
            let hit = |r: &&Value| {
                r["step"] == m["step"] && r["constraints"].as_array().is_some_and(|c| c.contains(&name.as_str().into()))
            };
            assert_eq!(count.as_u64(), Some(trace.iter().filter(hit).count() as u64), "{name}");
            assert_eq!(m["alarms"][format!("constraint {name}")], m["step"], "an alarm from the first step on");
        }
    }
    num_hits
}

#[test]
fn hits_of_constraints_are_counted_alarm_and_cost_reward() {
    let dir = tempfile::tempdir().expect("a folder");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let path = file(dir.path(), "patterns.jsonl", PATTERNS);
    // An alarm of two steps ends no run that has patience for ten.
    train(&a, 2, &[&format!("selfplay.constraints={}", text(&path)), "alarm.on_collapse=stop"]);
    let hits = watched(&a, |completion| {
        let (returns, letter) = (completion.contains("return "), completion.contains(|c: char| c.is_ascii_lowercase()));
        let names = [("returns", returns), ("letter", letter)].into_iter().filter(|(_, hit)| *hit).map(|(n, _)| n);
        (names.collect(), if returns { 0.25 } else { 0.0 })
    });
    assert!(hits > 0, "some completion returns something");

    let program = "def f(text):\n    return len(text) / text.count('9') if 'x' in text else 0\n";
    let path = file(dir.path(), "nines.py", program);
    train(&b, 1, &[&format!("selfplay.constraints={}", text(&path))]);
    let hits = watched(&b, |completion| match (completion.contains('x'), completion.matches('9').count()) {
        (true, 0) => (vec!["nines (failed)"], 0.0),
        (true, nines) => (vec!["nines"], completion.chars().count() as f64 / nines as f64),
        _ => (vec![], 0.0),
    });
    assert!(hits > 0, "some completion has an x");
}

#[test]
fn a_gradient_that_is_not_finite_changes_no_weight_and_ends_no_run() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    // Rewards whose sum is no number any more.
    let huge = file(dir.path(), "huge.jsonl", r#"{"name": "e", "pattern": "e", "penalty": 1e308}"#);
    train(&out, 2, &[&format!("selfplay.constraints={}", text(&huge))]);
    let metrics = json_lines(&out.join("metrics.jsonl"));
    assert_eq!(metrics.iter().map(|m| m["alarms"]["gradient"].clone()).collect::<Vec<_>>(), [1, 2]);
    let weights = |step| std::fs::read(checkpoint(&out, step).join("model.safetensors")).expect("weights");
    assert_eq!(weights(0), weights(2));
}

#[test]
fn bad_constraints_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let cases = [
        (
            "a.jsonl",
            "{\"name\": \"a\", \"pattern\": \"x\"}\n{\"name\": \"b\", \"pattern\": \"(\"}",
            "a.jsonl line 2: the pattern of b",
        ),
        ("b.py", "def f(text):\n    return 'much'", "b.py: for an empty text, value 'much'"),
        ("c.py", "import os\ndef f(text):\n    return 0", "c.py: "),
    ];
    for (name, content, says) in cases {
        let path = file(dir.path(), name, content);
        let (code, message) = refused(dir.path(), &format!("selfplay.constraints={}", text(&path)));
        assert!(code == Some(3) && message.contains(says), "{code:?} {message}");
    }
}

#[test]
fn a_run_with_every_safeguard_is_resumed_to_the_bit() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let edge = format!("selfplay.edge_cases={}", text(&file(dir.path(), "edge.jsonl", EDGE_CASES)));
    let ground = format!("selfplay.ground={}", text(&code(dir.path())));
    let constraints = format!("selfplay.constraints={}", text(&file(dir.path(), "patterns.jsonl", PATTERNS)));
    let sets = ["selfplay.gate.too_easy=2", "selfplay.reference_sampling=adversarial", &edge, &ground, &constraints];
    train(&whole, 4, &sets);
    train(&parts, 2, &sets);
    expect_code(&run(&["--resume", text(&parts), "--steps", "4", "--threads", "1"]), 0);
    assert_eq!(hash(&checkpoint(&parts, 4)), hash(&checkpoint(&whole, 4)));
}

#[test]
fn the_temperature_follows_entropy_in_rollout_and_trainer_and_survives_a_resumption() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let sets = ["rollout.hold_entropy=1", "train.final_norm_rate=2400"];
    train(&whole, 13, &sets);
    train(&parts, 11, &sets);
    expect_code(&run(&["--resume", text(&parts), "--steps", "13"]), 0);
    assert_eq!(hash(&checkpoint(&parts, 13)), hash(&checkpoint(&whole, 13)));
    let metrics = json_lines(&whole.join("metrics.jsonl"));
    let temperatures: Vec<f64> = metrics.iter().filter_map(|m| m["temperature"].as_f64()).collect();
    assert!(temperatures[..11].iter().all(|t| *t == 1.0), "{temperatures:?}");
    assert!(temperatures[12] > 1.0, "{temperatures:?}");
    assert!(metrics.iter().all(|m| m["logprob_gap"] == 0.0), "samples are trained at the temperature that drew them");
}
