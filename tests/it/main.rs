//! Integration tests: the real binary and its real worker processes.

mod bad_input;
mod cli;
mod command;
mod exec;
mod fixture;
mod main_job;
mod transformers;
