//! What an evaluation found: a table for people, JSON in the shape of lm-evaluation-harness, and two models compared.
//!
//! A suite's name may have levels, `builtin/deduction/2`: every level above has a row of its own.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::run::Record;
use super::stats::{Interval, interval, mcnemar, mean, pass_at_k, standard_error};

/// A measured mean over items.
#[derive(Debug, Clone, Serialize)]
pub struct Metric {
    /// `pass@k`, or `f1`.
    pub name: String,
    /// Mean.
    pub value: f64,
    /// Standard error of the mean.
    pub stderr: f64,
    /// 95 % confidence interval.
    pub interval: Interval,
}

/// A suite's results.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Suite.
    pub suite: String,
    /// Items.
    pub num_items: usize,
    /// Samples of each.
    pub num_samples: usize,
    /// What was measured.
    pub metrics: Vec<Metric>,
    /// Share of samples without an answer.
    pub unanswered: f64,
    /// Tokens per sample.
    pub tokens: f64,
    /// Calls of the executor by the protocol, per sample.
    pub executor_calls: f64,
    /// Completions cut off at their longest length, per sample.
    pub cut: f64,
}

/// Rows by suite, levels above before those below. `ks` are the k of pass@k; those beyond the number of samples are left
/// out.
pub fn rows(records: &[Record], ks: &[usize], seed: u64) -> Vec<Row> {
    let mut suites: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in records {
        let ends = record.suite.match_indices('/').map(|(at, _)| at).chain([record.suite.len()]);
        for end in ends {
            suites.entry(&record.suite[..end]).or_default().push(record);
        }
    }
    suites.into_iter().map(|(suite, records)| row(suite, &records, ks, seed)).collect()
}

fn row(suite: &str, records: &[&Record], ks: &[usize], seed: u64) -> Row {
    let num_samples = records.iter().map(|r| r.right.len()).min().unwrap_or(0);
    let metric = |name: String, values: Vec<f64>| {
        let (value, stderr) = (mean(&values), standard_error(&values));
        Metric { name, value, stderr, interval: interval(&values, seed) }
    };
    let right = |r: &Record| r.right.iter().filter(|x| **x == 1.0).count();
    let mut metrics: Vec<Metric> = ks
        .iter()
        .filter(|k| (1..=num_samples).contains(*k))
        .map(|k| metric(format!("pass@{k}"), records.iter().map(|r| pass_at_k(r.right.len(), right(r), *k)).collect()))
        .collect();
    let f1: Vec<f64> = records.iter().filter(|r| !r.f1.is_empty()).map(|r| mean(&r.f1)).collect();
    if !f1.is_empty() {
        metrics.push(metric("f1".to_owned(), f1));
    }
    let samples = records.iter().map(|r| r.right.len()).sum::<usize>().max(1) as f64;
    let per_sample = |of: &dyn Fn(&Record) -> usize| records.iter().map(|r| of(r)).sum::<usize>() as f64 / samples;
    Row {
        suite: suite.to_owned(),
        num_items: records.len(),
        num_samples,
        metrics,
        unanswered: per_sample(&|r| r.answers.iter().filter(|a| a.is_none()).count()),
        tokens: per_sample(&|r| r.tokens.iter().sum()),
        executor_calls: per_sample(&|r| r.executor_calls.iter().sum()),
        cut: per_sample(&|r| r.cut.iter().sum()),
    }
}

/// The rows for people.
pub fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|r| r.suite.len()).max().unwrap_or(0).max("suite".len());
    let mut out = format!(
        "{:width$}  {:>5}  {:>3}  {:8}  {:>6}  {:19}  {:>10}  {:>8}  {:>6}  {:>5}\n",
        "suite", "items", "n", "metric", "%", "95 % interval", "unanswered", "tokens", "calls", "cut"
    );
    for row in rows {
        for (i, m) in row.metrics.iter().enumerate() {
            let span = format!("{:.1}-{:.1} {}", 100.0 * m.interval.low, 100.0 * m.interval.high, m.interval.method);
            let _ = write!(
                out,
                "{:width$}  {:>5}  {:>3}  {:8}  {:>6.1}  {span:19}",
                row.suite,
                row.num_items,
                row.num_samples,
                m.name,
                100.0 * m.value
            );
            if i == 0 {
                let (u, t, e, c) = (100.0 * row.unanswered, row.tokens, row.executor_calls, row.cut);
                let _ = write!(out, "  {u:>9.1}%  {t:>8.1}  {e:>6.2}  {c:>5.2}");
            }
            out.push('\n');
        }
    }
    out.push_str(
        "Intervals: wilson (score interval of a share) or bootstrap (over items); tokens, calls of the \
                  executor and cut-off completions are per sample.\n",
    );
    out
}

/// The rows in the shape of lm-evaluation-harness's results file; `azr` holds all of them with intervals and costs, and
/// `config` what was evaluated and how.
pub fn json(rows: &[Row], config: &Json) -> Json {
    let by_suite = |value: &dyn Fn(&Row) -> Json| -> Map<String, Json> {
        rows.iter().map(|r| (r.suite.clone(), value(r))).collect()
    };
    let result = |row: &Row| {
        let mut found = json!({"alias": row.suite});
        for m in &row.metrics {
            // A single sample's pass@1 is what others call an exact match.
            let name = if m.name == "pass@1" && row.num_samples == 1 { "exact_match" } else { &m.name };
            found[format!("{name},none")] = json!(m.value);
            found[format!("{name}_stderr,none")] = json!(m.stderr);
        }
        found
    };
    json!({
        "results": by_suite(&result),
        "group_subtasks": by_suite(&|_| json!([])),
        "configs": by_suite(&|r| json!({"task": r.suite, "output_type": "generate_until", "repeats": r.num_samples, "num_fewshot": 0})),
        "versions": by_suite(&|_| json!(1.0)),
        "n-shot": by_suite(&|_| json!(0)),
        "n-samples": by_suite(&|r| json!({"original": r.num_items, "effective": r.num_items})),
        "config": config,
        "azr": rows,
    })
}

/// Two models on the same items.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Suite.
    pub suite: String,
    /// Items that both have.
    pub num_items: usize,
    /// Share of the first model's right answers.
    pub a: f64,
    /// Share of the second model's.
    pub b: f64,
    /// Items that only the first model has right.
    pub only_a: usize,
    /// Items that only the second model has right.
    pub only_b: usize,
    /// Exact two-sided McNemar test.
    pub p: f64,
}

/// Compares first samples item by item, in every suite and its levels.
///
/// # Errors
/// When no item is in both.
pub fn compare(a: &[Record], b: &[Record]) -> Result<Vec<Comparison>, String> {
    // An id that comes again is another item.
    let keys = |records: &[Record]| {
        let mut seen: BTreeMap<(String, String), usize> = BTreeMap::new();
        let key = |r: &Record| {
            let of = (r.suite.clone(), r.id.clone());
            let count = seen.entry(of.clone()).or_default();
            *count += 1;
            (of, *count)
        };
        records.iter().map(key).collect::<Vec<_>>()
    };
    let right = |r: &Record| r.right.first() == Some(&1.0);
    let second: BTreeMap<_, bool> = keys(b).into_iter().zip(b.iter().map(right)).collect();
    let mut suites: BTreeMap<&str, Vec<(bool, bool)>> = BTreeMap::new();
    for (record, key) in a.iter().zip(keys(a)) {
        let Some(other) = second.get(&key) else { continue };
        for end in record.suite.match_indices('/').map(|(at, _)| at).chain([record.suite.len()]) {
            suites.entry(&record.suite[..end]).or_default().push((right(record), *other));
        }
    }
    if suites.is_empty() {
        return Err("no item is in both files".to_owned());
    }
    let comparison = |(suite, pairs): (&str, Vec<(bool, bool)>)| {
        let count = |of: &dyn Fn(&(bool, bool)) -> bool| pairs.iter().filter(|p| of(p)).count();
        let share = |n: usize| n as f64 / pairs.len() as f64;
        let (only_a, only_b) = (count(&|p| p.0 && !p.1), count(&|p| p.1 && !p.0));
        Comparison {
            suite: suite.to_owned(),
            num_items: pairs.len(),
            a: share(count(&|p| p.0)),
            b: share(count(&|p| p.1)),
            only_a,
            only_b,
            p: mcnemar(only_a, only_b),
        }
    };
    Ok(suites.into_iter().map(comparison).collect())
}

/// Comparisons for people.
pub fn comparison_table(found: &[Comparison]) -> String {
    let width = found.iter().map(|c| c.suite.len()).max().unwrap_or(0).max("suite".len());
    let mut out = format!(
        "{:width$}  {:>5}  {:>6}  {:>6}  {:>7}  {:>6}  {:>6}  {:>9}\n",
        "suite", "items", "A %", "B %", "B - A", "only A", "only B", "McNemar p"
    );
    for c in found {
        let _ = writeln!(
            out,
            "{:width$}  {:>5}  {:>6.1}  {:>6.1}  {:>+7.1}  {:>6}  {:>6}  {:>9.2e}",
            c.suite,
            c.num_items,
            100.0 * c.a,
            100.0 * c.b,
            100.0 * (c.b - c.a),
            c.only_a,
            c.only_b,
            c.p
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(suite: &str, id: usize, right: &[f64]) -> Record {
        Record { suite: suite.into(), id: id.to_string(), right: right.to_vec(), ..Record::default() }
    }

    #[test]
    fn an_id_that_comes_again_is_another_item() {
        let records = [record("a", 1, &[1.0]), record("a", 1, &[0.0])];
        let found = compare(&records, &records).expect("items");
        assert_eq!((found[0].num_items, found[0].a, found[0].b, found[0].only_a), (2, 0.5, 0.5, 0));
    }

    #[test]
    fn levels_add_up_and_the_shape_is_the_harness_s() {
        let mut records = vec![record("b/x/1", 0, &[1.0]), record("b/x/2", 0, &[0.0]), record("b/y/1", 0, &[1.0])];
        records.push(Record { f1: vec![0.5], ..record("drop", 0, &[0.0]) });
        let found = rows(&records, &[1, 5], 1);
        let names: Vec<(&str, usize, f64)> =
            found.iter().map(|r| (r.suite.as_str(), r.num_items, r.metrics[0].value)).collect();
        assert_eq!(
            names,
            [
                ("b", 3, 2.0 / 3.0),
                ("b/x", 2, 0.5),
                ("b/x/1", 1, 1.0),
                ("b/x/2", 1, 0.0),
                ("b/y", 1, 1.0),
                ("b/y/1", 1, 1.0),
                ("drop", 1, 0.0)
            ]
        );
        let json = json(&found, &json!({"model": "azr"}));
        assert_eq!(json["results"]["b/x"]["exact_match,none"], 0.5);
        assert_eq!(json["results"]["drop"]["f1,none"], 0.5);
        assert_eq!(json["n-samples"]["b"]["effective"], 3);
        assert!(table(&found).lines().any(|l| l.starts_with("b/x ") && l.contains("50.0")), "{}", table(&found));
    }

    #[test]
    fn more_samples_give_pass_at_k() {
        let records = [record("s", 0, &[1.0, 0.0, 0.0, 0.0]), record("s", 1, &[0.0; 4])];
        let found = rows(&records, &[1, 2, 8], 1);
        let values: Vec<(&str, f64)> = found[0].metrics.iter().map(|m| (m.name.as_str(), m.value)).collect();
        assert_eq!(values, [("pass@1", 0.125), ("pass@2", 0.25)]);
    }

    #[test]
    fn models_are_compared_item_by_item() {
        let a: Vec<Record> = (0..10).map(|i| record("s", i, &[f64::from(u8::from(i < 2))])).collect();
        let b: Vec<Record> = (0..10).rev().map(|i| record("s", i, &[f64::from(u8::from(i >= 1))])).collect();
        let found = compare(&a, &b).expect("the same items");
        assert_eq!((found[0].num_items, found[0].only_a, found[0].only_b), (10, 1, 8));
        assert!((found[0].p - mcnemar(1, 8)).abs() < 1e-15 && found[0].a == 0.2 && found[0].b == 0.9);
        assert!(compare(&a, &[record("t", 0, &[1.0])]).is_err());
    }
}
