//! The tiny models of tests/fixtures, and `azr score` over them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

/// Folder of a fixture.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a fixture's model, to be changed.
pub fn copy(name: &str, to: &Path) {
    for entry in std::fs::read_dir(folder(name)).expect("the fixture is there") {
        let path = entry.expect("an entry").path();
        let file = path.file_name().expect("a file").to_string_lossy().into_owned();
        if !file.starts_with("reference.") {
            std::fs::write(to.join(file), std::fs::read(&path).expect("readable")).expect("written");
        }
    }
}

/// Runs `azr score` with these lines on its standard input.
pub fn score(args: &[&str], lines: &str) -> Output {
    let mut child = crate::command::azr(&["score"]).args(args).stdin(Stdio::piped()).spawn().expect("it starts");
    // What fails before it reads its input closes the pipe; the test sees the exit code.
    let _ = child.stdin.take().expect("piped").write_all(lines.as_bytes());
    child.wait_with_output().expect("it ends")
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
