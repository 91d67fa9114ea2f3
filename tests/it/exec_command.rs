//! `azr exec` as a command: forms of input, order, exit codes, set order, soak; and `azr doctor`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};

use serde_json::{Value as Json, json};

fn azr(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_azr"))
        .arg("exec")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("azr starts");
    // The command may end before it has read everything.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("azr ends")
}

fn lines(output: &Output) -> Vec<Json> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
}

#[test]
fn corpora_run_as_they_are_and_answers_keep_their_order() {
    let input = [
        json!({"id": "slow", "program": "def f():\n    n = 0\n    for i in range(300000): n += i\n    return n", "input": ""}),
        json!({"code": "def f(s): return s[::-1]", "input": "'abc'", "output": "'cba'", "id": "cruxeval"}),
        json!({"code": "def f(s): return s[::-1]", "input": "'abc'", "output": "'abc'", "id": "wrong"}),
        json!({"task_id": "h/1", "prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n", "entry_point": "add",
               "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}),
        json!({"task_id": 2, "code": "def is_even(n): return n % 2 == 0", "test_list": ["assert is_even(2)", "assert is_even(3)"]}),
        json!({"snippet": "def f(x): return x", "imports": ["import math"], "inputs": ["1", "math.pi > 3"], "outputs": ["1", "True"]}),
        json!({"program": "def f(x, y): return {x: y}", "calls": [{"args": ["a", [1, 2.5]], "expect": {"a": [1, 2.5]}}]}),
        json!({"program": "import numpy\ndef f(): return 1", "input": ""}),
        json!({"program": "def f(): return 1 +"}),
        json!({"program": "def f(x): return eval(x)", "input": "'1'", "profile": "answer"}),
        json!({"program": "def f(x): return x", "input": "1 + 1", "profile": "answer"}),
        json!({"program": "def f(x): return list({3, 1, x})", "input": "2", "profile": "propose"}),
        json!({"program": "def f():\n    while True: pass", "input": "", "limits": {"cpu_ms": 30}}),
        json!({"program": "def f(): return 'a' * 10 ** 8", "input": "", "limits": {"memory_mib": 8}}),
        json!({"program": "def f(): return (1, {2, 1}, 1.0, 2 ** 70)", "input": ""}),
    ];
    let text: String = input.iter().map(|l| format!("{l}\n")).collect();
    let output = azr(&["--executors", "2"], &text);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found = lines(&output);
    assert_eq!(found.len(), input.len());
    let brief: Vec<(&str, Option<bool>)> =
        found.iter().map(|l| (l["verdict"].as_str().expect("a verdict"), l["passed"].as_bool())).collect();
    assert_eq!(
        brief,
        [
            ("value", None),
            ("value", Some(true)),
            ("value", Some(false)),
            ("value", Some(true)),
            ("exception", Some(false)),
            ("value", Some(true)),
            ("value", Some(true)),
            ("unsupported", None),
            ("exception", Some(false)),
            ("rejected_policy", None),
            ("bad_args", None),
            ("set_order", None),
            ("timeout_cpu", None),
            ("out_of_memory", None),
            ("value", None),
        ]
    );
    assert_eq!((&found[0]["id"], &found[3]["id"], &found[4]["id"]), (&json!("slow"), &json!("h/1"), &json!(2)));
    assert_eq!(found[4]["calls"][1], json!({"verdict": "exception", "exception": "AssertionError", "message": ""}));
    assert_eq!(
        found[14]["calls"][0],
        json!({"verdict": "value", "value": "(1, {1, 2}, 1.0, 1180591620717411303424)",
               "json": {"$tuple": [1, {"$set": [1, 2]}, 1.0, {"$int": "1180591620717411303424"}]}})
    );
    assert!(found.iter().all(|l| l["cpu_ms"].is_number() && l["memory_mib"].is_number()));
}

#[test]
fn lines_are_answered_while_input_is_open() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_azr"))
        .args(["exec", "--executors", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("azr starts");
    let mut input = child.stdin.take().expect("piped");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    for i in 0..3 {
        writeln!(input, "{}", json!({"program": "def f(x): return x", "input": i.to_string()})).expect("azr reads");
        let mut line = String::new();
        output.read_line(&mut line).expect("azr writes");
        let line: Json = serde_json::from_str(&line).expect("a JSON line");
        assert_eq!(line["calls"][0]["json"], json!(i));
    }
    drop(input);
    assert!(child.wait().expect("azr ends").success());
}

#[test]
fn the_shells_limits_decide_no_verdict() {
    // Each level of Python takes twenty of native code.
    let deep = "def f(x):\n    deepest = 0\n    def g(n):\n        nonlocal deepest\n        deepest = max(deepest, n)\n\
                \x20       h = map(g, [n + 1])\n        for _ in range(20): h = map(int, h)\n        return len(list(h))\n\
                \x20   try: g(0)\n    except RecursionError: pass\n    return deepest > 900";
    let line = json!({"program": deep, "input": "1", "profile": "answer"}).to_string();
    for limit in ["2048", "8192"] {
        let script = format!("ulimit -S -s {limit} && printf '%s\\n' \"$1\" | exec \"$0\" exec --executors 1");
        let output =
            Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_azr"), &line]).output().expect("sh is there");
        assert_eq!(
            lines(&output)[0]["calls"][0]["json"],
            json!(true),
            "with {limit} KiB: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    // Nor does a limit of processor time that is lower than a child's own.
    let script = "ulimit -t 20 && printf '%s\\n' \"$1\" | exec \"$0\" exec --executors 1";
    let line = json!({"program": "def f(x): return x", "input": "1"}).to_string();
    let output =
        Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_azr"), &line]).output().expect("sh is there");
    assert_eq!(lines(&output)[0]["verdict"], "value");
}

#[test]
fn a_line_that_is_no_request_is_answered_and_told_in_the_exit_code() {
    let output = azr(&["--executors", "1"], "nonsense\n\n{\"program\": \"def f(): return 1\", \"input\": \"\"}\n");
    assert_eq!(output.status.code(), Some(3));
    let verdicts: Vec<String> = lines(&output).iter().map(|l| l["verdict"].to_string()).collect();
    assert_eq!(verdicts, ["\"bad_request\"", "\"value\""]);
    assert_eq!(azr(&["--executors", "0"], "").status.code(), Some(2), "a wrong command line");
}

#[test]
fn what_depends_on_the_order_of_a_set_is_marked_where_asked() {
    let program = |body: &str| json!({"program": format!("def f(x): return {body}"), "input": "2", "output": "2"});
    let bodies = ["list({3, 1, x})", "sorted({3, 1, x})[1]", "id([x]) * hash(str(x))", "x + {3, 1}", "1 / 0"];
    let text: String = bodies.iter().map(|b| format!("{}\n", program(b))).collect();
    let marks = |args: &[&str]| -> Vec<Json> {
        let found = lines(&azr(args, &text));
        found.iter().map(|l| json!([l["verdict"], l["passed"], l["calls"][0]["unstable"]])).collect()
    };
    let plain = marks(&["--executors", "1"]);
    assert!(plain.iter().all(|l| l[2].is_null()), "{plain:?}");
    assert_eq!(
        marks(&["--executors", "1", "--recheck"]),
        [
            json!(["value", false, "set_order"]),
            json!(["value", true, null]),
            json!(["value", false, "not_deterministic"]),
            json!(["exception", false, null]),
            json!(["exception", false, null]),
        ]
    );
}

#[test]
fn a_short_soak_leaves_nothing_behind() {
    let output = azr(&["--soak", "600", "--executors", "2"], "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = &lines(&output)[0];
    assert_eq!((&report["tasks"], &report["wrong_verdicts"]), (&json!(600), &json!(0)));
}

#[test]
fn the_doctor_tells_what_a_run_uses_and_ends_as_it_would() {
    let doctor = |args: &[&str]| crate::command::run(&[&["doctor"], args].concat());
    let output = doctor(&["--json"]);
    crate::command::expect_code(&output, 0);
    let report = &lines(&output)[0];
    assert_eq!((&report["works"], &report["exit_code"]), (&json!(true), &json!(0)));
    let checks = report["checks"].as_array().expect("a list");
    let of = |name: &str| -> Vec<&Json> { checks.iter().filter(|c| c["name"] == json!(name)).collect() };
    let layers = of("sandbox");
    assert_eq!(layers.len(), 5);
    for (layer, name) in layers.iter().zip(["no_new_privs", "capabilities", "rlimits", "landlock", "seccomp"]) {
        assert!(layer["detail"].as_str().is_some_and(|d| d.starts_with(name)), "{layer}");
        assert_eq!(layer["state"], json!("ok"), "{layer}");
    }
    for name in ["azr", "strict", "executor", "cpu", "gpu", "gpu kernels", "directory"] {
        assert_eq!(of(name).len(), 1, "{name} in {report}");
    }
    let cpu = of("cpu")[0]["detail"].to_string();
    assert!(cpu.contains(std::env::consts::ARCH) && cpu.contains("threads"), "{cpu}");
    let text = String::from_utf8_lossy(&doctor(&[]).stdout).into_owned();
    assert_eq!(text.lines().count(), checks.len(), "{text}");
    let nowhere = crate::command::azr(&["doctor"]).current_dir("/proc").output().expect("azr starts");
    crate::command::expect_code(&nowhere, 74);
}
