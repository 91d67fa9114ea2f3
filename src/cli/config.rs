//! One resolved configuration out of layers: defaults < preset < file < `--set` < flags. Every value remembers where it
//! comes from, and `resolved.toml` says so.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use crate::cli::args::{Preset, SandboxMode, TrainArgs};
use crate::error::{Error, Result};
use crate::pipeline::config::Config;

/// Settings that name a file or folder; kept as absolute paths, so that a run is resumed from anywhere.
const PATHS: [&str; 5] = ["weights", "seeds", "selfplay.edge_cases", "selfplay.ground", "selfplay.constraints"];

/// A configuration in the making.
#[derive(Debug, Clone)]
pub struct Layers {
    table: Table,
    origins: BTreeMap<String, String>,
}

impl Layers {
    /// The defaults.
    pub fn defaults() -> Self {
        let table = Table::try_from(Config::default()).expect("plain data");
        Layers { table, origins: BTreeMap::new() }
    }

    /// All layers of a command line; a resumed run's own settings stand between preset and file.
    ///
    /// # Errors
    /// When a key is unknown, a value has the wrong type, or a file cannot be read.
    pub fn resolve(args: &TrainArgs, resumed: Option<&Path>) -> Result<Self> {
        let mut layers = Layers::defaults();
        let preset = match (args.preset, &args.weights, resumed) {
            (Some(preset), _, _) => Some(preset),
            (None, None, None) => Some(Preset::Tiny),
            _ => None,
        };
        if let Some(preset) = preset {
            let table: Table = preset_text(preset).parse().expect("presets are tested");
            layers.apply_table("", &table, &format!("preset {}", name_of(preset)))?;
        }
        for (path, origin) in [(resumed, "the run"), (args.config.as_deref(), "file")] {
            let Some(path) = path else { continue };
            let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
            let table: Table = text.parse().map_err(|e: toml::de::Error| {
                Error::config(format!("{} is not TOML: {}", path.display(), e.message()))
            })?;
            layers.apply_table("", &table, &format!("{origin} {}", path.display()))?;
        }
        for set in &args.sets {
            let (key, text) = set
                .split_once('=')
                .ok_or_else(|| Error::usage(format!("--set {set} has no `=`")).with_hint("write --set key=value"))?;
            layers.set(key.trim(), value_of(text.trim()), "--set")?;
        }
        let number = |n: usize| Value::Integer(n as i64);
        let suites = || Value::Array(args.eval_suite.iter().map(|p| Value::String(p.display().to_string())).collect());
        let flags = [
            ("weights", args.weights.as_ref().map(|p| Value::String(p.display().to_string()))),
            ("steps", args.steps.map(|n| number(n as usize))),
            ("seed", args.seed.map(|n| number(n as usize))),
            ("threads", args.threads.map(number)),
            ("executors", args.executors.map(number)),
            ("eval.every_steps", args.eval_every.map(|n| number(n as usize))),
            ("eval.suites", (!args.eval_suite.is_empty()).then(suites)),
            (
                "executor.sandbox",
                args.sandbox
                    .map(|s| Value::String(if s == SandboxMode::Strict { "strict" } else { "best-effort" }.to_owned())),
            ),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                layers.set(key, value, &format!("--{}", key.rsplit('.').next().unwrap_or(key)))?;
            }
        }
        Ok(layers)
    }

    fn apply_table(&mut self, prefix: &str, table: &Table, origin: &str) -> Result<()> {
        for (key, value) in table {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                Value::Table(inner) if self.find(&path).is_some_and(Value::is_table) => {
                    self.apply_table(&path, inner, origin)?;
                }
                value => self.set(&path, value.clone(), origin)?,
            }
        }
        Ok(())
    }

    fn find(&self, path: &str) -> Option<&Value> {
        let mut keys = path.split('.');
        let first = self.table.get(keys.next()?)?;
        keys.try_fold(first, |value, key| value.get(key))
    }

    /// Sets one value.
    ///
    /// # Errors
    /// When the key is unknown or the value has the wrong type.
    pub fn set(&mut self, path: &str, value: Value, origin: &str) -> Result<()> {
        let unknown = || {
            let error = Error::config(format!("unknown setting `{path}` ({origin})"));
            let nearest = self.keys().into_iter().min_by_key(|k| strsim::damerau_levenshtein(k, path));
            error.with_hint(format!("did you mean `{}`?", nearest.unwrap_or_default()))
        };
        if self.find(path).is_none_or(Value::is_table) {
            return Err(unknown());
        }
        let value = match value {
            Value::String(name) if PATHS.contains(&path) && !name.is_empty() => {
                Value::String(absolute(Path::new(&name)))
            }
            Value::Array(names) if path == "eval.suites" => Value::Array(names.into_iter().map(suite).collect()),
            value => value,
        };
        let mut table = self.table.clone();
        let (parents, key) = path.rsplit_once('.').map_or((None, path), |(p, k)| (Some(p), k));
        let mut inner = &mut table;
        for parent in parents.into_iter().flat_map(|p| p.split('.')) {
            inner = inner.get_mut(parent).and_then(Value::as_table_mut).expect("the path was found");
        }
        inner.insert(key.to_owned(), value.clone());
        Config::deserialize(Value::Table(table.clone()))
            .map_err(|e| Error::config(format!("{path} = {value} ({origin}): {}", e.message())))?;
        self.table = table;
        self.origins.insert(path.to_owned(), origin.to_owned());
        Ok(())
    }

    /// All settings, dotted.
    pub fn keys(&self) -> Vec<String> {
        fn walk(prefix: &str, table: &Table, out: &mut Vec<String>) {
            for (key, value) in table {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                match value {
                    Value::Table(inner) => walk(&path, inner, out),
                    _ => out.push(path),
                }
            }
        }
        let mut keys = Vec::new();
        walk("", &self.table, &mut keys);
        keys
    }

    /// The configuration.
    ///
    /// # Errors
    /// When a value makes no sense.
    pub fn config(&self) -> Result<Config> {
        let config = Config::deserialize(Value::Table(self.table.clone()))
            .map_err(|e| Error::config(format!("configuration: {}", e.message())))?;
        config.check()?;
        Ok(config)
    }

    /// The text of resolved.toml: every setting, with its origin where it is not the default.
    pub fn resolved(&self) -> String {
        let mut text =
            String::from("# Every setting of this run. A comment names where a value that is no default comes from.\n");
        self.write_table("", &self.table, &mut text);
        text
    }

    fn write_table(&self, prefix: &str, table: &Table, text: &mut String) {
        for (key, value) in table.iter().filter(|(_, v)| !v.is_table()) {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            let origin = self.origins.get(&path).map(|o| format!("  # {o}")).unwrap_or_default();
            let _ = writeln!(text, "{key} = {value}{origin}");
        }
        for (key, value) in table {
            if let Value::Table(inner) = value {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                let _ = writeln!(text, "\n[{path}]");
                self.write_table(&path, inner, text);
            }
        }
    }
}

/// A value as TOML would read it; what is no TOML is a string.
fn value_of(text: &str) -> Value {
    let line = format!("v = {text}");
    line.parse::<Table>().ok().and_then(|mut t| t.remove("v")).unwrap_or_else(|| Value::String(text.to_owned()))
}

/// A suite's name, or the absolute path of its file.
fn suite(name: Value) -> Value {
    match name {
        Value::String(file) if Path::new(&file).exists() => Value::String(absolute(Path::new(&file))),
        other => other,
    }
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).to_string_lossy().into_owned()
}

fn name_of(preset: Preset) -> &'static str {
    match preset {
        Preset::Tiny => "tiny",
        Preset::Paper3b => "paper-3b",
        Preset::Paper7b => "paper-7b",
        Preset::Paper14b => "paper-14b",
        Preset::PaperLlama => "paper-llama",
    }
}

/// What a preset changes. The paper's runs differ in little: the defaults are theirs. What `tiny` has was found by trying
/// (`benches/learning/tried.jsonl`).
fn preset_text(preset: Preset) -> &'static str {
    match preset {
        Preset::Tiny => {
            "steps = 100\n\
             rollout = { max_prompt = 400, max_propose = 192, max_solve = 96, hold_entropy = 0.9 }\n\
             checkpoint = { every_steps = 20 }\n\
             [train]\n\
             learning_rate = 2e-5\n\
             final_norm_rate = 1000\n\
             micro_batch_tokens = 2048\n\
             beta2 = 0.95\n\
             entropy_coef = 0.0\n\
             loss_aggregation = \"sequence_mean\"\n\
             [selfplay]\n\
             batch_size = 32\n\
             num_references = 3\n\
             seed_factor = 64\n\
             num_answers = 8\n\
             baseline = \"task\"\n\
             negative_weight = 0.3\n\
             task_sampling = \"learnable\"\n\
             accept = \"non_extremes\"\n\
             duplicates = \"refuse\"\n\
             check_shown = true\n\
             gate = { identity = true, constant = true, coin_flips = true, max_guess = 0.7, misleading = 0.8 }\n"
        }
        Preset::Paper3b | Preset::Paper7b | Preset::Paper14b => "steps = 500\nselfplay = { seed_factor = 4 }\n",
        Preset::PaperLlama => "steps = 500\nselfplay = { seed_factor = 1 }\n",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::Cli;
    use clap::{Parser, ValueEnum};

    fn resolve(args: &[&str]) -> Result<Layers> {
        let cli = Cli::try_parse_from(["azr"].iter().chain(args)).expect("a command line");
        Layers::resolve(&cli.train, None)
    }

    #[test]
    fn later_layers_win_and_origins_are_kept() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "steps = 7\nseed = 7\n[train]\nlearning_rate = 1\nfinal_norm_rate = 1\n")
            .expect("written");
        let file = file.to_string_lossy().into_owned();
        let layers =
            resolve(&["--config", &file, "--set", "seed=8", "--set", "steps=8", "--steps", "9"]).expect("good");
        let config = layers.config().expect("good");
        assert_eq!((config.steps, config.seed, config.train.learning_rate), (9, 8, 1.0));
        assert_eq!(config.selfplay.batch_size, 32);
        let text = layers.resolved();
        assert!(text.contains("steps = 9  # --steps") && text.contains("seed = 8  # --set"), "{text}");
        assert!(text.contains("# preset tiny") && text.contains(&format!("# file {file}")), "{text}");
        let again: Table = text.parse().expect("TOML");
        assert_eq!(Config::deserialize(Value::Table(again)).expect("whole"), config);
    }

    #[test]
    fn unknown_keys_name_the_nearest_and_wrong_types_the_key() {
        let error = resolve(&["--set", "selfplay.batchsize=3"]).expect_err("unknown");
        assert_eq!(error.exit_code(), 3);
        assert!(error.hint().is_some_and(|h| h.contains("selfplay.batch_size")), "{error}");
        let error = resolve(&["--set", "steps=many"]).expect_err("no number").to_string();
        assert!(error.contains("steps") && error.contains("--set"), "{error}");
        assert!(resolve(&["--set", "selfplay=3"]).is_err());
        assert!(resolve(&["--set", "rollout.temperature=0"]).and_then(|l| l.config()).is_err());
        assert_eq!(resolve(&["--set", "steps"]).expect_err("no value").exit_code(), 2);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (key, value) in [
            ("steps", "2147483648"),
            ("selfplay.intrinsic.complexity", "-inf"),
            ("selfplay.intrinsic.max", "nan"),
            ("selfplay.num_references", "65"),
            ("selfplay.seed_factor", "288230376151711744"),
            ("executor.cpu_ms_propose", "60001"),
            ("executor.cpu_ms_answer", "9223372036854775807"),
            ("rollout.max_running", "65537"),
            ("rollout.temperature", "nan"),
        ] {
            let error = resolve(&["--set", &format!("{key}={value}")]).and_then(|l| l.config()).expect_err(key);
            assert!(error.exit_code() == 3 && error.to_string().contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn files_are_found_from_any_folder() {
        let config = resolve(&["--set", "seeds=s.jsonl", "--set", "eval.suites=['grammar', 'Cargo.toml']"]);
        let config = config.and_then(|l| l.config()).expect("good");
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(config.seeds, here.join("s.jsonl").to_string_lossy());
        assert_eq!(config.eval.suites, ["grammar".to_owned(), here.join("Cargo.toml").to_string_lossy().into_owned()]);
    }

    #[test]
    fn every_preset_resolves() {
        for preset in Preset::value_variants() {
            let config = resolve(&["--preset", name_of(*preset)]).and_then(|l| l.config()).expect("a whole preset");
            assert_eq!(config.selfplay.num_references, if *preset == Preset::Tiny { 3 } else { 6 });
        }
        assert_eq!(resolve(&["--weights", "w"]).and_then(|l| l.config()).expect("good").selfplay.batch_size, 64);
    }
}
