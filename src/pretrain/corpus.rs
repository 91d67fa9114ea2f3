//! Documents for pre-training: generated programs, executed by the sandboxed pool, in the six compact task formats.
//!
//! A document is a prompt as self-play writes it, its answer and `<|end|>`; where several pairs of one program follow
//! each other, each ends so. Answers weigh more than what merely leads to them.

use azr_tokenizer::Tokenizer;

use super::generator::{self, Program};
use crate::base::rng::{Purpose, Rng};
use crate::error::Result;
use crate::exec::pool::Pool;
use crate::exec::protocol::{Call, Outcome, Profile, Request};
use crate::selfplay::codec::Codec;
use crate::selfplay::prompt::{self, Format, NUM_INDUCTION_INPUTS, Piece};
use crate::selfplay::task::{Pair, Record, Task, TaskKind};

/// Programs that are executed and mixed at a time.
pub const CHUNK: u64 = 2048;
/// Longest output of a document, in characters; longer ones are copying exercises.
const MAX_OUTPUT: usize = 60;
/// Weight of an answer's tokens; all others weigh 1.
const ANSWER_WEIGHT: f32 = 3.0;
/// Weight of the token that ends an induction proposal's inputs.
const COUNT_WEIGHT: f32 = 10.0;
/// Share of held-out programs: one in this many indices is never trained on.
pub const HELD_OUT_EVERY: u64 = 50;

/// A text to train on: tokens with a weight each.
#[derive(Debug, Clone)]
pub struct Document {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// Weight of each token's loss.
    pub weights: Vec<f32>,
}

/// A program with executed inputs.
#[derive(Debug, Clone)]
pub struct Executed {
    /// The program.
    pub program: Program,
    /// Inputs with outputs, at most ten.
    pub pairs: Vec<Pair>,
}

impl Executed {
    /// A task about the first of its pairs (induction: about all).
    pub fn task(&self, kind: TaskKind) -> Task {
        let pairs = if kind == TaskKind::Induction { self.pairs.clone() } else { vec![self.pairs[0].clone()] };
        Task {
            kind,
            program: self.program.code.clone(),
            pairs,
            message: self.program.message.clone(),
            step: 0,
            normal_form: String::new(),
            num_composites: 0,
            record: Record::default(),
        }
    }
}

/// Texts of generated program number `index` for training the vocabulary: code, message, inputs, and values of every
/// kind that outputs have.
pub fn vocabulary_texts(seed: u64, index: u64) -> Vec<String> {
    let mut rng = Rng::new(seed, Purpose::Generate, index, 0);
    let program = generator::program(&mut rng, None);
    let words: Vec<&str> = (0..4).map(|_| *rng.choose(&generator::WORDS)).collect();
    let bool_value = generator::value(&mut rng, generator::Ty::Bool);
    let [a, b, c, d] = words[..] else { unreachable!("four words") };
    let values = format!("['{a}', '{b}', '{a}'], [-1, 2, -3], {{'{c}': 1, '{d}': -2}}, '{a}', '{c}', {bool_value}");
    vec![program.code, program.message, values]
}

/// Different inputs for parameters of these types, at most ten.
pub fn inputs(rng: &mut Rng, params: &[generator::Ty]) -> Vec<String> {
    let mut inputs: Vec<String> = Vec::new();
    for _ in 0..NUM_INDUCTION_INPUTS {
        let input = generator::input(rng, params);
        if !inputs.contains(&input) {
            inputs.push(input);
        }
    }
    inputs
}

/// Program number `index` with its inputs.
pub fn numbered(seed: u64, index: u64) -> (Program, Vec<String>) {
    let mut rng = Rng::new(seed, Purpose::Generate, index, 0);
    let program = generator::program(&mut rng, None);
    let inputs = inputs(&mut rng, &program.params);
    (program, inputs)
}

/// Generates and executes the programs with these indices; those without a single short output are left out.
///
/// # Errors
/// When the executor stops.
pub fn execute(pool: &Pool, seed: u64, indices: impl Iterator<Item = u64>) -> Result<Vec<Executed>> {
    execute_programs(pool, indices.map(|index| numbered(seed, index)).collect())
}

/// Executes programs on their inputs; those without a single short output are left out.
///
/// # Errors
/// When the executor stops.
pub fn execute_programs(pool: &Pool, programs: Vec<(Program, Vec<String>)>) -> Result<Vec<Executed>> {
    let request = |(program, inputs): &(Program, Vec<String>)| {
        let calls = inputs.iter().map(|args| Call { args: args.clone(), expect: None }).collect();
        Request { program: program.code.clone(), calls, profile: Profile::Answer }
    };
    let verdicts = pool.run(programs.iter().map(request).collect())?;
    let executed = programs.into_iter().zip(verdicts).map(|((program, inputs), verdict)| {
        let pair = |(input, outcome): (String, Outcome)| match outcome {
            Outcome::Value { text, .. } if text.len() <= MAX_OUTPUT => Some(Pair { input, output: text }),
            _ => None,
        };
        Executed { program, pairs: inputs.into_iter().zip(verdict.calls).filter_map(pair).collect() }
    });
    Ok(executed.filter(|e| !e.pairs.is_empty()).collect())
}

/// Documents of chunk number `chunk`, mixed.
///
/// # Errors
/// When the executor stops.
pub fn documents(pool: &Pool, codec: &Codec, seed: u64, chunk: u64) -> Result<Vec<Document>> {
    let indices = (chunk * CHUNK..(chunk + 1) * CHUNK).filter(|i| i % HELD_OUT_EVERY != 0);
    let executed = execute(pool, seed, indices)?;
    let mut rng = Rng::new(seed, Purpose::Generate, chunk, 1);
    let mut documents = Vec::new();
    for item in &executed {
        // Per program: about two texts of deduction, and one of another kind.
        let mut writer = Writer { codec, document: Document { tokens: Vec::new(), weights: Vec::new() } };
        documents.push(writer.pairs(item, TaskKind::Deduction, &mut rng));
        if rng.below(2) == 0 {
            documents.push(writer.pairs(item, TaskKind::Deduction, &mut rng));
        }
        match rng.weighted(&[32.0, 30.0, 22.0, 16.0]) {
            0 => documents.push(writer.pairs(item, TaskKind::Abduction, &mut rng)),
            1 => documents.extend(writer.induction(item, &mut rng)),
            2 => documents.push(writer.proposal(item, &executed, &mut rng)),
            _ => documents.extend(writer.induction_proposal(item)),
        }
    }
    rng.shuffle(&mut documents);
    Ok(documents)
}

struct Writer<'a> {
    codec: &'a Codec,
    document: Document,
}

impl Writer<'_> {
    fn write(&mut self, pieces: &[Piece], weight: f32) {
        let tokens = self.codec.encode(pieces);
        self.document.weights.extend(std::iter::repeat_n(weight, tokens.len()));
        self.document.tokens.extend(tokens);
    }

    fn answer(&mut self, text: &str) {
        self.write(&[Piece::Text(text.to_owned()), Piece::Special("<|end|>")], ANSWER_WEIGHT);
    }

    fn finish(&mut self) -> Document {
        std::mem::replace(&mut self.document, Document { tokens: Vec::new(), weights: Vec::new() })
    }

    /// A deduction or abduction prompt with its answer, and up to two more pairs of the program.
    fn pairs(&mut self, item: &Executed, kind: TaskKind, rng: &mut Rng) -> Document {
        let count = (1 + rng.below(3)).min(item.pairs.len());
        let picked = rng.distinct(item.pairs.len(), count);
        for (i, at) in picked.into_iter().enumerate() {
            let pair = &item.pairs[at];
            let (given, asked, question, reply) = match kind {
                TaskKind::Deduction => ("<|input|>", "<|output|>", &pair.input, &pair.output),
                _ => ("<|output|>", "<|input|>", &pair.output, &pair.input),
            };
            if i == 0 {
                let head = if kind == TaskKind::Deduction { "<|deduce|>" } else { "<|abduce|>" };
                let code = Piece::Text(item.program.code.clone());
                self.write(&[Piece::Special(head), Piece::Special("<|code|>"), code], 1.0);
            }
            self.write(&[Piece::Special(given), Piece::Text(question.clone()), Piece::Special(asked)], 1.0);
            self.answer(reply);
        }
        self.finish()
    }

    fn induction(&mut self, item: &Executed, rng: &mut Rng) -> Option<Document> {
        if item.pairs.len() < NUM_INDUCTION_INPUTS / 2 {
            return None;
        }
        let mut task = item.task(TaskKind::Induction);
        rng.shuffle(&mut task.pairs);
        task.pairs.truncate(NUM_INDUCTION_INPUTS / 2);
        // Shown are the first half of the pairs, so double them.
        task.pairs.extend(task.pairs.clone());
        self.write(&prompt::solver(Format::Compact, &task), 1.0);
        self.answer(&item.program.code);
        Some(self.finish())
    }

    fn proposal(&mut self, item: &Executed, others: &[Executed], rng: &mut Rng) -> Document {
        let kind = [TaskKind::Abduction, TaskKind::Deduction][rng.below(2)];
        let count = [0, 1, 2, 4, 6][rng.weighted(&[1.0, 2.0, 2.0, 1.0, 2.0])];
        let references: Vec<Task> = (0..count).map(|_| rng.choose(others).task(kind)).collect();
        let references: Vec<&Task> = references.iter().collect();
        // References are not learnt: after an input comes their output, but the proposal's end.
        self.write(&prompt::proposer(Format::Compact, kind, &references, &[]), 0.0);
        self.write(&[Piece::Text(item.program.code.clone()), Piece::Special("<|input|>")], 1.0);
        self.write(&[Piece::Text(item.pairs[0].input.clone()), Piece::Special("<|end|>")], 1.0);
        self.finish()
    }

    fn induction_proposal(&mut self, item: &Executed) -> Option<Document> {
        if item.pairs.len() < NUM_INDUCTION_INPUTS {
            return None;
        }
        let task = item.task(TaskKind::Induction);
        self.write(&prompt::proposer(Format::Compact, TaskKind::Induction, &[&task], &[]), 1.0);
        for (i, pair) in item.pairs.iter().enumerate() {
            if i > 0 {
                self.write(&[Piece::Special("<|input|>")], ANSWER_WEIGHT);
            }
            self.write(&[Piece::Text(pair.input.clone())], 1.0);
        }
        // Ten inputs and no fewer: counting them is the hard part.
        self.write(&[Piece::Special("<|message|>")], COUNT_WEIGHT);
        self.write(&[Piece::Text(item.program.message.clone())], 1.0);
        self.write(&[Piece::Special("<|end|>")], 1.0);
        Some(self.finish())
    }
}

/// The compact codec of a tokenizer.
///
/// # Errors
/// When the tokenizer lacks the format's special tokens.
pub fn compact_codec(tokenizer: Tokenizer) -> Result<Codec> {
    Codec::new(std::sync::Arc::new(tokenizer), Format::Compact, None)
}
