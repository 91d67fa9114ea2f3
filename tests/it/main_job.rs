//! The main job end to end: the executable trains the embedded model, and what it leaves behind is whole, recomputable,
//! and the same whatever the threads, the timing and the interruptions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use azr::selfplay::advantage::whiten_by_task;
use azr::selfplay::reward::{self, Combine, Extremes};
use azr::weights::model_files::ModelFiles;
use serde_json::Value;

use crate::command::{azr, checkpoint, expect_code, hash, json_lines, run, stderr};

/// A run that is small but has every part.
const SMALL: &[&str] = &[
    "--set",
    "selfplay.batch_size=6",
    "--set",
    "selfplay.seed_factor=3",
    "--set",
    "selfplay.num_probes=3",
    "--set",
    "selfplay.num_answers=2",
    "--set",
    "checkpoint.every_steps=1",
    "--set",
    "checkpoint.keep=0",
];

/// Factor of a solver's advantage below 0 in the tiny preset.
const NEGATIVE_WEIGHT: f64 = 0.3;

const CONFIGS: [&str; 6] = [
    "propose_abduction",
    "propose_deduction",
    "propose_induction",
    "solve_abduction",
    "solve_deduction",
    "solve_induction",
];

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is a number"))
}

#[test]
fn the_readme_command_trains_all_six_configurations_and_leaves_everything() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let output = run(&["--steps", "3", "--out", text(&out)]);
    expect_code(&output, 0);
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    for step in 1..=3 {
        assert!(lines.lines().any(|l| l.starts_with(&format!("step {step}/3 "))), "a line for step {step}:\n{lines}");
    }
    let metrics = json_lines(&out.join("metrics.jsonl"));
    assert_eq!(metrics.iter().map(|m| m["step"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2), Some(3)]);
    for m in &metrics {
        for config in CONFIGS {
            assert!(number(&m["configs"][config]["num_samples"]) > 0.0, "{config} has trained samples in {m}");
        }
        assert!(number(&m["valid"]) > 0.1, "valid proposals in {m}");
        assert_eq!(number(&m["logprob_gap"]), 0.0, "sampling and training give the same bits");
        assert!(number(&m["grad_norm"]) > 0.0);
    }
    // Every valid proposal is stored that some probes solve and some do not; one optimiser step a step.
    for (before, after) in metrics.iter().zip(&metrics[1..]) {
        for kind in ["abduction", "deduction", "induction"] {
            let grown = number(&after["buffers"][kind]) - number(&before["buffers"][kind]);
            let histogram = after["variety"][kind]["success_histogram"].as_array().expect("by solved probes");
            let mixed: f64 = histogram[1..histogram.len() - 1].iter().map(number).sum();
            assert_eq!(grown, mixed, "{kind} in {after}");
        }
    }
    let state = std::fs::read(checkpoint(&out, 3).join("azr/state.json")).expect("training state");
    let state: Value = serde_json::from_slice(&state).expect("JSON");
    assert_eq!((state["step"].as_u64(), state["num_updates"].as_u64()), (Some(3), Some(3)));
    let trace = json_lines(&out.join("trace.jsonl"));
    recompute(&trace, Extremes::Zero);
    let resolved = std::fs::read_to_string(out.join("resolved.toml")).expect("written");
    assert!(resolved.contains("steps = 3  # --steps"), "{resolved}");
    let events = std::fs::read_dir(&out).expect("the run directory").flatten().map(|e| e.file_name());
    assert!(events.into_iter().any(|n| n.to_string_lossy().contains("tfevents")), "TensorBoard events");
    // The checkpoint is a model like any other: the trained weights open, and differ from where they started.
    let (first, last) = (checkpoint(&out, 0), checkpoint(&out, 3));
    let (a, b) = (ModelFiles::open(&first).expect("opens"), ModelFiles::open(&last).expect("opens"));
    let name = "model.embed_tokens.weight";
    let shape = a.tensors.shape(name).expect("there").to_vec();
    assert_ne!(a.tensors.read(name, &shape).expect("whole"), b.tensors.read(name, &shape).expect("whole"));
}

/// Recomputes every reward and advantage of a trace from what it says about each completion.
fn recompute(trace: &[Value], extremes: Extremes) {
    let mut groups: BTreeMap<(u64, String), Vec<&Value>> = BTreeMap::new();
    let mut probes: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for r in trace {
        if let Some(proposal) = r["probe_of"].as_u64() {
            probes.entry(proposal).or_default().push(number(&r["accuracy"]));
            assert!(r["reward"].is_null(), "probes are not trained on");
        } else if r["reward"].is_null() {
            assert!(r["note"].as_str().is_some_and(|note| note.contains("misleads")), "it is trained on: {r}");
        } else {
            let key = (r["step"].as_u64().expect("a step"), r["config"].as_str().expect("a name").to_owned());
            groups.entry(key).or_default().push(r);
        }
    }
    let mut kinds = BTreeSet::new();
    for ((_, config), records) in &groups {
        let mut rewards = Vec::new();
        for r in records {
            let format_ok = r["format_ok"].as_bool().expect("a flag");
            let expected = if config.starts_with("propose") {
                let rate = r["success_rate"].as_f64();
                let drawn = r["id"].as_u64().and_then(|id| probes.get(&id));
                let mean = drawn.map(|p| p.iter().sum::<f64>() / p.len() as f64);
                // What repeats an earlier proposal of the step, or misleads, is refused after its probes were drawn.
                let late = refused_late(r);
                assert!(rate == mean || rate.is_none() && late, "the success rate is its probes' mean: {r}");
                reward::proposer(format_ok, rate, extremes, &[], Combine::Sum)
            } else {
                reward::solver(format_ok, number(&r["accuracy"]))
            };
            assert_eq!(number(&r["reward"]), expected, "{r}");
            rewards.push(expected);
        }
        // Answers to one task have ids that differ in the last byte alone.
        let tasks: Vec<u64> = records.iter().map(|r| r["id"].as_u64().expect("an id") >> 8).collect();
        for (r, advantage) in records.iter().zip(whiten_by_task(&rewards, &tasks)) {
            let less = config.starts_with("solve") && advantage < 0.0;
            let advantage = if less { NEGATIVE_WEIGHT * advantage } else { advantage };
            assert!((number(&r["advantage"]) - advantage).abs() < 1e-9, "{r}: {advantage}");
        }
        kinds.insert(config.as_str());
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), CONFIGS);
}

/// Whether a proposal was refused after its probes were drawn.
fn refused_late(r: &Value) -> bool {
    r["verdict"] == "duplicate" || r["verdict"] == "gate: the message misleads"
}

fn small(out: &Path, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = ["--steps", "4", "--seed", "11", "--out", text(out)].map(str::to_owned).into();
    args.extend(SMALL.iter().chain(more).map(|s| (*s).to_owned()));
    args
}

fn start(args: &[String]) -> Child {
    azr(&args.iter().map(String::as_str).collect::<Vec<_>>()).spawn().expect("the executable starts")
}

fn finish(args: &[String]) {
    expect_code(&start(args).wait_with_output().expect("it ends"), 0);
}

fn resume(out: &Path) -> Vec<String> {
    ["--resume", text(out)].map(str::to_owned).into()
}

/// Waits until a file exists; an error when the process ends before.
fn wait_for(file: &Path, child: &mut Child) {
    let start = Instant::now();
    while !file.exists() {
        assert!(child.try_wait().expect("a child").is_none(), "the run ended before {} appeared", file.display());
        assert!(start.elapsed() < Duration::from_secs(300), "{} never appeared", file.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn threads_executors_and_kills_change_no_bit_of_the_last_checkpoint() {
    let dir = tempfile::tempdir().expect("a folder");
    let plain = dir.path().join("plain");
    finish(&small(&plain, &["--threads", "1", "--executors", "1"]));
    let expected = hash(&checkpoint(&plain, 4));

    let wide = dir.path().join("wide");
    finish(&small(&wide, &["--threads", "3", "--executors", "3", "--set", "rollout.max_running=7"]));
    assert_eq!(hash(&checkpoint(&wide, 4)), expected, "threads, executors and batch width");

    // Killed in seeding, in a step, and while a checkpoint may be being written; resumed each time.
    let killed = dir.path().join("killed");
    for (n, (appears, delay_ms)) in
        [(killed.join("resolved.toml"), 300), (checkpoint(&killed, 1), 20), (checkpoint(&killed, 2), 150)]
            .iter()
            .enumerate()
    {
        let mut child = start(&if n == 0 { small(&killed, &[]) } else { resume(&killed) });
        wait_for(appears, &mut child);
        std::thread::sleep(Duration::from_millis(*delay_ms));
        child.kill().expect("SIGKILL");
        child.wait().expect("gone");
    }
    finish(&resume(&killed));
    assert_eq!(hash(&checkpoint(&killed, 4)), expected, "kills and resumptions");
    let steps = |run: &Path, file: &str| -> Vec<(u64, u64)> {
        let of = |r: &Value| (r["step"].as_u64().expect("a step"), r["id"].as_u64().unwrap_or(0));
        json_lines(&run.join(file)).iter().map(of).collect()
    };
    for file in ["metrics.jsonl", "trace.jsonl"] {
        assert_eq!(steps(&killed, file), steps(&plain, file), "{file} has every line once");
    }

    let other = dir.path().join("other");
    let mut args = small(&other, &[]);
    args[3] = "12".to_owned();
    finish(&args);
    assert_ne!(hash(&checkpoint(&other, 4)), expected, "another seed is another run");
}

#[test]
fn what_is_carried_to_the_next_step_is_drawn_alike_and_survives_kills() {
    let dir = tempfile::tempdir().expect("a folder");
    let carrying = ["--set", "rollout.straggler_tokens=24", "--set", "rollout.max_lag=1"];
    let plain = dir.path().join("plain");
    finish(&small(&plain, &carrying));
    let metrics = json_lines(&plain.join("metrics.jsonl"));
    for m in &metrics {
        assert_eq!(number(&m["logprob_gap"]), 0.0, "what these weights have drawn is trained to the bit");
        assert!(number(&m["carried"]) > 18.0, "the next step's proposals, and stragglers: {m}");
    }
    assert!(metrics.iter().skip(1).all(|m| number(&m["stale_tokens"]) > 0.0));

    let killed = dir.path().join("killed");
    for (n, (appears, delay_ms)) in [(checkpoint(&killed, 1), 20), (checkpoint(&killed, 2), 150)].iter().enumerate() {
        let mut child = start(&if n == 0 { small(&killed, &carrying) } else { resume(&killed) });
        wait_for(appears, &mut child);
        std::thread::sleep(Duration::from_millis(*delay_ms));
        child.kill().expect("SIGKILL");
        child.wait().expect("gone");
    }
    finish(&resume(&killed));
    assert_eq!(hash(&checkpoint(&killed, 4)), hash(&checkpoint(&plain, 4)), "kills and resumptions");

    // With weights that stay, a sequence is the same however many steps it takes.
    let drawn = |name: &str, more: &[&str]| -> BTreeMap<u64, String> {
        let out = dir.path().join(name);
        finish(&small(&out, &[&["--set", "train.learning_rate=0"], more].concat()));
        let of = |r: &Value| Some((r["id"].as_u64()?, r["completion"].as_str()?.to_owned()));
        let all: Vec<(u64, String)> = json_lines(&out.join("trace.jsonl")).iter().filter_map(of).collect();
        let first: BTreeMap<u64, String> = all.iter().filter(|(id, _)| id >> 32 == 1).cloned().collect();
        assert_eq!(all.iter().filter(|(id, _)| id >> 32 == 1).count(), first.len(), "{name}: trained once");
        first
    };
    let (whole, pieces) = (drawn("whole", &[]), drawn("pieces", &carrying));
    let both = whole.keys().filter(|id| pieces.contains_key(id)).count();
    assert!(both > 30 && pieces.values().any(|text| text.len() > 100), "{both} of {}", whole.len());
    for (id, text) in &pieces {
        assert!(whole.get(id).is_none_or(|w| w == text), "{id:x}: {text} and not {:?}", whole.get(id));
    }
}

#[test]
fn the_first_signal_saves_and_the_run_can_be_resumed() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let mut args = small(&out, &["--set", "checkpoint.every_steps=0"]);
    args[1] = "100000".to_owned();
    let mut child = start(&args);
    wait_for(&checkpoint(&out, 0), &mut child);
    let metrics = out.join("metrics.jsonl");
    wait_for(&metrics, &mut child);
    while std::fs::read(&metrics).expect("there").is_empty() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let second = run(&["--resume", text(&out), "--steps", "1"]);
    expect_code(&second, 2);
    assert!(stderr(&second).contains("goes on"), "{}", stderr(&second));
    signal(&child, "TERM");
    let output = child.wait_with_output().expect("it ends");
    expect_code(&output, 75);
    let message = stderr(&output);
    assert!(message.contains("hint: go on with: azr --resume"), "{message}");
    let done = json_lines(&metrics).len() as u64;
    assert!(checkpoint(&out, done).exists(), "step {done} is saved");
    let more = (done + 1).to_string();
    expect_code(&run(&["--resume", text(&out), "--steps", &more]), 0);
    assert_eq!(json_lines(&metrics).len() as u64, done + 1);
}

#[test]
fn the_second_signal_ends_at_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    // One step that samples for long: the stop is only seen between passes of the model, the second signal is not waited for.
    let mut child = start(&small(&out, &["--set", "selfplay.batch_size=256"]));
    wait_for(&out.join("resolved.toml"), &mut child);
    signal(&child, "INT");
    signal(&child, "INT");
    let output = child.wait_with_output().expect("it ends");
    let code = output.status.code();
    assert!(code == Some(130) || code == Some(75), "{}\n{}", output.status, stderr(&output));
}

fn signal(child: &Child, name: &str) {
    let status = std::process::Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    assert!(status.expect("kill runs").success());
}

#[test]
fn both_sources_of_solver_tasks_and_the_optional_parts_run() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let args = small(
        &out,
        &[
            "--set",
            "selfplay.solver_tasks=same_step",
            "--set",
            "selfplay.train_on_probes=true",
            "--set",
            "selfplay.propose_reward=minus_half",
            "--set",
            "selfplay.error_task=true",
            "--set",
            "selfplay.intrinsic.complexity=0.5",
            "--set",
            "selfplay.intrinsic.answer_diversity=0.5",
            "--set",
            "selfplay.baseline=sequence",
            "--set",
            "train.entropy_coef=0.001",
            "--set",
            "train.loss_aggregation=sequence_mean",
            "--set",
            "trace_every=2",
        ],
    );
    let mut args = args;
    args[1] = "2".to_owned();
    finish(&args);
    let trace = json_lines(&out.join("trace.jsonl"));
    assert!(trace.iter().all(|r| r["step"] == 2), "every second step is traced");
    let trained_probe = |r: &Value| r["probe_of"].is_u64() && r["reward"].is_f64();
    assert!(trace.iter().any(trained_probe), "probes are trained on");
    let intrinsic = |r: &Value| r["intrinsic"].as_array().is_some_and(|t| t.len() == 2);
    assert!(trace.iter().any(intrinsic), "intrinsic terms are on record");
}

#[test]
fn seeds_are_cached_for_reuse() {
    let dir = tempfile::tempdir().expect("a folder");
    let seeds = dir.path().join("seeds.jsonl");
    let set = format!("seeds={}", text(&seeds));
    let runs: Vec<_> = ["a", "b"].iter().map(|n| dir.path().join(n)).collect();
    for out in &runs {
        let mut args = small(out, &["--set", &set]);
        args[1] = "1".to_owned();
        finish(&args);
    }
    assert!(json_lines(&seeds).len() >= 3 * 18 - 2, "three buffers of seeds");
    assert_eq!(hash(&checkpoint(&runs[0], 1)), hash(&checkpoint(&runs[1], 1)));
}
