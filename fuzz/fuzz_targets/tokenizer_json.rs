#![no_main]

#[path = "../targets.rs"]
#[expect(dead_code, reason = "each binary runs one target")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::tokenizer_json(data));
