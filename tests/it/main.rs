//! Integration tests: the real binary and its real worker processes.

mod bad_input;
mod cli;
mod command;
mod cuda;
mod eval;
mod exec;
mod exec_cases;
mod exec_command;
mod exec_hostile;
mod exec_survival;
mod fixture;
mod fuzz;
mod main_job;
mod safeguards;
mod transformers;
