//! Between the pieces that prompts and completions are made of and the model's tokens.
//!
//! Text is always encoded with special tokens switched off, so that nothing a model wrote can act as one.

use std::sync::Arc;

use azr_tokenizer::{Specials, Tokenizer};

use crate::error::{Error, Result};
use crate::selfplay::prompt::{Format, Piece, SPECIAL_TOKENS};

/// A tokenizer with the prompt format's special tokens looked up once.
pub struct Codec {
    tokenizer: Arc<Tokenizer>,
    specials: Vec<(u32, &'static str)>,
    bos: Vec<u32>,
}

impl Codec {
    /// Looks up the special tokens that the format needs.
    ///
    /// # Errors
    /// When the format is compact and the tokenizer lacks one of its special tokens.
    pub fn new(tokenizer: Arc<Tokenizer>, format: Format, bos: Option<u32>) -> Result<Self> {
        let mut specials = Vec::new();
        if format == Format::Compact {
            for name in SPECIAL_TOKENS {
                let id = tokenizer.token_id(name).ok_or_else(|| {
                    Error::config(format!("the tokenizer has no token {name}, which the compact format needs"))
                        .with_hint("use prompt_format = \"azr\" with this model")
                })?;
                specials.push((id, name));
            }
        }
        Ok(Codec { tokenizer, specials, bos: bos.into_iter().collect() })
    }

    /// Tokens of a prompt, beginning-of-text token included where the model has one.
    pub fn encode(&self, pieces: &[Piece]) -> Vec<u32> {
        let mut tokens = self.bos.clone();
        for piece in pieces {
            match piece {
                Piece::Special(name) => {
                    let known = self.specials.iter().find(|(_, n)| n == name);
                    tokens.push(known.expect("prompts use the format's own special tokens").0);
                }
                Piece::Text(text) => tokens.extend(self.tokenizer.encode(text, Specials::AsText)),
            }
        }
        tokens
    }

    /// Pieces of a completion. Special tokens that the format does not know vanish, as they do in a decoded text.
    pub fn decode(&self, tokens: &[u32]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for (i, token) in tokens.iter().enumerate() {
            if let Some(&(_, name)) = self.specials.iter().find(|(id, _)| id == token) {
                self.push_text(&tokens[start..i], &mut pieces);
                pieces.push(Piece::Special(name));
                start = i + 1;
            }
        }
        self.push_text(&tokens[start..], &mut pieces);
        pieces
    }

    /// Ids of special tokens by name.
    pub fn special_ids<'a>(&'a self, names: &'a [&'a str]) -> impl Iterator<Item = u32> + 'a {
        self.specials.iter().filter(|(_, n)| names.contains(n)).map(|(id, _)| *id)
    }

    fn push_text(&self, tokens: &[u32], pieces: &mut Vec<Piece>) {
        if !tokens.is_empty() {
            pieces.push(Piece::Text(self.tokenizer.decode(tokens, false)));
        }
    }
}
