//! What goes to a worker and what comes back: requests, verdicts, and length-prefixed frames.

use std::fmt;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Largest frame; a longer one is refused by whoever reads it.
pub const MAX_FRAME: usize = 16 << 20;

/// Which checks and limits a program runs under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profile {
    /// A proposed task: syntax policy, determinism, tight limits.
    Propose,
    /// A program that is judged by its outputs: looser limits, one run.
    Answer,
}

/// One call of the program's `f`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Arguments as literals, separated by commas.
    pub args: String,
    /// Value to compare with, as a literal.
    pub expect: Option<String>,
}

/// A program with the calls to make of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Python source that defines `f`.
    pub program: String,
    /// The calls; each runs in a fresh module.
    pub calls: Vec<Call>,
    /// Checks and limits.
    pub profile: Profile,
}

/// How one call ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// A value of exact builtin types, as its literal, and whether it equals the expected one.
    Value {
        /// Python's repr of the value.
        text: String,
        /// Result of the comparison, where one was asked for.
        matches: Option<bool>,
    },
    /// An exception ended the call (or the module before it).
    Exception {
        /// Name of its class.
        class: String,
        /// Its message.
        message: String,
    },
    /// The CPU limit.
    TimeoutCpu,
    /// The wall-clock limit.
    TimeoutWall,
    /// The memory limit.
    OutOfMemory,
    /// A forbidden system call.
    Policy,
    /// The process died.
    Crash,
    /// The value's literal is too long.
    OutputTooLarge,
    /// The value has a type that has no literal, or holds nan.
    UnsupportedValue(String),
    /// The arguments are not literals.
    BadArgs(String),
    /// Two runs gave two results.
    NotDeterministic,
}

impl Outcome {
    /// Whether the call gave the expected value.
    pub fn matches(&self) -> bool {
        matches!(self, Outcome::Value { matches: Some(true), .. })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Value { matches: Some(true), .. } => f.write_str("equal"),
            Outcome::Value { matches: Some(false), .. } => f.write_str("not equal"),
            Outcome::Value { text, .. } => write!(f, "value {text}"),
            Outcome::Exception { class, .. } => write!(f, "exception {class}"),
            Outcome::TimeoutCpu => f.write_str("CPU time limit"),
            Outcome::TimeoutWall => f.write_str("wall time limit"),
            Outcome::OutOfMemory => f.write_str("memory limit"),
            Outcome::Policy => f.write_str("forbidden system call"),
            Outcome::Crash => f.write_str("crash"),
            Outcome::OutputTooLarge => f.write_str("output too large"),
            Outcome::UnsupportedValue(what) => write!(f, "unsupported value: {what}"),
            Outcome::BadArgs(what) => write!(f, "arguments: {what}"),
            Outcome::NotDeterministic => f.write_str("not deterministic"),
        }
    }
}

/// Why a program was not run at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rejection {
    /// It does not parse.
    Syntax(String),
    /// The syntax policy forbids something in it.
    Policy(String),
    /// It imports a module that the executor does not have.
    UnsupportedModule(String),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejection::Syntax(what) => write!(f, "syntax: {what}"),
            Rejection::Policy(what) => write!(f, "policy: {what}"),
            Rejection::UnsupportedModule(name) => write!(f, "unsupported module {name}"),
        }
    }
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Set when the program was not run.
    pub rejection: Option<Rejection>,
    /// One outcome per call; empty after a rejection.
    pub calls: Vec<Outcome>,
    /// The program up to renaming, where it is a proposal that parses.
    pub normal_form: Option<String>,
    /// CPU time of all its processes, in microseconds. Not part of the verdict proper: it varies.
    pub cpu_us: u64,
}

/// What a supervisor asks of a zygote.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Python source.
    pub program: String,
    /// The calls.
    pub calls: Vec<Call>,
    /// Runs the calls from last to first.
    pub reverse: bool,
    /// Calls twice in one module and compares.
    pub repeat: bool,
    /// CPU limit of one call, in milliseconds.
    pub cpu_ms: u64,
    /// Wall-clock limit of one call, in milliseconds.
    pub wall_ms: u64,
    /// Memory that a call may add, in bytes.
    pub memory_bytes: u64,
}

/// What a zygote answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobResult {
    /// One outcome per call, in the order of the request.
    pub calls: Vec<Outcome>,
    /// CPU time of the children, in microseconds.
    pub cpu_us: u64,
}

/// Bytes of a message: its length (little-endian u32), then JSON.
pub fn frame(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).expect("messages are plain data");
    let len = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// Writes a message.
///
/// # Errors
/// When the other side is gone.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&frame(message))
}

/// Reads a message.
///
/// # Errors
/// When the other side is gone, or what it wrote is no message.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is too long"));
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Takes complete messages off the front of a buffer; what does not decode ends the list.
pub fn take_frames<T: DeserializeOwned>(mut bytes: &[u8]) -> Vec<T> {
    let mut messages = Vec::new();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let Some(body) = rest.get(..len) else { break };
        let Ok(message) = serde_json::from_slice(body) else { break };
        messages.push(message);
        bytes = &rest[len..];
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_and_broken_ones_do_not_panic() {
        let outcome = Outcome::Value { text: "'\u{e9}'".into(), matches: Some(true) };
        let mut bytes = frame(&outcome);
        bytes.extend(frame(&Outcome::Crash));
        assert_eq!(take_frames::<Outcome>(&bytes), [outcome.clone(), Outcome::Crash]);
        for cut in 0..bytes.len() {
            assert!(take_frames::<Outcome>(&bytes[..cut]).len() <= 1);
        }
        assert!(receive::<Outcome>(&mut &[255u8, 255, 255, 255, 0][..]).is_err());
        assert_eq!(receive::<Outcome>(&mut &bytes[..]).ok(), Some(outcome));
    }
}
