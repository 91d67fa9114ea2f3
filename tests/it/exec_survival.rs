//! A model that emits nothing but hostile programs, for a whole step of the real loop: rewards are right, nothing leaks, and
//! the next step runs. The model is the CPU's, except that what it draws is scripted; its probabilities are its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use azr::base::stop::StopFlag;
use azr::compute::cpu::backend::CpuBackend;
use azr::compute::ops::{
    AdamW, Angles, Backend, Draw, Drawn, HeadReport, HeadTarget, Heads, LayerKv, MomentPrecision, Norms, Seat, Span,
    Weight,
};
use azr::exec::pool::Pool;
use azr::model::forward::Decoder;
use azr::model::params::ParamTable;
use azr::pipeline::carry::Carried;
use azr::pipeline::config::{Config, PromptFormat};
use azr::pipeline::step::{Run, format, rules};
use azr::rollout::engine::Engine;
use azr::selfplay::alarm::Alarms;
use azr::selfplay::buffer::Buffers;
use azr::selfplay::codec::Codec;
use azr::selfplay::intrinsic::Seen;
use azr::selfplay::prompt::Piece;
use azr::selfplay::task::{Config as Which, Role, Task, TaskKind};
use azr::selfplay::warmth::Warmth;
use azr::train::optim::Trainer;
use azr::weights::model_files::ModelFiles;
use azr::weights::safetensors::Sink;

use crate::exec::config;
use crate::exec_hostile::num_children;

/// Samples per configuration.
const BATCH: usize = 10;
/// Probes of a valid task.
const PROBES: usize = 2;

/// Programs as proposals and as induction answers, one per sample.
const PROGRAMS: [&str; BATCH] = [
    "def f(x):\n    while True: pass",
    "def f(x):\n    return sum(iter(int, 1))",
    "def f(x):\n    y = []\n    while True: y.append(bytes(1 << 22))",
    "import os\ndef f(x):\n    os._exit(0)",
    "def f(x):\n    raise SystemExit(0)",
    "class A:\n    def __eq__(self, o): return True\n    def __repr__(self): return '1'\ndef f(x):\n    return A()",
    "def f(x):\n    y = iter([])\n    for _ in range(200000): y = map(str, y)\n    return list(y)",
    "def f(x):\n    while True: print('x' * 1000)",
    "def f(x):\n    return __import__('os').listdir('/')",
    "def f(x):\n    return f(x)",
];

/// Answers that are no programs, one per sample.
const ANSWERS: [&str; BATCH] = [
    "__import__('os').system('id')",
    "0) or True or f(0",
    "eval('1')",
    "[x for x in ().__class__.__base__.__subclasses__()]",
    "lambda: 0",
    "gold_output",
    "[[[[[[[[[[[[[[[[[[[[",
    "'a' * 10 ** 10",
    "9 ** 9 ** 9",
    "nan",
];

type Tokens = Vec<u32>;

/// What the model says for a sequence id.
type Script = Box<dyn Fn(u64) -> Tokens + Send + Sync>;

/// The CPU backend with a script in the place of chance.
struct Scripted {
    cpu: CpuBackend,
    vocabulary: usize,
    script: Mutex<Script>,
    /// Position of each sequence's first drawn token.
    starts: Mutex<HashMap<u64, u32>>,
}

impl Scripted {
    fn token(&self, seq: u64, position: u32) -> u32 {
        let start = *self.starts.lock().expect("no panic inside").entry(seq).or_insert(position);
        let tokens = self.script.lock().expect("no panic inside")(seq);
        tokens[(position - start) as usize]
    }
}

/// Operations that are the CPU's.
macro_rules! as_cpu {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {
        $(fn $name(&self, $($arg: $ty),*) -> azr::Result<$ret> { self.cpu.$name($($arg),*) })*
    };
}

type Cpu<'a> = Weight<'a, <CpuBackend as Backend>::Param, <CpuBackend as Backend>::Linear>;

impl Backend for Scripted {
    type Buf = <CpuBackend as Backend>::Buf;
    type Act = <CpuBackend as Backend>::Act;
    type Param = <CpuBackend as Backend>::Param;
    type Moments = <CpuBackend as Backend>::Moments;
    type Linear = <CpuBackend as Backend>::Linear;
    type Kv = <CpuBackend as Backend>::Kv;
    type Batch = <CpuBackend as Backend>::Batch;
    type Reports = <CpuBackend as Backend>::Reports;
    type Clip = <CpuBackend as Backend>::Clip;
    type Seats = <CpuBackend as Backend>::Seats;

    const MAX_ROWS: usize = CpuBackend::MAX_ROWS;

    fn param_from(
        &self,
        len: usize,
        source: impl FnOnce(Sink<'_>) -> azr::Result<()>,
    ) -> azr::Result<<CpuBackend as Backend>::Param> {
        self.cpu.param_from(len, source)
    }

    fn seat_rows(&self, seats: &Self::Seats, _: usize) -> usize {
        match *seats {}
    }
    fn step_seats<'x>(
        &self,
        seats: &mut Self::Seats,
        _: (usize, usize),
        _: Cpu<'_>,
        _: u64,
        _: impl FnOnce(&Self::Batch) -> azr::Result<&'x Self::Act>,
    ) -> azr::Result<()> {
        match *seats {}
    }

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.cpu.scope(f)
    }
    fn lanes(&self, _: usize) -> usize {
        1
    }
    fn split<T: Sync, R: Send>(&self, parts: &[T], f: impl Fn(&Self, &T) -> R + Sync + Send) -> Vec<R> {
        parts.iter().map(|p| f(self, p)).collect()
    }
    fn describe(&self) -> String {
        self.cpu.describe()
    }
    fn num_running(&self) -> usize {
        self.cpu.num_running()
    }
    as_cpu! {
        check(heads: Heads, widths: &[usize]) -> ();
        finish() -> ();
        zeros(len: usize) -> Self::Buf;
        scratch(len: usize) -> Self::Buf;
        write(buf: &mut Self::Buf, values: &[f32]) -> ();
        download(buf: &Self::Buf) -> Vec<f32>;
        clear(buf: &mut Self::Buf) -> ();
        act(len: usize) -> Self::Act;
        upload(values: &[f32]) -> Self::Act;
        values(act: &Self::Act) -> Vec<f32>;
        clear_act(act: &mut Self::Act) -> ();
        copy(y: &mut Self::Act, x: &Self::Act) -> ();
        master(param: &Self::Param) -> Vec<f32>;
        linear(w: &Self::Param, n: usize, k: usize, backward: bool) -> Self::Linear;
        relayout(linear: &mut Self::Linear, w: &Self::Param) -> ();
        matmul(x: &Self::Act, w: Cpu<'_>, bias: Option<&Self::Param>, y: &mut Self::Act, add: bool) -> ();
        gated(x: &Self::Act, w: Cpu<'_>, f: usize, gate_up: Option<&mut Self::Act>, h: &mut Self::Act) -> ();
        swiglu_backward(gate_up: &Self::Act, dh: &Self::Act, f: usize, dgate_up: &mut Self::Act) -> ();
        matmul_backward_input(dy: &Self::Act, w: Cpu<'_>, dx: &mut Self::Act, add: bool) -> ();
        matmul_backward_weight(dy: &Self::Act, x: &Self::Act, n: usize, k: usize, dw: &mut Self::Buf) -> ();
        bias_backward(dy: &Self::Act, n: usize, db: &mut Self::Buf) -> ();
        batch(heads: Heads, tokens: &[u32], spans: &[Span<'_>]) -> Self::Batch;
        embed(batch: &Self::Batch, table: &Self::Param, d: usize, x: &mut Self::Act) -> ();
        seats(heads: Heads, v: usize, capacity: usize, max_tokens: usize) -> Option<Self::Seats>;
        take_seats(seats: &mut Self::Seats, new: &[Seat<'_>], prefixes: &[(usize, &[u32])]) -> ();
        begin_seats(seats: &mut Self::Seats) -> ();
        seats_drew(seats: &mut Self::Seats, count: usize) -> (Vec<Drawn>, f64);
        embed_backward(batch: &Self::Batch, dx: &Self::Act, d: usize, dtable: &mut Self::Buf) -> ();
        rmsnorm(x: &Self::Act, w: &Self::Param, eps: f32, y: &mut Self::Act, rstd: &mut Self::Buf) -> ();
        rmsnorm_backward(x: &Self::Act, w: &Self::Param, rstd: &Self::Buf, dy: &Self::Act, dx: &mut Self::Act,
            dw: &mut Self::Buf) -> ();
        rope(heads: Heads, qkv: &Self::Act, batch: &Self::Batch, angles: &Angles<Self::Buf>,
            norms: Norms<'_, Self::Param>, kv: LayerKv<'_, Self::Kv>, q: &mut Self::Act) -> ();
        rope_backward(heads: Heads, dqkv: &mut Self::Act, raw: Option<&Self::Act>, batch: &Self::Batch,
            angles: &Angles<Self::Buf>, norms: Norms<'_, Self::Param>,
            dnorms: Option<(&mut Self::Buf, &mut Self::Buf)>) -> ();
        new_kv(heads: Heads, num_layers: usize, num_pages: usize) -> Self::Kv;
        copy_pages(kv: &mut Self::Kv, copies: &[(u32, u32)]) -> ();
        attention(heads: Heads, kv: LayerKv<'_, Self::Kv>, q: &Self::Act, batch: &Self::Batch, out: &mut Self::Act,
            lse: &mut Self::Buf) -> ();
        attention_backward(heads: Heads, kv: LayerKv<'_, Self::Kv>, q: &Self::Act, out: &Self::Act, lse: &Self::Buf,
            dout: &Self::Act, batch: &Self::Batch, dqkv: &mut Self::Act) -> ();
        logits(x: &Self::Act, d: usize, head: Cpu<'_>) -> Vec<f32>;
        policy_head(x: &Self::Act, d: usize, head: Cpu<'_>, targets: &[HeadTarget],
            grads: Option<(&mut Self::Act, &mut Self::Buf)>) -> Self::Reports;
        reports(reports: Self::Reports) -> Vec<HeadReport>;
        clip(grads: &[Self::Buf], max_norm: f32) -> Self::Clip;
        norm(clip: &Self::Clip) -> f64;
        moments(len: usize, precision: MomentPrecision) -> Self::Moments;
        read_moments(moments: &Self::Moments, which: usize) -> Vec<f32>;
        write_moments(moments: &mut Self::Moments, values: [&[f32]; 2]) -> ();
        adamw(p: &mut Self::Param, g: &mut Self::Buf, moments: &mut Self::Moments, clip: &Self::Clip,
            hyper: &AdamW) -> ();
    }
    fn draw(
        &self,
        x: &Self::Act,
        d: usize,
        head: Cpu<'_>,
        draws: &[(usize, Draw, u32)],
        _: u64,
    ) -> azr::Result<Vec<Drawn>> {
        let one = |(row, how, position): &(usize, Draw, u32)| {
            let token = self.token(how.seq, *position);
            let logits = self.cpu.logits(&self.cpu.upload(&x[row * d..][..d])?, d, head)?;
            let scaled: Vec<f64> =
                logits[..self.vocabulary].iter().map(|l| f64::from(*l) / f64::from(how.temperature)).collect();
            let most = scaled.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scaled.iter().map(|l| (l - most).exp()).sum();
            let logprob = scaled[token as usize] - most - sum.ln();
            Ok(Drawn { token, logprob: logprob as f32, entropy: 0.0 })
        };
        draws.iter().map(one).collect()
    }
}

/// Configuration and index of a sequence, and whether it is the trained sample and not a probe.
fn parts(id: u64) -> (Which, usize, bool) {
    (Which::ALL[(id >> 24 & 0xff) as usize], (id >> 8 & 0xffff) as usize, id & 0xff == 0)
}

/// Words of the compact format.
fn said(which: Which, trained: bool, program: &str, answer: &str) -> Vec<Piece> {
    let text = |t: &str| Piece::Text(t.to_owned());
    let end = Piece::Special("<|end|>");
    match (which.role, which.kind) {
        (Role::Propose, TaskKind::Induction) if trained => {
            let mut words = vec![text(answer)];
            words.extend((1..10).flat_map(|i| [Piece::Special("<|input|>"), text(&format!("{i}, {i}"))]));
            words.extend([Piece::Special("<|message|>"), text("a function"), end]);
            words
        }
        (Role::Propose, _) if trained => vec![text(program), Piece::Special("<|input|>"), text("1"), end],
        (_, TaskKind::Induction) => vec![text(program), end],
        _ => vec![text(answer), end],
    }
}

fn hostile(codec: &Codec) -> Script {
    let mut words: HashMap<(usize, usize, bool), Tokens> = HashMap::new();
    for which in Which::ALL {
        for index in 0..BATCH {
            for trained in [true, false] {
                let pieces = said(which, trained, PROGRAMS[index], ANSWERS[index]);
                words.insert((which.index(), index, trained), codec.encode(&pieces));
            }
        }
    }
    Box::new(move |id| {
        let (which, index, trained) = parts(id);
        words[&(which.index(), index, trained)].clone()
    })
}

/// A model that has learnt better: each of its programs is new and right, and so are its answers to identity tasks.
fn honest(codec: &Codec) -> Script {
    let mut words: HashMap<(usize, usize, bool), Tokens> = HashMap::new();
    for which in Which::ALL {
        for index in 0..BATCH {
            for trained in [true, false] {
                let program = if which.role == Role::Propose && which.kind != TaskKind::Induction {
                    format!("def f(x):\n    return x{}", " + x".repeat(index))
                } else {
                    "def f(x):\n    return x".to_owned()
                };
                let pieces = said(which, trained, &program, "'Hello world'");
                words.insert((which.index(), index, trained), codec.encode(&pieces));
            }
        }
    }
    Box::new(move |id| {
        let (which, index, trained) = parts(id);
        words[&(which.index(), index, trained)].clone()
    })
}

fn run() -> Run<Scripted> {
    let model = ModelFiles::embedded().expect("the embedded model");
    let mut config = Config { prompt_format: PromptFormat::Compact, ..Config::default() };
    config.selfplay.batch_size = BATCH;
    config.selfplay.num_probes = PROBES;
    config.rollout.max_prompt = 300;
    (config.rollout.max_propose, config.rollout.max_solve) = (200, 200);
    config.executor.cpu_ms_propose = 60;
    config.executor.cpu_ms_answer = 120;
    config.executor.memory_mib = 64;
    let tokenizer = Arc::new(model.tokenizer.clone());
    let format = format(&config, &tokenizer);
    let codec = Codec::new(tokenizer.clone(), format, None).expect("the compact format");
    let rules = rules(&config, &model, format, &codec);
    let weights = ParamTable::new(&model.spec).load(&model.tensors).expect("weights");
    let backend = Scripted {
        cpu: CpuBackend::new(2).expect("threads"),
        vocabulary: model.spec.vocab_size,
        script: Mutex::new(hostile(&codec)),
        starts: Mutex::default(),
    };
    let decoder = Decoder::new(backend, model.spec.clone(), &weights, true).expect("it fits");
    let limits = Engine::<Scripted>::limits(64, model.spec.max_position_embeddings, 0);
    let engine = Engine::new(&decoder, limits, 1).expect("room");
    let mut pool = config.executor.pool(2);
    pool.executable = self::config().executable;
    let mut buffers = Buffers::new(config.selfplay.buffer_size);
    for kind in TaskKind::ALL {
        buffers.push(Arc::new(Task::identity(kind)));
    }
    Run {
        trainer: Trainer::new(decoder, config.train.optim(1)).expect("it fits"),
        engine,
        pool: Pool::start(&pool).expect("the pool starts"),
        codec,
        tokenizer,
        rules,
        buffers,
        carried: Carried::default(),
        seen: Seen::default(),
        alarms: Alarms::default(),
        warmth: Warmth::default(),
        is_updating: false,
        stop: StopFlag::default(),
        config,
    }
}

#[test]
fn the_trainer_survives_a_model_that_emits_only_hostile_programs() {
    let mut run = run();
    let kinds = [TaskKind::Abduction, TaskKind::Deduction, TaskKind::Induction];
    let before: Vec<usize> = kinds.iter().map(|k| run.buffers.of(*k).len()).collect();
    for step in 1..=2 {
        let (metrics, trace) = run.step(step, true).expect("the step ends");
        assert_eq!(metrics.valid, 0.0, "no hostile program becomes a task: {:?}", metrics.rejections);
        for (name, found) in &metrics.configs {
            let expected = if name.starts_with("propose") { -1.0 } else { -0.5 };
            assert_eq!(found.reward, expected, "{name} in step {step}");
            assert_eq!(found.accuracy, 0.0, "{name}");
        }
        assert_eq!(metrics.configs.len(), 6);
        assert!(metrics.loss.is_finite() && metrics.grad_norm.is_finite());
        for what in ["CPU time limit", "memory limit", "policy", "unsupported value", "exception"] {
            assert!(trace.iter().any(|t| t.verdict.contains(what)), "{what} is in the trace");
        }
    }
    let after: Vec<usize> = kinds.iter().map(|k| run.buffers.of(*k).len()).collect();
    assert_eq!(before, after, "nothing entered the buffers");
    let script = honest(&run.codec);
    *run.trainer.decoder().backend().script.lock().expect("no panic inside") = script;
    let (metrics, _) = run.step(3, false).expect("the next step runs");
    assert!(metrics.valid > 0.5, "{} {:?}", metrics.valid, metrics.rejections);
    assert_eq!(metrics.configs["solve_induction"].reward, 1.0, "the program that gives back its argument");
    for zygote in run.pool.zygotes() {
        assert_eq!(num_children(*zygote), Some(0), "every zygote lives, and no child of one is left");
    }
}
