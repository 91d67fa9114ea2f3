//! The one error type: what went wrong in one line, what to do about it, and the exit code.

use std::fmt;
use std::path::Path;

/// Result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Class of an error; decides the process's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything that has no class of its own.
    Failure,
    /// Wrong command line.
    Usage,
    /// Wrong configuration or input file: config, weights, tokenizer, checkpoint.
    Config,
    /// Driver, library, GPU or operating system lacks something.
    Environment,
    /// The model and its buffers do not fit.
    OutOfMemory,
    /// The sandbox cannot be enforced as asked.
    Sandbox,
    /// Reading or writing failed.
    Io,
    /// Stopped by a signal; the run can be resumed.
    Interrupted,
}

impl Kind {
    /// Exit code of the process, a stable part of the command line's contract.
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Failure => 1,
            Kind::Usage => 2,
            Kind::Config => 3,
            Kind::Environment => 4,
            Kind::OutOfMemory => 5,
            Kind::Sandbox => 6,
            Kind::Io => 74,
            Kind::Interrupted => 75,
        }
    }
}

/// An error: class, one line of text, and a hint where there is something to do.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error {
    /// An error of a class. Line breaks in the text become spaces: an error is one line.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: one_line(message.into()), hint: None }
    }

    /// Unclassified failure, exit code 1.
    pub fn failure(message: impl Into<String>) -> Self {
        Self::new(Kind::Failure, message)
    }

    /// Wrong command line, exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// Wrong configuration or input file, exit code 3.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }

    /// The machine lacks something, exit code 4.
    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(Kind::Environment, message)
    }

    /// The sandbox cannot be enforced, exit code 6.
    pub fn sandbox(message: impl Into<String>) -> Self {
        Self::new(Kind::Sandbox, message)
    }

    /// An operation on a file failed, exit code 74.
    pub fn io(action: &str, path: &Path, source: &std::io::Error) -> Self {
        Self::new(Kind::Io, format!("cannot {action} {}: {source}", path.display()))
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(one_line(hint.into()));
        self
    }

    /// Puts what was being done before the text.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.message = one_line(format!("{doing}: {}", self.message));
        self
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The class.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Exit code of the process when this error ends it.
    pub fn exit_code(&self) -> u8 {
        self.kind.exit_code()
    }
}

fn one_line(text: String) -> String {
    if text.contains(['\n', '\r']) { text.split_whitespace().collect::<Vec<_>>().join(" ") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_its_class() {
        let error = Error::config("bad\nkey").with_hint("use\n`seed`").context("reading a.toml");
        assert_eq!(error.to_string(), "reading a.toml: bad key");
        assert_eq!(error.hint(), Some("use `seed`"));
        assert_eq!(error.exit_code(), 3);
    }
}
