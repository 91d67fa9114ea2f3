//! Standard output.

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes to standard output.
///
/// # Errors
/// When nobody reads it, or the disk is full.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|e| Error::io("write", Path::new("standard output"), &e))
}

/// Writes a JSON line to standard output.
///
/// # Errors
/// When nobody reads it, or the disk is full.
pub fn print_line(line: &serde_json::Value) -> Result<()> {
    print(&format!("{line}\n"))
}
