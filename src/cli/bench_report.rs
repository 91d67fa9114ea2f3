//! Results of `azr bench` as a table, and two files of them side by side.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Prints each result with its numbers.
pub fn table(report: &Value) -> String {
    let mut out = String::new();
    for result in report["results"].as_array().into_iter().flatten() {
        out += &format!("{}\n", result["name"].as_str().unwrap_or("?"));
        for (key, value) in result.as_object().into_iter().flatten().filter(|(key, _)| *key != "name") {
            let shown = match value.as_f64() {
                Some(number) => format!("{:>14}", rounded(number)),
                None => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            };
            out += &format!("  {key:<26} {shown}\n");
        }
    }
    out
}

/// Four digits, or whole numbers.
fn rounded(number: f64) -> String {
    match number.abs() {
        n if n >= 1000.0 => format!("{number:.0}"),
        n if n >= 10.0 => format!("{number:.1}"),
        _ => format!("{number:.3}"),
    }
}

/// For every number that both files have, both and how they compare.
///
/// # Errors
/// When a file is none of `azr bench --json`.
pub fn compare(old: &Path, new: &Path) -> Result<String> {
    let (before, after) = (read(old)?, read(new)?);
    let mut out = String::new();
    for (name, numbers) in &before {
        let Some((_, others)) = after.iter().find(|(other, _)| other == name) else { continue };
        out += &format!("{name}\n");
        for (key, before) in numbers {
            if let Some((_, after)) = others.iter().find(|(other, _)| other == key) {
                let ratio = after / before;
                out += &format!("  {key:<26} {:>12} {:>12} {ratio:>8.3}x\n", rounded(*before), rounded(*after));
            }
        }
    }
    Ok(out)
}

type Numbers = Vec<(String, f64)>;

fn read(path: &Path) -> Result<Vec<(String, Numbers)>> {
    let wrong = || {
        Error::config(format!("{} holds no results", path.display())).with_hint("compare two files that --json wrote")
    };
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let report: Value = serde_json::from_str(&text).map_err(|_| wrong())?;
    let results = report["results"].as_array().ok_or_else(wrong)?;
    let numbers = |result: &Value| {
        let fields = result.as_object().into_iter().flatten();
        fields.filter_map(|(key, value)| Some((key.clone(), value.as_f64()?))).collect()
    };
    Ok(results.iter().map(|r| (r["name"].as_str().unwrap_or("?").to_owned(), numbers(r))).collect())
}
