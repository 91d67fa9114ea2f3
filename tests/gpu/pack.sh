#!/usr/bin/env bash
# Builds what tests/gpu/run.sh needs on a GPU box without a compiler, stripped, into target/gpu (about 50 MB).
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --locked
cargo test --release --locked --test kernels --no-run
cargo bench --locked --bench kernels --no-run
# The newest executable that holds a word: tests and benchmarks have the same name.
newest() {
  local f
  for f in $(ls -t target/release/deps/kernels-*); do
    [ -x "$f" ] && grep -q "$1" "$f" && echo "$f" && return
  done
  echo "no executable holds $1" >&2
  return 1
}
mkdir -p target/gpu
kernels/nvrtc.sh --probes "$PWD/target/gpu"
strip -o target/gpu/azr target/release/azr
strip -o target/gpu/kernel-tests "$(newest planted_faults_are_found)"
strip -o target/gpu/kernel-bench "$(newest AZR_KERNEL_BENCH_SMALL)"
ls -l target/gpu
