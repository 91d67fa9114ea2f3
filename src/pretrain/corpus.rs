//! Documents for pre-training.

use super::generator;
use crate::base::rng::{Purpose, Rng};

/// Texts of generated program number `index` for training the vocabulary: code, message, inputs, and values of every
/// kind that outputs have.
pub fn vocabulary_texts(seed: u64, index: u64) -> Vec<String> {
    let mut rng = Rng::new(seed, Purpose::Generate, index, 0);
    let program = generator::program(&mut rng, None);
    let words: Vec<&str> = (0..4).map(|_| *rng.choose(&generator::WORDS)).collect();
    let bool_value = generator::value(&mut rng, generator::Ty::Bool);
    let [a, b, c, d] = words[..] else { unreachable!("four words") };
    let values = format!("['{a}', '{b}', '{a}'], [-1, 2, -3], {{'{c}': 1, '{d}': -2}}, '{a}', '{c}', {bool_value}");
    vec![program.code, program.message, values]
}
