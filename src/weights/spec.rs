//! What kind of decoder a checkpoint holds: the part of Hugging Face's config.json that the forward pass needs.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};

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

/// Shape of a Qwen2.5 model by its size: 0.5B, 1.5B, 3B or 7B.
pub fn qwen25(size: &str) -> Option<ModelSpec> {
    let (hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, vocab_size) = match size {
        "0.5B" => (896, 4864, 24, 14, 2, 151_936),
        "1.5B" => (1536, 8960, 28, 12, 2, 151_936),
        "3B" => (2048, 11_008, 36, 16, 2, 151_936),
        "7B" => (3584, 18_944, 28, 28, 4, 152_064),
        _ => return None,
    };
    Some(ModelSpec {
        family: Family::Qwen2,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim: hidden_size / num_heads,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: None,
        tie_word_embeddings: size != "7B",
        max_position_embeddings: 32_768,
    })
}

/// Most parameters: ten times the largest decoders of today. More is a damaged file, and products must not overflow.
const MAX_PARAMS: f64 = 1e13;

impl ModelSpec {
    /// Reads config.json, in the classic way of writing RoPE settings or in that of transformers 5.
    ///
    /// # Errors
    /// When the architecture is not one of ours, or a setting is missing, misshapen or not supported.
    pub fn from_config(config: &Value) -> Result<Self> {
        let hint = "azr reads config.json as transformers writes it for Qwen2, Qwen2.5, Qwen3 and Llama 3";
        Self::read(config).map_err(|e| if e.hint().is_some() { e } else { e.with_hint(hint) })
    }

    fn read(config: &Value) -> Result<Self> {
        let family = family(config)?;
        let count = |key: &str| {
            optional_count(config, key)?.ok_or_else(|| Error::config(format!("config.json has no `{key}`")))
        };
        let num_heads = count("num_attention_heads")?;
        let hidden_size = count("hidden_size")?;
        let head_dim = match optional_count(config, "head_dim")? {
            Some(width) => width,
            None if family == Family::Qwen3 => 128,
            None => hidden_size / num_heads,
        };
        let (rope_theta, rope_scaling) = rope(config)?;
        let spec = ModelSpec {
            family,
            vocab_size: count("vocab_size")?,
            hidden_size,
            intermediate_size: count("intermediate_size")?,
            num_layers: count("num_hidden_layers")?,
            num_heads,
            num_kv_heads: optional_count(config, "num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            rms_norm_eps: optional_number(config.get("rms_norm_eps"), "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
            max_position_embeddings: count("max_position_embeddings")?,
        };
        spec.check(config)?;
        Ok(spec)
    }

    fn check(&self, config: &Value) -> Result<()> {
        let unsupported =
            |what: &str| Err(Error::config(format!("config.json asks for {what}, which azr does not have")));
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(Error::config(format!("config.json gives an odd head_dim of {}", self.head_dim)));
        }
        let [d, f, v, layers] =
            [self.hidden_size, self.intermediate_size, self.vocab_size, self.num_layers].map(|n| n as f64);
        let attention = 2.0 * (self.num_heads + self.num_kv_heads) as f64 * self.head_dim as f64;
        let num_params = d * (v + layers * (attention + 3.0 * f));
        if num_params > MAX_PARAMS {
            return unsupported(&format!("{num_params:.0e} parameters"));
        }
        // A model of today has a hundred layers; thousands are a damaged file.
        if self.num_layers > 4096 {
            return unsupported(&format!("{} layers", self.num_layers));
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(Error::config(format!(
                "config.json gives {} query heads for {} key-value heads, which is no whole ratio",
                self.num_heads, self.num_kv_heads
            )));
        }
        let act = config.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if act != "silu" && act != "swish" {
            return unsupported(&format!("the activation {act:?}"));
        }
        let on = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        if on("use_sliding_window") {
            return unsupported("sliding-window attention");
        }
        if self.family != Family::Qwen2 && on("attention_bias") {
            return unsupported("`attention_bias`");
        }
        if on("mlp_bias") {
            return unsupported("`mlp_bias`");
        }
        if config.get("quantization_config").is_some_and(|q| !q.is_null()) {
            return unsupported("quantised weights");
        }
        Ok(())
    }

    /// The config.json of a model of this shape.
    pub fn to_config(&self) -> Value {
        let (architecture, model_type) = match self.family {
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Family::Llama => ("LlamaForCausalLM", "llama"),
        };
        let scaling = self.rope_scaling.map(|s| {
            json!({
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            })
        });
        json!({
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": false,
        })
    }
}

fn family(config: &Value) -> Result<Family> {
    let named = config.get("model_type").and_then(Value::as_str).map(str::to_owned).or_else(|| {
        let architecture = config.get("architectures")?.get(0)?.as_str()?;
        Some(architecture.trim_end_matches("ForCausalLM").to_lowercase())
    });
    match named.as_deref() {
        Some("qwen2") => Ok(Family::Qwen2),
        Some("qwen3") => Ok(Family::Qwen3),
        Some("llama") => Ok(Family::Llama),
        Some(other) => Err(Error::config(format!("the architecture {other:?} is not supported"))
            .with_hint("azr trains Qwen2, Qwen2.5, Qwen3 and Llama 3 decoders")),
        None => Err(Error::config("config.json names no `model_type`")),
    }
}

fn optional_count(config: &Value, key: &str) -> Result<Option<usize>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        // Larger numbers are no shape of a model, and their products must not overflow.
        Some(value) => match value.as_u64().filter(|n| (1..1 << 31).contains(n)) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(Error::config(format!("config.json has `{key}` = {value}, which is no positive whole number"))),
        },
    }
}

/// A positive number, if it is there.
fn optional_number(value: Option<&Value>, key: &str) -> Result<Option<f64>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(Error::config(format!("config.json has `{key}` = {value}, which is no positive number"))),
        },
    }
}

/// RoPE base and scaling. transformers 5 writes both into `rope_parameters`; before it was `rope_theta` and `rope_scaling`.
fn rope(config: &Value) -> Result<(f64, Option<Llama3Rope>)> {
    let object = |key: &str| config.get(key).filter(|v| v.is_object());
    let settings = object("rope_parameters").or_else(|| object("rope_scaling"));
    let theta = settings.and_then(|s| s.get("rope_theta")).or_else(|| config.get("rope_theta"));
    let theta = optional_number(theta, "rope_theta")?.unwrap_or(10_000.0);
    let Some(settings) = settings else { return Ok((theta, None)) };
    let kind = settings.get("rope_type").or_else(|| settings.get("type")).and_then(Value::as_str).unwrap_or("default");
    let number = |key: &str| {
        optional_number(settings.get(key), key)?
            .ok_or_else(|| Error::config(format!("config.json's llama3 RoPE scaling has no `{key}`")))
    };
    match kind {
        "default" => Ok((theta, None)),
        "llama3" => {
            let scaling = Llama3Rope {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_context: number("original_max_position_embeddings")? as usize,
            };
            if scaling.low_freq_factor >= scaling.high_freq_factor {
                return Err(Error::config("config.json's `low_freq_factor` is not below its `high_freq_factor`"));
            }
            Ok((theta, Some(scaling)))
        }
        other => Err(Error::config(format!("the RoPE scaling {other:?} is not supported"))
            .with_hint("\"default\" and \"llama3\" are")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}
        })
    }

    #[test]
    fn both_ways_of_writing_rope_say_the_same() {
        let classic = ModelSpec::from_config(&llama()).expect("a classic config");
        let mut new = llama();
        let map = new.as_object_mut().expect("an object");
        let mut rope = map.remove("rope_scaling").expect("there");
        rope["rope_theta"] = map.remove("rope_theta").expect("there");
        map.insert("rope_parameters".into(), rope);
        let modern = ModelSpec::from_config(&new).expect("a transformers 5 config");
        assert_eq!(classic, modern);
        assert_eq!(classic.rope_theta, 500_000.0);
        assert_eq!(ModelSpec::from_config(&classic.to_config()).expect("its own config"), classic);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (key, value, word) in [
            ("model_type", json!("gpt2"), "gpt2"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("num_attention_heads", json!(3), "ratio"),
            ("num_hidden_layers", json!(-1), "num_hidden_layers"),
            ("vocab_size", Value::Null, "vocab_size"),
            ("rope_scaling", json!({"type": "yarn", "factor": 4.0}), "yarn"),
            ("head_dim", json!(7), "odd"),
            ("quantization_config", json!({"bits": 4}), "quantised"),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = ModelSpec::from_config(&config).expect_err(key).to_string();
            assert!(error.contains(word), "{key}: {error}");
        }
    }
}
