//! `azr exec` as a command: forms of input, order, exit codes, layers, soak.

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
fn a_line_that_is_no_request_is_answered_and_told_in_the_exit_code() {
    let output = azr(&["--executors", "1"], "nonsense\n\n{\"program\": \"def f(): return 1\", \"input\": \"\"}\n");
    assert_eq!(output.status.code(), Some(3));
    let verdicts: Vec<String> = lines(&output).iter().map(|l| l["verdict"].to_string()).collect();
    assert_eq!(verdicts, ["\"bad_request\"", "\"value\""]);
    assert_eq!(azr(&["--executors", "0"], "").status.code(), Some(2), "a wrong command line");
}

#[test]
fn layers_are_listed() {
    let output = azr(&["--layers", "--executors", "1"], "");
    let layers = &lines(&output)[0]["layers"];
    let names: Vec<&str> = layers.as_array().expect("a list").iter().filter_map(|l| l["name"].as_str()).collect();
    assert_eq!(names, ["no_new_privs", "capabilities", "rlimits", "landlock", "seccomp"]);
    assert!(layers.as_array().expect("a list").iter().all(|l| l["in_force"] == json!(true)), "{layers}");
}

#[test]
fn a_short_soak_leaves_nothing_behind() {
    let output = azr(&["--soak", "600", "--executors", "2"], "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = &lines(&output)[0];
    assert_eq!((&report["tasks"], &report["wrong_verdicts"]), (&json!(600), &json!(0)));
}
