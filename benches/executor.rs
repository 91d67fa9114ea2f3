//! Verdicts per second of the executor with all layers on, in batches: one program alone, with ten inputs, as eight answers
//! to one task, and as a proposal. `azr exec --bench` measures the same by processor time, with latencies and beside
//! CPython; this one is for comparing two builds.

use azr::cli::exec_bench::workloads;
use azr::exec::pool::{Pool, PoolConfig};
use criterion::{Criterion, Throughput};

/// Requests of one measurement.
const BATCH: usize = 64;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let executable = Some(env!("CARGO_BIN_EXE_azr").into());
    let mut executors = 1;
    while executors <= std::thread::available_parallelism().map_or(1, usize::from) {
        let pool = Pool::start(&PoolConfig {
            num_workers: executors,
            executable: executable.clone(),
            ..PoolConfig::default()
        });
        let pool = pool.expect("the pool starts");
        let mut group = criterion.benchmark_group(format!("executor_{executors}"));
        for workload in workloads() {
            group.throughput(Throughput::Elements((BATCH * workload.num_verdicts) as u64));
            group.bench_function(workload.name, |b| {
                b.iter(|| {
                    let verdicts = pool.run(vec![workload.request.clone(); BATCH]).expect("the pool answers");
                    assert!(verdicts.iter().all(|v| v.calls.iter().all(|o| o.class() == "value")));
                });
            });
        }
        group.finish();
        executors *= 2;
    }
    criterion.final_summary();
}
