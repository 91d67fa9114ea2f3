//! The logs in the run directory: JSON lines and TensorBoard events. A resumed run drops the lines that its checkpoint has
//! not seen.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::base::run_dir::RunDir;
use crate::error::{Error, Result};
use crate::observe::records::{StepMetrics, TraceRecord};
use crate::observe::tensorboard::EventFile;

struct JsonLines {
    path: PathBuf,
    file: BufWriter<File>,
    /// Whether the last line has an evaluation.
    has_eval: bool,
}

/// What is read of a line.
#[derive(Deserialize)]
struct Line {
    step: u64,
    eval: Option<IgnoredAny>,
}

impl JsonLines {
    /// Opens a log for appending after the last line of step `last_step`.
    fn open(path: PathBuf, last_step: u64) -> Result<Self> {
        let open = OpenOptions::new().create(true).read(true).append(true).open(&path);
        let file = open.map_err(|e| Error::io("open", &path, &e))?;
        let (bytes, has_eval) = lines_up_to(&file, last_step).map_err(|e| Error::io("read", &path, &e))?;
        file.set_len(bytes).map_err(|e| Error::io("cut", &path, &e))?;
        Ok(JsonLines { path, file: BufWriter::new(file), has_eval })
    }

    fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(record).map_err(|e| Error::failure(format!("a log record: {e}")))?;
        writeln!(self.file, "{line}").map_err(|e| Error::io("write", &self.path, &e))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io("write", &self.path, &e))
    }
}

/// Bytes of the whole lines up to those of `last_step`, and whether the last of them has an evaluation. Lines come in the
/// order of their steps; from the first that is not whole, which a crash cut off, nothing counts.
fn lines_up_to(file: &File, last_step: u64) -> std::io::Result<(u64, bool)> {
    let (mut reader, mut line) = (BufReader::new(file), Vec::new());
    let (mut bytes, mut has_eval) = (0, false);
    loop {
        line.clear();
        let len = reader.read_until(b'\n', &mut line)?;
        match serde_json::from_slice::<Line>(&line) {
            Ok(read) if read.step <= last_step && line.ends_with(b"\n") => {
                bytes += len as u64;
                has_eval = read.eval.is_some();
            }
            _ => return Ok((bytes, has_eval)),
        }
    }
}

/// The logs of a run.
pub struct Sinks {
    metrics: JsonLines,
    trace: JsonLines,
    events: EventFile,
}

impl Sinks {
    /// Opens the logs of a run that goes on after `last_step`.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub fn open(dir: &RunDir, last_step: u64) -> Result<Self> {
        Ok(Sinks {
            metrics: JsonLines::open(dir.file("metrics.jsonl"), last_step)?,
            trace: JsonLines::open(dir.file("trace.jsonl"), last_step)?,
            events: EventFile::create(dir.root())?,
        })
    }

    /// Writes a step: its samples, then its metrics.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn step(&mut self, metrics: &StepMetrics, trace: &[TraceRecord]) -> Result<()> {
        for record in trace {
            self.trace.write(record)?;
        }
        self.trace.flush()?;
        self.metrics.write(metrics)?;
        self.metrics.flush()?;
        self.metrics.has_eval = !metrics.eval.is_empty();
        let record = serde_json::to_value(metrics).map_err(|e| Error::failure(format!("a log record: {e}")))?;
        self.events.scalars(metrics.step, &record)
    }

    /// Waits until all lines are on the disk, where it can tell: those of a checkpoint's steps are not written again.
    pub fn sync(&self) {
        for log in [&self.trace, &self.metrics] {
            let _ = log.file.get_ref().sync_data();
        }
    }

    /// Whether the last line of the metrics has an evaluation.
    pub fn has_eval(&self) -> bool {
        self.metrics.has_eval
    }

    /// Writes an evaluation that belongs to no step's metrics: that before the first, or one that was broken off.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn eval(&mut self, step: u64, scores: &BTreeMap<String, f64>) -> Result<()> {
        if scores.is_empty() {
            return Ok(());
        }
        let record = serde_json::json!({"step": step, "eval": scores});
        self.metrics.has_eval = true;
        self.metrics.write(&record)?;
        self.metrics.flush()?;
        self.events.scalars(step, &record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_has_no_line_twice_and_no_half_line() {
        let dir = tempfile::tempdir().expect("a folder");
        let run = RunDir::create(dir.path()).expect("made");
        let step = |step| StepMetrics { step, ..StepMetrics::default() };
        let mut sinks = Sinks::open(&run, 0).expect("opens");
        // A score that is no number is null in JSON.
        let scores = BTreeMap::from([("grammar".to_owned(), f64::NAN)]);
        sinks.eval(0, &scores).expect("written");
        drop(sinks);
        let mut sinks = Sinks::open(&run, 0).expect("opens");
        assert!(sinks.has_eval(), "it is not evaluated again");
        (1..=3).for_each(|s| sinks.step(&step(s), &[]).expect("written"));
        drop(sinks);
        let path = run.file("metrics.jsonl");
        let mut text = std::fs::read_to_string(&path).expect("there");
        text.push_str("{\"step\": 1, \"conf");
        std::fs::write(&path, text).expect("written");
        let mut sinks = Sinks::open(&run, 2).expect("opens");
        assert!(!sinks.has_eval());
        sinks.step(&step(3), &[]).expect("written");
        let steps: Vec<u64> = std::fs::read_to_string(&path)
            .expect("there")
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).expect("whole")["step"].as_u64().expect("a number"))
            .collect();
        assert_eq!(steps, [0, 1, 2, 3]);
    }
}
