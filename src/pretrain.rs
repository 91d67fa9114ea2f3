//! The embedded model's making, `azr pretrain`: a vocabulary and a small Qwen2 decoder, from generated programs alone.
//!
//! Every draw comes from the seed and every sum has one order, so a seed gives one model, whatever the threads. Not
//! here: self-play (`pipeline`), which starts from what this makes.

pub mod corpus;
pub mod generator;
pub mod grammar;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use azr_tokenizer::Tokenizer;

use crate::base::run_dir::{Content, publish_folder};
use crate::compute::cpu::backend::CpuBackend;
use crate::exec::pool::{Pool, PoolConfig};
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::train::loss::{TrainSeq, nll_sequence};
use crate::train::optim::{OptimConfig, Trainer};
use crate::weights::model_files::{ModelFiles, embedded_generation_config};
use crate::weights::safetensors::{StoredAs, to_bytes};
use crate::weights::spec::{Family, ModelSpec};
use crate::{Error, Result};

/// Programs whose texts train the vocabulary.
const NUM_VOCABULARY_PROGRAMS: u64 = 40_000;
/// Steps over which the learning rate rises.
const WARM_UP: u64 = 100;
/// Part of the run after which the learning rate falls.
const CONSTANT_PART: f64 = 0.6;
/// Chunks of documents that may lie ready.
const CHUNKS_AHEAD: usize = 4;

/// What to make, and how long.
#[derive(Debug, Clone)]
pub struct PretrainConfig {
    /// Seed of weights and programs.
    pub seed: u64,
    /// Tokens to train on.
    pub num_tokens: u64,
    /// Tokens of one step.
    pub batch_tokens: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Model to go on from, or random weights of the [embedded model's shape](embedded_spec).
    pub weights: Option<PathBuf>,
    /// Compute threads.
    pub num_threads: usize,
    /// Executors.
    pub pool: PoolConfig,
}

/// Shape of the embedded model: 0.9 M parameters.
pub fn embedded_spec() -> ModelSpec {
    ModelSpec {
        family: Family::Qwen2,
        vocab_size: azr_tokenizer::train::VOCAB_SIZE,
        hidden_size: 128,
        intermediate_size: 384,
        num_layers: 4,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 32,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: true,
        max_position_embeddings: 512,
    }
}

/// State of a running pre-training.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean negative log-likelihood per token of the step (nats), answers weighted.
    pub loss: f64,
    /// Tokens per second since the start.
    pub tokens_per_s: f64,
}

/// Trains a model and writes it as a folder that transformers can load, in bf16.
///
/// # Errors
/// When the executor or the disk fails, or the training diverges.
pub fn train(config: &PretrainConfig, out: &Path, mut report: impl FnMut(Progress)) -> Result<()> {
    let codec = Arc::new(corpus::compact_codec(Tokenizer::embedded())?);
    let (spec, weights) = match &config.weights {
        Some(path) => known(path)?,
        None => (embedded_spec(), ParamTable::new(&embedded_spec()).init(&embedded_spec(), config.seed)),
    };
    let decoder = Decoder::new(CpuBackend::new(config.num_threads)?, spec.clone(), &weights, true)?;
    let optim = OptimConfig {
        beta2: 0.95,
        weight_decay: 0.1,
        micro_batch_tokens: config.batch_tokens,
        ..OptimConfig::default()
    };
    let mut trainer = Trainer::new(decoder, optim)?;
    let num_steps = config.num_tokens.div_ceil(config.batch_tokens as u64).max(1);
    let start = Instant::now();
    let (send, receive) = crossbeam::channel::bounded(CHUNKS_AHEAD);
    let pool = Pool::start(&config.pool)?;
    let (seed, max_len) = (config.seed, spec.max_position_embeddings);
    let writer = std::thread::spawn(move || -> Result<()> {
        for chunk in 0.. {
            let documents = corpus::documents(&pool, &codec, seed, chunk)?;
            if documents.into_iter().filter(|d| d.tokens.len() <= max_len).any(|d| send.send(d).is_err()) {
                break;
            }
        }
        Ok(())
    });
    let mut tokens = 0u64;
    for step in 1..=num_steps {
        let (mut batch, mut size): (Vec<corpus::Document>, usize) = (Vec::new(), 0);
        while size < config.batch_tokens {
            let Ok(document) = receive.recv() else {
                break;
            };
            size += document.tokens.len();
            batch.push(document);
        }
        if batch.is_empty() {
            break;
        }
        let total: f32 = batch.iter().flat_map(|d| &d.weights[1..]).sum();
        let seqs: Vec<TrainSeq> = batch
            .iter()
            .map(|d| nll_sequence(&d.tokens, &d.weights.iter().map(|w| w / total).collect::<Vec<f32>>()))
            .collect();
        let reports = trainer.accumulate(&seqs)?;
        let loss: f64 = reports.iter().flatten().map(|r| f64::from(r.loss)).sum();
        let norm = trainer.update(learning_rate(config.learning_rate, step, num_steps) as f32)?;
        if !norm.is_finite() {
            return Err(Error::failure(format!("the gradient norm is {norm} in step {step}"))
                .with_hint("lower the learning rate"));
        }
        tokens += size as u64;
        report(Progress { step, tokens, loss, tokens_per_s: tokens as f64 / start.elapsed().as_secs_f64() });
    }
    drop(receive);
    writer.join().map_err(|_| Error::failure("the thread that writes documents has died"))??;
    let model = to_bytes(&trainer.weights()?, StoredAs::Bf16)?;
    let mut described = spec.to_config();
    described["torch_dtype"] = "bfloat16".into();
    described["eos_token_id"] = 1.into();
    let files = vec![
        ("model.safetensors".to_owned(), model),
        ("config.json".to_owned(), format!("{described:#}\n").into_bytes()),
        ("generation_config.json".to_owned(), embedded_generation_config()),
        ("tokenizer.json".to_owned(), azr_tokenizer::EMBEDDED.to_vec()),
        ("tokenizer_config.json".to_owned(), azr_tokenizer::EMBEDDED_CONFIG.to_vec()),
    ];
    publish_folder(out, files.into_iter().map(|(name, bytes)| (name, Content::Bytes(bytes))).collect())
}

/// Shape and weights of a model that has the embedded vocabulary.
fn known(path: &Path) -> Result<(ModelSpec, Vec<Vec<f32>>)> {
    let model = ModelFiles::open(path)?;
    if model.spec.vocab_size != azr_tokenizer::train::VOCAB_SIZE {
        return Err(Error::config(format!("{} has another vocabulary than the embedded model", path.display()))
            .with_hint("documents are made of its tokens: go on from a checkpoint of the embedded model"));
    }
    let weights = ParamTable::new(&model.spec).load(&model.tensors)?;
    Ok((model.spec, weights))
}

/// Rises linearly, stays, falls linearly to zero.
fn learning_rate(highest: f64, step: u64, num_steps: u64) -> f64 {
    let rise = (step as f64 / WARM_UP as f64).min(1.0);
    let done = step as f64 / num_steps as f64;
    let fall = ((1.0 - done) / (1.0 - CONSTANT_PART)).min(1.0);
    highest * rise * fall
}

/// Trains the embedded model's vocabulary and writes it as a tokenizer.json.
///
/// # Errors
/// When the file cannot be written.
pub fn train_tokenizer(path: &Path, seed: u64) -> Result<()> {
    let texts = (0..NUM_VOCABULARY_PROGRAMS).flat_map(move |index| corpus::vocabulary_texts(seed, index));
    let json =
        azr_tokenizer::train::train(texts).map_err(|e| Error::failure(format!("cannot train the vocabulary: {e}")))?;
    std::fs::write(path, json + "\n").map_err(|e| Error::io("write", path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_stays_and_falls() {
        assert_eq!(learning_rate(1.0, 50, 1000), 0.5);
        assert_eq!(learning_rate(1.0, 500, 1000), 1.0);
        assert!((learning_rate(1.0, 800, 1000) - 0.5).abs() < 1e-12);
        assert_eq!(learning_rate(1.0, 1000, 1000), 0.0);
    }
}
