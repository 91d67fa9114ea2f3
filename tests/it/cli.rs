//! The command line's contract: help, exit codes, one line of error with a hint, nothing lost.

use crate::command::{expect_code, run, stderr};

#[test]
fn help_is_as_committed() {
    let output = crate::command::azr(&["--help"]).env("COLUMNS", "100").output().expect("the executable starts");
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    let committed = include_str!("help.txt");
    assert!(help == committed, "help.txt is out of date: write `COLUMNS=100 azr --help` into it. It is now:\n{help}");
}

#[test]
fn errors_are_one_line_with_a_hint_and_their_exit_code() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let out = out.to_str().expect("UTF-8");
    let bad_toml = dir.path().join("bad.toml");
    std::fs::write(&bad_toml, "steps = = 3").expect("written");
    let bad_toml = bad_toml.to_str().expect("UTF-8");
    let unknown = dir.path().join("unknown.toml");
    std::fs::write(&unknown, "[train]\nlearning_rat = 1e-4").expect("written");
    let unknown = unknown.to_str().expect("UTF-8");
    let fixture = crate::fixture::folder("qwen2");
    let fixture = fixture.to_str().expect("UTF-8");
    for (args, code, says) in [
        (vec!["--steps", "many"], 2, "invalid value 'many'"),
        (vec!["--no-such-flag"], 2, "unexpected argument"),
        (vec!["--preset", "paper-4b"], 2, "paper-3b"),
        (vec!["--out", out, "--set", "selfplay.batchsize=2"], 3, "did you mean `selfplay.batch_size`?"),
        (vec!["--out", out, "--set", "steps"], 2, "hint: write --set key=value"),
        (vec!["--out", out, "--set", "train.learning_rate=fast"], 3, "train.learning_rate"),
        (vec!["--out", out, "--set", "train.learning_rate=1e-4"], 3, "train.final_norm_rate is 0.10"),
        (vec!["--out", out, "--set", "rollout.temperature=0"], 3, "rollout.temperature is 0"),
        (vec!["--out", out, "--config", unknown], 3, "did you mean `train.learning_rate`?"),
        (vec!["--out", out, "--config", bad_toml], 3, "bad.toml is not TOML"),
        (vec!["--out", out, "--config", "/nowhere/a.toml"], 74, "cannot read /nowhere/a.toml"),
        (vec!["--out", out, "--weights", "/nowhere"], 3, "there is no /nowhere"),
        (vec!["--out", "/proc/none/R"], 74, "cannot create"),
        (vec!["--device", "cuda", "--out", out], 4, "hint: install NVIDIA's driver, or use --device cpu"),
        (vec!["--resume", out, "--preset", "tiny"], 2, "cannot be used with"),
        (vec!["--out", out, "--set", "executor.memory_mib=4200"], 3, "executor.memory_mib"),
        (vec!["--resume", out], 3, "hint: --resume takes the directory of a run"),
        (vec!["pretrain", "--out", out, "--weights", fixture], 3, "another vocabulary than the embedded model"),
    ] {
        let output = run(&args);
        expect_code(&output, code);
        let message = stderr(&output);
        assert!(message.contains(says), "{args:?} says {says:?}:\n{message}");
        assert!(!message.contains("panicked"), "{message}");
        // clap's own messages are several lines.
        if code != 2 {
            assert_eq!(message.lines().filter(|l| l.starts_with("azr: ")).count(), 1, "{message}");
        }
    }
    assert!(!std::path::Path::new(out).exists(), "no run directory for a run that cannot start");
}

#[test]
fn a_run_directory_is_never_overwritten() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("resolved.toml"), "steps = 1\n").expect("written");
    let out = dir.path().to_str().expect("UTF-8");
    let output = run(&["--out", out, "--steps", "1"]);
    expect_code(&output, 2);
    assert!(stderr(&output).contains("holds a run already"), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(dir.path().join("resolved.toml")).expect("there"), "steps = 1\n");
    // Nor is what has the name of a run's file.
    let metrics = dir.path().join("metrics.jsonl");
    std::fs::rename(dir.path().join("resolved.toml"), &metrics).expect("renamed");
    expect_code(&run(&["--out", out, "--steps", "1"]), 2);
    assert_eq!(std::fs::read_to_string(metrics).expect("there"), "steps = 1\n");
}

#[test]
fn a_plan_needs_neither_gpu_nor_weights() {
    let output = run(&["plan", "--weights", "7B", "--gpu", "141GB", "--json"]);
    expect_code(&output, 0);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&plan["fits"], &plan["settings"]["train.moments"]), (&true.into(), &"bf16".into()));
    let sum: f64 = plan["segments"].as_array().expect("segments").iter().filter_map(|s| s["gb"].as_f64()).sum();
    assert!(sum > plan["peak_gb"].as_f64().expect("a number") && plan["peak_gb"].as_f64() < Some(139.0), "{plan}");
    let small = run(&["plan", "--weights", "7B", "--gpu", "80GB"]);
    assert!(String::from_utf8_lossy(&small.stdout).contains("take a larger GPU"), "{small:?}");
    let fixture = crate::fixture::folder("qwen3");
    let output = run(&["plan", "--weights", fixture.to_str().expect("UTF-8")]);
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("most at once"));
    let output = run(&["plan", "--weights", "/nowhere"]);
    expect_code(&output, 3);
    assert!(stderr(&output).contains("hint:"));
}

#[test]
fn a_benchmark_runs_and_its_results_can_be_compared() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("b.json");
    let path = file.to_str().expect("UTF-8");
    for part in ["decode", "train", "step"] {
        let args = ["bench", part, "--device", "cpu", "--threads", "1", "--small", "--steps", "2", "--json", path];
        expect_code(&run(&args), 0);
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).expect("there")).expect("JSON");
        let results = report["results"].as_array().expect("results");
        assert_eq!(results[0]["name"], "machine");
        assert!(results[0]["copy_gb_per_s"].as_f64() > Some(0.0) && results.len() == 2, "{report}");
        assert!(results[1]["name"].as_str().is_some_and(|n| n.starts_with(part)), "{report}");
        assert!(results[1].as_object().expect("fields").values().skip(1).all(|v| v.as_f64() > Some(0.0)), "{report}");
    }
    let output = run(&["bench", "--compare", path, path]);
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1.000x"));
    expect_code(&run(&["bench", "--compare", path, "/nowhere"]), 74);
}
