//! The executable: allocator, worker processes, command line, one line of error with a hint, exit code.

#[global_allocator]
static ALLOCATOR: azr::exec::sandbox::CountingAllocator = azr::exec::sandbox::CountingAllocator;

fn main() {
    azr::exec::worker::maybe_run();
    let tokens: u64 = std::env::args().nth(1).unwrap_or_default().parse().unwrap_or(200_000);
    let out = std::env::args().nth(2).unwrap_or_default();
    let config = azr::pretrain::PretrainConfig {
        seed: 1, num_tokens: tokens, batch_tokens: 8192, learning_rate: 4e-3,
        spec: azr::pretrain::embedded_spec(), num_threads: 2,
        pool: azr::exec::pool::PoolConfig{ num_workers: 2, ..Default::default() },
    };
    azr::pretrain::train(&config, std::path::Path::new(&out), |p| if p.step % 10 == 0 { println!("{p:?}"); }).expect("done");
}
