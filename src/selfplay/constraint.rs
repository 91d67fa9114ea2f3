//! Constraints: what completions are watched for. A hit is counted, stands in the trace, raises an alarm, and costs reward
//! where the constraint has a penalty. Pure. Not here: the executor, which runs a constraint that is a program (`pipeline`).

use regex::Regex;
use serde::Deserialize;

/// A pattern with a name, as a line of a constraints file has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Written")]
pub struct Pattern {
    name: String,
    regex: Regex,
    penalty: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    pattern: String,
    #[serde(default)]
    penalty: f64,
}

impl TryFrom<Written> for Pattern {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written { name, pattern, penalty } = written;
        let regex = Regex::new(&pattern).map_err(|e| format!("the pattern of {name}: {e}"))?;
        if name.is_empty() || !penalty.is_finite() || penalty < 0.0 {
            return Err("a constraint has a name, and a penalty of 0 or more".to_owned());
        }
        Ok(Pattern { name, regex, penalty })
    }
}

/// What completions are watched for.
#[derive(Debug, Clone)]
pub enum Constraints {
    /// Regular expressions.
    Patterns(Vec<Pattern>),
    /// A Python program whose `f(text)` gives the penalty, where a number above 0 is a hit.
    Program {
        /// Name of the constraint.
        name: String,
        /// Source.
        source: String,
    },
}

impl Default for Constraints {
    fn default() -> Self {
        Constraints::Patterns(Vec::new())
    }
}

/// Constraints that a completion hits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Hits {
    /// Their names.
    pub names: Vec<String>,
    /// What they cost together.
    pub penalty: f64,
}

impl Hits {
    /// Patterns that a text matches; each counts once.
    pub fn of(patterns: &[Pattern], text: &str) -> Hits {
        let mut hits = Hits::default();
        for pattern in patterns.iter().filter(|p| p.regex.is_match(text)) {
            hits.names.push(pattern.name.clone());
            hits.penalty += pattern.penalty;
        }
        hits
    }

    /// What a program's value for a text means. What is no finite number is a hit that costs nothing, so that a program
    /// that fails is seen.
    pub fn scored(name: &str, value: Option<&str>) -> Hits {
        let number = value.and_then(|v| v.parse::<f64>().ok()).filter(|n| n.is_finite());
        match number {
            Some(penalty) if penalty > 0.0 => Hits { names: vec![name.to_owned()], penalty },
            Some(_) => Hits::default(),
            None => Hits { names: vec![format!("{name} (failed)")], penalty: 0.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(line: &str) -> Result<Pattern, String> {
        serde_json::from_str(line).map_err(|e| e.to_string())
    }

    #[test]
    fn patterns_that_match_are_hit_once_and_cost_their_penalty() {
        let patterns: Vec<Pattern> = [
            r#"{"name": "eval", "pattern": "\\beval\\(", "penalty": 0.5}"#,
            r#"{"name": "digits", "pattern": "(?s)[0-9].*[0-9]"}"#,
            r#"{"name": "never", "pattern": "zzz", "penalty": 9}"#,
        ]
        .map(|line| pattern(line).expect("good"))
        .into();
        let hits = Hits::of(&patterns, "eval(1)\neval(2)");
        assert_eq!(hits, Hits { names: vec!["eval".into(), "digits".into()], penalty: 0.5 });
        assert_eq!(Hits::of(&patterns, "medieval(x)"), Hits::default());
        for (bad, says) in [
            (r#"{"name": "a", "pattern": "("}"#, "the pattern of a"),
            (r#"{"name": "a", "pattern": "x", "penalty": -1}"#, "0 or more"),
            (r#"{"name": "a", "pattern": "x", "cost": 1}"#, "unknown field"),
        ] {
            assert!(pattern(bad).expect_err("bad").contains(says), "{bad}");
        }
    }

    #[test]
    fn a_programs_value_is_the_penalty_and_a_failure_is_seen() {
        let [half, none, failed, inf] = [Some("0.5"), Some("-1"), None, Some("inf")].map(|v| Hits::scored("p", v));
        assert_eq!(half, Hits { names: vec!["p".into()], penalty: 0.5 });
        assert_eq!(none, Hits::default());
        assert_eq!((failed.names, failed.penalty), (vec!["p (failed)".to_owned()], 0.0));
        assert_eq!(inf.names, ["p (failed)"]);
    }
}
