//! The command line's commands.

pub mod args;
pub mod bench;
pub mod bench_report;
pub mod config;
pub mod doctor;
pub mod eval;
pub mod exec;
pub mod exec_bench;
pub mod exec_request;
pub mod exec_soak;
pub mod output;
pub mod plan;
pub mod pretrain;
pub mod score;
pub mod selftest;
pub mod selftest_ops;
pub mod solve;
pub mod train;

use crate::cli::args::{Cli, Command};
use crate::error::Result;

/// Does what the command line says.
///
/// # Errors
/// What went wrong, with its exit code.
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        None => train::train(&cli.train),
        Some(Command::Score(args)) => score::score(args),
        Some(Command::Pretrain(args)) => pretrain::pretrain(args),
        Some(Command::Exec(args)) => exec::exec(args),
        Some(Command::Bench(args)) => bench::bench(args),
        Some(Command::Plan(args)) => plan::plan(args),
        Some(Command::Selftest(args)) => selftest::selftest(args),
        Some(Command::Doctor(args)) => doctor::doctor(args),
        Some(Command::Eval(args)) => eval::eval(args),
        Some(Command::Solve(args)) => solve::solve(args),
    }
}
