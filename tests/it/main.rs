//! Integration tests: the real binary and its real worker processes.

mod exec;
