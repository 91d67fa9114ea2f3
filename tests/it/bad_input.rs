//! Broken weights: whatever is wrong with a model's files, `azr` ends with the documented exit code, one line of error
//! and a hint, and never with a panic.

use std::path::Path;

use azr::model::params::ParamTable;
use azr::weights::model_files::ModelFiles;
use serde_json::{Map, Value, json};

use crate::{command, fixture};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What is wrong, the change that makes it so, the exit code, and what the error says.
type Case = (&'static str, fn(&Path), i32, &'static str);

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("copied")
}

fn write(dir: &Path, file: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(dir.join(file), bytes).expect("written");
}

fn remove(dir: &Path, file: &str) {
    std::fs::remove_file(dir.join(file)).expect("removed");
}

/// Changes a JSON file; null removes the key.
fn set(dir: &Path, file: &str, key: &str, value: Value) {
    let mut object: Map<String, Value> = serde_json::from_slice(&read(&dir.join(file))).expect("an object");
    if value.is_null() {
        object.remove(key);
    } else {
        object.insert(key.to_owned(), value);
    }
    write(dir, file, Value::Object(object).to_string());
}

fn config(dir: &Path, key: &str, value: Value) {
    set(dir, "config.json", key, value);
}

/// Changes the bytes of the weights.
fn bytes(dir: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = read(&dir.join(WEIGHTS));
    change(&mut bytes);
    write(dir, WEIGHTS, bytes);
}

/// Changes the header of the weights, not the data behind it.
fn header(dir: &Path, change: impl FnOnce(&mut Value)) {
    bytes(dir, |bytes| {
        let len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let data = bytes.split_off(8 + len);
        let mut header: Value = serde_json::from_slice(&bytes[8..]).expect("a header");
        change(&mut header);
        let text = header.to_string();
        *bytes = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat();
    });
}

/// Writes the weights anew after a change of one tensor: type, shape and bytes (none: the tensor is left out).
fn tensor(dir: &Path, name: &str, change: impl Fn(&mut Value, &mut Option<Vec<u8>>)) {
    let all = read(&dir.join(WEIGHTS));
    let len = u64::from_le_bytes(all[..8].try_into().expect("8 bytes")) as usize;
    let old: Map<String, Value> = serde_json::from_slice(&all[8..8 + len]).expect("a header");
    let (mut new, mut data) = (Map::new(), Vec::new());
    let absent = (!old.contains_key(name)).then(|| (name.to_owned(), json!({"dtype": "BF16", "shape": [0]})));
    for (tensor, mut info) in old.into_iter().filter(|(n, _)| n != "__metadata__").chain(absent) {
        let offset = |i: usize| info["data_offsets"][i].as_u64().unwrap_or_default() as usize;
        let mut bytes = Some(all[8 + len..][offset(0)..offset(1)].to_vec());
        if tensor == name {
            change(&mut info, &mut bytes);
        }
        let Some(bytes) = bytes else { continue };
        info["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
        data.extend(bytes);
        new.insert(tensor, info);
    }
    let text = Value::Object(new).to_string();
    write(dir, WEIGHTS, [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat());
}

/// Stores a norm's 32 values as another type of `width` bytes.
fn stored_as(dir: &Path, dtype: &str, width: usize) {
    tensor(dir, "model.norm.weight", |info, bytes| {
        info["dtype"] = json!(dtype);
        *bytes = Some(vec![0; 32 * width]);
    });
}

/// Puts a file name into the index.
fn index(dir: &Path, file: Value) {
    let mut index: Value = serde_json::from_slice(&read(&dir.join(INDEX))).expect("an index");
    index["weight_map"]["lm_head.weight"] = file;
    write(dir, INDEX, index.to_string());
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";
/// About the largest number that config.json may hold.
const HUGE: u64 = (1 << 31) - 8;

/// Changes of the one file of `qwen2`.
const FILE: &[Case] = &[
    ("empty", |d| write(d, WEIGHTS, ""), 3, "it has 0 bytes"),
    ("cut off in the data", |d| bytes(d, |b| b.truncate(b.len() - 100)), 3, "not a whole safetensors file"),
    ("cut off in the header", |d| bytes(d, |b| b.truncate(60)), 3, "its header has"),
    ("a byte too many", |d| bytes(d, |b| b.push(0)), 3, "not a whole safetensors file"),
    ("a header longer than the file", |d| bytes(d, |b| b[2] = 255), 3, "its header has"),
    ("a header longer than memory", |d| bytes(d, |b| b[..8].fill(255)), 3, "its header has"),
    ("no header", |d| bytes(d, |b| b[..8].fill(0)), 3, "not a whole safetensors file"),
    ("a pickle", |d| write(d, WEIGHTS, [b"PK\x03\x04".as_slice(), &[7; 500]].concat()), 3, "its header has"),
    ("a web page", |d| write(d, WEIGHTS, "<!DOCTYPE html><html></html>"), 3, "its header has"),
    ("a header that is no JSON", |d| bytes(d, |b| b[9] = b'{'), 3, "not a whole safetensors file"),
    ("overlapping tensors", |d| header(d, |h| h[UP]["data_offsets"] = json!([0, 3072])), 3, "not a whole safetensors"),
    ("a tensor outside", |d| header(d, |h| h[UP]["data_offsets"] = json!([HUGE, HUGE + 3072])), 3, "whole"),
    ("a shape that is larger than its bytes", |d| header(d, |h| h[UP]["shape"] = json!([48, 33])), 3, "whole"),
    ("a shape beyond all numbers", |d| header(d, |h| h[UP]["shape"] = json!([1u64 << 40, 1u64 << 40])), 3, "whole"),
    ("an unknown type", |d| header(d, |h| h[UP]["dtype"] = json!("Q4_0")), 3, "not a whole safetensors file"),
    ("a type for integers", |d| stored_as(d, "I64", 8), 3, "the tensor model.norm.weight has type I64"),
    ("a type of 8 bits", |d| stored_as(d, "F8_E4M3", 1), 3, "the tensor model.norm.weight has type F8_E4M3"),
    ("a type of 64 bits", |d| stored_as(d, "F64", 8), 3, "the tensor model.norm.weight has type F64"),
    (
        "a transposed tensor",
        |d| tensor(d, UP, |i, _| i["shape"] = json!([32, 48])),
        3,
        "has shape [32, 48], not [48, 32]",
    ),
    ("a missing tensor", |d| tensor(d, UP, |_, b| *b = None), 3, "lack the tensor model.layers.1.mlp.up_proj.weight"),
    ("an unknown tensor", |d| tensor(d, "base.lora_A.weight", |_, _| ()), 3, "the unknown tensor base.lora_A.weight"),
    ("not a number", |d| bytes(d, |b| b.iter_mut().rev().take(2).for_each(|x| *x = 255)), 3, "holds NaN at element"),
    ("no weights", |d| remove(d, WEIGHTS), 3, "holds no model.safetensors"),
];

/// Changes of the files beside the weights of `qwen2`.
const COMPANIONS: &[Case] = &[
    ("no config.json", |d| remove(d, "config.json"), 3, "config.json is missing"),
    ("no tokenizer.json", |d| remove(d, "tokenizer.json"), 3, "tokenizer.json is missing"),
    ("an empty config.json", |d| write(d, "config.json", ""), 3, "config.json is not JSON"),
    ("a list for config.json", |d| write(d, "config.json", "[]"), 3, "names no `model_type`"),
    ("a deep config.json", |d| write(d, "config.json", "[".repeat(100_000)), 3, "config.json is not JSON"),
    ("half a tokenizer.json", |d| write(d, "tokenizer.json", "{\"model\":"), 3, "tokenizer.json: not a tokenizer"),
    ("no tokenizer in tokenizer.json", |d| write(d, "tokenizer.json", "{}"), 3, "tokenizer.json: not a tokenizer"),
    (
        "a broken generation_config.json",
        |d| write(d, "generation_config.json", "{"),
        3,
        "generation_config.json is not",
    ),
    ("a broken tokenizer_config.json", |d| write(d, "tokenizer_config.json", "{"), 3, "tokenizer_config.json is not"),
    ("an unknown architecture", |d| config(d, "model_type", json!("gpt2")), 3, "the architecture \"gpt2\""),
    ("no vocabulary", |d| config(d, "vocab_size", Value::Null), 3, "has no `vocab_size`"),
    (
        "a vocabulary below the tokenizer's",
        |d| config(d, "vocab_size", json!(10)),
        3,
        "the tokenizer has ids up to 299",
    ),
    (
        "a vocabulary that the weights lack",
        |d| config(d, "vocab_size", json!(400)),
        3,
        "has shape [304, 32], not [400, 32]",
    ),
    ("an end outside", |d| set(d, "generation_config.json", "eos_token_id", json!(304)), 3, "the special token 304 is"),
    ("no heads", |d| config(d, "num_attention_heads", json!(0)), 3, "`num_attention_heads` = 0"),
    ("no key-value heads", |d| config(d, "num_key_value_heads", json!(0)), 3, "`num_key_value_heads` = 0"),
    ("heads in no ratio", |d| config(d, "num_attention_heads", json!(3)), 3, "no whole ratio"),
    ("half a layer", |d| config(d, "num_hidden_layers", json!(1.5)), 3, "`num_hidden_layers` = 1.5"),
    ("a layer too many", |d| config(d, "num_hidden_layers", json!(3)), 3, "lack the tensor model.layers.2"),
    ("a layer too few", |d| config(d, "num_hidden_layers", json!(1)), 3, "the unknown tensor model.layers.1"),
    ("a million layers", |d| config(d, "num_hidden_layers", json!(1_000_000)), 3, "1000000 layers"),
    ("layers beyond all numbers", |d| config(d, "num_hidden_layers", json!(1u64 << 60)), 3, "`num_hidden_layers` ="),
    ("a negative width", |d| config(d, "hidden_size", json!(-32)), 3, "`hidden_size` = -32"),
    ("a huge width", |d| config(d, "hidden_size", json!(HUGE)), 3, "parameters"),
    ("a huge vocabulary", |d| config(d, "vocab_size", json!(HUGE)), 3, "has shape [304, 32]"),
    ("a huge feed-forward layer", |d| config(d, "intermediate_size", json!(HUGE)), 3, "has shape [48, 32]"),
    ("huge heads", |d| config(d, "head_dim", json!(HUGE)), 3, "has shape [32, 32]"),
    ("an odd head", |d| config(d, "head_dim", json!(7)), 3, "head_dim"),
    ("a word as epsilon", |d| config(d, "rms_norm_eps", json!("small")), 3, "rms_norm_eps"),
    ("a negative epsilon", |d| config(d, "rms_norm_eps", json!(-1)), 3, "rms_norm_eps"),
    ("a word as RoPE base", |d| config(d, "rope_theta", json!("big")), 3, "rope_theta"),
    ("a negative RoPE base", |d| config(d, "rope_theta", json!(-1)), 3, "rope_theta"),
    ("an unknown RoPE scaling", |d| config(d, "rope_scaling", json!({"type": "yarn"})), 3, "\"yarn\""),
    ("half a RoPE scaling", |d| config(d, "rope_scaling", json!({"rope_type": "llama3"})), 3, "has no `factor`"),
    (
        "a RoPE scaling without a band",
        |d| {
            let scaling = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2,
                "original_max_position_embeddings": 32});
            config(d, "rope_scaling", scaling);
        },
        3,
        "low_freq_factor",
    ),
    ("quantised weights", |d| config(d, "quantization_config", json!({"bits": 4})), 3, "quantised"),
    (
        "no end of text",
        |d| {
            set(d, "generation_config.json", "eos_token_id", Value::Null);
            config(d, "eos_token_id", Value::Null);
        },
        3,
        "eos_token_id",
    ),
];

/// Changes of the index and shards of `qwen3`.
const SHARDS: &[Case] = &[
    ("a missing shard", |d| remove(d, "model-00002-of-00003.safetensors"), 74, "cannot read"),
    ("an index with an unknown shard", |d| index(d, json!("model-4.safetensors")), 74, "model-4.safetensors"),
    ("an index that leaves the folder", |d| index(d, json!("../model.safetensors")), 3, "not a file beside it"),
    ("an index with an absolute path", |d| index(d, json!("/etc/passwd")), 3, "not a file beside it"),
    ("an index with the folder above", |d| index(d, json!("..")), 3, "not a file beside it"),
    ("an index with the folder itself", |d| index(d, json!("")), 3, "is not a file"),
    ("an index with a number", |d| index(d, json!(3)), 3, "no file name"),
    ("an index without a map", |d| write(d, INDEX, "{}"), 3, "has no `weight_map`"),
    ("an index with an empty map", |d| write(d, INDEX, "{\"weight_map\": {}}"), 3, "lack the tensor"),
    ("half an index", |d| write(d, INDEX, "{\"weight_map\": {"), 3, "is not JSON"),
    (
        "an index with a tensor that no shard holds",
        |d| {
            let mut index: Value = serde_json::from_slice(&read(&d.join(INDEX))).expect("an index");
            index["weight_map"]["model.extra"] = json!("model-00001-of-00003.safetensors");
            write(d, INDEX, index.to_string());
        },
        3,
        "names the tensor model.extra, which no shard holds",
    ),
    (
        "a tensor in two shards",
        |d| {
            write(d, "again.safetensors", read(&d.join("model-00001-of-00003.safetensors")));
            index(d, json!("again.safetensors"));
        },
        3,
        "is in two files",
    ),
    (
        "a shard that is cut off",
        |d| {
            let shard = read(&d.join("model-00003-of-00003.safetensors"));
            write(d, "model-00003-of-00003.safetensors", &shard[..shard.len() - 4]);
        },
        3,
        "model-00003-of-00003.safetensors is not a whole safetensors file",
    ),
];

/// What is wrong with how a run on these weights ended.
fn fault(weights: &Path, code: i32, says: &str) -> Option<String> {
    let output = fixture::score(&["--weights", fixture::text(weights)], "{\"tokens\": [1, 2]}\n");
    let stderr = command::stderr(&output);
    let lines: Vec<&str> = stderr.lines().collect();
    let is_well_formed = matches!(lines[..], [error, hint] if error.starts_with("azr: ") && hint.starts_with("hint: "));
    let is_right = output.status.code() == Some(code) && lines.first().is_some_and(|l| l.contains(says));
    let is_fine = is_well_formed && is_right && output.stdout.is_empty();
    (!is_fine).then(|| format!("{}, expected {code} and {says:?}:\n{stderr}", output.status))
}

#[test]
fn broken_weights_end_with_one_line_a_hint_and_their_exit_code() {
    let root = tempfile::tempdir().expect("a folder");
    let mut faults = Vec::new();
    for (model, cases) in [("qwen2", FILE), ("qwen2", COMPANIONS), ("qwen3", SHARDS)] {
        for (what, change, code, says) in cases {
            let dir = root.path().join(what.replace(' ', "_"));
            std::fs::create_dir(&dir).expect("made");
            fixture::copy(model, &dir);
            change(&dir);
            faults.extend(fault(&dir, *code, says).map(|f| format!("{what}: {f}")));
        }
    }
    for (path, says) in [("nowhere", "there is no"), ("", "holds no model.safetensors")] {
        faults.extend(fault(&root.path().join(path), 3, says));
    }
    faults.extend(fault(&fixture::folder("qwen2").join("config.json"), 3, "not a whole safetensors file"));
    faults.extend(fault(Path::new("/dev/null"), 3, "is not a file"));
    assert!(faults.is_empty(), "{} of them:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn a_long_context_costs_nothing_where_it_is_not_used() {
    let dir = tempfile::tempdir().expect("a folder");
    fixture::copy("qwen2", dir.path());
    config(dir.path(), "max_position_embeddings", json!(HUGE));
    let output = fixture::score(&["--weights", fixture::text(dir.path()), "--generate", "3"], "{\"tokens\": [1, 2]}\n");
    command::expect_code(&output, 0);
}

#[test]
fn weights_that_shrink_while_a_run_has_them_open_are_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    fixture::copy("qwen2", dir.path());
    let files = ModelFiles::open(dir.path()).expect("whole");
    let weights = std::fs::File::options().write(true).open(dir.path().join(WEIGHTS)).expect("there");
    weights.set_len(30_000).expect("cut off");
    let error = ParamTable::new(&files.spec).load(&files.tensors).expect_err("cut off");
    assert_eq!(error.exit_code(), 74, "{error}");
    assert!(error.to_string().contains("changed while it was being read") && error.hint().is_some(), "{error}");
}
