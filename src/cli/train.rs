//! The main job: where a run starts, and its directory.

use std::fs::File;
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
    let root = match (&resumed, &args.out) {
        (Some(root), _) => root.clone(),
        (None, Some(out)) => out.clone(),
        (None, None) => next_run(),
    };
    if resumed.is_none() && root.join(RESOLVED).exists() {
        return Err(Error::usage(format!("{} holds a run already", root.display()))
            .with_hint(format!("go on with --resume {}, or name another --out", root.display())));
    }
    // No other process may write checkpoints from here on.
    let locked = resumed.as_ref().map(|root| RunDir::at(root).lock()).transpose()?;
    // A run that was stopped before its first checkpoint starts again.
    let last = RunDir::at(&root).checkpoints().last().map(|step| RunDir::at(&root).checkpoint(*step));
    let model = match &last {
        Some(checkpoint) => ModelFiles::open(checkpoint)?,
        None if config.weights.is_empty() => ModelFiles::embedded()?,
        None => ModelFiles::open(Path::new(&config.weights))?,
    };
    let job = Job { config: &config, model, root: &root, resolved: layers.resolved(), last, quiet: args.quiet, locked };
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
    root: &'a Path,
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
        let dir = RunDir::create(root)?;
        let _locked = locked.map_or_else(|| dir.lock(), Ok)?;
        publish(&dir.file(RESOLVED), resolved.as_bytes())?;
        let console = Console::new(config.steps, quiet);
        let name = if model.is_embedded { "the embedded model".to_owned() } else { config.weights.clone() };
        console.note(&format!(
            "training {name} on {}, {} executors, run directory {}",
            backend.describe(),
            config.num_executors(),
            root.display()
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

/// The first `runs/N` that is free.
fn next_run() -> PathBuf {
    (1..).map(|n| Path::new(RUNS).join(n.to_string())).find(|p| !p.exists()).expect("numbers do not end")
}
