//! The fuzz targets on a stable compiler: committed seeds, bent by a deterministic mutator that knows each target's
//! dictionary. Short here; `AZR_FUZZ_RUNS=1000000 AZR_FUZZ_TARGET=literal cargo test --release --test it fuzz -- --nocapture`
//! runs one target long. There is no coverage feedback: that is what the libFuzzer crate in `fuzz/` is for.

#[path = "../../fuzz/targets.rs"]
mod targets;

use std::path::{Path, PathBuf};
use std::time::Instant;

use azr::base::rng::{Purpose, Rng};
use azr::selfplay::prompt::SPECIAL_TOKENS;

/// Runs of a target in the test suite; the executor's target starts processes.
const RUNS: u64 = 2000;
const PROGRAM_RUNS: u64 = 60;
/// Stack of a target: parsing recurses as deeply as a program nests, and supervisors have this much too.
const STACK: usize = 512 << 20;
/// Longest input.
const MAX_LEN: usize = 8192;

/// Seeds of a target: the files of its folder.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|p| std::fs::read(p).expect("readable")).collect();
    if seeds.is_empty() { vec![Vec::new()] } else { seeds }
}

/// Words of a libFuzzer dictionary: the text between the first and the last quote of each line, `\x0A`, `\"` and `\\` undone.
fn dictionary(target: &str) -> Vec<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/dict").join(format!("{target}.dict"));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let word = |line: &str| {
        Some(
            line[line.find('"')? + 1..line.rfind('"')?]
                .replace("\\x0A", "\n")
                .replace("\\\"", "\"")
                .replace("\\\\", "\\"),
        )
    };
    let mut words: Vec<Vec<u8>> = text.lines().filter_map(word).map(String::into_bytes).collect();
    if target == "completion" {
        words.extend(SPECIAL_TOKENS.iter().map(|t| t.as_bytes().to_vec()));
    }
    words
}

/// Bends an input in a few places.
fn mutate(rng: &mut Rng, seeds: &[Vec<u8>], words: &[Vec<u8>]) -> Vec<u8> {
    let mut input = rng.choose(seeds).clone();
    for _ in 0..=rng.below(6) {
        let at = rng.below(input.len() + 1);
        let end = at + rng.below((input.len() - at).min(64) + 1);
        match rng.below(8) {
            0 => drop(input.drain(at..end)),
            1 => input.splice(at..at, [rng.next_u32() as u8]).for_each(drop),
            2 if at < input.len() => input[at] ^= 1 << rng.below(8),
            3 => {
                let part = input[at..end].to_vec();
                (0..=rng.below(3)).for_each(|_| input.splice(at..at, part.iter().copied()).for_each(drop));
            }
            4 => {
                let other = rng.choose(seeds);
                let from = rng.below(other.len() + 1);
                input.splice(at..end, other[from..].iter().take(256).copied()).for_each(drop);
            }
            5 => {
                let number =
                    rng.choose(&["0", "-1", "1e999", "18446744073709551616", "9".repeat(40).as_str()]).to_string();
                input.splice(at..end, number.into_bytes()).for_each(drop);
            }
            _ if !words.is_empty() => input.splice(at..at, rng.choose(words).iter().copied()).for_each(drop),
            _ => input.extend((0..rng.below(24)).map(|_| rng.next_u32() as u8)),
        }
    }
    input.truncate(MAX_LEN);
    input
}

fn fuzz(target: targets::Target, runs: u64) {
    let (name, run) = target;
    let (seeds, words) = (seeds(name), dictionary(name));
    let work = move || {
        let start = Instant::now();
        for seed in &seeds {
            run(seed);
        }
        for i in 0..runs {
            let input = mutate(&mut Rng::new(1, Purpose::Test, i, 77), &seeds, &words);
            let outcome = std::panic::catch_unwind(|| run(&input));
            if outcome.is_err() {
                panic!("target {name}, run {i}: {:?}", String::from_utf8_lossy(&input));
            }
        }
        println!("fuzz {name}: {runs} runs in {:.1} s", start.elapsed().as_secs_f64());
    };
    let thread = std::thread::Builder::new().name(format!("fuzz-{name}")).stack_size(STACK).spawn(work);
    thread.expect("a thread starts").join().unwrap_or_else(|e| std::panic::resume_unwind(e));
}

#[test]
fn fuzz_targets_keep_their_promises() {
    let wanted = std::env::var("AZR_FUZZ_TARGET").ok();
    let runs: Option<u64> = std::env::var("AZR_FUZZ_RUNS").ok().map(|n| n.parse().expect("AZR_FUZZ_RUNS is a number"));
    for target in targets::TARGETS.iter().filter(|(name, _)| wanted.as_deref().is_none_or(|w| w == *name)) {
        let usual = if target.0 == "programs" { PROGRAM_RUNS } else { RUNS };
        fuzz(*target, runs.unwrap_or(usual));
    }
}
