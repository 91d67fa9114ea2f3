#!/usr/bin/env bash
# Fetches NVIDIA's run-time compiler (one wheel, by its hash) into target/nvrtc and compiles all kernels with it.
#   kernels/nvrtc.sh --write   brings kernels/prebuilt up to date (after a change of a kernel)
#   kernels/nvrtc.sh --check   compares kernels/prebuilt bit for bit
# Needs Python's pip and, the first time, a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
library=target/nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
if [ ! -e "$library" ]; then
  mkdir -p target
  echo 'nvidia-cuda-nvrtc-cu12==12.6.85 --hash=sha256:800927308ccc5dd6246d3f61f7fcef2ed7ec4e59e199090d360d3293f78bd5a2' > target/nvrtc.txt
  python3 -m pip install --quiet --no-deps --require-hashes --only-binary=:all: --target target/nvrtc -r target/nvrtc.txt
fi
exec cargo run --quiet --release --locked -p azr-kernel-emu --bin prebuild -- "${1:---check}"
