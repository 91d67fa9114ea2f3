//! What is fuzzed: one function a target, each taking any bytes and panicking when a promise is broken. The crate beside this
//! file runs them under libFuzzer; `tests/it/fuzz.rs` runs the same functions on a stable compiler.

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use azr::base::rng::{Purpose, Rng};
use azr::cli::args::Cli;
use azr::cli::config::Layers;
use azr::exec::normal_form::normal_form;
use azr::exec::policy;
use azr::exec::pool::{Pool, PoolConfig};
use azr::exec::protocol::{Call, Outcome, Profile, Request, Verdict, frame, receive, take_frames};
use azr::exec::source::{self, FunctionRule};
use azr::exec::value::Value;
use azr::model::params::ParamTable;
use azr::pretrain::generator;
use azr::selfplay::parse;
use azr::selfplay::prompt::{Format, NUM_INDUCTION_INPUTS, Piece, SPECIAL_TOKENS};
use azr::selfplay::task::{Task, TaskKind};
use azr::weights::safetensors::TensorFiles;
use azr::weights::spec::ModelSpec;
use azr_tokenizer::{Specials, Tokenizer};
use clap::Parser;

/// A target: its name, and what it does with some bytes.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("literal", literal),
    ("values", values),
    ("frames", frames),
    ("completion", completion),
    ("policy", policies),
    ("programs", programs),
    ("safetensors", safetensors),
    ("config_json", config_json),
    ("tokenizer_json", tokenizer_json),
    ("run_toml", run_toml),
];

/// The literal parser: what it takes, it writes so that it reads the same again.
pub fn literal(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(value) = Value::parse(&text) {
        same_again(&value);
    }
    if let Ok(args) = Value::parse_args(&text) {
        args.iter().for_each(same_again);
    }
}

fn same_again(value: &Value) {
    let text = value.repr();
    // A literal may be within the limits of length while its repr, with escapes spelt out, is not.
    let Ok(again) = Value::parse(&text) else {
        assert!(text.len() > azr::exec::value::MAX_TEXT, "{text} does not read back");
        return;
    };
    // Python's repr of a complex number may read as one with the other zero for its real part, there and here.
    let other_zero = text.contains('j') && (text.contains("-0") || again.repr().contains("-0"));
    assert!(other_zero || again.repr() == text, "{text} has one repr, not {}", again.repr());
    assert!(value.holds_nan() || value.py_eq(&again) && again.py_eq(value), "{text} equals itself");
}

/// The value codec: a value made from the bytes survives its repr, and equality is symmetric.
pub fn values(data: &[u8]) {
    let mut bytes = data.iter().copied();
    let (a, b) = (value(&mut bytes, 0), value(&mut bytes, 0));
    same_again(&a);
    assert_eq!(a.py_eq(&b), b.py_eq(&a), "{} and {}", a.repr(), b.repr());
    if a.is_hashable() && b.is_hashable() {
        let set = Value::parse(&format!("{{{}, {}}}", a.repr(), b.repr()));
        if let (Ok(Value::Set(members)), false) = (set, a.holds_nan() || b.holds_nan()) {
            assert_eq!(members.len() == 1, a.py_eq(&b), "a set joins what is equal: {} and {}", a.repr(), b.repr());
        }
    }
}

fn value(bytes: &mut impl Iterator<Item = u8>, depth: usize) -> Value {
    let mut next = || bytes.next().unwrap_or(0);
    let (kind, size) = (next(), usize::from(next()) % 4);
    let text = |n: usize, next: &mut dyn FnMut() -> u8| (0..n).map(|_| char::from(next())).collect::<String>();
    match kind % if depth > 4 { 7 } else { 12 } {
        0 => Value::None,
        1 => Value::Bool(size % 2 == 0),
        2 => Value::Int(i64::from_le_bytes(std::array::from_fn(|_| next())).into()),
        3 => Value::Int((size as i64 - 2).into()),
        4 => Value::Float(f64::from_bits(u64::from_le_bytes(std::array::from_fn(|_| next())))),
        5 => Value::Str(text(size * 3, &mut next)),
        6 => Value::Bytes((0..size).map(|_| next()).collect()),
        7 => Value::List((0..size).map(|_| value(bytes, depth + 1)).collect()),
        8 => Value::Tuple((0..size).map(|_| value(bytes, depth + 1)).collect()),
        9 => Value::parse(&format!("{{{}}}", value(bytes, depth + 5).repr())).unwrap_or(Value::None),
        10 => Value::parse(&format!("{{{}: {}}}", value(bytes, depth + 5).repr(), value(bytes, depth + 1).repr()))
            .unwrap_or(Value::None),
        // In Python, -128j is minus 128j, whose real part is -0.0: a real part of 0 does not survive its repr there either.
        _ => Value::Complex(f64::from(next()) + 0.5, f64::from(next()) - 128.0),
    }
}

/// The frame protocol: no bytes panic it, and what it took apart is what was put together.
pub fn frames(data: &[u8]) {
    let _ = receive::<Verdict>(&mut &data[..]);
    let _ = take_frames::<Outcome>(data, 64);
    let text = String::from_utf8_lossy(data).into_owned();
    let call = Call { args: text.clone(), expect: Some(text) };
    let mut bytes = frame(&call);
    bytes.extend(frame(&call));
    let whole: Vec<Call> = take_frames(&bytes, usize::MAX);
    assert_eq!(whole, [call.clone(), call]);
    bytes.truncate(bytes.len() - 1);
    assert_eq!(take_frames::<Call>(&bytes, usize::MAX).len(), 1, "half a frame is none");
}

/// The completion parser: no completion panics it, and a draft is what it should be.
pub fn completion(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let source = Task::identity(TaskKind::Deduction);
    for (format, pieces) in
        [(Format::Azr, vec![Piece::Text(text.clone().into_owned())]), (Format::Compact, split(&text))]
    {
        for kind in TaskKind::ALL {
            for (seeding, finished) in [(false, true), (true, true), (false, false)] {
                let rules = parse::Rules { function_rule: FunctionRule::Any, seeding };
                let read = parse::proposal(format, kind, &pieces, finished, Some(&source), &[], rules);
                if let Ok(draft) = read.draft {
                    let wanted = if kind == TaskKind::Induction { NUM_INDUCTION_INPUTS } else { 1 };
                    assert_eq!(draft.inputs.len(), wanted);
                    assert!(
                        kind == TaskKind::Induction
                            || source::with_entry_point(&draft.program, FunctionRule::Any).is_ok()
                    );
                }
                let read = parse::answer(format, kind, &pieces, finished);
                assert!(finished || format == Format::Azr || !read.format_ok, "a cut-off answer is no answer");
            }
        }
    }
}

fn split(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((at, name)) =
        SPECIAL_TOKENS.iter().filter_map(|name| Some((rest.find(name)?, *name))).min_by_key(|(at, _)| *at)
    {
        if at > 0 {
            pieces.push(Piece::Text(rest[..at].to_owned()));
        }
        pieces.push(Piece::Special(name));
        rest = &rest[at + name.len()..];
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    pieces
}

/// The syntax policy and everything else that reads sources: no program panics them, and renaming changes no normal form.
pub fn policies(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let allowed = policy::check(&text).is_ok();
    let form = normal_form(&text);
    assert!(!allowed || form.is_some(), "what is allowed parses");
    let _ = source::complexity(&text);
    let _ = source::calls_composites(&text, 2);
    if let Some(clean) = source::cleaned(&text) {
        assert!(clean.is_empty() || normal_form(&clean).is_some(), "cleaning keeps a program a program: {clean:?}");
    }
    if let Ok(program) = source::with_entry_point(&text, FunctionRule::Any) {
        // A name that has to make room for the entry point's may be one that the program does not define.
        let made_room = program.contains("f_") && !text.contains("f_");
        assert!(made_room || normal_form(&program) == form, "renaming the entry point changes no normal form");
    }
}

/// The executor of the program target. Under libFuzzer `AZR_EXECUTABLE` names a built `azr`, whose workers it uses.
fn pool() -> &'static Mutex<Pool> {
    static POOL: OnceLock<Mutex<Pool>> = OnceLock::new();
    POOL.get_or_init(|| {
        let named = std::env::var_os("AZR_EXECUTABLE").map(PathBuf::from);
        let executable = named.or(option_env!("CARGO_BIN_EXE_azr").map(PathBuf::from));
        let config = PoolConfig { cpu_ms_propose: 200, cpu_ms_answer: 400, executable, ..PoolConfig::default() };
        Mutex::new(Pool::start(&config).expect("AZR_EXECUTABLE names a built azr, and the sandbox is whole"))
    })
}

/// The executor: a generated program, bent by the bytes, gets the same verdict every time, and what is valid as a proposal
/// gives the same value as an answer.
pub fn programs(data: &[u8]) {
    let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|j| data.get(i * 8 + j).copied().unwrap_or(0)));
    let mut rng = Rng::new(word(0), Purpose::Test, word(1), 0);
    let program = generator::program(&mut rng, None);
    let args = generator::input(&mut rng, &program.params);
    let mut code = program.code.into_bytes();
    for pair in data.get(16..).unwrap_or(&[]).chunks_exact(2) {
        if let ([at, with], false) = (pair, code.is_empty()) {
            let at = usize::from(*at) * code.len() / 256;
            match with % 3 {
                0 => drop(code.remove(at)),
                1 => code[at] = with / 3 + 32,
                _ => code.insert(at, with / 3 + 32),
            }
        }
    }
    let code = String::from_utf8_lossy(&code).into_owned();
    let request =
        |profile| Request { program: code.clone(), calls: vec![Call { args: args.clone(), expect: None }], profile };
    let requests = [Profile::Propose, Profile::Propose, Profile::Answer].map(request).into();
    let verdicts = pool().lock().expect("no target panics inside").run(requests).expect("the pool answers");
    let timed = |v: &Verdict| v.calls.iter().any(|o| matches!(o, Outcome::TimeoutCpu | Outcome::TimeoutWall));
    if verdicts.iter().any(timed) {
        return;
    }
    let (first, second) = (&verdicts[0], &verdicts[1]);
    assert_eq!((&first.rejection, &first.calls), (&second.rejection, &second.calls), "{code}({args})");
    if let [Outcome::Value { text, .. }] = first.calls.as_slice() {
        let answer = &verdicts[2].calls[0];
        assert!(matches!(answer, Outcome::Value { text: t, .. } if t == text), "{code}({args}): {text} and {answer}");
    }
}

fn file(name: &str, data: &[u8]) -> PathBuf {
    let path =
        std::env::temp_dir().join(format!("azr-fuzz-{}-{:?}-{name}", std::process::id(), std::thread::current().id()));
    std::fs::write(&path, data).expect("the temporary folder takes files");
    path
}

/// Weights: no file panics the reader, and every tensor that it lists can be read, or says why not.
pub fn safetensors(data: &[u8]) {
    let path = file("model.safetensors", data);
    if let Ok(tensors) = TensorFiles::open(&path) {
        let names: Vec<String> = tensors.names().map(str::to_owned).collect();
        for name in names {
            let shape = tensors.shape(&name).expect("listed").to_vec();
            if let Ok(values) = tensors.read(&name, &shape) {
                assert_eq!(values.len(), shape.iter().product::<usize>());
            }
        }
    }
    std::fs::remove_file(path).expect("it was written");
}

/// config.json: what is accepted has a parameter table, and reads the same again from what it writes.
pub fn config_json(data: &[u8]) {
    let Ok(json) = serde_json::from_slice(data) else { return };
    let Ok(spec) = ModelSpec::from_config(&json) else { return };
    assert_eq!(ModelSpec::from_config(&spec.to_config()).ok().as_ref(), Some(&spec));
    if spec.num_layers <= 64 {
        assert!(ParamTable::new(&spec).num_params() > 0);
    }
}

/// tokenizer.json: what is accepted encodes and decodes without a panic.
pub fn tokenizer_json(data: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_bytes(data) else { return };
    let tokens = tokenizer.encode("def f(x):\n    return x + 12 # caf\u{e9}", Specials::AsText);
    let _ = tokenizer.decode(&tokens, true);
    let _ = tokenizer.decode(&[0, 1, u32::MAX], false);
    let _ = (tokenizer.vocab_size(), tokenizer.num_ids());
}

/// The run's TOML: an error, or a configuration whose resolved text gives the same configuration.
pub fn run_toml(data: &[u8]) {
    let path = file("run.toml", data);
    let resolve = || {
        let cli = Cli::try_parse_from(["azr".as_ref(), "--config".as_ref(), path.as_os_str()]).expect("a command line");
        let layers = Layers::resolve(&cli.train, None)?;
        layers.config().map(|config| (layers, config))
    };
    if let Ok((layers, config)) = resolve() {
        std::fs::write(&path, layers.resolved()).expect("writable");
        assert_eq!(resolve().map(|(_, again)| again).expect("it reads back"), config);
    }
    std::fs::remove_file(&path).expect("it was written");
}
