//! Programs in text files, each with the verdict classes that are right for it.
//!
//! A file begins with a line of comment. A case begins with `=== name [profile] =value @args -> verdicts`, of which name and
//! verdicts must be there; what follows to the next case is the program. The profile is `run` where none is named, `=value`
//! is what the call should give, and `@args` are arguments instead of none. Verdicts are separated by `|`: a verdict class,
//! `value=literal`, or `exception:Class`. In programs `@@N*text@@` stands for the text N times, in which `#` is the number of
//! the repetition.

use azr::exec::protocol::{Call, Outcome, Profile, Request, Verdict};
use azr::exec::value::Value;

/// A program with what is right for it.
pub struct Case {
    pub name: String,
    pub request: Request,
    pub expected: String,
}

/// Reads a file's cases.
pub fn cases(text: &str) -> Vec<Case> {
    text.split("\n=== ").skip(1).map(case).collect()
}

fn case(text: &str) -> Case {
    let (head, program) = text.split_once('\n').expect("a program follows the first line");
    let (head, expected) = head.split_once(" -> ").expect("verdicts follow the name");
    let (name, options) = head.split_once(' ').unwrap_or((head, ""));
    let (mut profile, mut expect, mut args) = (Profile::Run, None, None);
    if let Some(own) = options.strip_prefix('@') {
        (profile, args) = (Profile::Answer, Some(expanded(&own.replace("\\n", "\n"))));
    } else if let Some(value) = options.strip_prefix('=') {
        expect = Some(value.to_owned());
    } else if options == "[propose]" {
        profile = Profile::Propose;
    } else {
        assert!(options.is_empty(), "{name}: unknown option {options}");
    }
    let args = args.unwrap_or_else(|| if profile == Profile::Run { "f()".to_owned() } else { String::new() });
    let request = Request { program: expanded(program), calls: vec![Call { args, expect }], profile };
    Case { name: name.to_owned(), request, expected: expected.to_owned() }
}

fn expanded(text: &str) -> String {
    let mut out = String::new();
    let mut parts = text.split("@@");
    out.push_str(parts.next().unwrap_or(""));
    while let (Some(repeat), Some(after)) = (parts.next(), parts.next()) {
        let (count, unit) = repeat.split_once('*').expect("@@N*text@@");
        let count: usize = count.parse().expect("a number of repetitions");
        for i in 0..count {
            out.push_str(&unit.replace('#', &i.to_string()));
        }
        out.push_str(after);
    }
    out
}

/// The verdict in the words of a case file.
pub fn verdict(verdict: &Verdict) -> String {
    match (&verdict.rejection, verdict.calls.first()) {
        (Some(rejection), _) => format!("{} ({rejection})", rejection.class()),
        (None, Some(Outcome::Value { text, .. })) => format!("value={text}"),
        (None, Some(Outcome::Exception { class, message })) => format!("exception:{class} ({message})"),
        (None, Some(outcome)) => format!("{} ({outcome})", outcome.class()),
        (None, None) => "nothing".to_owned(),
    }
}

/// Whether a verdict is one of those that a case allows.
pub fn is_right(expected: &str, verdict: &Verdict) -> bool {
    expected.split('|').any(|one| match (&verdict.rejection, &verdict.calls[..]) {
        (Some(rejection), _) => rejection.class() == one,
        (None, [Outcome::Value { text, .. }]) => {
            one == "value" || one.strip_prefix("value=").is_some_and(|literal| equal(literal, text))
        }
        (None, [Outcome::Exception { class, .. }]) => one == "exception" || one == format!("exception:{class}"),
        (None, [outcome]) => outcome.class() == one,
        _ => false,
    })
}

/// Whether two literals are the same value, or at least the same text (nan is no value's equal).
pub fn equal(a: &str, b: &str) -> bool {
    a == b || matches!((Value::parse(a), Value::parse(b)), (Ok(a), Ok(b)) if a.py_eq(&b))
}

#[test]
fn case_files_are_read_as_described() {
    let text =
        "# about\n\n=== one -> value=1|timeout_cpu\ndef f(): return @@3*#+@@1\n\n=== two @1 + 1 -> bad_args\np\n";
    let read = cases(text);
    assert_eq!(read[0].request.program, "def f(): return 0+1+2+1\n");
    assert_eq!((read[1].request.calls[0].args.as_str(), read[1].request.profile), ("1 + 1", Profile::Answer));
    let value = |text: &str| Verdict {
        calls: vec![Outcome::Value { text: text.to_owned(), matches: None }],
        ..Verdict::default()
    };
    assert!(is_right(&read[0].expected, &value("1")) && !is_right(&read[0].expected, &value("2")));
}
