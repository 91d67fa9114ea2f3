//! Evaluation while training: the same suites on the model as it is after a step.
//!
//! Sequences have ids of which training uses none, and answers are graded by the run's own executor, so that a run with
//! evaluation and one without are the same to the bit.

use std::collections::BTreeMap;
use std::path::Path;

use super::builtin;
use super::protocol::{Protocol, Settings};
use super::report::rows;
use super::run::{Model, run, stop_tokens};
use super::suites::{Item, read_all};
use super::template::Template;
use crate::compute::ops::Backend;
use crate::error::Result;
use crate::pipeline::Exam;
use crate::pipeline::config::Config;
use crate::selfplay::prompt::Format;

/// First id of evaluated sequences: those of training hold a step of at most 31 bits above 32 others and lie below. Those of
/// seeding, which is over by then, lie here, too.
const FIRST_ID: u64 = 1 << 63;

/// The suites that a run is evaluated on.
pub struct Watch {
    items: Vec<Item>,
    /// Generated suites, until they have been made.
    generated: Vec<String>,
    /// Programs of each of their levels.
    num_builtin: usize,
    temperature: f32,
    max_new: usize,
    seed: u64,
}

impl Watch {
    /// Reads the suites of a run's configuration; nothing where it is not evaluated.
    ///
    /// # Errors
    /// When a suite cannot be read.
    pub fn open(config: &Config) -> Result<Watch> {
        let (mut files, mut generated) = (Vec::new(), Vec::new());
        let limit = Some(config.eval.limit).filter(|n| *n > 0);
        for suite in config.eval.suites.iter().filter(|_| config.eval.every_steps > 0) {
            if [builtin::NAME, builtin::GRAMMAR].contains(&suite.as_str()) {
                generated.push(suite.clone());
            } else {
                files.push(Path::new(suite));
            }
        }
        Ok(Watch {
            items: read_all(&files, None, limit)?,
            generated,
            num_builtin: config.eval.num_builtin,
            temperature: config.eval.temperature as f32,
            max_new: config.rollout.max_solve,
            seed: config.seed,
        })
    }

    /// Accuracy by suite, of the built-in suite by task type.
    ///
    /// # Errors
    /// When the model or the executor fails, or on a stop signal.
    pub fn examine<B: Backend>(&mut self, exam: Exam<'_, B>) -> Result<BTreeMap<String, f64>> {
        for suite in std::mem::take(&mut self.generated) {
            self.items.extend(builtin::items(&suite, exam.pool, self.num_builtin)?.unwrap_or_default());
        }
        let name = if exam.format == Format::Compact { "compact" } else { "azr" };
        let template = Template::named(name, exam.tokenizer)?;
        let settings = Settings {
            template,
            protocol: Protocol::Direct,
            temperature: self.temperature,
            max_new: self.max_new,
            budget: usize::MAX,
            num_paths: 1,
            num_rounds: 1,
            keep_trace: false,
        };
        let mut model = Model {
            decoder: exam.decoder,
            engine: exam.engine,
            codec: exam.codec,
            tokenizer: exam.tokenizer,
            stop_tokens: stop_tokens(template, exam.codec, exam.eos),
            top_p: 1.0,
            top_k: 0,
            stop: exam.stop,
        };
        let records = run(&self.items, settings, 1, FIRST_ID, &mut model, exam.pool)?;
        let rows = rows(&records, &[1], self.seed);
        let shown = rows.iter().filter(|r| r.suite.matches('/').count() < 2);
        Ok(shown.filter_map(|r| Some((r.suite.clone(), r.metrics.first()?.value))).collect())
    }
}
