//! The house rules that a compiler does not check, read from the sources: floors, one-way imports, where `unsafe` may
//! stand, and habits. `src/lib.rs` is the map; a new top-level module needs a floor here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Floor of each top-level module; imports go strictly downward or stay inside the module.
const FLOORS: &[(&str, u32)] = &[
    ("main", 9),
    ("cli", 8),
    ("eval", 7),
    ("pipeline", 6),
    ("pretrain", 6),
    ("selfplay", 5),
    ("train", 5),
    ("rollout", 5),
    ("model", 4),
    ("compute", 3),
    ("exec", 3),
    ("weights", 2),
    ("observe", 2),
    ("base", 1),
    ("error", 0),
];

/// The only places that may hold `unsafe`: SIMD, the CUDA driver, the mapped weights, system calls.
const UNSAFE_HOMES: &[&str] =
    &["src/compute/cpu/", "src/compute/launch/", "src/weights/safetensors.rs", "src/exec/sandbox.rs"];

/// The only places that may write to the terminal.
const PRINT_HOMES: &[&str] = &["src/main.rs", "src/cli", "src/observe/"];

/// Words that a module must not know, with the reason.
const FOREIGN_WORDS: &[(&str, &[&str], &str)] = &[
    ("src/selfplay/", &["Backend", "Decoder", "std::fs", "std::process"], "selfplay is pure: no tensors, no I/O"),
    ("src/exec/", &["Decoder", "logprob", "Tokenizer"], "the executor knows nothing of models"),
    ("src/rollout/", &["reward", "advantage"], "rollout knows nothing of rewards"),
];

/// Longest file in lines; a longer one holds two things.
const MAX_LINES: usize = 800;

/// Longest line of C++ and CUDA (kernels/.clang-format); rustfmt sees to Rust.
const MAX_COLUMNS: usize = 100;

/// What kernels must not use: instructions go through `kernels/prims.h`, and no reduction may depend on timing.
const KERNEL_WORDS: &[&str] =
    &["asm", "atomicAdd", "__syncthreads", "__syncwarp", "__shfl_sync", "__shared__", "__global__", "__device__"];

struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Code lines with their numbers, without comments, up to the file's unit tests.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text
            .lines()
            .enumerate()
            .take_while(|(_, line)| !line.trim_start().starts_with("#[cfg(test)]"))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
            .map(|(i, line)| (i + 1, line))
    }

    /// Top-level module of a file below `src/`.
    fn module(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?;
        Some(rest.split('/').next()?.trim_end_matches(".rs"))
    }
}

fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries {
        let path = entry.expect("readable directory entry").path();
        let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
        if path.is_dir() && !matches!(name.as_str(), "target" | ".git" | "corpus" | "artifacts" | "fixtures") {
            collect(&path, out);
        } else if path.is_file() {
            out.push(path);
        }
    }
}

fn sources(extensions: &[&str]) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for top in ["src", "tokenizer", "kernels", "tests", "benches", "fuzz", ".ci"] {
        collect(&root.join(top), &mut files);
    }
    files.push(root.join("README.md"));
    files.sort();
    let listed: Vec<Source> = files
        .iter()
        .filter(|f| f.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)))
        .filter_map(|f| {
            let text = fs::read_to_string(f).ok()?;
            let path = f.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
            Some(Source { path, text })
        })
        .collect();
    assert!(!listed.is_empty(), "no sources found with {extensions:?}");
    listed
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "{} problem(s):\n{}", problems.len(), problems.join("\n"));
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = at.checked_sub(1).map(|i| line.as_bytes()[i]);
        let after = line.as_bytes().get(at + word.len()).copied();
        !before.is_some_and(is_word_byte) && !after.is_some_and(is_word_byte)
    })
}

/// Paths after `crate::` on a line, one-level groups `crate::{a, b::c}` included.
fn crate_paths(line: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, marker) in line.match_indices("crate::") {
        if at > 0 && is_word_byte(line.as_bytes()[at - 1]) {
            continue;
        }
        let rest = &line[at + marker.len()..];
        if let Some(group) = rest.strip_prefix('{') {
            found.extend(group.split('}').next().unwrap_or("").split(',').map(|p| p.trim().to_owned()));
        } else {
            found.push(rest.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | ':')).collect());
        }
    }
    found
}

#[test]
fn imports_go_downward() {
    let floors: BTreeMap<&str, u32> = FLOORS.iter().copied().collect();
    let mut problems = Vec::new();
    for source in sources(&["rs"]).iter().filter(|s| s.path.starts_with("src/") && s.path != "src/lib.rs") {
        let module = source.module().expect("a file below src has a module");
        let Some(&own) = floors.get(module) else {
            problems.push(format!("{}: module `{module}` has no floor in tests/tidy.rs", source.path));
            continue;
        };
        for (line, code) in source.code() {
            for path in crate_paths(code) {
                let target = path.split("::").next().unwrap_or("");
                match floors.get(target) {
                    Some(&floor) if target != module && floor >= own => {
                        problems.push(format!(
                            "{}:{line}: `{module}` (floor {own}) imports `{target}` (floor {floor})",
                            source.path
                        ));
                    }
                    _ => {}
                }
            }
        }
    }
    report(&problems);
}

#[test]
fn siblings_import_in_one_direction() {
    let mut problems = Vec::new();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources(&["rs"]).iter().filter(|s| s.path.starts_with("src/")) {
        let parts: Vec<&str> = source.path.trim_start_matches("src/").trim_end_matches(".rs").split('/').collect();
        let [folder, file, ..] = parts[..] else { continue };
        let node = format!("{folder}::{file}");
        for (_, code) in source.code() {
            for path in crate_paths(code) {
                let mut steps = path.split("::");
                if steps.next() == Some(folder)
                    && let Some(sibling) = steps.next()
                    && sibling != file
                    && sibling.starts_with(|c: char| c.is_ascii_lowercase())
                {
                    edges.entry(node.clone()).or_default().insert(format!("{folder}::{sibling}"));
                }
            }
        }
    }
    for start in edges.keys() {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![start.clone()]);
        while let Some(node) = todo.pop() {
            for next in edges.get(&node).into_iter().flatten() {
                if next == start {
                    problems.push(format!("{start} and {node} import each other in a circle"));
                }
                if seen.insert(next.clone()) {
                    todo.push(next.clone());
                }
            }
        }
    }
    report(&problems);
}

#[test]
fn unsafe_stays_in_its_homes_and_is_explained() {
    let mut problems = Vec::new();
    for source in sources(&["rs"]).iter().filter(|s| s.path.starts_with("src/") || s.path.starts_with("tokenizer/")) {
        let home = UNSAFE_HOMES.iter().any(|h| source.path.starts_with(h));
        let lines: Vec<&str> = source.text.lines().collect();
        for (line, code) in source.code() {
            let code = code.split("//").next().unwrap_or("");
            if !has_word(code, "unsafe") {
                continue;
            }
            if !home {
                problems.push(format!("{}:{line}: `unsafe` outside its homes", source.path));
            } else if code.contains("unsafe {") || code.contains("unsafe impl") {
                let explained = lines[line.saturating_sub(8)..line].iter().any(|l| l.contains("SAFETY:"));
                if !explained {
                    problems.push(format!("{}:{line}: `unsafe` without `// SAFETY:` above it", source.path));
                }
            }
        }
    }
    report(&problems);
}

#[test]
fn modules_do_not_know_what_is_not_theirs() {
    let mut problems = Vec::new();
    for source in sources(&["rs"]).iter().filter(|s| s.path.starts_with("src/")) {
        for (prefix, words, reason) in FOREIGN_WORDS {
            if !source.path.starts_with(prefix) {
                continue;
            }
            for (line, code) in source.code() {
                for word in words.iter().filter(|w| has_word(code, w)) {
                    problems.push(format!("{}:{line}: `{word}`: {reason}", source.path));
                }
            }
        }
        let prints = PRINT_HOMES.iter().any(|h| source.path.starts_with(h));
        for (line, code) in source.code() {
            if !prints && ["println!", "eprintln!", "print!", "eprint!", "dbg!"].iter().any(|p| has_word(code, p)) {
                problems.push(format!("{}:{line}: only observe, cli and main write to the terminal", source.path));
            }
        }
    }
    report(&problems);
}

#[test]
fn habits_are_kept() {
    let mut problems = Vec::new();
    for source in sources(&["rs", "cu", "cpp", "h", "py", "sh", "md"]) {
        let path = &source.path;
        let this_file = path == "tests/tidy.rs";
        for (i, line) in source.text.lines().enumerate() {
            if !line.is_ascii() && !path.ends_with(".md") {
                problems.push(format!("{path}:{}: not ASCII", i + 1));
            }
            if !this_file && ["/work/", "/root/", "/tmp/bash"].iter().any(|p| line.contains(p)) {
                problems.push(format!("{path}:{}: a path of one machine", i + 1));
            }
        }
        if !path.ends_with(".md") && source.text.lines().count() > MAX_LINES {
            problems.push(format!("{path}: over {MAX_LINES} lines"));
        }
        if [".cu", ".cpp", ".h"].iter().any(|e| path.ends_with(e)) {
            for (i, _) in source.text.lines().enumerate().filter(|(_, l)| l.len() > MAX_COLUMNS) {
                problems.push(format!("{path}:{}: over {MAX_COLUMNS} columns", i + 1));
            }
        }
        if path.ends_with(".rs") {
            if path.ends_with("/mod.rs") {
                problems.push(format!("{path}: modules are declared inline in lib.rs"));
            }
            if path.starts_with("src/") && !source.text.starts_with("//!") {
                problems.push(format!("{path}: no module documentation"));
            }
            for (line, code) in source.code().filter(|_| !this_file) {
                for habit in [".unwrap()", "todo!(", "unimplemented!(", "#[allow(", "#[ignore"] {
                    if code.contains(habit) {
                        problems.push(format!("{path}:{line}: `{habit}`"));
                    }
                }
            }
        }
    }
    report(&problems);
}

/// Names in `KERNEL(threads, name)` of a kernel source.
fn entry_points(text: &str) -> Vec<&str> {
    let lines = text.lines().filter(|l| l.starts_with("KERNEL"));
    lines.filter_map(|l| l.split_once(", ")?.1.split(')').next()).collect()
}

/// Names in `PLANTED(name)` of a kernel source.
fn planted_faults(text: &str) -> BTreeSet<&str> {
    let code = text.lines().filter(|l| !l.starts_with("#define"));
    code.flat_map(|l| l.split("PLANTED(").skip(1)).filter_map(|rest| rest.split(')').next()).collect()
}

/// Number of files, of those below a folder, and number of places where a quoted name occurs.
fn quoted(files: &[Source], folder: &str, name: &str) -> usize {
    let quoted = format!("\"{name}\"");
    files.iter().filter(|f| f.path.starts_with(folder)).map(|f| f.text.matches(&quoted).count()).sum()
}

#[test]
fn every_kernel_has_one_launcher_and_a_test_and_every_fault_is_found() {
    let (kernels, rust, texts) = (sources(&["cu", "h"]), sources(&["rs"]), sources(&["md"]));
    let table = texts.iter().find(|t| t.path == "kernels/README.md").map_or("", |t| t.text.as_str());
    let tests: String = rust.iter().filter(|f| f.path.starts_with("tests/kernels/")).map(|f| f.text.as_str()).collect();
    let mut problems = Vec::new();
    for source in kernels.iter().filter(|k| k.path.starts_with("kernels/") && !k.path.contains("/emu/")) {
        let path = &source.path;
        for name in entry_points(&source.text) {
            let launchers = quoted(&rust, "src/compute/launch/", name);
            if launchers != 1 {
                problems.push(format!("{path}: `{name}` has {launchers} launchers in src/compute/launch/"));
            }
            if !has_word(&tests, name) {
                problems.push(format!("{path}: `{name}` has no test in tests/kernels/"));
            }
            if !table.contains(&format!("`{name}`")) {
                problems.push(format!("{path}: `{name}` is not in kernels/README.md"));
            }
        }
        for fault in planted_faults(&source.text) {
            if quoted(&rust, "tests/kernels/", fault) == 0 || !table.contains(&format!("`{fault}`")) {
                problems.push(format!("{path}: the fault `{fault}` is not tested and in kernels/README.md"));
            }
        }
        if path.ends_with(".cu") {
            for (line, code) in source.code() {
                for word in KERNEL_WORDS.iter().filter(|w| has_word(code, w)) {
                    problems.push(format!("{path}:{line}: `{word}`: kernels use kernels/prims.h"));
                }
            }
        }
    }
    report(&problems);
}

#[test]
fn the_checks_see_what_they_look_for() {
    assert_eq!(crate_paths("use crate::{base::rng, error};"), ["base::rng", "error"]);
    assert_eq!(crate_paths("let x = crate::exec::pool::Pool::start();"), ["exec::pool::Pool::start"]);
    assert!(has_word("unsafe {", "unsafe") && !has_word("unsafe_code", "unsafe"));
    assert_eq!(entry_points("KERNEL(THREADS, f)\n(int x) {\nKERNEL_ALONE(384, g)(int y) {"), ["f", "g"]);
    assert_eq!(planted_faults("if (!PLANTED(a_b) && PLANTED(c)) {").into_iter().collect::<Vec<_>>(), ["a_b", "c"]);
}
