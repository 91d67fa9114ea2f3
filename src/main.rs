//! The executable: allocator, worker processes, command line, one line of error with a hint, exit code.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: azr::exec::sandbox::CountingAllocator = azr::exec::sandbox::CountingAllocator;

fn main() -> ExitCode {
    azr::exec::worker::maybe_run();
    let cli = azr::cli::args::Cli::parse();
    match azr::cli::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("azr: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
