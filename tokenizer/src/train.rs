//! Training of the embedded model's vocabulary: byte-level BPE with Qwen's way of splitting text.
//!
//! Equal texts in equal order give an equal file. Not here: the texts (the pre-training's generator makes them).

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

/// Special tokens of the compact format; a token's id is its place.
pub const SPECIALS: [&str; 14] = [
    "<|endoftext|>",
    "<|end|>",
    "<|propose_abduction|>",
    "<|propose_deduction|>",
    "<|propose_induction|>",
    "<|propose_error|>",
    "<|abduce|>",
    "<|deduce|>",
    "<|induce|>",
    "<|predict_error|>",
    "<|code|>",
    "<|input|>",
    "<|output|>",
    "<|message|>",
];

/// Entries of the embedded model's vocabulary: 14 special tokens, 256 bytes and the merges.
pub const VOCAB_SIZE: usize = 1024;

/// Qwen2's pre-tokenisation: words with the character before them, single digits, runs of punctuation and of space.
const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Trains a vocabulary of [`VOCAB_SIZE`] entries on the texts and returns it as the text of a tokenizer.json.
///
/// # Errors
/// When the texts are too few for that many entries, or when the library refuses.
pub fn train(texts: impl Iterator<Item = String> + Send) -> tokenizers::Result<String> {
    let split = Split::new(SplitPattern::Regex(PATTERN.to_owned()), SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(bytes),
    ])));
    tokenizer.with_decoder(Some(bytes));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(VOCAB_SIZE)
        .show_progress(false)
        .special_tokens(SPECIALS.iter().map(|text| AddedToken::from(*text, true)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    tokenizer.train(&mut trainer, texts)?;
    let num_entries = tokenizer.get_vocab_size(true);
    if num_entries != VOCAB_SIZE {
        return Err(format!("the texts give {num_entries} entries, not {VOCAB_SIZE}").into());
    }
    tokenizer.to_string(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_texts_are_refused() {
        assert!(train(["def f(x):".to_owned()].into_iter()).is_err());
    }

    #[test]
    fn special_tokens_come_first_and_digits_stay_single() {
        let word = |n: usize| {
            let letter = |k: usize| char::from(b'a' + (k % 26) as u8);
            format!(" {}{}{} 1234", letter(n), letter(n / 26), letter(n / 5))
        };
        let texts = || (0..4_000).map(word);
        let json = train(texts()).expect("enough texts");
        assert_eq!(json, train(texts()).expect("enough texts"));
        let tokenizer: Tokenizer = json.parse().expect("its own file");
        for (id, special) in SPECIALS.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(special), u32::try_from(id).ok());
        }
        let ids = tokenizer.encode("1234", false).expect("plain text").get_ids().to_vec();
        assert_eq!(ids.len(), 4);
        assert_eq!(tokenizer.decode(&ids, false).expect("known ids"), "1234");
    }
}
