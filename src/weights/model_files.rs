//! A model as transformers lays it out: weights, config.json, generation_config.json, tokenizer.json.

use std::path::Path;

use azr_tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::weights::safetensors::TensorFiles;
use crate::weights::spec::ModelSpec;

/// Files that are carried along into checkpoints as they are, where they exist.
const COMPANIONS: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

static EMBEDDED_WEIGHTS: &[u8] = include_bytes!("../embedded/model.safetensors");
static EMBEDDED_CONFIG: &[u8] = include_bytes!("../embedded/config.json");

/// What to do about a file that is not what transformers writes.
const COPY_AGAIN: &str = "copy it again from where the weights come from";

/// A model's files, opened and checked against each other.
pub struct ModelFiles {
    /// Shape.
    pub spec: ModelSpec,
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Tensors by name.
    pub tensors: TensorFiles,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Token before every text, if the tokenizer adds one.
    pub bos: Option<u32>,
    /// Whether this is the embedded default.
    pub is_embedded: bool,
    /// Files to carry along into checkpoints.
    pub companions: Vec<(String, Vec<u8>)>,
}

impl ModelFiles {
    /// Opens a weights file or a folder; the other files are looked for beside the weights.
    ///
    /// # Errors
    /// When a file is missing, not what it should be, or does not fit the others.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::config(format!("there is no {}", path.display()))
                .with_hint("--weights takes a folder as transformers saves it, or a .safetensors file in one"));
        }
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let mut companions = Vec::new();
        for name in COMPANIONS {
            let file = folder.join(name);
            if file.is_file() {
                let bytes = std::fs::read(&file).map_err(|e| Error::io("read", &file, &e))?;
                companions.push((name.to_owned(), bytes));
            }
        }
        let tensors = TensorFiles::open(path)?;
        Self::assemble(tensors, companions, false).map_err(|e| e.context(folder.display()))
    }

    /// The model that is part of the executable.
    ///
    /// # Errors
    /// When the build embedded something broken.
    pub fn embedded() -> Result<Self> {
        let companions = vec![
            ("config.json".to_owned(), EMBEDDED_CONFIG.to_vec()),
            ("generation_config.json".to_owned(), embedded_generation_config()),
            ("tokenizer.json".to_owned(), azr_tokenizer::EMBEDDED.to_vec()),
            ("tokenizer_config.json".to_owned(), azr_tokenizer::EMBEDDED_CONFIG.to_vec()),
        ];
        Self::assemble(TensorFiles::from_static(EMBEDDED_WEIGHTS)?, companions, true)
    }

    fn assemble(tensors: TensorFiles, companions: Vec<(String, Vec<u8>)>, is_embedded: bool) -> Result<Self> {
        let file = |name: &str| companions.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice());
        let required = |name: &str| {
            file(name).ok_or_else(|| {
                Error::config(format!("{name} is missing beside the weights"))
                    .with_hint("copy it from where the weights come from")
            })
        };
        let parse = |name: &str, bytes: &[u8]| -> Result<Value> {
            serde_json::from_slice(bytes)
                .map_err(|e| Error::config(format!("{name} is not JSON: {e}")).with_hint(COPY_AGAIN))
        };
        let config = parse("config.json", required("config.json")?)?;
        let spec = ModelSpec::from_config(&config)?;
        let tokenizer = Tokenizer::from_bytes(required("tokenizer.json")?)
            .map_err(|e| Error::config(format!("tokenizer.json: {e}")).with_hint(COPY_AGAIN))?;
        if tokenizer.num_ids() > spec.vocab_size {
            return Err(Error::config(format!(
                "the tokenizer has ids up to {}, the model {} rows",
                tokenizer.num_ids() - 1,
                spec.vocab_size
            ))
            .with_hint("tokenizer.json and weights must belong together"));
        }
        let generation = match file("generation_config.json") {
            Some(bytes) => parse("generation_config.json", bytes)?,
            None => Value::Null,
        };
        let mut eos = token_ids(&generation, "eos_token_id");
        if eos.is_empty() {
            eos = token_ids(&config, "eos_token_id");
        }
        if eos.is_empty() {
            return Err(Error::config("neither generation_config.json nor config.json names an `eos_token_id`")
                .with_hint("name the tokens that end a text in generation_config.json"));
        }
        let tokenizer_config = match file("tokenizer_config.json") {
            Some(bytes) => parse("tokenizer_config.json", bytes)?,
            None => Value::Null,
        };
        let bos = added_bos(&tokenizer, &tokenizer_config);
        if let Some(id) = eos.iter().chain(&bos).find(|id| **id as usize >= spec.vocab_size) {
            return Err(Error::config(format!(
                "the special token {id} is outside the vocabulary of {}",
                spec.vocab_size
            ))
            .with_hint("tokenizer, generation_config.json and weights must belong together"));
        }
        Ok(ModelFiles { spec, tokenizer, tensors, eos, bos, is_embedded, companions })
    }
}

/// The embedded model's generation_config.json.
pub fn embedded_generation_config() -> Vec<u8> {
    let config = json!({"eos_token_id": [1, 0], "pad_token_id": 0, "do_sample": true, "temperature": 1.0});
    format!("{config:#}\n").into_bytes()
}

fn token_ids(config: &Value, key: &str) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match config.get(key) {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The token that the tokenizer puts before a text: named by tokenizer_config.json, where `add_bos_token` decides, or
/// else (absent or null, as Llama 3 and Qwen have it) the post-processor of tokenizer.json.
fn added_bos(tokenizer: &Tokenizer, config: &Value) -> Option<u32> {
    let token = config.get("bos_token")?;
    let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
    let id = tokenizer.token_id(text)?;
    let adds = config.get("add_bos_token").and_then(Value::as_bool).unwrap_or_else(|| tokenizer.adds_first(id));
    adds.then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn add_bos_token_decides_only_where_it_says_something() {
        let tokenizer = Tokenizer::embedded();
        for (add, bos) in [(json!(true), Some(1)), (json!(false), None), (Value::Null, None)] {
            let config = json!({"bos_token": {"content": "<|end|>"}, "add_bos_token": add});
            assert_eq!(added_bos(&tokenizer, &config), bos, "{config}");
        }
        assert_eq!(added_bos(&tokenizer, &json!({"bos_token": "<|end|>"})), None);
        assert_eq!(added_bos(&tokenizer, &json!({"bos_token": null, "add_bos_token": true})), None);
    }

    #[test]
    fn the_embedded_model_is_whole() {
        let model = ModelFiles::embedded().expect("part of the build");
        assert_eq!(model.eos, [1, 0]);
        assert_eq!(model.spec.vocab_size, azr_tokenizer::train::VOCAB_SIZE);
        for name in model.tensors.names() {
            let shape = model.tensors.shape(name).expect("listed").to_vec();
            model.tensors.read(name, &shape).expect("whole");
        }
    }
}
