//! Safeguards of self-play that look beyond a single proposal: each does what it says, is counted and explained, and a run
//! with all of them is resumed to the bit.

use std::path::Path;

use serde_json::Value;

use crate::command::{checkpoint, expect_code, hash, json_lines, run};

/// A run that is small, so that tasks are soon drawn again.
const SMALL: [&str; 5] = [
    "selfplay.batch_size=6",
    "selfplay.seed_factor=2",
    "selfplay.num_probes=2",
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

#[test]
fn a_run_with_every_safeguard_is_resumed_to_the_bit() {
    let dir = tempfile::tempdir().expect("a folder");
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let sets = ["selfplay.gate.too_easy=2", "selfplay.reference_sampling=adversarial"];
    train(&whole, 4, &sets);
    train(&parts, 2, &sets);
    expect_code(&run(&["--resume", text(&parts), "--steps", "4", "--threads", "1"]), 0);
    assert_eq!(hash(&checkpoint(&parts, 4)), hash(&checkpoint(&whole, 4)));
}
