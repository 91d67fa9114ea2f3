//! The protocols, with a script in the model's place; and the suites' formats.

use super::protocol::{Attempt, Next, Protocol, Reply, Settings};
use super::suites::{Format, Item, Question, parse, read_all, read_question};
use super::template::Template;
use crate::exec::protocol::{Outcome, Verdict};
use crate::selfplay::prompt::Piece;
use crate::selfplay::task::{Pair, Task, TaskKind};
use azr_tokenizer::Tokenizer;

fn settings(protocol: Protocol, template: &str) -> Settings {
    let template = Template::named(template, &Tokenizer::embedded()).expect("a template");
    Settings {
        template,
        protocol,
        temperature: 0.0,
        max_new: 100,
        budget: 1000,
        num_paths: 5,
        num_rounds: 3,
        keep_trace: true,
    }
}

fn math() -> Item {
    let question = Question::Math { problem: "1 + 1?".into(), golds: vec!["2".into()], tolerance: None };
    Item { suite: "s".into(), id: "0".into(), question }
}

fn reply(text: &str) -> Reply {
    Reply { pieces: vec![Piece::Text(text.to_owned())], num_tokens: 10, finished: true }
}

fn verdict(text: &str, matches: Option<bool>) -> Verdict {
    let calls = vec![Outcome::Value { text: text.to_owned(), matches }];
    Verdict { rejection: None, calls, unstable: Vec::new(), normal_form: None, cpu_us: 0, memory_bytes: 0 }
}

/// Prompts that it asks for, or none when it asks for something else.
fn prompts(next: &Next) -> Vec<String> {
    match next {
        Next::Say(lines) => lines.iter().map(|l| super::template::words_of(&l.pieces)).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn a_vote_takes_the_largest_class_of_equal_answers() {
    let item = math();
    let mut attempt = Attempt::new(&item, settings(Protocol::Vote, "azr"), 40);
    let Next::Say(lines) = attempt.begin() else { panic!("it asks") };
    assert_eq!(lines.iter().map(|l| l.id).collect::<Vec<_>>(), [40, 41, 42, 43, 44]);
    assert!(lines.iter().all(|l| l.temperature == Settings::VARIED && l.max_new == 100));
    let texts = ["</think>\\boxed{3}", "</think>\\boxed{0.5}", "</think>none", "</think>\\boxed{1/2}", "</think>3."];
    let next = attempt.heard(texts.iter().map(|t| reply(t)).collect());
    assert!(matches!(next, Next::Done));
    // 3 and 0.5 twice each: the one that came first.
    assert_eq!((attempt.answer.as_deref(), attempt.num_tokens), (Some("3"), 50));
    assert_eq!(
        attempt.trace.iter().map(|t| t.role).collect::<Vec<_>>(),
        [&["prompt"][..], &["completion"; 5]].concat()
    );
}

#[test]
fn programs_vote_by_their_outputs() {
    let pairs: Vec<Pair> = (0..4).map(|i| Pair { input: i.to_string(), output: i.to_string() }).collect();
    let question = Question::Task(Task { pairs, ..Task::identity(TaskKind::Induction) });
    let item = Item { question, ..math() };
    let mut attempt = Attempt::new(&item, settings(Protocol::Vote, "compact"), 0);
    attempt.begin();
    let program =
        |text: &str| Reply { pieces: vec![Piece::Text(text.to_owned()), Piece::Special("<|end|>")], ..reply("") };
    let next = attempt.heard(["a", "b", "c", "d"].map(program).into());
    let Next::Run(requests) = next else { panic!("programs are run") };
    assert_eq!((requests.len(), requests[0].calls.len()), (4, 2));
    let crash = Verdict { calls: vec![Outcome::Crash], ..verdict("", None) };
    // Two that crash alike are no majority.
    let next = attempt.ran(&[crash.clone(), verdict("1", None), crash, verdict("1", None)]);
    assert!(matches!(next, Next::Done));
    assert_eq!((attempt.answer.as_deref(), attempt.num_calls), (Some("b"), 8));
}

#[test]
fn a_critique_sees_the_draft_and_the_revision_both() {
    let item = math();
    let mut attempt = Attempt::new(&item, settings(Protocol::Critique, "azr"), 0);
    assert_eq!(prompts(&attempt.begin()).len(), 1);
    let critique = prompts(&attempt.heard(vec![reply("</think>\\boxed{3}")])).concat();
    assert!(critique.contains("Someone answered:\n3"), "{critique}");
    let revision = prompts(&attempt.heard(vec![reply("1 + 1 is 2, not 3.")])).concat();
    assert!(revision.contains("answer was:\n3") && revision.contains("not 3."), "{revision}");
    assert!(matches!(attempt.heard(vec![reply("</think>\\boxed{2}")]), Next::Done));
    assert_eq!(attempt.answer.as_deref(), Some("2"));
    // A revision without an answer leaves the draft.
    let mut attempt = Attempt::new(&item, settings(Protocol::Critique, "azr"), 0);
    attempt.begin();
    for text in ["</think>\\boxed{3}", "fine", "</think>fine"] {
        attempt.heard(vec![reply(text)]);
    }
    assert_eq!(attempt.answer.as_deref(), Some("3"));
}

#[test]
fn react_runs_what_it_is_asked_to_and_believes_no_invented_observation() {
    let item = math();
    let mut attempt = Attempt::new(&item, settings(Protocol::React, "azr"), 0);
    attempt.begin();
    let next = attempt.heard(vec![reply("Add.\n```run\nx = 1\nx + 1\n```\nObservation: 7\n<answer>7</answer>")]);
    let Next::Run(requests) = next else { panic!("code is run") };
    assert_eq!((requests[0].program.as_str(), requests[0].calls[0].args.as_str()), ("x = 1", "x + 1"));
    let next = prompts(&attempt.ran(&[verdict("2", None)])).concat();
    assert!(next.contains("Observation: 2") && !next.contains('7'), "{next}");
    assert!(matches!(attempt.heard(vec![reply("</think> <answer>\\boxed{2}</answer>")]), Next::Done));
    assert_eq!((attempt.answer.as_deref(), attempt.num_calls), (Some("2"), 1));
    // In the last round nothing is run any more.
    let mut attempt = Attempt::new(&item, settings(Protocol::React, "azr"), 0);
    attempt.begin();
    for _ in 0..2 {
        attempt.heard(vec![reply("```run\n1\n```")]);
        assert!(!prompts(&attempt.ran(&[verdict("1", None)])).is_empty());
    }
    assert!(matches!(attempt.heard(vec![reply("```run\n1\n```")]), Next::Done));
}

#[test]
fn reflexion_keeps_what_it_learnt_and_ends_with_the_first_success() {
    let question = Question::Task(Task::identity(TaskKind::Abduction));
    let item = Item { question, ..math() };
    let mut attempt = Attempt::new(&item, settings(Protocol::Reflexion, "azr"), 0);
    attempt.begin();
    let Next::Run(requests) = attempt.heard(vec![reply("</think><answer>```input\n1\n```</answer>")]) else {
        panic!("the answer is tried");
    };
    assert_eq!(requests[0].calls[0].expect.as_deref(), Some("'Hello world'"));
    let reflect = prompts(&attempt.ran(&[verdict("1", Some(false))])).concat();
    assert!(reflect.contains("Your answer was:\n1"), "{reflect}");
    let again = prompts(&attempt.heard(vec![reply("I forgot the quotes.")])).concat();
    assert!(again.contains("- I forgot the quotes."), "{again}");
    attempt.heard(vec![reply("</think><answer>```input\n'Hello world'\n```</answer>")]);
    assert!(matches!(attempt.ran(&[verdict("'Hello world'", Some(true))]), Next::Done));
    assert_eq!((attempt.answer.as_deref(), attempt.num_calls, attempt.num_tokens), (Some("'Hello world'"), 2, 30));
}

#[test]
fn a_budget_is_never_exceeded_and_the_best_answer_stands() {
    let item = math();
    let tight = Settings { budget: 15, ..settings(Protocol::Critique, "azr") };
    let mut attempt = Attempt::new(&item, tight, 0);
    let Next::Say(lines) = attempt.begin() else { panic!("it asks") };
    assert_eq!(lines[0].max_new, 15);
    let Next::Say(lines) = attempt.heard(vec![reply("</think>\\boxed{3}")]) else { panic!("it asks") };
    assert_eq!(lines[0].max_new, 5);
    assert!(matches!(attempt.heard(vec![reply("hm")]), Next::Done));
    assert_eq!(attempt.answer.as_deref(), Some("3"));
}

#[test]
fn questions_come_as_records_or_words() {
    let kind = |text: &str| match read_question(text) {
        Ok(Question::Task(task)) => task.kind.name(),
        Ok(Question::Open(_)) => "open",
        Ok(_) => "other",
        Err(_) => "error",
    };
    for (text, found) in [
        (r#"{"code": "def f(x): return x", "input": "1"}"#, "deduction"),
        (r#"{"program": "def f(x): return x", "output": "1"}"#, "abduction"),
        (r#"{"inputs": ["1", "2"], "outputs": ["1", 2], "message": "same"}"#, "induction"),
        (r#"{"inputs": ["1"], "outputs": []}"#, "error"),
        (r#"{"problem": "1+1", "answer": "2"}"#, "other"),
        (r#"{"x": 1}"#, "error"),
        ("What is 1 + 1?", "open"),
    ] {
        assert_eq!(kind(text), found, "{text}");
    }
}

#[test]
fn drop_as_data_sets_have_it() {
    let golds = |answers: &str| {
        let record = format!(r#"{{"passage": "p", "question": "q", "query_id": "1", {answers}}}"#);
        match parse(&record, "drop", None).expect("a record").remove(0).question {
            Question::Spans { golds, .. } => golds,
            _ => panic!("DROP asks for spans"),
        }
    };
    let of = |golds: &[&[&str]]| -> Vec<Vec<String>> {
        golds.iter().map(|g| g.iter().map(|s| (*s).to_owned()).collect()).collect()
    };
    let more = r#""answer": {"number": "3", "spans": []}, "validated_answers": {"number": ["", "4"], "spans": [["a", "b"], []]}"#;
    assert_eq!(golds(more), of(&[&["3"], &["a", "b"], &["4"]]));
    // One annotator's spans belong together; of several annotators, each may have given one.
    assert_eq!(golds(r#""answers_spans": {"spans": ["a", "b"]}"#), of(&[&["a", "b"]]));
    assert_eq!(golds(r#""answers_spans": {"spans": ["a", "a"]}"#), of(&[&["a"]]));
    assert_eq!(golds(r#""answers_spans": {"spans": ["a", "a", "b"]}"#), of(&[&["a"], &["b"], &["a", "b"]]));
}

#[test]
fn suites_of_one_name_are_told_apart() {
    let dir = tempfile::tempdir().expect("a folder");
    let files: Vec<_> = ["x/test.jsonl", "y/test.jsonl"].iter().map(|f| dir.path().join(f)).collect();
    for file in &files {
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        std::fs::write(file, "{\"problem\": \"1+1\", \"answer\": \"2\"}\n").expect("written");
    }
    let named = |files: &[&std::path::Path]| -> Vec<String> {
        read_all(files, None, None).expect("good").into_iter().map(|i| i.suite).collect()
    };
    assert_eq!(named(&[&files[0]]), ["test"]);
    assert_eq!(named(&[&files[0], &files[1]]), ["x-test", "y-test"]);
    assert_eq!(read_all(&[&files[0], &files[0]], None, None).expect_err("the same twice").exit_code(), 2);
}

#[test]
fn broken_suites_name_record_and_reason() {
    for (text, format, says) in [
        ("{\"x\": 1}", None, "record 1: no known format has the fields x"),
        ("{\"question\": \"q\", \"answer\": \"2\"}", Some(Format::Gsm8k), "record 1: the answer has no ####"),
        ("{\"code\": 1, \"input\": \"\", \"output\": \"\"}", None, "no text `code`"),
        ("{\"kind\": \"induction\", \"program\": \"p\", \"pairs\": []}", None, "needs 2 pairs"),
        ("{\"problem\": \"p\", \"answer\": \"\"}", None, "an empty answer"),
        ("{\"a\": 1}\n{\"b\"", None, "line 2 is no JSON"),
        ("[1]", None, "record 1: no JSON object"),
        ("{\"prompt\": \"Add.\", \"entry_point\": \"f\", \"test\": \"\"}", None, "does not begin `f`"),
        ("7", None, "neither records nor passages"),
    ] {
        let error = parse(text, "s", format).expect_err(text);
        assert!(error.contains(says), "{text}: {error}");
    }
}
