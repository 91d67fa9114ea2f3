//! The CPU backend against Hugging Face transformers: tiny random models of all families, in the forms in which
//! transformers stores them, and what it says of them (`tests/fixtures/make.py`).

use std::path::Path;

use azr::compute::cpu::backend::CpuBackend;
use azr::model::forward::Decoder;
use azr::model::params::ParamTable;
use azr::train::loss::nll_sequence;
use azr::train::optim::{OptimConfig, Trainer};
use azr::weights::model_files::ModelFiles;
use azr::weights::safetensors::TensorFiles;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{command, fixture};

/// bf16 in one file, tied; f32 in shards, untied; f16 in one file, tied.
const MODELS: [&str; 3] = ["qwen2", "qwen3", "llama"];

// Bars are tighter than what is asked of the backend (logits 2e-4, log-probabilities 1e-4, gradients 1e-3), and about
// ten times what was measured.
/// Largest difference of a logit.
const LOGIT_BAR: f64 = 1e-4;
/// Largest difference of a log-probability or an entropy.
const LOGPROB_BAR: f64 = 5e-5;
/// Two logits that are closer may change places: each may be off by its bar.
const NEAR_TIE: f64 = 2.0 * LOGIT_BAR;
/// Largest relative L2 difference of a parameter's gradient.
const GRAD_BAR: f64 = 1e-4;
/// Largest difference of a weight after an update: a few roundings of weights of about 1.
const UPDATE_BAR: f64 = 5e-7;

#[derive(Deserialize)]
struct Said {
    texts: Vec<Text>,
    sequences: Vec<Sequence>,
    adamw: AdamW,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Sequence {
    text: Option<String>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
    logprobs: Vec<f64>,
    greedy: Vec<u32>,
    margins: Vec<f64>,
}

#[derive(Deserialize)]
struct AdamW {
    lr: f32,
    betas: [f32; 2],
    eps: f32,
    weight_decay: f32,
    clip: f32,
    grad_norm: f64,
}

/// What `azr score` prints for a line.
#[derive(Deserialize)]
struct Scored {
    tokens: Vec<u32>,
    logprobs: Vec<Option<f64>>,
    entropies: Vec<Option<f64>>,
    generated: Vec<u32>,
}

fn reference(model: &str) -> (Said, TensorFiles) {
    let folder = fixture::folder(model);
    let said = std::fs::read(folder.join("reference.json")).expect("the fixture is there");
    let tensors = TensorFiles::open(&folder.join("reference.safetensors")).expect("the fixture is whole");
    (serde_json::from_slice(&said).expect("as make.py writes it"), tensors)
}

/// Runs `azr score` and returns what it printed, a JSON value per line.
fn score<T: for<'a> Deserialize<'a>>(weights: &Path, args: &[&str], lines: &[Value]) -> Vec<T> {
    let input: String = lines.iter().map(|l| format!("{l}\n")).collect();
    let output = fixture::score(&[&["--weights", fixture::text(weights), "--threads", "2"], args].concat(), &input);
    assert!(output.status.success(), "{}: {}", weights.display(), command::stderr(&output));
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let answers: Vec<T> = stdout.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
    assert_eq!(answers.len(), lines.len(), "an answer per line");
    answers
}

/// All of a tensor.
fn read(tensors: &TensorFiles, name: &str) -> Vec<f32> {
    let shape = tensors.shape(name).unwrap_or_else(|| panic!("there is no tensor {name}")).to_vec();
    tensors.read(name, &shape).expect("a whole tensor")
}

fn max_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

fn relative_error(ours: &[f32], theirs: impl Iterator<Item = f64>) -> f64 {
    let (error, norm) =
        ours.iter().zip(theirs).fold((0.0, 0.0), |(e, n), (a, b)| (e + (f64::from(*a) - b).powi(2), n + b * b));
    (error / norm).sqrt()
}

/// Entropy of a row of logits.
fn entropy(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let shifted = || logits.iter().map(|x| f64::from(x - max));
    let sum: f64 = shifted().map(f64::exp).sum();
    sum.ln() - shifted().map(|x| x * x.exp()).sum::<f64>() / sum
}

/// Collects what is over its bar, and remembers the worst.
#[derive(Default)]
struct Bar {
    worst: f64,
    failures: Vec<String>,
}

impl Bar {
    fn check(&mut self, what: &str, error: f64, bar: f64) {
        self.worst = self.worst.max(error);
        if error.is_nan() || error > bar {
            self.failures.push(format!("{what}: {error:.2e} is over {bar:.0e}"));
        }
    }

    fn done(self, what: &str) {
        println!("{what}: worst {:.2e}", self.worst);
        assert!(self.failures.is_empty(), "{what}:\n{}", self.failures.join("\n"));
    }
}

/// Scores the sequences of a fixture: answers, logits, gradients.
fn score_sequences(model: &str, said: &Said) -> (Vec<Scored>, TensorFiles, TensorFiles) {
    let dir = tempfile::tempdir().expect("a folder");
    let (logits, grads) = (dir.path().join("logits"), dir.path().join("grads"));
    let lines: Vec<Value> = said
        .sequences
        .iter()
        .map(|s| match &s.text {
            Some(text) => json!({"text": text, "weights": s.weights}),
            None => json!({"tokens": s.tokens, "weights": s.weights}),
        })
        .collect();
    let args = ["--generate", "24", "--logits", fixture::text(&logits), "--grads", fixture::text(&grads)];
    let scored = score(&fixture::folder(model), &args, &lines);
    let open = |path: &Path| TensorFiles::open(path).expect("azr writes whole files");
    (scored, open(&logits), open(&grads))
}

#[test]
fn logits_and_logprobs_agree() {
    let (mut logits_bar, mut logprobs_bar, mut entropies_bar) = (Bar::default(), Bar::default(), Bar::default());
    for model in MODELS {
        let (said, reference) = reference(model);
        let (scored, logits, _) = score_sequences(model, &said);
        for (i, (theirs, ours)) in said.sequences.iter().zip(&scored).enumerate() {
            let what = format!("{model}, sequence {i}");
            assert_eq!(ours.tokens, theirs.tokens, "{what}");
            let (a, b) = (read(&logits, &i.to_string()), read(&reference, &format!("logits.{i}")));
            logits_bar.check(&what, max_error(&a, &b), LOGIT_BAR);
            assert_eq!((ours.logprobs.len(), ours.logprobs[0]), (theirs.tokens.len(), None), "{what}");
            let rows = b.chunks_exact(b.len() / theirs.tokens.len());
            for (at, ((a, b), row)) in ours.logprobs[1..].iter().zip(&theirs.logprobs).zip(rows).enumerate() {
                let what = format!("{what}, token {}", at + 1);
                logprobs_bar.check(&what, a.map_or(f64::NAN, |a| (a - b).abs()), LOGPROB_BAR);
                let ours = ours.entropies[at + 1];
                entropies_bar.check(&what, ours.map_or(f64::NAN, |a| (a - entropy(row)).abs()), LOGPROB_BAR);
            }
        }
    }
    logits_bar.done("logits");
    logprobs_bar.done("log-probabilities");
    entropies_bar.done("entropies");
}

#[test]
fn greedy_continuations_are_equal_except_at_near_ties() {
    let mut num_compared = 0;
    for model in MODELS {
        let (said, _) = reference(model);
        let (scored, ..) = score_sequences(model, &said);
        for (i, (theirs, ours)) in said.sequences.iter().zip(&scored).enumerate() {
            let sure = theirs.margins.iter().position(|m| *m < NEAR_TIE).unwrap_or(theirs.greedy.len());
            let compared = |tokens: &[u32]| tokens[..sure.min(tokens.len())].to_vec();
            assert_eq!(compared(&ours.generated), compared(&theirs.greedy), "{model}, sequence {i}");
            assert!(sure < theirs.greedy.len() || ours.generated.len() == sure, "{model}, sequence {i} goes on");
            num_compared += sure;
        }
    }
    println!("greedy: {num_compared} tokens compared");
    assert!(num_compared > 300, "the fixtures are no near ties: {num_compared}");
}

#[test]
fn every_gradient_agrees() {
    let mut bar = Bar::default();
    for model in MODELS {
        let (said, reference) = reference(model);
        let (.., grads) = score_sequences(model, &said);
        let names = |tensors: &TensorFiles, prefix: &str| -> Vec<String> {
            tensors.names().filter_map(|n| n.strip_prefix(prefix)).map(str::to_owned).collect()
        };
        assert_eq!(names(&grads, ""), names(&reference, "grad."), "{model}");
        for name in names(&grads, "") {
            let theirs = read(&reference, &format!("grad.{name}"));
            let error = relative_error(&read(&grads, &name), theirs.iter().map(|g| f64::from(*g)));
            bar.check(&format!("{model}, {name}"), error, GRAD_BAR);
        }
    }
    bar.done("gradients");
}

#[test]
fn one_adamw_step_agrees() {
    let (mut weights_bar, mut moments_bar, mut norm_bar) = (Bar::default(), Bar::default(), Bar::default());
    let (mut num_weights, mut num_doubtful) = (0, 0);
    for model in MODELS {
        let (said, reference) = reference(model);
        let AdamW { lr, betas, eps, weight_decay, clip, grad_norm } = said.adamw;
        let config = OptimConfig {
            beta1: betas[0],
            beta2: betas[1],
            eps,
            weight_decay,
            grad_clip: clip,
            // Several micro-batches.
            micro_batch_tokens: 40,
            ..OptimConfig::default()
        };
        let files = ModelFiles::open(&fixture::folder(model)).expect("the fixture is whole");
        let weights = ParamTable::new(&files.spec).load(&files.tensors).expect("the fixture is whole");
        let backend = CpuBackend::new(2).expect("threads start");
        let decoder = Decoder::new(backend, files.spec, &weights, true).expect("it fits");
        let mut trainer = Trainer::new(decoder, config).expect("it fits");
        let seqs: Vec<_> = said.sequences.iter().map(|s| nll_sequence(&s.tokens, &s.weights)).collect();
        trainer.accumulate(&seqs).expect("the sequences fit");
        let grads = trainer.gradients().expect("read");
        let norm = trainer.update(lr).expect("finite gradients");
        norm_bar.check(model, (norm / grad_norm - 1.0).abs(), GRAD_BAR);

        // The moments show the clipping, which the first step's size does not depend on.
        let scale = f64::from(clip) / grad_norm;
        for (name, _, ours) in trainer.moments().expect("read") {
            let (kind, name) = name.split_once('.').expect("a prefix");
            let theirs = read(&reference, &format!("grad.{name}"));
            let theirs = theirs.iter().map(|g| f64::from(*g) * scale).map(|g| match kind {
                "m" => (1.0 - f64::from(betas[0])) * g,
                _ => (1.0 - f64::from(betas[1])) * g * g,
            });
            moments_bar.check(&format!("{model}, {kind} of {name}"), relative_error(&ours, theirs), GRAD_BAR);
        }
        // The first step is close to lr * sign(g): where g is hardly more than its error, the step is as uncertain.
        let step = |g: f32| {
            let g = f64::from(g) * scale;
            f64::from(lr) * g / (g.abs() + f64::from(eps))
        };
        for ((name, _, ours), (.., grad)) in trainer.weights().expect("read").iter().zip(&grads) {
            let (theirs, slopes) =
                (read(&reference, &format!("adamw.{name}")), read(&reference, &format!("grad.{name}")));
            let doubt: Vec<f64> = grad.iter().zip(&slopes).map(|(a, b)| (step(*a) - step(*b)).abs()).collect();
            let errors = ours.iter().zip(&theirs).zip(&doubt).map(|((a, b), d)| f64::from((a - b).abs()) - d);
            weights_bar.check(&format!("{model}, {name}"), errors.fold(0.0, f64::max), UPDATE_BAR);
            num_weights += doubt.len();
            num_doubtful += doubt.iter().filter(|d| **d > UPDATE_BAR).count();
        }
    }
    norm_bar.done("gradient norm");
    moments_bar.done("moments");
    weights_bar.done("weights after one step");
    println!("{num_doubtful} of {num_weights} weights have a gradient that is hardly more than its error");
    assert!(num_doubtful * 1000 < num_weights, "{num_doubtful} of {num_weights}");
}

#[test]
fn texts_have_the_same_tokens_and_back() {
    #[derive(Deserialize)]
    struct Encoded {
        tokens: Vec<u32>,
    }
    #[derive(Deserialize)]
    struct Decoded {
        text: String,
    }
    for model in MODELS {
        let folder = fixture::folder(model);
        let (said, _) = reference(model);
        let lines: Vec<Value> = said.texts.iter().map(|t| json!({"text": t.text})).collect();
        for (theirs, ours) in said.texts.iter().zip(score::<Encoded>(&folder, &["--encode"], &lines)) {
            assert_eq!(ours.tokens, theirs.tokens, "{model}: {:?}", theirs.text);
        }
        let lines: Vec<Value> = said.texts.iter().map(|t| json!({"tokens": t.tokens})).collect();
        for (theirs, ours) in said.texts.iter().zip(score::<Decoded>(&folder, &["--decode"], &lines)) {
            assert_eq!(ours.text, theirs.decoded, "{model}: {:?}", theirs.tokens);
        }
    }
}

#[test]
fn every_way_to_name_and_write_a_model_is_the_same_model() {
    let lines = [json!({"tokens": (0..50).collect::<Vec<u32>>()})];
    let score = |weights: &Path| score::<Value>(weights, &["--generate", "8"], &lines);
    let dir = tempfile::tempdir().expect("a folder");
    for (model, file) in [("llama", "model.safetensors"), ("qwen3", "model.safetensors.index.json")] {
        let whole = score(&fixture::folder(model));
        assert_eq!(score(&fixture::folder(model).join(file)), whole, "{model} by its {file}");

        // The settings of RoPE in the form that the fixture does not have.
        let copied = dir.path().join(model);
        std::fs::create_dir(&copied).expect("made");
        fixture::copy(model, &copied);
        let path = copied.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("copied")).expect("JSON");
        let settings = config.as_object_mut().expect("an object");
        match settings.remove("rope_parameters") {
            Some(rope) => drop(settings.insert("rope_theta".into(), rope["rope_theta"].clone())),
            None => {
                let mut rope = settings.remove("rope_scaling").expect("the classic form");
                rope["rope_theta"] = settings.remove("rope_theta").expect("the classic form");
                settings.insert("rope_parameters".into(), rope);
            }
        }
        std::fs::write(&path, config.to_string()).expect("written");
        assert_eq!(score(&copied), whole, "{model} in the other form");
    }
}

#[test]
fn self_play_runs_a_step_on_a_folder_of_transformers() {
    let dir = tempfile::tempdir().expect("a folder");
    let (weights, run) = (dir.path().join("model"), dir.path().join("R"));
    std::fs::create_dir(&weights).expect("made");
    fixture::copy("qwen3", &weights);
    let sets = [
        "prompt_format=azr",
        "selfplay.batch_size=2",
        "selfplay.seed_factor=1",
        "selfplay.num_probes=2",
        "selfplay.max_seed_passes=1",
        "rollout.max_propose=24",
        "rollout.max_solve=24",
    ];
    let args = ["--weights", fixture::text(&weights), "--steps", "1", "--out", fixture::text(&run)];
    let output = command::azr(&args)
        .args(["--threads", "2", "--executors", "1"])
        .args(sets.iter().flat_map(|s| ["--set", s]))
        .output()
        .expect("the executable starts");
    command::expect_code(&output, 0);
    let checkpoint = command::checkpoint(&run, 1);
    for file in ["resolved.toml", "metrics.jsonl", "trace.jsonl"] {
        assert!(run.join(file).metadata().is_ok_and(|m| m.len() > 0), "{file}");
    }
    let metrics = command::json_lines(&run.join("metrics.jsonl")).remove(0);
    assert_eq!((&metrics["step"], &metrics["prompts_left_out"]), (&json!(1), &json!(0)));
    assert!(metrics["trained_tokens"].as_u64().is_some_and(|n| n > 0), "{metrics}");

    // The checkpoint is a model of its own, with the tokenizer of the first and weights that moved a little.
    let before = ModelFiles::open(&weights).expect("a model");
    let after = ModelFiles::open(&checkpoint).expect("a checkpoint is a model");
    assert_eq!((&before.spec, &before.eos, before.bos), (&after.spec, &after.eos, after.bos));
    let load = |files: &ModelFiles| ParamTable::new(&files.spec).load(&files.tensors).expect("whole").concat();
    let moved = max_error(&load(&after), &load(&before));
    assert!(moved > 0.0 && moved < 1e-2, "the weights moved by {moved}");
}
