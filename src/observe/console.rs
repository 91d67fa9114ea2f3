//! Progress for people: a bar on a terminal, a line per step elsewhere.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::observe::records::StepMetrics;

/// Where progress goes.
pub struct Console {
    bar: Option<ProgressBar>,
    num_steps: u64,
    quiet: bool,
}

impl Console {
    /// A console for a run up to step `num_steps`.
    pub fn new(num_steps: u64, quiet: bool) -> Self {
        let bar = (!quiet && stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}");
            ProgressBar::new(num_steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Console { bar, num_steps, quiet }
    }

    /// A remark.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if !self.quiet => write(stderr(), text),
            None => {}
        }
    }

    /// Progress of seeding.
    pub fn seeding(&self, shared: usize, induction: usize, wanted: usize) {
        self.note(&format!("seeding: {shared}/{wanted} programs, {induction}/{wanted} induction tasks"));
    }

    /// A finished step.
    pub fn step(&self, m: &StepMetrics) {
        let line = self.line(m);
        match &self.bar {
            Some(bar) => {
                bar.set_position(m.step);
                bar.set_message(line);
            }
            None if !self.quiet => write(stdout(), &line),
            None => {}
        }
    }

    /// An evaluation before the first step.
    pub fn eval(&self, step: u64, scores: &BTreeMap<String, f64>) {
        let line = format!("step {step}/{}{}", self.num_steps, accuracy(scores));
        match &self.bar {
            Some(bar) => bar.println(line),
            None if !self.quiet => write(stdout(), &line),
            None => {}
        }
    }

    fn line(&self, m: &StepMetrics) -> String {
        let mut rewards = String::new();
        for (name, c) in &m.configs {
            let (role, kind) = name.split_once('_').unwrap_or(("", name));
            let kind: String = kind.chars().take(3).collect();
            rewards.push_str(&format!(" {}.{kind} {:+.2}", role.chars().next().unwrap_or('?'), c.reward));
        }
        let left = self.num_steps.saturating_sub(m.step) as f64 * m.step_s;
        let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
        format!(
            "step {}/{}  reward {:+.3} [{} ]  valid {:.0}%  {:.0} tok/s  {:.0} steps/h{}  left {}",
            m.step,
            self.num_steps,
            m.reward,
            rewards,
            100.0 * m.valid,
            m.tokens_per_s,
            m.steps_per_hour,
            accuracy(&m.eval),
            duration(left)
        ) + &alarms(&m.alarms)
    }

    /// Ends the display.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

/// Writes a line. A run goes on when whoever read its lines is gone, or the disk of its log is full.
fn write(mut to: impl Write, line: &str) {
    let _ = writeln!(to, "{line}");
}

/// Accuracy by suite in percent; nothing where nothing was evaluated.
fn accuracy(scores: &BTreeMap<String, f64>) -> String {
    let parts: Vec<String> = scores.iter().map(|(suite, x)| format!("{suite} {:.1}%", 100.0 * x)).collect();
    if parts.is_empty() { String::new() } else { format!("  eval: {}", parts.join(", ")) }
}

/// Alarms by name, nothing where there are none.
fn alarms(lasting: &BTreeMap<String, u64>) -> String {
    let parts: Vec<String> = lasting.iter().map(|(name, steps)| format!("{name} for {steps} steps")).collect();
    if parts.is_empty() { String::new() } else { format!("  ALARM: {}", parts.join(", ")) }
}

fn duration(d: Duration) -> String {
    let s = d.as_secs();
    format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_step_rewards_and_time_left() {
        let mut m = StepMetrics { step: 3, step_s: 10.0, valid: 0.5, ..StepMetrics::default() };
        m.configs.insert("solve_deduction".into(), Default::default());
        let line = Console::new(10, true).line(&m);
        assert!(line.starts_with("step 3/10") && line.contains("s.ded +0.00"), "{line}");
        assert!(line.ends_with("left 0:01:10") && !line.contains("eval"), "{line}");
        m.eval.insert("builtin/deduction".into(), 0.125);
        let line = Console::new(10, true).line(&m);
        assert!(line.contains("  eval: builtin/deduction 12.5%  left"), "{line}");
        m.alarms.insert("entropy".into(), 7);
        assert!(Console::new(10, true).line(&m).ends_with("  ALARM: entropy for 7 steps"));
        assert!(Console::new(u64::MAX, true).line(&m).contains("left "), "however many steps there are");
    }
}
