#!/usr/bin/env bash
# Fetches NVIDIA's run-time compiler and disassembler (a wheel each, by its hash) into target/nvrtc and target/nvdisasm, and
# compiles all kernels. A test (prebuilt.rs) then reads the images.
#   kernels/nvrtc.sh --write   brings kernels/prebuilt up to date (after a change of a kernel)
#   kernels/nvrtc.sh --check   compares kernels/prebuilt bit for bit
#   kernels/nvrtc.sh --probes FOLDER   compiles the emulator's probes for Hopper, for tests/gpu/run.sh
# Needs Python's pip and, the first time, a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
fetch() {  # folder, package, hash
  [ -e "target/$1/nvidia" ] && return
  mkdir -p target
  echo "$2 --hash=sha256:$3" > "target/$1.txt"
  python3 -m pip install --quiet --no-deps --require-hashes --only-binary=:all: --target "target/$1" -r "target/$1.txt"
}
fetch nvrtc nvidia-cuda-nvrtc-cu12==12.6.85 800927308ccc5dd6246d3f61f7fcef2ed7ec4e59e199090d360d3293f78bd5a2
fetch nvdisasm nvidia-cuda-nvdisasm==13.2.51 5a7acf77c55d6d2911ed6155d4d5bc156ffadf9df7a68a89b0c1155f4b13688c ||
  echo "no disassembler: a test will be SKIPPED" >&2
exec cargo run --quiet --release --locked -p azr-kernel-emu --bin prebuild -- "${@:---check}"
