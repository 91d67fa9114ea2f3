//! The parameter table: every tensor of a decoder, in one fixed order, under its Hugging Face names.
//!
//! Query, key and value projections are one tensor here, and so are gate and up: one product instead of three or two.
//! The names and shapes of the parts are kept, so that a checkpoint never sees the fusion.

use std::collections::BTreeSet;

use crate::base::rng::{Purpose, Rng};
use crate::error::{Error, Result};
use crate::weights::safetensors::{Sink, TensorFiles};
use crate::weights::spec::{Family, ModelSpec};

/// One tensor of a checkpoint inside a fused tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Hugging Face name.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// First element in the fused tensor.
    pub offset: usize,
}

impl Part {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the part has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One tensor as the forward pass uses it.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its parts, in order, without gaps.
    pub parts: Vec<Part>,
    /// Rows (1 for vectors).
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl TensorInfo {
    fn matrix(parts: &[(String, usize)], cols: usize) -> Self {
        let mut offset = 0;
        let parts: Vec<Part> = parts
            .iter()
            .map(|(name, rows)| {
                let part = Part { name: name.clone(), shape: vec![*rows, cols], offset };
                offset += rows * cols;
                part
            })
            .collect();
        TensorInfo { rows: offset / cols, cols, parts }
    }

    fn vector(parts: &[(String, usize)]) -> Self {
        let mut offset = 0;
        let parts: Vec<Part> = parts
            .iter()
            .map(|(name, len)| {
                let part = Part { name: name.clone(), shape: vec![*len], offset };
                offset += len;
                part
            })
            .collect();
        TensorInfo { rows: 1, cols: offset, parts }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a layer's tensors are in the table.
#[derive(Debug, Clone, Copy)]
pub struct LayerIndex {
    /// RMSNorm before attention, `[D]`.
    pub input_norm: usize,
    /// Fused query, key and value projection, `[Q][D]`.
    pub qkv: usize,
    /// Their bias, `[Q]` (Qwen2).
    pub qkv_bias: Option<usize>,
    /// RMSNorm of query and key heads, `[C]` each (Qwen3).
    pub qk_norms: Option<(usize, usize)>,
    /// Output projection, `[D][H C]`.
    pub o: usize,
    /// RMSNorm before the feed-forward layer, `[D]`.
    pub post_norm: usize,
    /// Fused gate and up projection, `[2 F][D]`.
    pub gate_up: usize,
    /// Down projection, `[D][F]`.
    pub down: usize,
}

/// The table of a model.
#[derive(Debug, Clone)]
pub struct ParamTable {
    /// All tensors in canonical order.
    pub tensors: Vec<TensorInfo>,
    /// Tensors of each layer.
    pub layers: Vec<LayerIndex>,
    /// Embedding, `[V][D]`.
    pub embed: usize,
    /// Last RMSNorm, `[D]`.
    pub norm: usize,
    /// LM head, `[V][D]`; the embedding when tied.
    pub head: usize,
}

impl ParamTable {
    /// The table of a model of this shape.
    pub fn new(spec: &ModelSpec) -> Self {
        let (d, f, v, c) = (spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.head_dim);
        let (q, kv) = (spec.num_heads * c, spec.num_kv_heads * c);
        let mut tensors = vec![TensorInfo::matrix(&[("model.embed_tokens.weight".into(), v)], d)];
        let mut push = |tensor: TensorInfo| {
            tensors.push(tensor);
            tensors.len() - 1
        };
        let mut layers = Vec::with_capacity(spec.num_layers);
        for l in 0..spec.num_layers {
            let name = |suffix: &str| format!("model.layers.{l}.{suffix}");
            let projections = |suffix: &str| {
                [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
                    .map(|(p, rows)| (name(&format!("self_attn.{p}.{suffix}")), rows))
            };
            layers.push(LayerIndex {
                input_norm: push(TensorInfo::vector(&[(name("input_layernorm.weight"), d)])),
                qkv: push(TensorInfo::matrix(&projections("weight"), d)),
                qkv_bias: (spec.family == Family::Qwen2).then(|| push(TensorInfo::vector(&projections("bias")))),
                qk_norms: (spec.family == Family::Qwen3).then(|| {
                    let q = push(TensorInfo::vector(&[(name("self_attn.q_norm.weight"), c)]));
                    (q, push(TensorInfo::vector(&[(name("self_attn.k_norm.weight"), c)])))
                }),
                o: push(TensorInfo::matrix(&[(name("self_attn.o_proj.weight"), d)], q)),
                post_norm: push(TensorInfo::vector(&[(name("post_attention_layernorm.weight"), d)])),
                gate_up: push(TensorInfo::matrix(
                    &[(name("mlp.gate_proj.weight"), f), (name("mlp.up_proj.weight"), f)],
                    d,
                )),
                down: push(TensorInfo::matrix(&[(name("mlp.down_proj.weight"), d)], f)),
            });
        }
        let norm = push(TensorInfo::vector(&[("model.norm.weight".into(), d)]));
        let head =
            if spec.tie_word_embeddings { 0 } else { push(TensorInfo::matrix(&[("lm_head.weight".into(), v)], d)) };
        ParamTable { tensors, layers, embed: 0, norm, head }
    }

    /// Number of parameters.
    pub fn num_params(&self) -> usize {
        self.tensors.iter().map(TensorInfo::len).sum()
    }

    /// All parts with the index of their tensor, in canonical order.
    pub fn parts(&self) -> impl Iterator<Item = (usize, &Part)> {
        self.tensors.iter().enumerate().flat_map(|(i, t)| t.parts.iter().map(move |p| (i, p)))
    }

    /// Values of tensor `i` from a source of parts.
    ///
    /// # Errors
    /// What the source reports.
    pub fn read(&self, i: usize, mut source: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
        let (tensor, mut values) = (&self.tensors[i], Vec::new());
        for part in &tensor.parts {
            let read = source(&part.name, &part.shape)?;
            assert_eq!(read.len(), part.len(), "the source gives {} in its shape", part.name);
            // Only now: before its first part is there, a tensor may be as large as config.json claims.
            values.reserve_exact(tensor.len() - values.len());
            values.extend(read);
        }
        Ok(values)
    }

    /// Hands the values of tensor `i` to `sink` piece after piece.
    ///
    /// # Errors
    /// Those of the files and of the sink.
    pub fn stream(&self, i: usize, files: &TensorFiles, sink: Sink<'_>) -> Result<()> {
        self.tensors[i].parts.iter().try_for_each(|part| files.stream(&part.name, &part.shape, &mut *sink))
    }

    /// Values of all tensors from a model's files.
    ///
    /// # Errors
    /// When a tensor is missing, misshapen or unknown.
    pub fn load(&self, files: &TensorFiles) -> Result<Vec<Vec<f32>>> {
        self.check(files)?;
        (0..self.tensors.len()).map(|i| self.read(i, |name, shape| files.read(name, shape))).collect()
    }

    /// Refuses files that lack a tensor of the table, have it in another shape, or have one that the table has not. What
    /// passes is as large as config.json says.
    ///
    /// # Errors
    /// The first such tensor.
    pub fn check(&self, files: &TensorFiles) -> Result<()> {
        self.parts().try_for_each(|(_, part)| files.check(&part.name, &part.shape))?;
        let known: BTreeSet<&str> = self.parts().map(|(_, p)| p.name.as_str()).collect();
        // A tied head may be stored once more, and old files hold the rotary frequencies.
        let harmless = |n: &str| n == "lm_head.weight" && self.head == self.embed || n.ends_with("rotary_emb.inv_freq");
        if let Some(name) = files.names().find(|n| !known.contains(n) && !harmless(n)) {
            return Err(Error::config(format!("the weights hold the unknown tensor {name}")).with_hint(
                "adapters and other architectures cannot be loaded; merge adapters into the weights first",
            ));
        }
        Ok(())
    }

    /// Fresh weights: norms 1, biases 0, embeddings N(0, 0.02), projections N(0, 0.49 / fan-in), those that write to the
    /// residual stream shrunk by `2 sqrt(L)` more. Each tensor has its own random stream.
    pub fn init(&self, spec: &ModelSpec, seed: u64) -> Vec<Vec<f32>> {
        let residual = 0.5 / (spec.num_layers as f64).sqrt() / 0.7;
        self.tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| {
                let name = &tensor.parts[0].name;
                if name.ends_with("norm.weight") {
                    return vec![1.0; tensor.len()];
                }
                if name.ends_with(".bias") {
                    return vec![0.0; tensor.len()];
                }
                let std = match name.as_str() {
                    "model.embed_tokens.weight" | "lm_head.weight" => 0.02,
                    n if n.ends_with("o_proj.weight") || n.ends_with("down_proj.weight") => {
                        residual * 0.7 / (tensor.cols as f64).sqrt()
                    }
                    _ => 0.7 / (tensor.cols as f64).sqrt(),
                };
                let mut rng = Rng::new(seed, Purpose::Init, i as u64, 0);
                (0..tensor.len()).map(|_| (rng.normal() * std) as f32).collect()
            })
            .collect()
    }
}
