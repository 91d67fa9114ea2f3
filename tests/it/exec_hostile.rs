//! The hostile corpus: every program ends in its verdict class, and none touches the next. And the innocent corpus: ordinary
//! programs, which no limit may stop.

use azr::exec::pool::{Pool, PoolConfig};
use azr::exec::protocol::{Call, Limits, Outcome, Profile, Request, Verdict};
use azr::exec::sandbox::kill;

use crate::exec::{config, pool};
use crate::exec_cases::{Case, cases, equal, is_right, verdict};

const CLASSES: &[(&str, &str)] = &[
    ("answers_as_code", include_str!("../hostile/answers_as_code.txt")),
    ("compile_time", include_str!("../hostile/compile_time.txt")),
    ("cpu_native", include_str!("../hostile/cpu_native.txt")),
    ("cpu_python", include_str!("../hostile/cpu_python.txt")),
    ("deadline", include_str!("../hostile/deadline.txt")),
    ("determinism", include_str!("../hostile/determinism.txt")),
    ("endings", include_str!("../hostile/endings.txt")),
    ("forged", include_str!("../hostile/forged.txt")),
    ("interpreter", include_str!("../hostile/interpreter.txt")),
    ("memory", include_str!("../hostile/memory.txt")),
    ("native_stack", include_str!("../hostile/native_stack.txt")),
    ("output", include_str!("../hostile/output.txt")),
    ("poisoning", include_str!("../hostile/poisoning.txt")),
    ("recursion", include_str!("../hostile/recursion.txt")),
    ("system", include_str!("../hostile/system.txt")),
];

/// Tight limits: hostile programs end soon. Those that end by themselves need up to 50 ms of them on a fast core. Only a wall
/// deadline depends on how busy the machine is, and nothing but a fault of the sandbox may ever reach it.
const TIGHT: Limits = Limits { cpu_ms: 200, wall_ms: 120_000, memory_bytes: 48 << 20 };
/// The tightest limits that anything runs under.
const TIGHTEST: Limits = Limits { cpu_ms: 200, wall_ms: 120_000, memory_bytes: 16 << 20 };

/// Uses what poisoning programs change. Its value is compared with its own, before and after.
const PROBE: &str = "\
import math, json, collections, decimal, re, random, functools, itertools, string, copy, fractions, operator, heapq
import bisect, statistics, datetime, enum, dataclasses, typing, numbers, builtins, sys, gc
def f():
    c = collections.Counter('aab')
    @dataclasses.dataclass
    class P:
        x: int
    class E(enum.Enum):
        A = 1
    h = []
    heapq.heappush(h, 3)
    heapq.heappush(h, 1)
    return (len([1, 2]) + sum([1, 2]), sorted([3, 1]), list(range(3)), isinstance(1, str), math.sqrt(4), math.pi,
            c.most_common(1), json.dumps([1]), str(decimal.Decimal(1) / 3), re.match('a', 'b') is None,
            string.ascii_letters[:2], copy.deepcopy([1]), fractions.Fraction(1) + 1, operator.add(1, 1), h,
            bisect.bisect([1, 2], 1), statistics.mean([1, 2]), datetime.date(2020, 1, 1), [e.name for e in E], P(1).x,
            isinstance('a', numbers.Integral), list(itertools.islice(itertools.count(), 2)), sys.getrecursionlimit(),
            gc.isenabled(), builtins.ValueError.__name__, functools.lru_cache(None)(len)((1,)), typing.List is not None)
";

/// Runs requests on the pool that all tests share.
fn run(requests: Vec<Request>, limits: Limits) -> Vec<Verdict> {
    let pool = pool();
    let mut verdicts: Vec<Option<Verdict>> = requests.iter().map(|_| None).collect();
    let mut waiting: Vec<(usize, Request)> = requests.into_iter().enumerate().rev().collect();
    let mut open = 0;
    while open > 0 || !waiting.is_empty() {
        while let Some((tag, request)) = waiting.pop() {
            match pool.try_submit_limited(tag as u64, request, Some(limits)).expect("the pool lives") {
                Some(request) => {
                    waiting.push((tag, request));
                    break;
                }
                None => open += 1,
            }
        }
        let (tag, verdict) = pool.verdicts().recv().expect("the pool lives");
        verdicts[tag as usize] = Some(verdict.expect("a verdict"));
        open -= 1;
    }
    verdicts.into_iter().map(|v| v.expect("every request has a verdict")).collect()
}

fn report(wrong: &[String]) {
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn hostile_programs_end_in_their_class_and_leave_nothing() {
    let all: Vec<(&str, Case)> =
        CLASSES.iter().flat_map(|(class, text)| cases(text).into_iter().map(move |c| (*class, c))).collect();
    assert!(all.len() >= 300 && CLASSES.len() >= 12, "{} programs in {} classes", all.len(), CLASSES.len());
    let verdicts = run(all.iter().map(|(_, c)| c.request.clone()).collect(), TIGHT);
    let mut wrong = Vec::new();
    for ((class, case), found) in all.iter().zip(&verdicts) {
        let met = case.request.calls[0].expect.is_some() && found.calls.iter().any(Outcome::matches);
        if !is_right(&case.expected, found) || met {
            wrong.push(format!("{class} {}: {} instead of {}", case.name, verdict(found), case.expected));
        }
    }
    report(&wrong);
    let after = run(vec![probe()], TIGHT);
    assert!(matches!(after[0].calls[0], Outcome::Value { .. }), "{}", verdict(&after[0]));
}

fn probe() -> Request {
    Request {
        program: PROBE.to_owned(),
        calls: vec![Call { args: "f()".to_owned(), expect: None }],
        profile: Profile::Run,
    }
}

#[test]
fn no_program_changes_the_next_ones_verdict() {
    let clean = run(vec![probe()], TIGHT)[0].calls.clone();
    assert!(matches!(clean[0], Outcome::Value { .. }), "{clean:?}");
    let poisons = CLASSES.iter().filter(|(class, _)| ["poisoning", "interpreter", "forged"].contains(class));
    let poisons: Vec<Case> = poisons.flat_map(|(_, text)| cases(text)).collect();
    // Each zygote gets each poison and then a probe: two supervisors take turns.
    let pairs = poisons.iter().flat_map(|p| [p.request.clone(), p.request.clone(), probe(), probe()]).collect();
    let verdicts = run(pairs, TIGHT);
    let mut wrong = Vec::new();
    for (poison, found) in poisons.iter().zip(verdicts.chunks(4)) {
        for after in &found[2..] {
            if after.calls != clean {
                wrong.push(format!("after {}: {}", poison.name, verdict(after)));
            }
        }
    }
    report(&wrong);
}

#[test]
fn innocent_programs_are_never_stopped_and_agree_with_cpython() {
    let all = cases(include_str!("innocent.txt"));
    let mut wrong = Vec::new();
    for _ in 0..2 {
        for (case, found) in all.iter().zip(run(all.iter().map(|c| c.request.clone()).collect(), TIGHTEST)) {
            let expected = case.expected.strip_prefix("value=").expect("an ordinary program has a value");
            if !matches!(&found.calls[..], [Outcome::Value { text, .. }] if equal(expected, text)) {
                wrong.push(format!("{}: {} instead of {expected}", case.name, verdict(&found)));
            }
        }
    }
    report(&wrong);
}

#[test]
fn throughput_recovers_after_any_number_of_hangs_and_everything_is_reaped() {
    let pool = Pool::start(&config()).expect("the pool starts");
    let hang = |program: &str| Request {
        program: program.to_owned(),
        calls: vec![Call { args: "f()".to_owned(), expect: None }; 3],
        profile: Profile::Run,
    };
    let limits = Limits { cpu_ms: 20, wall_ms: 120_000, memory_bytes: 32 << 20 };
    for i in 0..60 {
        let program = ["def f():\n    while True: pass", "import select\ndef f(): return sum(iter(int, 1))"][i % 2];
        assert!(pool.try_submit_limited(i as u64, hang(program), Some(limits)).expect("alive").is_none());
    }
    for _ in 0..60 {
        let verdict = pool.verdicts().recv().expect("alive").1.expect("a verdict");
        assert!(verdict.calls.iter().all(|o| matches!(o.class(), "timeout_cpu" | "unsupported")), "{verdict:?}");
    }
    assert!(pool.run(increments()).expect("alive").iter().all(|v| v.calls[0].matches()));
    for zygote in pool.zygotes() {
        assert_eq!(num_children(*zygote), Some(0), "every zygote lives, and no child of one is left");
    }
}

#[test]
fn throughput_recovers_after_wall_clock_hangs() {
    let pool = Pool::start(&config()).expect("the pool starts");
    let hang = || Request {
        program: "def f():\n    while True: pass".to_owned(),
        calls: vec![Call { args: "f()".to_owned(), expect: None }; 2],
        profile: Profile::Run,
    };
    let limits = Limits { cpu_ms: 600_000, wall_ms: 20, memory_bytes: 32 << 20 };
    for tag in 0..30 {
        assert!(pool.try_submit_limited(tag, hang(), Some(limits)).expect("alive").is_none());
    }
    for _ in 0..30 {
        let verdict = pool.verdicts().recv().expect("alive").1.expect("a verdict");
        assert_eq!(verdict.calls, [Outcome::TimeoutWall, Outcome::TimeoutWall]);
    }
    assert!(pool.run(increments()).expect("alive").iter().all(|v| v.calls[0].matches()));
    for zygote in pool.zygotes() {
        assert_eq!(num_children(*zygote), Some(0), "every zygote lives, and no child of one is left");
    }
}

#[test]
fn a_zygote_killed_from_outside_is_replaced_and_no_verdict_is_lost() {
    let pool = Pool::start(&PoolConfig { num_workers: 1, ..config() }).expect("the pool starts");
    let loops = Request {
        program: "def f():\n    while True: pass".to_owned(),
        calls: vec![Call { args: "f()".to_owned(), expect: None }],
        profile: Profile::Run,
    };
    // An orphan would go on for a minute.
    let limits = Limits { cpu_ms: 60_000, wall_ms: 3000, memory_bytes: 32 << 20 };
    assert!(pool.try_submit_limited(0, loops, Some(limits)).expect("alive").is_none());
    let zygote = pool.zygotes()[0];
    let child = child_of(zygote);
    kill(zygote as i32);
    let (tag, verdict) = pool.verdicts().recv().expect("alive");
    let calls = verdict.expect("a zygote can be started").calls;
    assert_eq!((tag, calls), (0, vec![Outcome::TimeoutWall]), "it ran again on a new zygote");
    assert_eq!(children(child), None, "the killed zygote took its child along");
}

#[test]
fn a_child_killed_from_outside_runs_again() {
    let pool = Pool::start(&PoolConfig { num_workers: 1, ..config() }).expect("the pool starts");
    let works = Request {
        program: "def f(n):\n    for i in range(n): pass\n    return n".to_owned(),
        calls: vec![Call { args: "3000000".to_owned(), expect: Some("3000000".to_owned()) }],
        profile: Profile::Answer,
    };
    let limits = Limits { cpu_ms: 20_000, wall_ms: 60_000, memory_bytes: 32 << 20 };
    assert!(pool.try_submit_limited(0, works, Some(limits)).expect("alive").is_none());
    kill(child_of(pool.zygotes()[0]) as i32);
    let verdict = pool.verdicts().recv().expect("alive").1.expect("a child can be made");
    assert!(verdict.calls[0].matches(), "{verdict:?}");
}

#[test]
fn where_no_process_can_be_made_there_is_an_error_and_no_verdict() {
    let dir = tempfile::tempdir().expect("a folder");
    let executable = dir.path().join("azr");
    std::fs::copy(env!("CARGO_BIN_EXE_azr"), &executable).expect("a copy");
    let config = PoolConfig { num_workers: 1, executable: Some(executable.clone()), ..config() };
    let pool = Pool::start(&config).expect("the pool starts");
    std::fs::remove_file(&executable).expect("removed");
    pool.zygotes().iter().for_each(|z| kill(*z as i32));
    let error = pool.run(increments()).expect_err("no program can be run");
    assert_eq!(error.kind(), azr::error::Kind::Environment, "{error}");
}

#[test]
fn zygotes_killed_in_the_middle_of_work_cost_no_task_its_verdict() {
    let pool = Pool::start(&config()).expect("the pool starts");
    let requests = increments();
    for (tag, request) in requests.iter().enumerate() {
        assert!(pool.try_submit(tag as u64, request.clone()).expect("alive").is_none(), "the queue has room");
    }
    let mut right = vec![false; requests.len()];
    for received in 0..requests.len() {
        if received == 10 {
            pool.zygotes().iter().for_each(|z| kill(*z as i32));
        }
        let (tag, verdict) = pool.verdicts().recv().expect("alive");
        right[tag as usize] = verdict.expect("a zygote can be started").calls[0].matches();
    }
    assert!(right.iter().all(|r| *r), "{right:?}");
}

/// Outcomes of one request.
fn outcomes(program: &str, calls: &[(&str, Option<&str>)], profile: Profile) -> Vec<Outcome> {
    let call =
        |(args, expect): &(&str, Option<&str>)| Call { args: (*args).to_owned(), expect: expect.map(str::to_owned) };
    let request = Request { program: program.to_owned(), calls: calls.iter().map(call).collect(), profile };
    let pool = pool();
    assert!(pool.try_submit(0, request).expect("alive").is_none(), "the queue has room");
    pool.verdicts().recv().expect("alive").1.expect("a verdict").calls
}

#[test]
fn answers_of_one_request_do_not_see_each_other() {
    let counting = "import math\nmath.k = math.k if hasattr(math, 'k') else 0\n\
        def f(x):\n    math.k += 1\n    return x * 0 if math.k <= 2 else 1";
    let answers = ["0", "1", "2", "3", "4"].map(|args| (args, Some("0")));
    let right: Vec<bool> = outcomes(counting, &answers, Profile::Answer).iter().map(Outcome::matches).collect();
    assert_eq!(right, [true; 5]);
}

#[test]
fn a_call_that_ends_badly_spares_no_other_the_second_run() {
    let ordered = "def f(s, n): return list(set(s)) * n";
    let found = outcomes(ordered, &[("'cab', 1", None), ("'cab', 5000", None)], Profile::Propose);
    assert_eq!(found, [Outcome::SetOrder, Outcome::OutputTooLarge]);
}

/// The child of a zygote, as soon as it has one.
fn child_of(zygote: u32) -> u32 {
    loop {
        match children(zygote).expect("the zygote lives").first() {
            Some(child) => return *child,
            None => std::thread::yield_now(),
        }
    }
}

/// A hundred quick answers.
fn increments() -> Vec<Request> {
    let quick = |i: u32| Request {
        program: "def f(x):\n    return x + 1".to_owned(),
        calls: vec![Call { args: i.to_string(), expect: Some((i + 1).to_string()) }],
        profile: Profile::Answer,
    };
    (0..100).map(quick).collect()
}

/// Number of children of a process; none when it is gone.
pub fn num_children(pid: u32) -> Option<usize> {
    children(pid).map(|c| c.len())
}

fn children(pid: u32) -> Option<Vec<u32>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let children = tasks.flatten().filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok());
    Some(children.flat_map(|c| c.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect())
}
