//! Integration tests: the real binary and its real worker processes.

mod cli;
mod command;
mod exec;
mod main_job;
