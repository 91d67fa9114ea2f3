//! A model that emits nothing but hostile programs, for a whole step of the real loop: rewards are right, nothing leaks, and
//! the next step runs. The model is the CPU's, except that what it draws is scripted; its probabilities are its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use azr::base::stop::StopFlag;
use azr::compute::cpu::backend::CpuBackend;
use azr::compute::ops::{AdamW, Backend, Draw, Drawn, HeadReport, HeadTarget, Heads, Norms, RopeTable, Span};
use azr::exec::pool::Pool;
use azr::model::forward::Decoder;
use azr::model::params::ParamTable;
use azr::pipeline::config::{Config, PromptFormat};
use azr::pipeline::step::{Run, format, rules};
use azr::rollout::engine::Engine;
use azr::selfplay::buffer::Buffers;
use azr::selfplay::codec::Codec;
use azr::selfplay::intrinsic::Seen;
use azr::selfplay::prompt::Piece;
use azr::selfplay::task::{Config as Which, Role, Task, TaskKind};
use azr::train::optim::Trainer;
use azr::weights::model_files::ModelFiles;

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

impl Backend for Scripted {
    type Buf = <CpuBackend as Backend>::Buf;
    type Linear = <CpuBackend as Backend>::Linear;
    type Kv = <CpuBackend as Backend>::Kv;

    fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.cpu.scope(f)
    }
    fn lanes(&self, _: usize) -> usize {
        1
    }
    fn split<T: Sync, R: Send>(&self, parts: &[T], f: impl Fn(&Self, &T) -> R + Sync + Send) -> Vec<R> {
        parts.iter().map(|p| f(self, p)).collect()
    }
    fn zeros(&self, len: usize) -> Self::Buf {
        self.cpu.zeros(len)
    }
    fn scratch(&self, len: usize) -> Self::Buf {
        self.cpu.scratch(len)
    }
    fn copy(&self, y: &mut Self::Buf, x: &Self::Buf) {
        self.cpu.copy(y, x);
    }
    fn upload(&self, values: &[f32]) -> Self::Buf {
        self.cpu.upload(values)
    }
    fn download(&self, buf: &Self::Buf) -> Vec<f32> {
        self.cpu.download(buf)
    }
    fn write(&self, buf: &mut Self::Buf, values: &[f32]) {
        self.cpu.write(buf, values);
    }
    fn clear(&self, buf: &mut Self::Buf) {
        self.cpu.clear(buf);
    }
    fn add(&self, y: &mut Self::Buf, x: &Self::Buf) {
        self.cpu.add(y, x);
    }
    fn linear(&self, w: &Self::Buf, n: usize, k: usize, backward: bool) -> Self::Linear {
        self.cpu.linear(w, n, k, backward)
    }
    fn relayout(&self, linear: &mut Self::Linear, w: &Self::Buf) {
        self.cpu.relayout(linear, w);
    }
    fn matmul(&self, x: &Self::Buf, w: &Self::Linear, bias: Option<&Self::Buf>, y: &mut Self::Buf, add: bool) {
        self.cpu.matmul(x, w, bias, y, add);
    }
    fn matmul_backward_input(&self, dy: &Self::Buf, w: &Self::Linear, dx: &mut Self::Buf, add: bool) {
        self.cpu.matmul_backward_input(dy, w, dx, add);
    }
    fn matmul_backward_weight(&self, dy: &Self::Buf, x: &Self::Buf, n: usize, k: usize, dw: &mut Self::Buf) {
        self.cpu.matmul_backward_weight(dy, x, n, k, dw);
    }
    fn bias_backward(&self, dy: &Self::Buf, n: usize, db: &mut Self::Buf) {
        self.cpu.bias_backward(dy, n, db);
    }
    fn embed(&self, tokens: &[u32], table: &Self::Buf, d: usize) -> Self::Buf {
        self.cpu.embed(tokens, table, d)
    }
    fn embed_backward(&self, tokens: &[u32], dx: &Self::Buf, d: usize, dtable: &mut Self::Buf) {
        self.cpu.embed_backward(tokens, dx, d, dtable);
    }
    fn rmsnorm(&self, x: &Self::Buf, w: &Self::Buf, eps: f32, y: &mut Self::Buf, rstd: &mut Self::Buf) {
        self.cpu.rmsnorm(x, w, eps, y, rstd);
    }
    fn rmsnorm_backward(
        &self,
        x: &Self::Buf,
        w: &Self::Buf,
        rstd: &Self::Buf,
        dy: &Self::Buf,
        dx: &mut Self::Buf,
        dw: &mut Self::Buf,
    ) {
        self.cpu.rmsnorm_backward(x, w, rstd, dy, dx, dw);
    }
    fn rope(&self, heads: Heads, qkv: &mut Self::Buf, spans: &[Span<'_>], table: &RopeTable, norms: Norms<'_, Self>) {
        self.cpu.rope(heads, qkv, spans, table, norms);
    }
    fn rope_backward(
        &self,
        heads: Heads,
        dqkv: &mut Self::Buf,
        raw: &Self::Buf,
        spans: &[Span<'_>],
        table: &RopeTable,
        norms: Norms<'_, Self>,
        dnorms: Option<(&mut Self::Buf, &mut Self::Buf)>,
    ) {
        self.cpu.rope_backward(heads, dqkv, raw, spans, table, norms, dnorms);
    }
    fn new_kv(&self, heads: Heads, num_layers: usize, num_pages: usize) -> azr::Result<Self::Kv> {
        self.cpu.new_kv(heads, num_layers, num_pages)
    }
    fn copy_page(&self, kv: &mut Self::Kv, from: u32, to: u32) {
        self.cpu.copy_page(kv, from, to);
    }
    fn write_kv(&self, heads: Heads, kv: &Self::Kv, layer: usize, qkv: &Self::Buf, spans: &[Span<'_>]) {
        self.cpu.write_kv(heads, kv, layer, qkv, spans);
    }
    fn attention(
        &self,
        heads: Heads,
        kv: &Self::Kv,
        layer: usize,
        qkv: &Self::Buf,
        spans: &[Span<'_>],
        out: &mut Self::Buf,
        lse: &mut Self::Buf,
    ) {
        self.cpu.attention(heads, kv, layer, qkv, spans, out, lse);
    }
    fn attention_backward(
        &self,
        heads: Heads,
        kv: &Self::Kv,
        layer: usize,
        qkv: &Self::Buf,
        out: &Self::Buf,
        lse: &Self::Buf,
        dout: &Self::Buf,
        spans: &[Span<'_>],
        dqkv: &mut Self::Buf,
    ) {
        self.cpu.attention_backward(heads, kv, layer, qkv, out, lse, dout, spans, dqkv);
    }
    fn swiglu(&self, gate_up: &Self::Buf, f: usize, h: &mut Self::Buf) {
        self.cpu.swiglu(gate_up, f, h);
    }
    fn swiglu_backward(&self, gate_up: &Self::Buf, dh: &Self::Buf, f: usize, dgate_up: &mut Self::Buf) {
        self.cpu.swiglu_backward(gate_up, dh, f, dgate_up);
    }
    fn draw(&self, x: &Self::Buf, d: usize, head: &Self::Linear, draws: &[(usize, Draw, u32)], _: u64) -> Vec<Drawn> {
        let one = |(row, how, position): &(usize, Draw, u32)| {
            let token = self.token(how.seq, *position);
            let logits = self.cpu.logits(&self.cpu.upload(&x[row * d..][..d]), head);
            let scaled: Vec<f64> =
                logits[..self.vocabulary].iter().map(|l| f64::from(*l) / f64::from(how.temperature)).collect();
            let most = scaled.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scaled.iter().map(|l| (l - most).exp()).sum();
            let logprob = scaled[token as usize] - most - sum.ln();
            Drawn { token, logprob: logprob as f32, entropy: 0.0 }
        };
        draws.iter().map(one).collect()
    }
    fn logits(&self, x: &Self::Buf, head: &Self::Linear) -> Vec<f32> {
        self.cpu.logits(x, head)
    }
    fn policy_head(
        &self,
        x: &Self::Buf,
        d: usize,
        head: &Self::Linear,
        targets: &[HeadTarget],
        grads: Option<(&mut Self::Buf, &mut Self::Buf)>,
    ) -> Vec<HeadReport> {
        self.cpu.policy_head(x, d, head, targets, grads)
    }
    fn sum_of_squares(&self, buf: &Self::Buf) -> f64 {
        self.cpu.sum_of_squares(buf)
    }
    fn adamw(&self, p: &mut Self::Buf, g: &Self::Buf, m: &mut Self::Buf, v: &mut Self::Buf, hyper: &AdamW) {
        self.cpu.adamw(p, g, m, v, hyper);
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
    let decoder = Decoder::new(backend, model.spec.clone(), &weights, true);
    let limits = Engine::<Scripted>::limits(64, model.spec.max_position_embeddings, 0);
    let engine = Engine::new(&decoder, limits, 1).expect("room");
    let mut pool = config.executor.pool(2);
    pool.executable = self::config().executable;
    let mut buffers = Buffers::new(config.selfplay.buffer_size);
    for kind in TaskKind::ALL {
        buffers.push(Arc::new(Task::identity(kind)));
    }
    Run {
        trainer: Trainer::new(decoder, config.train.optim()),
        engine,
        pool: Pool::start(&pool).expect("the pool starts"),
        codec,
        tokenizer,
        rules,
        buffers,
        seen: Seen::default(),
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
        let (metrics, trace) = run.step(step).expect("the step ends");
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
    let (metrics, _) = run.step(3).expect("the next step runs");
    assert!(metrics.valid > 0.5, "{} {:?}", metrics.valid, metrics.rejections);
    assert_eq!(metrics.configs["solve_induction"].reward, 1.0, "the program that gives back its argument");
    for zygote in run.pool.zygotes() {
        assert_eq!(num_children(*zygote), Some(0), "every zygote lives, and no child of one is left");
    }
}
