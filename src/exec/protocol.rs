//! What goes to a worker and what comes back: requests, verdicts, and length-prefixed frames.

use std::fmt;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Largest frame; a longer one is refused by whoever reads it.
pub const MAX_FRAME: usize = 16 << 20;

/// Which checks and limits a program runs under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// A proposed task: syntax policy, determinism, tight limits.
    Propose,
    /// A program that is judged by its outputs: syntax policy, looser limits, one run.
    Answer,
    /// An answer that is a program, to be right in all its calls: as an answer, but a call that goes over a time limit ends it.
    #[serde(skip)]
    Program,
    /// A program from elsewhere: no policy, and calls are Python source, run after the program in its module. Only the
    /// sandbox stands between it and the machine, as it does for the others.
    Run,
}

/// What one call may use up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Processor time, in milliseconds.
    pub cpu_ms: u64,
    /// Time on the wall, in milliseconds.
    pub wall_ms: u64,
    /// Memory on top of the idle interpreter's, in bytes; at most [`MAX_MEMORY_MIB`].
    pub memory_bytes: u64,
}

/// Most memory of a call, in MiB: with as much again for pieces, a child's address space holds it.
pub const MAX_MEMORY_MIB: u64 = 2048;

/// Processor time after which the kernel kills a child whatever else fails, in seconds.
pub const MAX_CPU_S: u64 = 60;

/// One call of the program's `f`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Arguments as literals, separated by commas. With [`Profile::Run`]: source to run after the program; its value is the
    /// outcome where it is an expression, else `None`.
    pub args: String,
    /// Value to compare with, as a literal. With [`Profile::Run`] it may be any expression.
    pub expect: Option<String>,
}

/// What the executor does not support: the one list of reasons, so that a trainer can count them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Unsupported {
    /// A module that is not there (numpy, sympy, ...).
    #[error("unsupported module {0}")]
    Module(String),
    /// A value of a type that has no literal.
    #[error("unsupported value: {0}")]
    Value(String),
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
#[serde(rename_all = "snake_case")]
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
    /// The value's literal is too long. It is never cut short.
    OutputTooLarge,
    /// The value has a type that has no literal, or holds nan.
    Unsupported(Unsupported),
    /// The arguments are not literals.
    BadArgs(String),
    /// Two runs gave two results.
    NotDeterministic,
    /// The result depends on the order in which a set gives its members, which is the interpreter's own affair: RustPython
    /// has insertion order, CPython the order of hashes.
    SetOrder,
}

impl Outcome {
    /// Whether the call gave the expected value.
    pub fn matches(&self) -> bool {
        matches!(self, Outcome::Value { matches: Some(true), .. })
    }

    /// Name of the verdict class, a stable part of the command line's contract.
    pub fn class(&self) -> &'static str {
        match self {
            Outcome::Value { .. } => "value",
            Outcome::Exception { .. } => "exception",
            Outcome::TimeoutCpu => "timeout_cpu",
            Outcome::TimeoutWall => "timeout_wall",
            Outcome::OutOfMemory => "out_of_memory",
            Outcome::Policy => "policy",
            Outcome::Crash => "crash",
            Outcome::OutputTooLarge => "output_too_large",
            Outcome::Unsupported(_) => "unsupported",
            Outcome::BadArgs(_) => "bad_args",
            Outcome::NotDeterministic => "not_deterministic",
            Outcome::SetOrder => "set_order",
        }
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
            Outcome::Unsupported(what) => what.fmt(f),
            Outcome::BadArgs(what) => write!(f, "arguments: {what}"),
            Outcome::NotDeterministic => f.write_str("not deterministic"),
            Outcome::SetOrder => f.write_str("depends on the order of a set"),
        }
    }
}

/// Why a program was not run at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rejection {
    /// It does not parse.
    Syntax(String),
    /// The syntax policy forbids something in it.
    Policy(String),
    /// It needs what the executor does not have.
    Unsupported(Unsupported),
}

impl Rejection {
    /// Name of the verdict class, a stable part of the command line's contract.
    pub fn class(&self) -> &'static str {
        match self {
            Rejection::Syntax(_) => "rejected_syntax",
            Rejection::Policy(_) => "rejected_policy",
            Rejection::Unsupported(_) => "unsupported",
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejection::Syntax(what) => write!(f, "syntax: {what}"),
            Rejection::Policy(what) => write!(f, "policy: {what}"),
            Rejection::Unsupported(what) => what.fmt(f),
        }
    }
}

/// The answer to a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Set when the program was not run.
    pub rejection: Option<Rejection>,
    /// One outcome per call; empty after a rejection.
    pub calls: Vec<Outcome>,
    /// By call, where that was asked for and the program is no proposal: [`Outcome::SetOrder`] or
    /// [`Outcome::NotDeterministic`] when a run elsewhere, with the members of sets in reverse order, gave something else.
    pub unstable: Vec<Option<Outcome>>,
    /// The program up to renaming, where it is a proposal that parses.
    pub normal_form: Option<String>,
    /// CPU time of all its processes, in microseconds. Not part of the verdict proper: it varies.
    pub cpu_us: u64,
    /// Most memory that one of its processes had on top of the idle interpreter's, in bytes; as a rule known only of those
    /// that ended by themselves.
    pub memory_bytes: u64,
}

/// What a supervisor asks of a zygote.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Python source.
    pub program: String,
    /// The calls.
    pub calls: Vec<Call>,
    /// Whether the calls are Python source ([`Profile::Run`]).
    pub source: bool,
    /// Runs the calls from last to first, and sets give their members from last to first.
    pub reverse: Reverse,
    /// Calls twice in one module and compares.
    pub repeat: bool,
    /// Limits of one call.
    pub limits: Limits,
    /// Whether the calls after one that went over a time limit are not run, and end as it did: a program that hangs for all of
    /// its inputs costs one limit.
    pub stop_when_late: bool,
    /// Whether every call gets a child of its own: calls that are answers of several samples must not see each other.
    pub apart: bool,
}

/// What a second run turns round, to see whether it makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reverse {
    /// Nothing.
    No,
    /// The order of the calls.
    Calls,
    /// The order of the calls and of the members of sets.
    CallsAndSets,
}

/// What a zygote answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct JobResult {
    /// One outcome per call, in the order of the request.
    pub calls: Vec<Outcome>,
    /// CPU time of the children, in microseconds.
    pub cpu_us: u64,
    /// Most memory of a child, in bytes.
    pub memory_bytes: u64,
    /// Why no child could be made, whatever the program; the outcomes then say nothing.
    pub no_child: Option<String>,
}

/// One layer of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// Whether it is in force.
    pub in_force: bool,
    /// Whether a strict sandbox refuses to run without it.
    pub required: bool,
    /// What it does, or why it is not there.
    pub detail: String,
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

/// Takes complete messages off the front of a buffer; what does not decode ends the list, as does more than `most` bytes.
pub fn take_frames<T: DeserializeOwned>(bytes: &[u8], most: usize) -> Vec<T> {
    let mut bytes = &bytes[..bytes.len().min(most)];
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
        assert_eq!(take_frames::<Outcome>(&bytes, usize::MAX), [outcome.clone(), Outcome::Crash]);
        for cut in 0..bytes.len() {
            assert!(take_frames::<Outcome>(&bytes, cut).len() <= 1);
        }
        assert!(receive::<Outcome>(&mut &[255u8, 255, 255, 255, 0][..]).is_err());
        assert_eq!(receive::<Outcome>(&mut &bytes[..]).ok(), Some(outcome));
    }
}
