//! `--device cuda` on the emulated driver: the executable as it is, with an emulated libcuda in its way. Kernels run as
//! compiled from the sources; which of the embedded images the device would take is the executable's choice.

use std::path::Path;
use std::process::{Command, Output};

use crate::command::{azr, checkpoint, expect_code, hash, json_lines, stderr};

/// The executable on an emulated GPU.
fn on_emulator(args: &[&str], options: &[(&str, &str)]) -> Command {
    let mut command = azr(args);
    command.env("LD_LIBRARY_PATH", azr_kernel_emu::folder());
    command.envs(options.iter().map(|(name, value)| (format!("AZR_EMU_{name}"), value)));
    command
}

fn run(args: &[&str], options: &[(&str, &str)]) -> Output {
    on_emulator(args, options).output().expect("the executable starts")
}

#[test]
fn the_self_test_passes_on_emulated_ampere_and_hopper() {
    let mut bits: Option<Vec<String>> = None;
    for capability in ["80", "90"] {
        let output = run(&["selftest", "--device", "cuda", "--quick"], &[("CC", capability), ("ARITHMETIC", "1")]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "capability {capability}:\n{said}{}", stderr(&output));
        assert!(said.contains("azr emulator") && said.lines().filter(|l| l.starts_with("ok ")).count() == 11, "{said}");
        // mma.sync and wgmma, both with Hopper's arithmetic: the same bits in every operation.
        let words = |line: &str| line.split_once(": bits ").map(|(name, rest)| format!("{name} {}", &rest[..16]));
        let found: Vec<String> = said.lines().filter_map(words).collect();
        assert_eq!(found.len(), 7, "{said}");
        assert_eq!(*bits.get_or_insert_with(|| found.clone()), found, "capability {capability}");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/bits.txt");
    let (committed, found) =
        (std::fs::read_to_string(&path).unwrap_or_default(), bits.unwrap_or_default().join("\n") + "\n");
    if committed != found {
        panic!("{} is out of date: it holds the bits of the emulator in Hopper's arithmetic:\n{found}", path.display());
    }
}

#[test]
fn what_is_wrong_with_a_gpu_is_said_in_one_line() {
    for (options, code, words) in [
        (&[("NO_DEVICE", "1")][..], 4, "sees no CUDA device"),
        (&[("DRIVER", "11080")], 4, "12.0 or newer is needed"),
        (&[("CC", "75")], 4, "compute capability 7.5"),
        (&[("MEMORY", "1000000")], 5, "allocating"),
    ] {
        let output = run(&["selftest", "--device", "cuda", "--quick"], options);
        expect_code(&output, code);
        let said = stderr(&output);
        assert!(said.contains(words) && said.contains("hint:") && said.lines().count() == 2, "{options:?}: {said}");
    }
}

#[test]
fn a_run_that_does_not_fit_says_what_would() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("R");
    let args = ["--device", "cuda", "--steps", "1", "--out", out.to_str().expect("UTF-8")];
    let output = run(&args, &[("MEMORY", "50000000")]);
    expect_code(&output, 5);
    let said = stderr(&output);
    for words in ["KV pages ", "most at once", "the GPU has 0.05 GB", "train.moments=bf16", "azr: allocating", "hint: "]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
    // On its own, azr takes what there is: a GPU that is too old is left alone.
    let out = dir.path().join("S");
    let args = ["--steps", "1", "--out", out.to_str().expect("UTF-8"), "--set", "selfplay.batch_size=2"];
    let output = run(&[&args[..], &["--set", "selfplay.seed_factor=2"]].concat(), &[("CC", "75")]);
    expect_code(&output, 0);
    assert!(stderr(&output).contains("warning: the GPU is left alone") && stderr(&output).contains("CPU threads"));
}

/// A run that is as small as it can be: the emulator takes a second for what a GPU does in a millisecond.
fn small<'a>(out: &'a Path, seeds: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["--device", "cuda", "--out", out.to_str().expect("UTF-8")];
    for set in [
        seeds,
        "selfplay.batch_size=2",
        "selfplay.seed_factor=2",
        "selfplay.num_probes=2",
        "selfplay.num_answers=2",
        "rollout.max_solve=12",
        "rollout.max_propose=40",
        "checkpoint.every_steps=1",
        "checkpoint.keep=0",
    ] {
        args.extend(["--set", set]);
    }
    args.extend(more);
    args
}

#[test]
fn the_main_job_runs_resumes_and_batches_to_the_same_bits() {
    let dir = tempfile::tempdir().expect("a folder");
    // Tasks to begin with, from the CPU: seeding would draw hundreds of tokens here.
    let seeds = format!("seeds={}", dir.path().join("seeds.jsonl").display());
    let seeding = dir.path().join("seeding");
    let mut args = small(&seeding, &seeds, &["--steps", "1"]);
    args[1] = "cpu";
    expect_code(&crate::command::run(&args), 0);

    let gpu = [("WORKERS", "2"), ("CC", "90")];
    let straight = dir.path().join("straight");
    let output = run(&small(&straight, &seeds, &["--steps", "2"]), &gpu);
    expect_code(&output, 0);
    assert!(stderr(&output).contains("on azr emulator"), "{output:?}");
    let metrics = json_lines(&straight.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 2);
    for m in &metrics {
        assert_eq!(m["logprob_gap"], 0.0, "what is drawn is what is trained, to the bit");
        assert!(m["grad_norm"].as_f64().is_some_and(|n| n > 0.0) && m["sampled_tokens"].as_u64() > Some(0));
    }
    // Stopped after a step and resumed, with another batch, on another number of multiprocessors, by streams that do their
    // work as late as they may.
    let broken = dir.path().join("broken");
    let few = ["--set", "rollout.max_running=3", "--steps", "1"];
    expect_code(&run(&small(&broken, &seeds, &few), &[("SMS", "5"), ("CC", "90"), ("DEFER", "1")]), 0);
    let resume = ["--device", "cuda", "--resume", broken.to_str().expect("UTF-8"), "--steps", "2"];
    expect_code(&run(&resume, &gpu), 0);
    for step in [1, 2] {
        assert_eq!(hash(&checkpoint(&straight, step)), hash(&checkpoint(&broken, step)), "step {step}");
    }
}

#[test]
fn the_script_for_gpu_boxes_runs_on_the_emulator() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name);
    let at = |name: &str| path(name).to_str().expect("UTF-8").to_owned();
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/run.sh"))
        .arg("quick")
        .env("LD_LIBRARY_PATH", azr_kernel_emu::folder())
        .env("AZR_EMU_ARITHMETIC", "1")
        .envs([("AZR", env!("CARGO_BIN_EXE_azr")), ("SMALL", "1"), ("AZR_EMU_WORKERS", "2"), ("KERNEL_TESTS", "none")])
        .envs([("KERNEL_BENCH", "none"), ("BUDGET", "3000"), ("WORK", &at("work")), ("OUT", &at("kept"))])
        .output()
        .expect("bash is there");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", stderr(&output));
    let lines = json_lines(&path("kept/results.jsonl"));
    let of = |name: &str| lines.iter().find(|l| l["step"] == name).unwrap_or_else(|| panic!("{name} in {said}"));
    for name in
        ["version", "selftest-quick", "bits-of-the-model", "straight", "resume-bits", "bench-small", "train-small"]
    {
        assert_eq!(of(name)["rc"], 0, "{said}");
    }
    assert!(of("kernels")["said"].as_str().is_some_and(|s| s.starts_with("SKIPPED: ")), "{said}");
    assert_eq!(json_lines(&path("work/metrics.jsonl")).len(), 3);
    assert!(path("work/bench-small.json").exists() && path("kept/all.tgz").exists());
}
