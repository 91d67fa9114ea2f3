//! Supervisors and their workers: bounded queues in and out, verdicts in any order, each with its tag.
//!
//! A supervisor thread owns two zygotes with different hash seeds (and so different address layouts and generator
//! states). A proposal runs in both, in opposite order of calls, and twice in each module; whatever differs makes it
//! non-deterministic. A zygote that dies or hangs is replaced, and its request runs once more; then it is a crash.

use std::io;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use crate::error::{Error, Result};
use crate::exec::policy;
use crate::exec::protocol::{Job, JobResult, Outcome, Profile, Rejection, Request, Verdict, receive, send};
use crate::exec::sandbox;
use crate::exec::worker::{MARKER, Ready};

/// Requests and verdicts that may wait, per supervisor.
const QUEUE_PER_WORKER: usize = 64;
/// Stack of a supervisor: parsing recurses as deeply as a program nests. Only what is touched is real.
const SUPERVISOR_STACK: usize = 512 << 20;
/// Longest start of a zygote.
const START_LIMIT: Duration = Duration::from_secs(60);
/// What a zygote may take beyond its children's limits.
const ZYGOTE_GRACE: Duration = Duration::from_secs(10);
/// Hash seeds of the two zygotes.
const HASH_SEEDS: [u32; 2] = [0x5eed_0001, 0x0bad_5eed];

/// What must be enforced for programs to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// Every layer, or no run.
    Strict,
    /// What the kernel has.
    BestEffort,
}

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Number of supervisors.
    pub num_workers: usize,
    /// CPU limit of one call of a proposal, in milliseconds.
    pub cpu_ms_propose: u64,
    /// CPU limit of one call of an answer, in milliseconds.
    pub cpu_ms_answer: u64,
    /// Wall-clock limit as a multiple of the CPU limit.
    pub wall_factor: u64,
    /// Memory that one call may add, in bytes.
    pub memory_bytes: u64,
    /// What must be enforced.
    pub sandbox: Sandbox,
    /// The executable to run as worker; by default this one.
    pub executable: Option<PathBuf>,
}

impl Default for PoolConfig {
    fn default() -> Self {
        PoolConfig {
            num_workers: 2,
            cpu_ms_propose: 300,
            cpu_ms_answer: 1000,
            wall_factor: 10,
            memory_bytes: 256 << 20,
            sandbox: Sandbox::Strict,
            executable: None,
        }
    }
}

/// A pool of sandboxed executors. Dropping it ends all its processes.
pub struct Pool {
    requests: Option<Sender<(u64, Request)>>,
    verdicts: Receiver<(u64, Verdict)>,
    supervisors: Vec<JoinHandle<()>>,
    missing: Ready,
}

impl Pool {
    /// Starts supervisors and their zygotes, and waits until these are ready.
    ///
    /// # Errors
    /// When a worker cannot be started, or a layer of the sandbox cannot be had and the sandbox is strict.
    pub fn start(config: &PoolConfig) -> Result<Self> {
        let capacity = QUEUE_PER_WORKER * config.num_workers.max(1);
        let (requests, work) = bounded(capacity);
        let (out, verdicts) = bounded(capacity);
        let (mut supervisors, mut missing) = (Vec::new(), Vec::new());
        for i in 0..config.num_workers.max(1) {
            let mut pair = Vec::with_capacity(2);
            for seed in HASH_SEEDS {
                let (zygote, without) = Zygote::start(config, seed)?;
                missing = without;
                pair.push(zygote);
            }
            let [first, second] = <[Zygote; 2]>::try_from(pair).ok().expect("two were started");
            let mut supervisor = Supervisor { config: config.clone(), zygotes: [Some(first), Some(second)] };
            let work: Receiver<(u64, Request)> = work.clone();
            let out: Sender<(u64, Verdict)> = out.clone();
            let thread = std::thread::Builder::new()
                .name(format!("azr-executor-{i}"))
                .stack_size(SUPERVISOR_STACK)
                .spawn(move || {
                    for (tag, request) in work {
                        if out.send((tag, supervisor.judge(&request))).is_err() {
                            break;
                        }
                    }
                })
                .map_err(|e| Error::environment(format!("cannot start an executor thread: {e}")))?;
            supervisors.push(thread);
        }
        Ok(Pool { requests: Some(requests), verdicts, supervisors, missing })
    }

    /// Queues a request; gives it back when the queue is full.
    ///
    /// # Errors
    /// When no supervisor is left.
    pub fn try_submit(&self, tag: u64, request: Request) -> Result<Option<Request>> {
        match self.requests.as_ref().expect("open until dropped").try_send((tag, request)) {
            Ok(()) => Ok(None),
            Err(TrySendError::Full((_, request))) => Ok(Some(request)),
            Err(TrySendError::Disconnected(_)) => Err(Error::failure("the executor has stopped")),
        }
    }

    /// Verdicts with the tags of their requests, in any order.
    pub fn verdicts(&self) -> &Receiver<(u64, Verdict)> {
        &self.verdicts
    }

    /// Runs requests to the end and gives their verdicts in order. For callers that have nothing else to do.
    ///
    /// # Errors
    /// When no supervisor is left.
    pub fn run(&self, requests: Vec<Request>) -> Result<Vec<Verdict>> {
        let mut verdicts: Vec<Option<Verdict>> = requests.iter().map(|_| None).collect();
        let mut waiting = requests.into_iter().enumerate().collect::<std::collections::VecDeque<_>>();
        let mut left = waiting.len();
        while left > 0 {
            while let Some((i, request)) = waiting.pop_front() {
                if let Some(request) = self.try_submit(i as u64, request)? {
                    waiting.push_front((i, request));
                    break;
                }
            }
            let (tag, verdict) = self.verdicts.recv().map_err(|_| Error::failure("the executor has stopped"))?;
            verdicts[tag as usize] = Some(verdict);
            left -= 1;
        }
        Ok(verdicts.into_iter().map(|v| v.expect("every request has a verdict")).collect())
    }

    /// Layers of the sandbox that are not in force.
    pub fn missing_layers(&self) -> &[String] {
        &self.missing
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.requests = None;
        // Supervisors that wait to hand over a verdict give up when nobody takes it.
        while self.supervisors.iter().any(|s| !s.is_finished()) {
            while self.verdicts.recv_timeout(Duration::from_millis(1)).is_ok() {}
        }
        for supervisor in self.supervisors.drain(..) {
            let _ = supervisor.join();
        }
    }
}

struct Zygote {
    process: Child,
    jobs: ChildStdin,
    results: ChildStdout,
}

impl Drop for Zygote {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Zygote {
    fn start(config: &PoolConfig, hash_seed: u32) -> Result<(Self, Ready)> {
        let executable = config.executable.clone().unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
        let mode = if config.sandbox == Sandbox::Strict { "strict" } else { "best-effort" };
        let mut process = Command::new(&executable)
            .args([MARKER, &hash_seed.to_string(), mode])
            .env_clear()
            .env("TZ", "UTC")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| Error::environment(format!("cannot start {}: {e}", executable.display())))?;
        let jobs = process.stdin.take().expect("piped");
        let results = process.stdout.take().expect("piped");
        let mut zygote = Zygote { process, jobs, results };
        let ready: io::Result<Ready> = zygote.receive(START_LIMIT);
        let missing = ready.map_err(|e| Error::environment(format!("an executor process did not start: {e}")))?;
        if config.sandbox == Sandbox::Strict && !missing.is_empty() {
            return Err(Error::sandbox(format!("the sandbox is incomplete: {}", missing.join("; ")))
                .with_hint("use a kernel with Landlock ABI 6 and seccomp, or accept less with --sandbox best-effort"));
        }
        Ok((zygote, missing))
    }

    fn receive<T: serde::de::DeserializeOwned>(&mut self, limit: Duration) -> io::Result<T> {
        if !sandbox::wait_readable(&self.results, limit) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
        }
        receive(&mut self.results)
    }

    fn run(&mut self, job: &Job, limit: Duration) -> io::Result<JobResult> {
        send(&mut self.jobs, job)?;
        self.receive(limit)
    }
}

struct Supervisor {
    config: PoolConfig,
    zygotes: [Option<Zygote>; 2],
}

impl Supervisor {
    fn judge(&mut self, request: &Request) -> Verdict {
        let mut verdict = Verdict { rejection: None, calls: Vec::new(), normal_form: None, cpu_us: 0 };
        // A parser that panics on hostile text must not take the supervisor with it.
        let checked = std::panic::catch_unwind(|| policy::check(&request.program));
        verdict.rejection =
            checked.unwrap_or_else(|_| Err(Rejection::Syntax("the parser failed on it".to_owned()))).err();
        if verdict.rejection.is_some() {
            return verdict;
        }
        let propose = request.profile == Profile::Propose;
        let cpu_ms = if propose { self.config.cpu_ms_propose } else { self.config.cpu_ms_answer };
        let mut job = Job {
            program: request.program.clone(),
            calls: request.calls.clone(),
            reverse: false,
            repeat: propose,
            cpu_ms,
            wall_ms: cpu_ms * self.config.wall_factor,
            memory_bytes: self.config.memory_bytes,
        };
        let first = self.run(0, &job);
        verdict.cpu_us = first.cpu_us;
        verdict.calls = first.calls;
        if propose {
            verdict.normal_form = std::panic::catch_unwind(|| policy::normal_form(&request.program)).ok().flatten();
            if verdict.calls.iter().all(|o| matches!(o, Outcome::Value { .. } | Outcome::Exception { .. })) {
                job.reverse = true;
                let second = self.run(1, &job);
                verdict.cpu_us += second.cpu_us;
                for (a, b) in verdict.calls.iter_mut().zip(second.calls) {
                    if *a != b {
                        *a = Outcome::NotDeterministic;
                    }
                }
            }
        }
        verdict
    }

    /// Runs a job on a zygote, on a fresh one if that fails, and calls it a crash if that fails too.
    fn run(&mut self, which: usize, job: &Job) -> JobResult {
        let limit = Duration::from_millis(job.wall_ms) * 2 * job.calls.len().max(1) as u32 + ZYGOTE_GRACE;
        for _ in 0..2 {
            if self.zygotes[which].is_none() {
                self.zygotes[which] = Zygote::start(&self.config, HASH_SEEDS[which]).ok().map(|(z, _)| z);
            }
            if let Some(zygote) = &mut self.zygotes[which] {
                match zygote.run(job, limit) {
                    Ok(result) if result.calls.len() == job.calls.len() => return result,
                    _ => self.zygotes[which] = None,
                }
            }
        }
        JobResult { calls: vec![Outcome::Crash; job.calls.len()], cpu_us: 0 }
    }
}
