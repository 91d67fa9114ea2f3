//! The main job: where a run starts, and its directory.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::base::run_dir::{RunDir, publish};
use crate::base::stop::StopFlag;
use crate::cli::args::{Device, TrainArgs};
use crate::cli::config::Layers;
use crate::cli::plan;
use crate::compute::cpu::backend::CpuBackend;
use crate::compute::cuda::CudaBackend;
use crate::compute::launch::device::probe;
use crate::compute::ops::Backend;
use crate::error::{Error, Kind, Result};
use crate::eval::watch::Watch;
use crate::observe::console::Console;
use crate::pipeline::config::Config;
use crate::pipeline::{self, Outside, Start};
use crate::weights::model_files::ModelFiles;

/// Name of the file with all settings of a run.
const RESOLVED: &str = "resolved.toml";
/// Folder of runs that were given no name.
const RUNS: &str = "runs";

/// Trains, or goes on training.
///
/// # Errors
/// What is wrong with command line, configuration, weights or machine; or that a signal stopped the run.
pub fn train(args: &TrainArgs) -> Result<()> {
    let stop = StopFlag::on_signals()?;
    let resumed = args.resume.as_ref().map(|dir| to_resume(dir.as_deref().or(args.out.as_deref()))).transpose()?;
    let settings = resumed.as_ref().map(|root| root.join(RESOLVED));
    if let Some(missing) = settings.as_ref().filter(|p| !p.exists()) {
        return Err(Error::config(format!("there is no {}", missing.display()))
            .with_hint("--resume takes the directory of a run, as --out names it"));
    }
    let layers = Layers::resolve(args, settings.as_deref())?;
    let config = layers.config()?;
    let root = resumed.as_ref().or(args.out.as_ref());
    if let (None, Some(out)) = (&resumed, root) {
        refuse_used(out)?;
    }
    // No other process may write checkpoints from here on.
    let locked = resumed.as_ref().map(|root| RunDir::at(root).lock()).transpose()?;
    // A run that was stopped before its first checkpoint starts again.
    let newest = |root: &PathBuf| RunDir::at(root).checkpoints().last().map(|step| RunDir::at(root).checkpoint(*step));
    let last = root.and_then(newest);
    let model = match &last {
        Some(checkpoint) => ModelFiles::open(checkpoint)?,
        None if config.weights.is_empty() => ModelFiles::embedded()?,
        None => ModelFiles::open(Path::new(&config.weights))?,
    };
    let job = Job { config: &config, model, root, resolved: layers.resolved(), last, quiet: args.quiet, locked };
    match gpu(args.device)? {
        Some(gpu) => {
            let (spec, memory) = (job.model.spec.clone(), gpu.device().memory()?.1);
            job.run(gpu, stop).inspect_err(|e| {
                if e.kind() == Kind::OutOfMemory {
                    eprint!("{}", plan::of_run(&spec, &config, memory));
                }
            })
        }
        None => job.run(CpuBackend::new(config.num_threads())?, stop),
    }
}

/// The GPU, if that is where the model runs.
///
/// # Errors
/// When one is asked for, but cannot be used.
pub fn gpu(device: Device) -> Result<Option<CudaBackend>> {
    match device {
        Device::Cpu => Ok(None),
        Device::Cuda => CudaBackend::open().map(Some),
        Device::Auto if probe().is_err() => Ok(None),
        Device::Auto => Ok(CudaBackend::open().inspect_err(|e| eprintln!("warning: the GPU is left alone: {e}")).ok()),
    }
}

/// A run that is ready to start on a device.
struct Job<'a> {
    config: &'a Config,
    model: ModelFiles,
    /// The run's directory; none where any will do.
    root: Option<&'a PathBuf>,
    resolved: String,
    last: Option<PathBuf>,
    quiet: bool,
    /// The run's directory, where it was there before.
    locked: Option<File>,
}

impl Job<'_> {
    fn run<B: Backend>(self, backend: B, stop: StopFlag) -> Result<()> {
        let Job { config, model, root, resolved, last, quiet, locked } = self;
        let mut watch = Watch::open(config)?;
        // Nothing is left behind by a run that cannot start.
        let dir = root.map_or_else(|| new_run(Path::new(RUNS)), |root| RunDir::create(root))?;
        let _locked = match locked {
            Some(locked) => locked,
            None => {
                let locked = dir.lock()?;
                // Another run may have begun and ended here since this one looked.
                refuse_used(dir.root())?;
                locked
            }
        };
        dir.sweep();
        publish(&dir.file(RESOLVED), resolved.as_bytes())?;
        let console = Console::new(config.steps, quiet);
        let name = if model.is_embedded { "the embedded model".to_owned() } else { config.weights.clone() };
        console.note(&format!(
            "training {name} on {}, {} executors, run directory {}",
            backend.describe(),
            config.num_executors(),
            dir.root().display()
        ));
        let start = last.map_or(Start::Fresh, Start::Checkpoint);
        let outside = Outside { stop, console: &console, examine: &mut |exam| watch.examine(exam) };
        pipeline::train(backend, config, model, &dir, &start, outside)
    }
}

/// The run to go on with: the one named, else the newest of `runs/`.
fn to_resume(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(root) = named {
        return Ok(root.to_owned());
    }
    let changed = |root: &PathBuf| root.join(RESOLVED).metadata().and_then(|m| m.modified()).ok();
    let runs = std::fs::read_dir(RUNS).into_iter().flatten().flatten().map(|e| e.path());
    runs.filter(|root| changed(root).is_some())
        .max_by_key(changed)
        .ok_or_else(|| Error::usage("there is no run to resume").with_hint("name its directory: --resume DIR"))
}

/// Refuses a directory that holds a run.
fn refuse_used(root: &Path) -> Result<()> {
    if root.join(RESOLVED).exists() {
        return Err(Error::usage(format!("{} holds a run already", root.display()))
            .with_hint(format!("go on with --resume {}, or name another --out", root.display())));
    }
    // What a run would take for its own, and cut or go on from.
    let has_checkpoints = (!RunDir::at(root).checkpoints().is_empty()).then_some("checkpoints");
    match has_checkpoints.or(["metrics.jsonl", "trace.jsonl"].into_iter().find(|name| root.join(name).exists())) {
        Some(name) => {
            Err(Error::usage(format!("{} holds {name} of another run", root.display())).with_hint("name another --out"))
        }
        None => Ok(()),
    }
}

/// Makes the first directory `runs/N` that nobody else has made.
fn new_run(runs: &Path) -> Result<RunDir> {
    let failed = |e| Error::io("create", runs, &e);
    fs::create_dir_all(runs).map_err(failed)?;
    for n in 1u64.. {
        let root = runs.join(n.to_string());
        match fs::create_dir(&root) {
            Ok(()) => return RunDir::create(&root),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(failed(e)),
        }
    }
    unreachable!("numbers do not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_start_at_once_have_directories_of_their_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let start = std::sync::Barrier::new(8);
        let mut made: Vec<PathBuf> = std::thread::scope(|scope| {
            let one = || {
                start.wait();
                new_run(&runs).expect("made").root().to_owned()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        made.sort();
        assert_eq!(made, (1..=8).map(|n| runs.join(n.to_string())).collect::<Vec<_>>());
    }
}
