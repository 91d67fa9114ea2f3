//! The executable: allocator, worker processes, command line, one line of error with a hint, exit code.

#[global_allocator]
static ALLOCATOR: azr::exec::sandbox::CountingAllocator = azr::exec::sandbox::CountingAllocator;

fn main() {
    azr::exec::worker::maybe_run();
}
