//! Running the executable in tests, and looking at what it left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The executable with a clean environment.
pub fn azr(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_azr"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs it to its end.
pub fn run(args: &[&str]) -> Output {
    azr(args).output().expect("the executable starts")
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Fails unless the run ended with this exit code.
pub fn expect_code(output: &Output, code: i32) {
    let status = output.status;
    assert_eq!(status.code(), Some(code), "{status}\n{}", stderr(output));
}

/// Lines of a JSON lines file.
pub fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).expect("a whole JSON line")).collect()
}

/// Folder of a checkpoint.
pub fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:08}"))
}

/// Hash over names and bytes of all files of a folder.
pub fn hash(folder: &Path) -> String {
    let mut files = Vec::new();
    walk(folder, &mut files);
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.strip_prefix(folder).expect("inside").to_string_lossy().as_bytes());
        hasher.update(&std::fs::read(&file).expect("readable"));
    }
    hasher.finalize().to_string()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}
