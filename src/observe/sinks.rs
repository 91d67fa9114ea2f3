//! The logs in the run directory: JSON lines and TensorBoard events. A resumed run drops the lines that its checkpoint has
//! not seen.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::run_dir::{RunDir, publish};
use crate::error::{Error, Result};
use crate::observe::records::{StepMetrics, TraceRecord};
use crate::observe::tensorboard::EventFile;

struct JsonLines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl JsonLines {
    /// Opens a log for appending after the last line of step `last_step`.
    fn open(path: PathBuf, last_step: u64) -> Result<Self> {
        if path.exists() {
            let kept = lines_up_to(&path, last_step)?;
            publish(&path, &kept)?;
        }
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io("open", &path, &e))?;
        Ok(JsonLines { path, file: BufWriter::new(file) })
    }

    fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(record).map_err(|e| Error::failure(format!("a log record: {e}")))?;
        writeln!(self.file, "{line}").map_err(|e| Error::io("write", &self.path, &e))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io("write", &self.path, &e))
    }
}

/// Whole lines whose `step` is not beyond `last_step`. What a crash cut off in the middle goes too.
fn lines_up_to(path: &Path, last_step: u64) -> Result<Vec<u8>> {
    let io = |e: std::io::Error| Error::io("read", path, &e);
    let mut kept = Vec::new();
    for line in BufReader::new(File::open(path).map_err(io)?).split(b'\n') {
        let line = line.map_err(io)?;
        let record: Option<serde_json::Value> = serde_json::from_slice(&line).ok();
        if record.and_then(|r| r.get("step")?.as_u64()).is_some_and(|step| step <= last_step) {
            kept.extend(line);
            kept.push(b'\n');
        }
    }
    Ok(kept)
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
        let record = serde_json::to_value(metrics).map_err(|e| Error::failure(format!("a log record: {e}")))?;
        self.events.scalars(metrics.step, &record)
    }

    /// Writes an evaluation that belongs to no step's metrics: that before the first.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn eval(&mut self, step: u64, scores: &BTreeMap<String, f64>) -> Result<()> {
        let record = serde_json::json!({"step": step, "eval": scores});
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
        (1..=3).for_each(|s| sinks.step(&step(s), &[]).expect("written"));
        drop(sinks);
        let path = run.file("metrics.jsonl");
        let mut text = std::fs::read_to_string(&path).expect("there");
        text.push_str("{\"step\": 1, \"conf");
        std::fs::write(&path, text).expect("written");
        let mut sinks = Sinks::open(&run, 2).expect("opens");
        sinks.step(&step(3), &[]).expect("written");
        let steps: Vec<u64> = std::fs::read_to_string(&path)
            .expect("there")
            .lines()
            .map(|l| serde_json::from_str::<serde_json::Value>(l).expect("whole")["step"].as_u64().expect("a number"))
            .collect();
        assert_eq!(steps, [1, 2, 3]);
    }
}
