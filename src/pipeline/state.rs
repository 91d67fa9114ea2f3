//! What a run is between two steps, on disk: a folder that transformers loads as it is, plus `azr/` with optimiser
//! moments, buffers, counters and sequences that have not ended. Random draws depend on seed, step and sequence alone, so no generator state is kept;
//! nor is anything that depends on time, threads or place, so equal runs have equal checkpoints.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::run_dir::{Content, RunDir, publish_folder};
use crate::compute::ops::Backend;
use crate::error::{Error, Result};
use crate::pipeline::carry::Carried;
use crate::selfplay::alarm::Alarms;
use crate::selfplay::buffer::Buffers;
use crate::selfplay::intrinsic::Seen;
use crate::selfplay::task::Task;
use crate::selfplay::warmth::Warmth;
use crate::train::optim::Trainer;
use crate::weights::safetensors::{self, Later, TensorFiles};

/// Version of the folder `azr/`.
const VERSION: u32 = 1;

/// Counters of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    version: u32,
    /// Steps done.
    pub step: u64,
    /// Optimiser steps done.
    pub num_updates: u64,
    /// Answers seen so far.
    pub seen: Seen,
    /// Signs of a collapse so far.
    #[serde(default)]
    pub alarms: Alarms,
    /// The temperature so far.
    #[serde(default)]
    pub warmth: Warmth,
}

impl Counters {
    /// Counters of a run that has done so much.
    pub fn new(step: u64, num_updates: u64, seen: Seen, alarms: Alarms, warmth: Warmth) -> Self {
        Counters { version: VERSION, step, num_updates, seen, alarms, warmth }
    }
}

/// Publishes a checkpoint.
///
/// # Errors
/// When the disk fails.
pub fn save<B: Backend>(
    dir: &RunDir,
    companions: &[(String, Vec<u8>)],
    trainer: &Trainer<B>,
    buffers: &Buffers,
    carried: &Carried,
    counters: &Counters,
) -> Result<()> {
    let json =
        |text: serde_json::Result<String>| text.map_err(|e| Error::failure(format!("a checkpoint's state: {e}")));
    let mut files = vec![
        ("model.safetensors".to_owned(), tensors(trainer.later_weights())),
        ("azr/optimizer.safetensors".to_owned(), tensors(trainer.later_moments())),
        ("azr/state.json".to_owned(), Content::Bytes(json(serde_json::to_string_pretty(counters))?.into_bytes())),
        ("azr/buffers.jsonl".to_owned(), Content::Bytes(task_lines(buffers)?)),
    ];
    if !carried.is_empty() {
        files.push(("azr/carried.json".to_owned(), Content::Bytes(json(serde_json::to_string(carried))?.into_bytes())));
    }
    for (name, bytes) in companions {
        let bytes = if name == "config.json" { with_f32(bytes)? } else { bytes.clone() };
        files.push((name.clone(), Content::Bytes(bytes)));
    }
    publish_folder(&dir.checkpoint(counters.step), files)
}

fn tensors(all: Vec<Later<'_>>) -> Content<'_> {
    Content::Written(Box::new(move |path: &Path| safetensors::write(path, &all)))
}

/// config.json that says f32, in the key that it uses.
fn with_f32(config: &[u8]) -> Result<Vec<u8>> {
    let bad = |e: serde_json::Error| Error::config(format!("config.json: {e}"));
    let mut config: serde_json::Value = serde_json::from_slice(config).map_err(bad)?;
    let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    config[key] = "float32".into();
    Ok(format!("{config:#}\n").into_bytes())
}

/// Tasks as JSON lines, buffer after buffer.
///
/// # Errors
/// Never for tasks that were validated.
pub fn task_lines(buffers: &Buffers) -> Result<Vec<u8>> {
    let mut lines = Vec::new();
    for task in buffers.iter() {
        serde_json::to_writer(&mut lines, task.as_ref()).map_err(|e| Error::failure(format!("a task: {e}")))?;
        lines.push(b'\n');
    }
    Ok(lines)
}

/// Buffers from a file of [`task_lines`].
///
/// # Errors
/// When it cannot be read, or a line is no task.
pub fn read_tasks(path: &Path, buffer_size: usize) -> Result<Buffers> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
    let mut buffers = Buffers::new(buffer_size);
    for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let task: Task = serde_json::from_slice(line)
            .map_err(|e| Error::config(format!("{} holds a line that is no task: {e}", path.display())))?;
        if task.pairs.is_empty() {
            return Err(Error::config(format!("{} holds a task without an execution", path.display())));
        }
        buffers.push(Arc::new(task));
    }
    Ok(buffers)
}

/// Takes a checkpoint's training state in; the weights have been read already, as those of any model.
///
/// # Errors
/// When a file is missing or not what it should be.
pub fn load<B: Backend>(
    path: &Path,
    trainer: &mut Trainer<B>,
    buffer_size: usize,
) -> Result<(Buffers, Carried, Counters)> {
    let read = |name: &str| {
        let file = path.join("azr").join(name);
        std::fs::read(&file).map_err(|e| Error::io("read", &file, &e).with_hint("is this a checkpoint of azr?"))
    };
    let bad = |name: &str, e: serde_json::Error| Error::config(format!("{}/azr/{name}: {e}", path.display()));
    let counters: Counters = serde_json::from_slice(&read("state.json")?).map_err(|e| bad("state.json", e))?;
    if counters.version != VERSION {
        return Err(Error::config(format!("the checkpoint has version {}, not {VERSION}", counters.version)));
    }
    let buffers = read_tasks(&path.join("azr").join("buffers.jsonl"), buffer_size)?;
    let carried = match path.join("azr").join("carried.json").exists() {
        false => Carried::default(),
        true => serde_json::from_slice(&read("carried.json")?).map_err(|e| bad("carried.json", e))?,
    };
    let moments = TensorFiles::open(&path.join("azr").join("optimizer.safetensors"))?;
    trainer.restore(counters.num_updates, |name, shape| moments.read(name, shape))?;
    Ok((buffers, carried, counters))
}
