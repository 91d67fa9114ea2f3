//! `azr exec --bench`: how fast the executor is, beside CPython with one fork per program on the same machine.
//!
//! Rates are given per second of wall time and per second of processor time. The second is what a core does when nothing
//! else wants it, and hardly changes on a busy machine; the goals are stated in it.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use crate::cli::output::print_line;
use crate::error::{Error, Result};
use crate::exec::pool::{Pool, PoolConfig};
use crate::exec::protocol::{Call, Profile, Request, Verdict};

/// How long a rate is measured.
const MEASURE: Duration = Duration::from_secs(4);
/// Requests one by one, for latencies.
const NUM_LATENCIES: usize = 1000;
/// Programs that CPython runs.
const NUM_PEER: usize = 2000;
/// Clock ticks per second of `/proc/*/stat`, the same on every Linux.
const TICKS: f64 = 100.0;

/// The program that everything is measured with: ten lines of what models write.
pub const PROGRAM: &str = "\
def f(words, k):
    counts = {}
    for w in words:
        key = w.lower().strip('.,')
        counts[key] = counts.get(key, 0) + 1
    items = sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))
    out = []
    for name, n in items[:k]:
        out.append(f\"{name}:{n}\")
    return ' | '.join(out)
";
/// Its arguments.
pub const ARGS: &str = "['The', 'cat', 'sat', 'on', 'the', 'mat.', 'The', 'dog,', 'ran', 'on'], 3";
/// What it gives for them.
pub const VALUE: &str = "'the:3 | on:2 | cat:1'";

/// CPython's way: a warm interpreter forks a child per program, which compiles, runs and writes the value's repr.
const PEER: &str = "\
import os, sys, time, resource
import collections, itertools, functools, heapq, math, re, string, random, statistics, fractions, decimal, datetime, json
import bisect, typing, dataclasses, copy, operator, enum
program, call, expected, n = sys.argv[1], 'f(' + sys.argv[2] + ')', sys.argv[3], int(sys.argv[4])
start = time.time()
for _ in range(n):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        scope = {}
        exec(compile(program, '<program>', 'exec'), scope)
        os.write(w, repr(eval(call, scope)).encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r, 'rb') as f:
        assert f.read().decode() == expected
    os.waitpid(pid, 0)
wall = time.time() - start
cpu = sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(wall, cpu, sys.version.split()[0])
";

/// A workload of the benchmark.
pub struct Workload {
    /// Its name.
    pub name: &'static str,
    /// Verdicts that one request gives.
    pub num_verdicts: usize,
    /// The request.
    pub request: Request,
}

/// The program with so many different inputs.
fn request(num_calls: usize, expect: bool, profile: Profile) -> Request {
    let call = |i: usize| Call {
        args: ARGS.replace("], 3", &format!(", 'x{i}'], 3")),
        expect: expect.then(|| VALUE.to_owned()),
    };
    Request { program: PROGRAM.to_owned(), calls: (0..num_calls).map(call).collect(), profile }
}

/// The workloads: one program alone, with ten inputs, as eight answers to one task, and as a proposal to be validated.
pub fn workloads() -> Vec<Workload> {
    let workload = |name, num_verdicts, request| Workload { name, num_verdicts, request };
    vec![
        workload("one_program", 1, request(1, true, Profile::Answer)),
        workload("ten_inputs", 10, request(10, true, Profile::Answer)),
        workload("eight_answers", 8, request(8, true, Profile::Answer)),
        workload("proposal", 1, request(1, false, Profile::Propose)),
    ]
}

/// Tasks of each type in a step of the paper's, solver samples per proposed task, inputs of a proposed induction task, and
/// how many of those an answer is checked on.
const PAPER_STEP: [usize; 4] = [64, 8, 10, 5];
/// Tokens that generation samples in such a step: 1,920 completions of about 800.
const PAPER_TOKENS: f64 = 1920.0 * 800.0;
/// Programs of such a step where each completion and each validation is a program of its own.
const PAPER_PROGRAMS: f64 = 2300.0;

/// All that a step of the paper's asks of the executor when every proposal is valid and no two answers are equal: proposals,
/// then probes and solutions. Answers to deduction tasks are compared as values and run nothing; the probes of an abduction
/// task share a child; those of an induction task are programs of their own.
fn paper_step() -> Vec<Request> {
    let [num_tasks, num_probes, num_inputs, num_checks] = PAPER_STEP;
    let mut requests = Vec::new();
    for _ in 0..num_tasks {
        requests.extend([1, 1, num_inputs].map(|calls| request(calls, false, Profile::Propose)));
        requests.push(request(num_probes, true, Profile::Answer));
        requests.push(request(1, true, Profile::Answer));
        requests.extend((0..=num_probes).map(|_| request(num_checks, true, Profile::Answer)));
    }
    requests
}

/// Runs such a step. Generation must take longer than this: the executor works while it samples.
fn measure_step(pool: &Pool, num_executors: usize, single_per_cpu_s: f64) -> Result<Json> {
    let requests = paper_step();
    let (num_requests, num_calls) = (requests.len(), requests.iter().map(|r| r.calls.len()).sum::<usize>());
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let verdicts = pool.run(requests)?;
    let (wall_s, cpu_s) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    if let Some(wrong) = verdicts.iter().find(|v| v.calls.iter().any(|o| o.class() != "value")) {
        return Err(Error::failure(format!("a wrong verdict: {wrong:?}")));
    }
    eprintln!("paper's step   {num_requests:7} requests in {wall_s:.2} s, {cpu_s:.2} CPU seconds");
    Ok(json!({
        "executors": num_executors,
        "requests": num_requests,
        "calls": num_calls,
        "wall_s": (wall_s * 1e3).round() / 1e3,
        "cpu_s": (cpu_s * 1e3).round() / 1e3,
        "hidden_up_to_tokens_per_s": (PAPER_TOKENS / wall_s).round(),
        "cpu_s_of_2300_single_programs": (PAPER_PROGRAMS / single_per_cpu_s * 1e3).round() / 1e3,
    }))
}

/// Runs the benchmark and prints one JSON object.
///
/// # Errors
/// When the executor cannot be had, or gives a wrong verdict.
pub fn bench(config: &PoolConfig) -> Result<()> {
    print_line(&report(config)?)
}

/// Rates, latencies, scaling, and CPython beside them.
///
/// # Errors
/// As [`bench`].
pub fn report(config: &PoolConfig) -> Result<Json> {
    let single = Pool::start(&PoolConfig { num_workers: 1, ..config.clone() })?;
    let mut rates = Vec::new();
    let mut one_program = 0.0;
    for workload in workloads() {
        let rate = measure(&single, &workload, MEASURE)?;
        if workload.name == "one_program" {
            one_program = rate.per_cpu_s();
        }
        eprintln!(
            "{:14} {:7.0} requests per CPU second, {:7.0} verdicts",
            workload.name,
            rate.per_cpu_s(),
            rate.verdicts_per_cpu_s()
        );
        rates.push(rate.to_json(&workload));
    }
    let latency = latencies(&single)?;
    drop(single);
    let mut scaling = Vec::new();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut executors = 1;
    while executors <= config.num_workers.max(1) {
        let pool = Pool::start(&PoolConfig { num_workers: executors, ..config.clone() })?;
        let rate = measure(&pool, &workloads()[0], MEASURE)?;
        scaling.push(json!({"executors": executors, "requests_per_s": rate.per_s().round(), "requests_per_cpu_s": rate.per_cpu_s().round()}));
        executors *= 2;
    }
    let pool = Pool::start(config)?;
    let step = measure_step(&pool, config.num_workers.max(1), one_program)?;
    drop(pool);
    let peer = cpython(one_program);
    Ok(json!({
        "cores": cores,
        "layers": "all that strict needs",
        "load_before": load(),
        "rates_with_one_executor": rates,
        "latency_one_program_us": latency,
        "scaling": scaling,
        "paper_step": step,
        "cpython_fork_per_program": peer,
        "cpu_accounting": "processor time of the supervisor, its zygotes and their children",
    }))
}

/// What was measured of a workload.
struct Rate {
    num_requests: usize,
    num_verdicts: usize,
    wall_s: f64,
    cpu_s: f64,
}

impl Rate {
    fn per_s(&self) -> f64 {
        self.num_requests as f64 / self.wall_s
    }

    fn per_cpu_s(&self) -> f64 {
        self.num_requests as f64 / self.cpu_s.max(1.0 / TICKS)
    }

    fn verdicts_per_cpu_s(&self) -> f64 {
        self.per_cpu_s() * self.num_verdicts as f64
    }

    fn to_json(&self, workload: &Workload) -> Json {
        json!({
            "workload": workload.name,
            "requests": self.num_requests,
            "requests_per_s": self.per_s().round(),
            "requests_per_cpu_s": self.per_cpu_s().round(),
            "verdicts_per_s": (self.per_s() * self.num_verdicts as f64).round(),
            "verdicts_per_cpu_s": self.verdicts_per_cpu_s().round(),
        })
    }
}

/// Keeps the pool busy with a workload for a time.
fn measure(pool: &Pool, workload: &Workload, time: Duration) -> Result<Rate> {
    let check = |verdict: &Verdict| {
        let right = verdict.calls.iter().all(|o| o.class() == "value") && verdict.rejection.is_none();
        if right { Ok(()) } else { Err(Error::failure(format!("{}: a wrong verdict: {verdict:?}", workload.name))) }
    };
    let rounds = |until: Instant| -> Result<usize> {
        let (mut sent, mut received) = (0, 0);
        while Instant::now() < until || received < sent {
            while Instant::now() < until && pool.try_submit(0, workload.request.clone())?.is_none() {
                sent += 1;
            }
            if let Ok((_, verdict)) = pool.verdicts().recv_timeout(Duration::from_millis(50)) {
                check(&verdict?)?;
                received += 1;
            }
        }
        Ok(received)
    };
    rounds(Instant::now() + time / 8)?;
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let num_requests = rounds(start + time)?;
    Ok(Rate {
        num_requests,
        num_verdicts: workload.num_verdicts,
        wall_s: start.elapsed().as_secs_f64(),
        cpu_s: cpu_seconds() - cpu,
    })
}

/// Percentiles of the time from request to verdict with nothing else to do, in microseconds.
fn latencies(pool: &Pool) -> Result<Json> {
    let request = workloads().swap_remove(0).request;
    let mut times = Vec::with_capacity(NUM_LATENCIES);
    for _ in 0..NUM_LATENCIES {
        let start = Instant::now();
        pool.run(vec![request.clone()])?;
        times.push(start.elapsed().as_micros() as u64);
    }
    Ok(percentiles(&mut times))
}

/// Percentiles of times.
pub(crate) fn percentiles(times: &mut [u64]) -> Json {
    times.sort_unstable();
    let at = |share: f64| times.get(((times.len() as f64 * share) as usize).min(times.len().max(1) - 1));
    json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)})
}

/// CPython with one fork per program, or in words why there is no such figure.
fn cpython(ours_per_cpu_s: f64) -> Json {
    let args = ["-c", PEER, PROGRAM, ARGS, VALUE, &NUM_PEER.to_string()];
    let output = match Command::new("python3").args(args).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => output,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("it failed").to_owned();
            return json!(format!("SKIPPED: python3: {why}"));
        }
        Err(e) => return json!(format!("SKIPPED: there is no python3 here: {e}")),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    let mut number = || words.next().and_then(|w| w.parse::<f64>().ok());
    let (Some(wall_s), Some(cpu_s)) = (number(), number()) else {
        return json!("SKIPPED: python3 said something else than its times");
    };
    let per_cpu_s = NUM_PEER as f64 / cpu_s;
    eprintln!(
        "CPython        {per_cpu_s:7.0} programs per CPU second: azr is {:.2} times as fast",
        ours_per_cpu_s / per_cpu_s
    );
    json!({
        "version": words.next(),
        "programs_per_s": (NUM_PEER as f64 / wall_s).round(),
        "programs_per_cpu_s": per_cpu_s.round(),
        "azr_is_times_as_fast": (ours_per_cpu_s / per_cpu_s * 100.0).round() / 100.0,
    })
}

fn load() -> Option<String> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    Some(text.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}

/// A process as `/proc` shows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    /// Processor time with that of reaped children, in clock ticks.
    pub(crate) ticks: u64,
    /// Resident memory, in pages.
    pub(crate) pages: u64,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses and may hold anything.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
        let ticks = (11..15).map(number).sum::<Option<u64>>()?;
        Some(Process { pid, parent: number(1)? as u32, ticks, pages: number(21)? })
    }
}

/// This process and all below it.
pub(crate) fn family() -> Vec<Process> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let all: Vec<Process> =
        pids.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect();
    let mut family: Vec<Process> = all.iter().filter(|p| p.pid == std::process::id()).copied().collect();
    let mut done = 0;
    while done < family.len() {
        let parent = family[done].pid;
        family.extend(all.iter().filter(|p| p.parent == parent && p.pid != parent));
        done += 1;
    }
    family
}

fn cpu_seconds() -> f64 {
    family().iter().map(|p| p.ticks).sum::<u64>() as f64 / TICKS
}
