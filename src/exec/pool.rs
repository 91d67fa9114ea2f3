//! Supervisors and their workers: bounded queues in and out, verdicts in any order, each with its tag.
//!
//! A supervisor thread owns two zygotes with different hash seeds, address layouts and generator states. A proposal runs in
//! both, in opposite order of calls and of the members of sets, and twice in each module; whatever differs makes it
//! non-deterministic, or dependent on the order of a set. A zygote that dies or hangs is replaced, and its request runs once
//! more; then it is a crash. Where no process can be made any more, that is an error and no program's verdict. Values are
//! compared here, not where the program ran.

use std::io;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use crate::error::{Error, Result};
use crate::exec::normal_form::normal_form;
use crate::exec::policy;
use crate::exec::protocol::{
    Call, Job, JobResult, Layer, Limits, Outcome, Profile, Rejection, Request, Reverse, Verdict, receive, send,
};
use crate::exec::sandbox;
use crate::exec::value::Value;
use crate::exec::worker::{HASH_SEEDS, MARKER, Ready};

/// Requests and verdicts that may wait, per supervisor.
const QUEUE_PER_WORKER: usize = 64;
/// Stack of a supervisor: parsing recurses as deeply as a program nests. Only what is touched is real.
const SUPERVISOR_STACK: usize = 512 << 20;
/// Longest start of a zygote.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a zygote is started before that is an error, and the first pause between two starts; each is twice the last.
const START_TRIES: u32 = 8;
const START_PAUSE: Duration = Duration::from_millis(50);
/// What a zygote may take beyond its children's limits.
const ZYGOTE_GRACE: Duration = Duration::from_secs(10);

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
    /// CPU limit of one call of any other program, in milliseconds.
    pub cpu_ms_run: u64,
    /// Wall-clock limit as a multiple of the CPU limit. Nothing that a program can do blocks, so that only a machine that
    /// is busy with other things comes near: a verdict must not depend on that.
    pub wall_factor: u64,
    /// Memory that one call may add, in bytes.
    pub memory_bytes: u64,
    /// What must be enforced.
    pub sandbox: Sandbox,
    /// Whether values of answers are looked at again, as those of proposals are: see [`Verdict::unstable`].
    pub recheck: bool,
    /// The executable to run as worker; by default this one.
    pub executable: Option<PathBuf>,
}

impl PoolConfig {
    /// Limits of one call under a profile.
    pub fn limits(&self, profile: Profile) -> Limits {
        let cpu_ms = match profile {
            Profile::Propose => self.cpu_ms_propose,
            Profile::Answer | Profile::Program => self.cpu_ms_answer,
            Profile::Run => self.cpu_ms_run,
        };
        Limits { cpu_ms, wall_ms: cpu_ms * self.wall_factor, memory_bytes: self.memory_bytes }
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        PoolConfig {
            num_workers: 2,
            cpu_ms_propose: 300,
            cpu_ms_answer: 1000,
            cpu_ms_run: 4000,
            wall_factor: 60,
            memory_bytes: 256 << 20,
            sandbox: Sandbox::Strict,
            recheck: false,
            executable: None,
        }
    }
}

/// A request on its way, with limits where these are its own.
struct Work {
    tag: u64,
    request: Request,
    limits: Option<Limits>,
}

/// A pool of sandboxed executors. Dropping it ends all its processes.
pub struct Pool {
    requests: Option<Sender<Work>>,
    verdicts: Receiver<(u64, Result<Verdict>)>,
    supervisors: Vec<JoinHandle<()>>,
    layers: Ready,
    missing: Vec<String>,
    zygotes: Vec<u32>,
}

impl Pool {
    /// Starts supervisors and their zygotes, and waits until these are ready.
    ///
    /// # Errors
    /// When a worker cannot be started, or a layer of the sandbox cannot be had and the sandbox is strict.
    pub fn start(config: &PoolConfig) -> Result<Self> {
        let num_workers = config.num_workers.max(1);
        let capacity = QUEUE_PER_WORKER * num_workers;
        let (requests, work) = bounded::<Work>(capacity);
        let (out, verdicts) = bounded(capacity);
        // All start at once; waiting for them comes after.
        let seeds = HASH_SEEDS.iter().cycle().take(2 * num_workers);
        let mut started = seeds.map(|seed| Zygote::spawn(config, *seed)).collect::<Result<Vec<_>>>()?;
        let mut layers = Vec::new();
        for zygote in &mut started {
            layers = zygote.ready(config)?;
        }
        let zygotes = started.iter().map(|z| z.process.id()).collect();
        let mut supervisors = Vec::with_capacity(num_workers);
        for i in 0..num_workers {
            // They were started in pairs, the second seed last.
            let (second, first) = (started.pop(), started.pop());
            let mut supervisor = Supervisor { config: config.clone(), zygotes: [first, second] };
            let (work, out): (Receiver<Work>, Sender<(u64, Result<Verdict>)>) = (work.clone(), out.clone());
            let serve = move || {
                for Work { tag, request, limits } in work {
                    let verdict = supervisor.judge(&request, limits);
                    let failed = verdict.is_err();
                    if out.send((tag, verdict)).is_err() || failed {
                        break;
                    }
                }
            };
            let thread = std::thread::Builder::new()
                .name(format!("azr-executor-{i}"))
                .stack_size(SUPERVISOR_STACK)
                .spawn(serve)
                .map_err(|e| Error::environment(format!("cannot start an executor thread: {e}")))?;
            supervisors.push(thread);
        }
        let missing = lacking(&layers);
        Ok(Pool { requests: Some(requests), verdicts, supervisors, layers, missing, zygotes })
    }

    /// Queues a request under its profile's limits; gives it back when the queue is full.
    ///
    /// # Errors
    /// When no supervisor is left.
    pub fn try_submit(&self, tag: u64, request: Request) -> Result<Option<Request>> {
        self.try_submit_limited(tag, request, None)
    }

    /// Queues a request under limits of its own; gives it back when the queue is full.
    ///
    /// # Errors
    /// When no supervisor is left.
    pub fn try_submit_limited(&self, tag: u64, request: Request, limits: Option<Limits>) -> Result<Option<Request>> {
        match self.requests.as_ref().expect("open until dropped").try_send(Work { tag, request, limits }) {
            Ok(()) => Ok(None),
            Err(TrySendError::Full(work)) => Ok(Some(work.request)),
            Err(TrySendError::Disconnected(_)) => Err(Error::failure("the executor has stopped")),
        }
    }

    /// Verdicts with the tags of their requests, in any order. One that is an error is a supervisor's last: the machine can
    /// run no program any more.
    pub fn verdicts(&self) -> &Receiver<(u64, Result<Verdict>)> {
        &self.verdicts
    }

    /// Runs requests to the end and gives their verdicts in order. For callers that have nothing else to do.
    ///
    /// # Errors
    /// When no supervisor is left, or programs cannot be run.
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
            verdicts[tag as usize] = Some(verdict?);
            left -= 1;
        }
        Ok(verdicts.into_iter().map(|v| v.expect("every request has a verdict")).collect())
    }

    /// Layers of the sandbox, in force or not.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Process ids of the zygotes that it started with. One that dies is replaced by another.
    pub fn zygotes(&self) -> &[u32] {
        &self.zygotes
    }

    /// Whether the sandbox is as complete as a strict one.
    ///
    /// # Errors
    /// As a strict pool would have failed to start.
    pub fn strict(&self) -> Result<()> {
        complete(&self.layers)
    }

    /// What a strict sandbox needs and is not in force, as texts.
    pub fn missing_layers(&self) -> &[String] {
        &self.missing
    }
}

/// Fails where a layer is not in force that a strict sandbox needs.
fn complete(layers: &[Layer]) -> Result<()> {
    match lacking(layers).as_slice() {
        [] => Ok(()),
        missing => Err(Error::sandbox(format!("the sandbox is incomplete: {}", missing.join("; ")))
            .with_hint("use a kernel with Landlock and seccomp, or accept less with --sandbox best-effort")),
    }
}

fn lacking(layers: &[Layer]) -> Vec<String> {
    layers.iter().filter(|l| l.required && !l.in_force).map(|l| format!("{}: {}", l.name, l.detail)).collect()
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
    fn spawn(config: &PoolConfig, hash_seed: u32) -> Result<Self> {
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
        Ok(Zygote { process, jobs, results })
    }

    /// Waits until the zygote is ready; its layers.
    fn ready(&mut self, config: &PoolConfig) -> Result<Ready> {
        let layers: io::Result<Ready> = self.receive(START_LIMIT);
        let layers = layers.map_err(|e| Error::environment(format!("an executor process did not start: {e}")))?;
        if config.sandbox == Sandbox::Strict {
            complete(&layers)?;
        }
        Ok(layers)
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
    fn judge(&mut self, request: &Request, limits: Option<Limits>) -> Result<Verdict> {
        let mut verdict = Verdict::default();
        let source = request.profile == Profile::Run;
        if !source {
            // A parser that panics on hostile text must not take the supervisor with it.
            let checked = std::panic::catch_unwind(|| policy::check(&request.program));
            verdict.rejection =
                checked.unwrap_or_else(|_| Err(Rejection::Syntax("the parser failed on it".to_owned()))).err();
        }
        if verdict.rejection.is_some() {
            return Ok(verdict);
        }
        // A child learns what is expected only where that is source itself.
        let expected: Vec<Option<Value>> =
            request.calls.iter().map(|c| c.expect.as_ref().and_then(|e| Value::parse(e).ok())).collect();
        let call = |(c, known): (&Call, &Option<Value>)| Call {
            args: c.args.clone(),
            expect: c.expect.clone().filter(|_| source && known.is_none()),
        };
        let job = Job {
            program: request.program.clone(),
            calls: request.calls.iter().zip(&expected).map(call).collect(),
            source,
            reverse: Reverse::No,
            repeat: request.profile == Profile::Propose,
            limits: limits.unwrap_or_else(|| self.config.limits(request.profile)),
            stop_when_late: matches!(request.profile, Profile::Propose | Profile::Program),
            apart: request.profile == Profile::Answer,
        };
        verdict.calls = self.run(0, &job, &mut verdict)?;
        for ((outcome, call), expected) in verdict.calls.iter_mut().zip(&request.calls).zip(&expected) {
            if let Outcome::Value { text, matches } = outcome
                && call.expect.is_some()
                && (!source || expected.is_some())
            {
                let value = Value::parse(text).ok();
                *matches = Some(expected.as_ref().zip(value).is_some_and(|(e, v)| e.py_eq(&v)));
            }
        }
        if request.profile == Profile::Propose {
            verdict.normal_form = std::panic::catch_unwind(|| normal_form(&request.program)).ok().flatten();
            if verdict.calls.iter().any(ended_well) {
                let unstable = self.turn_round(&job, &mut verdict)?;
                for (outcome, unstable) in verdict.calls.iter_mut().zip(unstable) {
                    if let Some(unstable) = unstable {
                        *outcome = unstable;
                    }
                }
            }
        } else if self.config.recheck {
            verdict.unstable = self.turn_round(&job, &mut verdict)?;
        }
        Ok(verdict)
    }

    /// Runs the calls that ended well in the other zygote, with everything turned round that must not matter. By call: the
    /// outcome that says what did matter.
    fn turn_round(&mut self, job: &Job, verdict: &mut Verdict) -> Result<Vec<Option<Outcome>>> {
        let mut unstable = vec![None; job.calls.len()];
        let which: Vec<usize> = (0..job.calls.len()).filter(|i| ended_well(&verdict.calls[*i])).collect();
        let calls = which.iter().map(|i| job.calls[*i].clone()).collect();
        // Each ended well before: one that takes a little longer now must not take those after it along. And each runs by
        // itself, as an answer will: what it found of the calls before it shows.
        let mut job = Job { calls, reverse: Reverse::CallsAndSets, stop_when_late: false, apart: true, ..job.clone() };
        let turned = self.run(1, &job, verdict)?;
        if which.iter().zip(&turned).all(|(i, turned)| same(&verdict.calls[*i], turned)) {
            return Ok(unstable);
        }
        job.reverse = Reverse::Calls;
        let plain = self.run(1, &job, verdict)?;
        for ((i, turned), plain) in which.into_iter().zip(turned).zip(plain) {
            unstable[i] = match &verdict.calls[i] {
                outcome if !same(outcome, &plain) => Some(Outcome::NotDeterministic),
                outcome if !same(outcome, &turned) => Some(Outcome::SetOrder),
                _ => None,
            };
        }
        Ok(unstable)
    }

    /// Runs a job on a zygote, on a fresh one if that fails, and calls it a crash if that fails too.
    fn run(&mut self, which: usize, job: &Job, verdict: &mut Verdict) -> Result<Vec<Outcome>> {
        let limit = Duration::from_millis(job.limits.wall_ms) * 2 * job.calls.len().max(1) as u32 + ZYGOTE_GRACE;
        for _ in 0..2 {
            let zygote = match self.zygotes[which].take() {
                Some(zygote) => zygote,
                None => self.start(which)?,
            };
            let result = self.zygotes[which].insert(zygote).run(job, limit);
            match result {
                Ok(JobResult { no_child: Some(why), .. }) => return Err(no_process(&why)),
                Ok(result) if result.calls.len() == job.calls.len() => {
                    verdict.cpu_us += result.cpu_us;
                    verdict.memory_bytes = verdict.memory_bytes.max(result.memory_bytes);
                    return Ok(result.calls);
                }
                _ => self.zygotes[which] = None,
            }
        }
        Ok(vec![Outcome::Crash; job.calls.len()])
    }

    /// A new zygote, after some time if the machine has no room for one now.
    fn start(&self, which: usize) -> Result<Zygote> {
        let mut pause = START_PAUSE;
        for _ in 1..START_TRIES {
            if let Ok(zygote) = self.try_start(which) {
                return Ok(zygote);
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        self.try_start(which).map_err(|e| no_process(&e.to_string()))
    }

    fn try_start(&self, which: usize) -> Result<Zygote> {
        let mut zygote = Zygote::spawn(&self.config, HASH_SEEDS[which])?;
        zygote.ready(&self.config)?;
        Ok(zygote)
    }
}

fn no_process(why: &str) -> Error {
    Error::environment(format!("programs can no longer be run: {why}"))
        .with_hint("look at the machine's memory and its limits of processes; a run can then be resumed")
}

/// Whether a call came to its end, with or without an exception.
fn ended_well(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Value { .. } | Outcome::Exception { .. })
}

/// Whether two runs came to the same: equal values, or exceptions of the same class.
fn same(a: &Outcome, b: &Outcome) -> bool {
    match (a, b) {
        (Outcome::Value { text: a, .. }, Outcome::Value { text: b, .. }) => {
            a == b || matches!((Value::parse(a), Value::parse(b)), (Ok(a), Ok(b)) if a.py_eq(&b))
        }
        (Outcome::Exception { class: a, .. }, Outcome::Exception { class: b, .. }) => a == b,
        _ => a == b,
    }
}
