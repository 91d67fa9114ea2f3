//! How varied a step's proposals are, and how hard: what shows a collapse before the rewards do.

use std::collections::HashSet;

use serde::Serialize;

use crate::selfplay::task::{Task, TaskKind};

/// Variety and difficulty of the valid proposals of one type in one step.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Variety {
    /// Valid proposals.
    pub num_valid: usize,
    /// Share of them whose program differs, up to renaming, from all before it in the step (induction: message).
    pub unique_programs: f64,
    /// Share whose answer (input, output, exception) differs from all before it in the step.
    pub unique_answers: f64,
    /// Share of tasks whose output is a bool or None, where a guess is right half of the time.
    pub guessable: f64,
    /// Number of tasks by number of probes that solved them, from none to all.
    pub success_histogram: Vec<usize>,
}

/// Variety of tasks with their success rates under `num_probes` probes.
pub fn variety(tasks: &[(&Task, f64)], num_probes: usize) -> Variety {
    let share = |count: usize| count as f64 / tasks.len().max(1) as f64;
    let distinct = |part: fn(&Task) -> &str| share(tasks.iter().map(|(t, _)| part(t)).collect::<HashSet<_>>().len());
    let mut histogram = vec![0; num_probes + 1];
    for (_, rate) in tasks {
        histogram[(rate * num_probes as f64).round() as usize] += 1;
    }
    let is_guess = |t: &Task| t.pairs.iter().all(|p| matches!(p.output.as_str(), "True" | "False" | "None"));
    Variety {
        num_valid: tasks.len(),
        unique_programs: distinct(|t| if t.kind == TaskKind::Induction { &t.message } else { &t.normal_form }),
        unique_answers: distinct(|t| if t.kind == TaskKind::Abduction { t.input() } else { t.gold_output() }),
        guessable: share(tasks.iter().filter(|(t, _)| is_guess(t)).count()),
        success_histogram: histogram,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_and_guesses_show() {
        let mut a = Task::identity(TaskKind::Deduction);
        let mut b = a.clone();
        b.pairs[0].output = "True".into();
        let found = variety(&[(&a, 0.0), (&b, 0.5), (&b, 1.0)], 8);
        assert!((found.unique_programs - 1.0 / 3.0).abs() < 1e-12 && (found.unique_answers - 2.0 / 3.0).abs() < 1e-12);
        assert!((found.guessable - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(found.success_histogram, [1, 0, 0, 0, 1, 0, 0, 0, 1]);
        a.normal_form = "other".into();
        assert_eq!(variety(&[(&a, 0.0), (&b, 0.5)], 8).unique_programs, 1.0);
        assert_eq!(variety(&[], 8).unique_programs, 0.0);
    }
}
