//! What kind of decoder a checkpoint holds: the part of Hugging Face's config.json that the forward pass needs.

use serde::{Deserialize, Serialize};

/// Model family; decides which optional tensors a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Qwen2 and Qwen2.5: bias on query, key and value.
    Qwen2,
    /// Qwen3: RMSNorm on every query and key head, own head width.
    Qwen3,
    /// Llama 3.x: neither, RoPE scaling "llama3".
    Llama,
}

/// RoPE frequency scaling of Llama 3.1 and later.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Llama3Rope {
    /// Factor by which long wavelengths are stretched.
    pub factor: f64,
    /// Wavelengths above `original_context / low_freq_factor` are stretched in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_context / high_freq_factor` stay as they are.
    pub high_freq_factor: f64,
    /// Context length of pre-training, in tokens.
    pub original_context: usize,
}

/// Shape of a decoder-only transformer (GQA, RoPE, RMSNorm, SwiGLU).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Model family.
    pub family: Family,
    /// Vocabulary rows of the embedding, V.
    pub vocab_size: usize,
    /// Model width, D.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer, F.
    pub intermediate_size: usize,
    /// Number of layers, L.
    pub num_layers: usize,
    /// Number of query heads, H.
    pub num_heads: usize,
    /// Number of key and value heads, G; H is a multiple of G.
    pub num_kv_heads: usize,
    /// Width of a head, C (even).
    pub head_dim: usize,
    /// RMSNorm epsilon.
    pub rms_norm_eps: f64,
    /// RoPE base.
    pub rope_theta: f64,
    /// RoPE scaling, if any.
    pub rope_scaling: Option<Llama3Rope>,
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
}
