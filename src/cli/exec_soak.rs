//! `azr exec --soak N`: many tasks, hostile ones among them, and a look at what is left behind.

use std::time::Instant;

use serde_json::{Value as Json, json};

use crate::base::rng::{Purpose, Rng};
use crate::cli::exec_bench::{ARGS, PROGRAM, VALUE, family, percentiles};
use crate::cli::output::print_line;
use crate::error::{Error, Result};
use crate::exec::pool::{Pool, PoolConfig};
use crate::exec::protocol::{Call, Limits, Profile, Request};

/// Looks at the process in the course of a soak.
const NUM_WINDOWS: u64 = 20;
/// Memory that all processes together may grow by from the second window to the last, in MiB.
const MAX_GROWTH_MIB: f64 = 32.0;
/// One task in so many is hostile.
const HOSTILE_EVERY: usize = 25;

/// Limits of the tasks: tight, so that hostile ones end soon.
const LIMITS: Limits = Limits { cpu_ms: 100, wall_ms: 60_000, memory_bytes: 64 << 20 };

/// Hostile programs with the verdict classes that are right for them.
const HOSTILE: &[(&str, &str)] = &[
    ("def f():\n    while True: pass", "timeout_cpu"),
    ("def f():\n    return sum(iter(int, 1))", "timeout_cpu"),
    ("def f():\n    x = []\n    while True: x.append(bytes(1 << 23))", "out_of_memory"),
    (
        "def f():\n    x = iter([])\n    for _ in range(300000): x = map(str, x)\n    return list(x)",
        "crash|timeout_cpu",
    ),
    ("import time\ndef f():\n    time.sleep(9)", "policy"),
    ("def f():\n    while True: print('x' * 1000)", "timeout_cpu"),
    ("def f():\n    return 'a' * 100000", "output_too_large"),
    ("def f():\n    return f()", "exception"),
    ("import math\nmath.sqrt = None\nlen = sum = sorted = None\ndef f(): return 1", "value"),
    ("def f():\n    raise SystemExit(0)", "exception"),
];

fn task(rng: &mut Rng) -> (Request, &'static str) {
    let call = |args: &str, expect: Option<&str>| Call { args: args.to_owned(), expect: expect.map(str::to_owned) };
    if rng.below(HOSTILE_EVERY) == 0 {
        let (program, class) = HOSTILE[rng.below(HOSTILE.len())];
        return (Request { program: program.to_owned(), calls: vec![call("f()", None)], profile: Profile::Run }, class);
    }
    let profile = if rng.below(4) == 0 { Profile::Propose } else { Profile::Answer };
    let calls = vec![call(ARGS, Some(VALUE)); 1 + rng.below(4)];
    (Request { program: PROGRAM.to_owned(), calls, profile }, "equal")
}

/// Runs the tasks and prints one JSON object.
///
/// # Errors
/// When a verdict is wrong, or descriptors, processes or memory have grown.
pub fn soak(pool: &Pool, config: &PoolConfig, num_tasks: u64) -> Result<()> {
    let mut rng = Rng::new(1, Purpose::Test, 0, 0);
    let mut windows: Vec<Json> = Vec::new();
    let (mut wrong, mut shape) = (Vec::new(), Vec::new());
    let start = Instant::now();
    for window in 0..NUM_WINDOWS {
        let num = num_tasks * (window + 1) / NUM_WINDOWS - num_tasks * window / NUM_WINDOWS;
        let mut times = run_window(pool, num, &mut rng, &mut wrong)?;
        let family = family();
        let mib = family.iter().map(|p| p.pages).sum::<u64>() as f64 * 4096.0 / f64::from(1 << 20);
        let descriptors = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        shape.push((descriptors, family.len(), mib));
        windows.push(json!({
            "tasks": num, "descriptors": descriptors, "processes": family.len(), "memory_mib": mib.round(),
            "latency_us": percentiles(&mut times),
        }));
        eprintln!("{}", windows.last().expect("just added"));
    }
    let (first, last) = (shape[1], shape[shape.len() - 1]);
    print_line(&json!({
        "tasks": num_tasks, "executors": config.num_workers, "hostile_one_in": HOSTILE_EVERY,
        "seconds": start.elapsed().as_secs_f64().round(), "wrong_verdicts": wrong.len(), "windows": windows,
    }))?;
    if let Some(first) = wrong.first() {
        return Err(Error::failure(format!("{} wrong verdicts, such as {first}", wrong.len())));
    }
    if last.0 > first.0 || last.1 > first.1 || last.2 > first.2 + MAX_GROWTH_MIB {
        return Err(Error::failure(format!("descriptors, processes, MiB went from {first:?} to {last:?}")));
    }
    Ok(())
}

/// Runs some tasks; times from request to verdict of the harmless ones, in microseconds, queue included.
fn run_window(pool: &Pool, num: u64, rng: &mut Rng, wrong: &mut Vec<String>) -> Result<Vec<u64>> {
    let mut times = Vec::new();
    let mut open = std::collections::HashMap::new();
    let (mut sent, mut received) = (0, 0);
    let mut next = None;
    while received < num {
        while sent < num && open.len() < 8 {
            let (request, class) = next.take().unwrap_or_else(|| task(rng));
            match pool.try_submit_limited(sent, request, Some(LIMITS))? {
                Some(request) => {
                    next = Some((request, class));
                    break;
                }
                None => open.insert(sent, (class, Instant::now())),
            };
            sent += 1;
        }
        let (tag, verdict) = pool.verdicts().recv().map_err(|_| Error::failure("the executor has stopped"))?;
        let verdict = verdict?;
        let (class, start) = open.remove(&tag).expect("a verdict answers a task");
        received += 1;
        let right = if class == "equal" {
            times.push(start.elapsed().as_micros() as u64);
            verdict.calls.iter().all(|o| o.class() == "value")
        } else {
            class.split('|').any(|c| c == verdict.calls[0].class())
        };
        if !right {
            wrong.push(format!("{class}: {verdict:?}"));
        }
    }
    Ok(times)
}
