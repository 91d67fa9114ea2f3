//! The command `azr pretrain`.

pub mod corpus;
pub mod generator;
pub mod grammar;

use std::path::Path;

use crate::{Error, Result};

/// Programs whose texts train the vocabulary.
const NUM_VOCABULARY_PROGRAMS: u64 = 40_000;

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
