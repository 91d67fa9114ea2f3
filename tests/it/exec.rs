//! The executor with its real worker processes: values, hostile programs, isolation, recovery.

use std::sync::{Mutex, MutexGuard, OnceLock};

use azr::exec::pool::{Pool, PoolConfig};
use azr::exec::protocol::{Call, Outcome, Profile, Request, Verdict};

pub fn config() -> PoolConfig {
    PoolConfig {
        num_workers: 2,
        cpu_ms_propose: 300,
        cpu_ms_answer: 400,
        cpu_ms_run: 400,
        executable: Some(env!("CARGO_BIN_EXE_azr").into()),
        ..PoolConfig::default()
    }
}

/// One pool for all tests: starting interpreters is the dear part.
pub fn pool() -> MutexGuard<'static, Pool> {
    static POOL: OnceLock<Mutex<Pool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| Mutex::new(Pool::start(&config()).expect("the pool starts")));
    // A test that failed has left the pool as idle as any other.
    pool.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn run(requests: Vec<Request>) -> Vec<Verdict> {
    pool().run(requests).expect("the pool answers")
}

fn request(program: &str, args: &[&str], expect: Option<&str>, profile: Profile) -> Request {
    let calls = args.iter().map(|a| Call { args: (*a).to_owned(), expect: expect.map(str::to_owned) }).collect();
    Request { program: program.to_owned(), calls, profile }
}

fn answer(program: &str, args: &str) -> Outcome {
    run(vec![request(program, &[args], None, Profile::Answer)])[0].calls[0].clone()
}

fn propose(program: &str, args: &str) -> Verdict {
    run(vec![request(program, &[args], None, Profile::Propose)]).remove(0)
}

fn value(text: &str) -> Outcome {
    Outcome::Value { text: text.to_owned(), matches: None }
}

/// Short name of an outcome's class.
fn class(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Exception { class, .. } => class.clone(),
        Outcome::Value { .. } => "value".to_owned(),
        other => other.to_string(),
    }
}

#[test]
fn values_come_back_as_python_writes_them() {
    let identity = "def f(*xs):\n    return xs";
    for args in [
        "1, 'a', None",
        "[1.5, -2], {'k': (1,)}",
        "{3, 1}, frozenset({2}), b'x'",
        "123456789012345678901234567890",
        "range(1, 5, 2), (1+2j)",
        "True, inf, ''",
    ] {
        let expected = azr::exec::value::Value::parse(&format!("({args},)")).expect("a literal").repr();
        assert_eq!(answer(identity, args), value(&expected));
    }
    let program = "from collections import Counter\nimport re, math, json, statistics, dataclasses, random\n\
                   def f(s):\n    c = Counter(s)\n    return sorted(c.items()), f'{math.pi:.3f}', json.dumps({'a': [1]})";
    let expected = "([('a', 2), ('b', 1)], '3.142', '{\"a\": [1]}')";
    let allowed = program.replace(", random", "");
    assert_eq!(answer(&allowed, "'aab'"), value(expected));
}

#[test]
fn comparisons_are_pythons_and_never_the_programs() {
    let check = |program: &str, args: &str, expect: &str| {
        run(vec![request(program, &[args], Some(expect), Profile::Answer)])[0].calls[0].matches()
    };
    assert!(check("def f(x):\n    return x", "True", "1.0"));
    assert!(check("def f(x):\n    return {2, 1}", "0", "{1, 2}"));
    assert!(!check("def f(x):\n    return x", "[1]", "(1,)"));
    let forged = "class A(int):\n    def __eq__(self, o): return True\n    def __repr__(self): return '7'\n\
                  def f(x):\n    return A(3)";
    assert!(!check(forged, "0", "7"), "a subclass with forged equality is no int");
    assert!(!check("def f(x):\n    return x", "0) or True or f(0", "1"));
}

#[test]
fn proposals_fail_closed() {
    for (program, args, reason) in [
        ("def f(x):\n    raise Exception('no error word')", "1", "exception Exception"),
        ("def f(x):\n    raise StopIteration", "1", "exception StopIteration"),
        ("def f(x):\n    raise SystemExit", "1", "exception SystemExit"),
        ("class Foo(BaseException): pass\ndef f(x):\n    raise Foo", "1", "exception Foo"),
        ("def f(x):\n    return float('nan')", "1", "unsupported value: nan"),
        ("def f(x):\n    return object()", "1", "unsupported value: object"),
        ("def f(x):\n    return lambda: 0", "1", "unsupported value: function"),
        ("def f(x):\n    return str(lambda: x)", "1", "not deterministic"),
        ("state = []\ndef f(x):\n    state.append(x)\n    return len(state)", "1", "not deterministic"),
        ("def f(x):\n    return 'a' * 10000", "1", "output too large"),
        ("def f(x):\n    while True: pass", "1", "CPU time limit"),
        ("def g(x):\n    return 1", "1", "exception KeyError"),
        ("def f(x):\n    return 1", "x + 1", "arguments"),
    ] {
        let verdict = propose(program, args);
        let outcome = verdict.calls.first().map(ToString::to_string).unwrap_or_default();
        assert!(outcome.starts_with(reason), "{program}: {outcome} {:?}", verdict.rejection);
    }
    let mutating = propose("def f(xs):\n    xs.append(1)\n    return xs", "[0]");
    assert_eq!(mutating.calls[0], value("[0, 1]"), "arguments are fresh in every run");
    assert!(mutating.normal_form.is_some());
}

#[test]
fn values_of_the_standard_library_go_in_and_come_out() {
    let program = "def f(*xs):\n    return xs";
    for args in [
        "deque([1, 2], maxlen=3), Counter({'a': 2}), defaultdict(<class 'list'>, {'a': [1]})",
        "OrderedDict({'b': 1, 'a': 2}), Fraction(1, 2), Decimal('1.50'), Decimal('-Infinity')",
        "datetime.date(2020, 2, 29), datetime.time(1, 2, 3), datetime.timedelta(days=-1, seconds=5)",
        "datetime.datetime(2020, 1, 2, 3, 4, tzinfo=datetime.timezone.utc)",
        "datetime.timezone(datetime.timedelta(seconds=3600)), {Fraction(1, 3): {Decimal('0.1')}}",
    ] {
        let expected = azr::exec::value::Value::parse(&format!("({args},)")).expect("a literal").repr();
        assert_eq!(answer(program, args), value(&expected), "as they were");
    }
    let kinds = "def f(*xs):\n    return [type(x).__name__ for x in xs]";
    let args =
        "deque([]), Counter(), defaultdict(int, {}), OrderedDict(), Fraction(1), Decimal(1), datetime.date(1, 1, 1)";
    let names = "['deque', 'Counter', 'defaultdict', 'OrderedDict', 'Fraction', 'Decimal', 'date']";
    assert_eq!(answer(kinds, args), value(names), "programs see the real types");
    let moved = "from collections import OrderedDict\ndef f():\n    d = OrderedDict(a=1, b=2)\n    d.move_to_end('a')\n    return d";
    assert_eq!(answer(moved, ""), value("OrderedDict({'b': 2, 'a': 1})"));
    let factory = "from collections import defaultdict\ndef f(): return defaultdict(lambda: 0)";
    assert_eq!(answer(factory, "").class(), "unsupported");
}

#[test]
fn what_is_not_supported_is_one_kind_of_verdict() {
    let module = propose("import numpy as np\ndef f(x):\n    return np.sum(x)", "1");
    let rejected = module.rejection.expect("numpy is not there");
    assert_eq!((rejected.class(), rejected.to_string().as_str()), ("unsupported", "unsupported module numpy"));
    let request = |program: &str| {
        let calls = vec![Call { args: "f(1)".to_owned(), expect: None }];
        run(vec![Request { program: program.to_owned(), calls, profile: Profile::Run }]).remove(0).calls.remove(0)
    };
    assert_eq!(request("import sympy\ndef f(x): return x").to_string(), "unsupported module sympy");
    assert_eq!(request("def f(x): return object()").class(), "unsupported");
}

#[test]
fn memory_and_time_are_told() {
    let program = "def f(n):\n    x = [0] * n\n    return len(x)";
    let memory = |n: &str| run(vec![request(program, &[n], None, Profile::Answer)])[0].memory_bytes;
    let (little, much) = (memory("10"), memory("1000000"));
    assert!(little < 1 << 20 && (8_000_000..20 << 20).contains(&much), "{little} {much}");
    let verdict = &run(vec![request("def f():\n    while True: pass", &[""], None, Profile::Answer)])[0];
    assert!(verdict.cpu_us > 200_000, "{}", verdict.cpu_us);
}

#[test]
fn a_proposals_limits_are_tighter_than_an_answers() {
    let config = PoolConfig::default();
    let (propose, answer) = (config.limits(Profile::Propose), config.limits(Profile::Answer));
    assert!(propose.cpu_ms * 2 < answer.cpu_ms && propose.wall_ms < answer.wall_ms, "a borderline program cannot flip");
}

#[test]
fn a_call_that_dies_does_not_touch_its_neighbours() {
    let program = "def f(x):\n    if x == 1:\n        while True: pass\n    if x == 2:\n        return 'a' * 10 ** 11\n    return x * 10";
    let verdict = &run(vec![request(program, &["0", "1", "3", "2", "4"], Some("30"), Profile::Answer)])[0];
    let classes: Vec<String> = verdict.calls.iter().map(class).collect();
    assert_eq!([&classes[0], &classes[1], &classes[2], &classes[4]], ["value", "CPU time limit", "value", "value"]);
    assert!(verdict.calls[2].matches() && !verdict.calls[0].matches() && !verdict.calls[3].matches());
}

#[test]
fn what_follows_a_hang_of_a_program_to_be_right_throughout_is_not_run() {
    let program = "def f(x):\n    while x == 1: pass\n    return x * 10";
    let args = ["0", "1", "3", "4"];
    let late = Outcome::TimeoutCpu;
    for profile in [Profile::Program, Profile::Propose] {
        let verdict = &run(vec![request(program, &args, None, profile)])[0];
        assert_eq!(verdict.calls, [value("0"), late.clone(), late.clone(), late.clone()]);
    }
    let verdict = &run(vec![request(program, &args, None, Profile::Answer)])[0];
    assert_eq!(verdict.calls, [value("0"), late, value("30"), value("40")], "answers to one task stand alone");
}

#[test]
fn a_varied_input_that_is_late_in_the_second_run_does_not_take_the_proposals_own_along() {
    // Ends well at first; with the members of sets turned round, the second call hangs, which runs before the first then.
    let program = "def f(x):\n    while x and next(iter({1, 2})) == 2: pass\n    return x * 10";
    let calls = run(vec![request(program, &["0", "1"], None, Profile::Propose)]).remove(0).calls;
    assert_eq!(calls[0], value("0"));
    assert!(["depends on the order of a set", "not deterministic"].contains(&class(&calls[1]).as_str()), "{calls:?}");
}

#[test]
fn calls_of_a_proposal_know_nothing_of_each_other() {
    // The same from the first call on and from the last on, and another alone.
    let program = "import math\nmath.k = math.k + 1 if hasattr(math, 'k') else 0\nP = math.k\ndef f(x): return x + abs(2 * P - 4)";
    let calls = run(vec![request(program, &["1"; 5], None, Profile::Propose)]).remove(0).calls;
    assert!(calls.contains(&Outcome::NotDeterministic), "{calls:?}");
    // What is drawn without a seed is the same everywhere.
    let draws = "import statistics\nR = statistics.NormalDist(0, 1).samples(1)\ndef f(): return R";
    let other = Pool::start(&config()).expect("the pool starts");
    let again = other.run(vec![request(draws, &[""], None, Profile::Answer)]).expect("the pool answers");
    assert_eq!(answer(draws, ""), again[0].calls[0]);
}

#[test]
fn hangs_leave_no_process_and_no_descriptor_behind() {
    let open = || std::fs::read_dir("/proc/self/fd").expect("proc is mounted").count();
    let pool = Pool::start(&config()).expect("the pool starts");
    let before = open();
    let hang = || request("def f():\n    while True: pass", &[""], None, Profile::Answer);
    for verdict in pool.run((0..8).map(|_| hang()).collect()).expect("the pool answers") {
        assert_eq!(verdict.calls, [Outcome::TimeoutCpu]);
    }
    let quick = (0..200).map(|i| request("def f(x):\n    return x", &[&i.to_string()], None, Profile::Answer));
    let verdicts = pool.run(quick.collect()).expect("the pool answers");
    assert!(verdicts.iter().enumerate().all(|(i, v)| v.calls[0] == value(&i.to_string())));
    // Other tests open descriptors of their own meanwhile; a leak of one per program would be in the hundreds.
    assert!(open() < before + 50, "descriptors: {before} before, {} after", open());
    drop(pool);
}
