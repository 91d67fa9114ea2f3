//! Tokenizer of `azr`: text to tokens and back over a Hugging Face tokenizer.json, and the embedded model's vocabulary.
//!
//! Text that a model wrote is encoded with [`Specials::AsText`], so that it can never act as a special token.

use std::path::Path;

use tokenizers::Tokenizer as Inner;

pub mod train;

/// The embedded model's tokenizer.json.
pub const EMBEDDED: &[u8] = include_bytes!("../embedded/tokenizer.json");
/// The embedded model's tokenizer_config.json.
pub const EMBEDDED_CONFIG: &[u8] = include_bytes!("../embedded/tokenizer_config.json");

/// What a special token's name in a text means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// The token.
    Parse,
    /// Nothing: it is text like any other.
    AsText,
}

/// Why a tokenizer cannot be had or used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// A tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    parsing: Inner,
    literal: Inner,
}

impl Tokenizer {
    /// Reads a tokenizer.json.
    ///
    /// # Errors
    /// When the bytes are no tokenizer.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        // The library panics on some files that are no JSON, or not the JSON that it expects.
        let json: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|e| Error(format!("not a tokenizer: {e}")))?;
        if !json.get("model").is_some_and(serde_json::Value::is_object) {
            return Err(Error("not a tokenizer: it has no `model`".to_owned()));
        }
        if json.pointer("/model/type").is_some_and(|kind| kind != "BPE") {
            return Err(Error("a tokenizer of another kind than byte-pair encoding".to_owned()));
        }
        let mut parsing = std::panic::catch_unwind(|| Inner::from_bytes(bytes))
            .map_err(|_| Error("not a tokenizer: a part of it has no known form".to_owned()))?
            .map_err(|e| Error(format!("not a tokenizer: {e}")))?;
        // Files keep what a call that cut or padded texts had left; they are no part of the vocabulary.
        parsing.with_padding(None);
        parsing.with_truncation(None).map_err(|e| Error(format!("not a tokenizer: {e}")))?;
        let mut literal = parsing.clone();
        literal.set_encode_special_tokens(true);
        Ok(Tokenizer { parsing, literal })
    }

    /// Reads a tokenizer.json from disk.
    ///
    /// # Errors
    /// When the file cannot be read or is no tokenizer.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(|e| Error(format!("cannot read {}: {e}", path.display())))?;
        Self::from_bytes(&bytes).map_err(|e| Error(format!("{}: {e}", path.display())))
    }

    /// The embedded model's tokenizer.
    ///
    /// # Panics
    /// Never: the file is part of the build and tested.
    pub fn embedded() -> Self {
        Self::from_bytes(EMBEDDED).expect("the embedded tokenizer is well-formed")
    }

    /// Tokens of a text; nothing is added before or after.
    ///
    /// # Panics
    /// Never for the models that tokenizer.json files hold: their encoding has no failure.
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let inner = if specials == Specials::Parse { &self.parsing } else { &self.literal };
        inner.encode_fast(text, false).expect("plain text can be encoded").get_ids().to_vec()
    }

    /// Text of tokens, with or without the names of special tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Panics
    /// Never: unknown ids are passed over.
    pub fn decode(&self, tokens: &[u32], keep_special: bool) -> String {
        self.parsing.decode(tokens, !keep_special).expect("decoding has no failure")
    }

    /// Id of a token by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.parsing.token_to_id(token)
    }

    /// Whether the tokenizer's post-processor puts this token before a text.
    pub fn adds_first(&self, token: u32) -> bool {
        self.parsing.encode_fast("a", true).is_ok_and(|e| e.get_ids().first() == Some(&token))
    }

    /// Number of entries, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.parsing.get_vocab_size(true)
    }

    /// Largest id plus one: the rows that an embedding must have.
    pub fn num_ids(&self) -> usize {
        self.parsing.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }
}

/// Text of a growing list of tokens, given out only where no later token can change it.
#[derive(Debug, Default)]
pub struct Detokenizer {
    tokens: Vec<u32>,
    given: usize,
}

impl Detokenizer {
    /// Takes a token and returns the text that has become certain.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.tokens.push(token);
        let text = tokenizer.decode(&self.tokens, true);
        // A character in the making shows as U+FFFD at the end.
        if text.ends_with('\u{fffd}') || text.len() <= self.given {
            return String::new();
        }
        let new = text[self.given..].to_owned();
        self.given = text.len();
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back_and_cannot_forge_special_tokens() {
        let tokenizer = Tokenizer::embedded();
        assert_eq!(tokenizer.vocab_size(), train::VOCAB_SIZE);
        for text in ["def f(x):\n    return x + 12", "", "caf\u{e9} \u{1f600}\t\r\n", "<|end|> and <|code|>"] {
            let tokens = tokenizer.encode(text, Specials::AsText);
            assert_eq!(tokenizer.decode(&tokens, true), text);
            assert!(tokens.iter().all(|t| *t as usize >= train::SPECIALS.len()), "{text}");
        }
        assert_eq!(tokenizer.encode("<|end|>", Specials::Parse), [1]);
    }

    #[test]
    fn a_broken_file_is_an_error_and_no_panic() {
        let whole = String::from_utf8(EMBEDDED.to_vec()).expect("JSON");
        for broken in [
            "",
            "{}",
            "[1]",
            "{\"model\": 3}",
            &whole[..whole.len() / 2],
            &whole.replacen("\"decoder\"", "\"decoder\"x", 1),
        ] {
            assert!(Tokenizer::from_bytes(broken.as_bytes()).is_err());
        }
        let other = r#"{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}"#;
        assert!(Tokenizer::from_bytes(other.as_bytes()).is_err(), "its encoding can fail");
    }

    #[test]
    fn what_a_file_says_of_cutting_and_padding_is_not_heeded() {
        let mut json: serde_json::Value = serde_json::from_slice(EMBEDDED).expect("JSON");
        json["truncation"] =
            serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = serde_json::json!({
            "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<|end|>"
        });
        let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).expect("a tokenizer");
        let text = "def f(x):\n    return x + 12";
        assert_eq!(tokenizer.encode(text, Specials::AsText), Tokenizer::embedded().encode(text, Specials::AsText));
    }

    #[test]
    fn streaming_gives_whole_characters_only() {
        let tokenizer = Tokenizer::embedded();
        let text = "a\u{1f600}b\u{e9}";
        let mut stream = Detokenizer::default();
        let pieces: Vec<String> =
            tokenizer.encode(text, Specials::AsText).into_iter().map(|t| stream.push(&tokenizer, t)).collect();
        assert_eq!(pieces.concat(), text);
        assert!(!pieces.concat().contains('\u{fffd}'));
    }
}
