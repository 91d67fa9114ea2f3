//! The executor with its real worker processes: values, hostile programs, isolation, recovery.

use std::sync::OnceLock;

use azr::exec::pool::{Pool, PoolConfig};
use azr::exec::protocol::{Call, Outcome, Profile, Request, Verdict};

fn config() -> PoolConfig {
    PoolConfig {
        num_workers: 2,
        cpu_ms_propose: 300,
        cpu_ms_answer: 400,
        executable: Some(env!("CARGO_BIN_EXE_azr").into()),
        ..PoolConfig::default()
    }
}

/// One pool for all tests: starting interpreters is the dear part.
fn run(requests: Vec<Request>) -> Vec<Verdict> {
    static POOL: OnceLock<std::sync::Mutex<Pool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| std::sync::Mutex::new(Pool::start(&config()).expect("the pool starts")));
    pool.lock().expect("no test panics inside").run(requests).expect("the pool answers")
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
        ("def f(x):\n    return hash('a' + str(x))", "1", "not deterministic"),
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

/// (program, arguments, classes that are right). Programs are run as answers, so that the sandbox and not the
/// determinism check decides.
const HOSTILE: &[(&str, &str, &[&str])] = &[
    // CPU in Python code and in native calls.
    ("def f():\n    while True: pass", "", &["CPU time limit"]),
    (
        "def f():\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        "",
        &["CPU time limit"],
    ),
    ("def f():\n    return sum(iter(int, 1))", "", &["CPU time limit"]),
    ("def f():\n    import itertools\n    return -1 in itertools.count()", "", &["CPU time limit"]),
    ("def f():\n    import re\n    return re.match('(a+)+$', 'a' * 60 + 'b')", "", &["CPU time limit", "value"]),
    ("def f():\n    return 9 ** 9 ** 9", "", &["CPU time limit", "memory limit"]),
    ("def f():\n    import math\n    return math.factorial(10 ** 8)", "", &["CPU time limit", "memory limit"]),
    (
        "class A:\n    def __del__(self):\n        while True: pass\ndef f():\n    A()\n    return 1",
        "",
        &["CPU time limit"],
    ),
    // Compile time.
    ("x = 1\nif x == 0: pass\n<elifs>def f(): return 1", "", &["CPU time limit", "value", "RecursionError", "crash"]),
    // Memory.
    ("def f():\n    return [0] * 10 ** 12", "", &["MemoryError", "memory limit", "crash"]),
    ("def f():\n    x = []\n    while True: x.append('a' * 1000)", "", &["memory limit", "CPU time limit"]),
    ("def f():\n    return 'a' * 10 ** 11", "", &["MemoryError", "memory limit", "crash"]),
    ("def f():\n    return list(range(10 ** 12))", "", &["MemoryError", "memory limit", "crash", "CPU time limit"]),
    (
        "def f():\n    return '%1000000000000d' % 1",
        "",
        &["MemoryError", "memory limit", "crash", "ValueError", "OverflowError"],
    ),
    (
        "def f():\n    d = {}\n    i = 0\n    while True:\n        d[i] = bytes(10000)\n        i += 1",
        "",
        &["memory limit", "CPU time limit"],
    ),
    ("def f():\n    return 1 << 10 ** 12", "", &["MemoryError", "OverflowError", "memory limit", "crash"]),
    // Recursion and the native stack.
    ("def f():\n    return f()", "", &["RecursionError"]),
    ("class A:\n    def __repr__(self): return repr(self)\ndef f():\n    return repr(A())", "", &["RecursionError"]),
    ("class A:\n    def __eq__(self, o): return self == o\ndef f():\n    return A() == 1", "", &["RecursionError"]),
    (
        "def f():\n    x = []\n    for _ in range(200000): x = [x]\n    return repr(x) == ''",
        "",
        &["RecursionError", "value"],
    ),
    (
        "def f():\n    x = iter([])\n    for _ in range(300000): x = map(str, x)\n    return list(x)",
        "",
        &["crash", "RecursionError", "CPU time limit"],
    ),
    ("def f():\n    x = 0\n    for _ in range(100): x = [x]\n    return x", "", &["output too large"]),
    // Output.
    ("def f():\n    print('x' * 10 ** 7)\n    return 1", "", &["value"]),
    ("def f():\n    while True: print('flood')", "", &["CPU time limit"]),
    ("def f():\n    return 'a' * 10 ** 6", "", &["output too large"]),
    ("def f():\n    raise ValueError('a' * 10 ** 7)", "", &["ValueError"]),
    ("def f():\n    return list(range(100000))", "", &["output too large"]),
    // Ending the process, catching everything.
    ("def f():\n    raise SystemExit(0)", "", &["SystemExit"]),
    ("def f():\n    raise KeyboardInterrupt", "", &["KeyboardInterrupt"]),
    ("raise SystemExit\ndef f(): return 1", "", &["SystemExit"]),
    // Interpreter tricks that the policy does not see.
    ("def f():\n    def g(): return 1\n    return g.__code__", "", &["rejected"]),
    ("def f():\n    return ().__class__.__base__.__subclasses__()", "", &["rejected"]),
    ("def f():\n    return f.__globals__", "", &["rejected"]),
    ("import ctypes\ndef f(): return 1", "", &["rejected"]),
    ("import os\ndef f(): return os.listdir('/')", "", &["rejected"]),
    ("def f():\n    return open('/etc/passwd').read()", "", &["rejected"]),
    ("def f():\n    return eval('1')", "", &["rejected"]),
    ("import socket\ndef f(): return 1", "", &["rejected"]),
    ("def f():\n    x = '{0.__class__.__mro__}'.format(1)\n    return x", "", &["value"]),
    (
        "import string\ndef f():\n    return string.Formatter().get_field('0.__class__', [1], {})[0]",
        "",
        &["unsupported value: type"],
    ),
    (
        "import dataclasses, collections\ndef f():\n    return collections.sys.modules['os'].listdir('/')",
        "",
        &["PermissionError", "AttributeError", "KeyError"],
    ),
    ("import re\ndef f():\n    re.compile = None\n    return 1", "", &["value"]),
    ("import typing\ndef f():\n    return typing.sys.exit(3)", "", &["SystemExit"]),
    (
        "import copy\ndef f():\n    class A:\n        def __deepcopy__(self, memo): return copy.deepcopy(self)\n    return copy.deepcopy(A())",
        "",
        &["RecursionError"],
    ),
];

#[test]
fn hostile_programs_end_in_their_class() {
    let elifs: String = (0..400).map(|i| format!("elif x == {i}: pass\n")).collect();
    let programs: Vec<String> = HOSTILE.iter().map(|(p, ..)| p.replace("<elifs>", &elifs)).collect();
    let requests =
        programs.iter().zip(HOSTILE).map(|(p, (_, args, _))| request(p, &[args], None, Profile::Answer)).collect();
    let verdicts = run(requests);
    let mut wrong = Vec::new();
    for ((program, verdict), (.., expected)) in programs.iter().zip(&verdicts).zip(HOSTILE) {
        let got = if verdict.rejection.is_some() { "rejected".to_owned() } else { class(&verdict.calls[0]) };
        if !expected.contains(&got.as_str()) {
            let reason = verdict.rejection.as_ref().map(ToString::to_string).unwrap_or_default();
            wrong.push(format!("{program}\n  -> {got} {reason}, expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    // Whatever they did, the next program is not touched.
    assert_eq!(answer("def f(x):\n    return len([x]) + sum([1, 2])", "0"), value("4"));
}

#[test]
fn no_program_changes_anothers_verdict() {
    let poisons = [
        "import math\nmath.sqrt = lambda x: 7\nmath.pi = 3\ndef f(): return 0",
        "import collections\ncollections.Counter.most_common = lambda s, n=None: 'poison'\ndef f(): return 0",
        "import json\njson.dumps = None\ndef f(): return 0",
        "import decimal\ndecimal.getcontext().prec = 2\ndef f(): return 0",
        "import typing\ntyping.sys.setrecursionlimit(20)\ndef f(): return 0",
    ];
    let probe = "import math, json, collections, decimal\n\
                 def f():\n    return (math.sqrt(4), collections.Counter('aab').most_common(1), json.dumps([1]), \
                 str(decimal.Decimal(1) / 3), [x for x in range(3)])";
    let clean = answer(probe, "");
    assert!(matches!(clean, Outcome::Value { .. }), "{clean}");
    for poison in poisons {
        run((0..4).map(|_| request(poison, &[""], None, Profile::Answer)).collect());
        let after = run((0..4).map(|_| request(probe, &[""], None, Profile::Answer)).collect());
        assert!(after.iter().all(|v| v.calls[0] == clean), "{poison}");
    }
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
