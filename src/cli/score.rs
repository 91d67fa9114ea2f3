//! `azr score`: what the model says about given texts, as numbers that other frameworks can be compared with.

use std::io::{BufRead, Write};

use serde::Deserialize;
use serde_json::json;

use azr_tokenizer::Specials;

use crate::base::run_dir::publish;
use crate::cli::args::ScoreArgs;
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::ops::Backend;
use crate::error::{Error, Result};
use crate::model::forward::Decoder;
use crate::model::params::ParamTable;
use crate::rollout::engine::{Engine, SampleRequest};
use crate::train::backward::micro_batch;
use crate::train::loss::nll_sequence;
use crate::weights::model_files::ModelFiles;
use crate::weights::safetensors::{StoredAs, to_bytes};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    text: Option<String>,
    tokens: Option<Vec<u32>>,
    weights: Option<Vec<f32>>,
}

struct Item {
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

/// Reads standard input to its end and answers each line.
///
/// # Errors
/// When a line is no request, or the model cannot be had.
pub fn score(args: &ScoreArgs) -> Result<()> {
    let mut model = match &args.weights {
        Some(path) => ModelFiles::open(path)?,
        None => ModelFiles::embedded()?,
    };
    let items = read(&model, !args.encode && !args.decode)?;
    let mut out = std::io::stdout().lock();
    let mut print = |value: serde_json::Value| {
        writeln!(out, "{value}").map_err(|e| Error::io("write", std::path::Path::new("standard output"), &e))
    };
    if args.encode || args.decode {
        for item in &items {
            print(if args.encode {
                json!({"tokens": item.tokens})
            } else {
                json!({"text": model.tokenizer.decode(&item.tokens, true)})
            })?;
        }
        return Ok(());
    }
    // Positions that no line reaches need no angles.
    let longest = items.iter().map(|i| i.tokens.len()).max().unwrap_or(0).saturating_add(args.generate);
    model.spec.max_position_embeddings = model.spec.max_position_embeddings.min(longest);
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let weights = ParamTable::new(&model.spec).load(&model.tensors)?;
    let decoder = Decoder::new(CpuBackend::new(threads)?, model.spec.clone(), &weights, true)?;
    let b = decoder.backend();
    let mut grads: Vec<_> = decoder.table().tensors.iter().map(|t| b.zeros(t.len())).collect::<Result<_>>()?;
    let mut logits = Vec::new();
    let continuations = continue_greedily(&decoder, &model, &items, args.generate)?;
    for (i, item) in items.iter().enumerate() {
        // Weight 0 keeps a token out of the gradient, not out of the report: each is a target of its own.
        let probe: Vec<f32> = item.weights.iter().map(|w| if *w == 0.0 { f32::MIN_POSITIVE } else { *w }).collect();
        let reports = b.reports(micro_batch(&decoder, &[nll_sequence(&item.tokens, &probe)], &mut grads, false)?)?;
        let logprobs: Vec<Option<f32>> = std::iter::once(None).chain(reports.iter().map(|r| Some(r.logprob))).collect();
        let entropies: Vec<Option<f32>> =
            std::iter::once(None).chain(reports.iter().map(|r| Some(r.entropy))).collect();
        let mut answer = json!({"tokens": item.tokens, "logprobs": logprobs, "entropies": entropies});
        if let Some(tokens) = continuations.get(i) {
            answer["generated"] = json!(tokens);
            answer["generated_text"] = json!(model.tokenizer.decode(tokens, true));
        }
        print(answer)?;
        if args.logits.is_some() {
            logits.push((i.to_string(), vec![item.tokens.len(), model.spec.vocab_size], decoder.logits(&item.tokens)?));
        }
    }
    if let Some(path) = &args.logits {
        publish(path, &to_bytes(&logits, StoredAs::F32)?)?;
    }
    if let Some(path) = &args.grads {
        let named: Vec<_> = decoder
            .table()
            .parts()
            .map(|(i, part)| (part.name.clone(), part.shape.clone(), grads[i][part.offset..][..part.len()].to_vec()))
            .collect();
        publish(path, &to_bytes(&named, StoredAs::F32)?)?;
    }
    Ok(())
}

fn read(model: &ModelFiles, for_model: bool) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for (number, line) in std::io::stdin().lock().lines().enumerate() {
        let bad = |what: String| {
            Error::config(format!("line {} of standard input {what}", number + 1))
                .with_hint("each line is {\"text\": \"..\"} or {\"tokens\": [..]}, with optional \"weights\"")
        };
        let line = line.map_err(|e| bad(format!("cannot be read: {e}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&line).map_err(|e| bad(format!("is no request: {e}")))?;
        let tokens = match (line.text, line.tokens) {
            (Some(text), None) => model.bos.into_iter().chain(model.tokenizer.encode(&text, Specials::Parse)).collect(),
            (None, Some(tokens)) => tokens,
            _ => return Err(bad("needs either text or tokens".to_owned())),
        };
        if tokens.is_empty() && for_model {
            return Err(bad("has no tokens".to_owned()));
        }
        let weights = line.weights.unwrap_or_else(|| vec![1.0; tokens.len()]);
        if weights.len() != tokens.len() || weights.iter().any(|w| !w.is_finite()) {
            return Err(bad(format!("has {} weights for {} tokens", weights.len(), tokens.len())));
        }
        items.push(Item { tokens, weights });
    }
    Ok(items)
}

fn continue_greedily<B: Backend>(
    decoder: &Decoder<B>,
    model: &ModelFiles,
    items: &[Item],
    max_new: usize,
) -> Result<Vec<Vec<u32>>> {
    if max_new == 0 || items.is_empty() {
        return Ok(Vec::new());
    }
    let longest = items.iter().map(|i| i.tokens.len()).max().unwrap_or(0) + max_new;
    let mut engine = Engine::new(decoder, Engine::<B>::limits(items.len().min(64), longest, 0), 0)?;
    for (i, item) in items.iter().enumerate() {
        engine.submit(SampleRequest {
            id: i as u64,
            prompt: item.tokens.as_slice().into(),
            max_new,
            stop: model.eos.as_slice().into(),
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
        })?;
    }
    Ok(engine.finish(decoder)?.into_iter().map(|c| c.tokens).collect())
}
