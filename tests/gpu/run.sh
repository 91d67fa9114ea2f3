#!/usr/bin/env bash
# tests/gpu/run.sh [quick|full]: everything that only a GPU can tell, as JSON lines on standard output and in $OUT.
#
# Needs the programs that tests/gpu/pack.sh puts into target/gpu, not a compiler (or AZR, KERNEL_TESTS and KERNEL_BENCH name
# them). PEER names the PyTorch peer's script, for `full`. SMALL=1 takes tiny shapes, for the emulated driver
# (LD_LIBRARY_PATH); faults of this script show there. SANDBOX=best-effort is for boxes whose kernel has no Landlock; the
# doctor's lines show it.
# The exit status is 1 when a check failed; a benchmark that failed is recorded and fails nothing else.
set -uo pipefail
cd "$(dirname "$0")/../.."

mode=${1:-quick}
small=${SMALL:-}
azr=${AZR:-target/gpu/azr}
out=${OUT:-/tmp/azr-gpu-$$}
sandbox=${SANDBOX:+--sandbox $SANDBOX}
mkdir -p "$out"
lines=$out/results.jsonl
: >"$lines"
failed=0

tests=${KERNEL_TESTS:-target/gpu/kernel-tests}
bench=${KERNEL_BENCH:-target/gpu/kernel-bench}

quote() { sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g; s/[[:cntrl:]]//g' | awk '{ printf "%s%s", sep, $0; sep = "\\n" }'; }

# step KIND NAME SECONDS COMMAND...: runs it, and writes down how it went with the end of what it said.
step() {
  local kind=$1 name=$2 limit=$3 start rc
  shift 3
  start=$(date +%s.%N)
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  [ "$kind" = check ] && [ $rc != 0 ] && failed=1
  printf '{"step": "%s", "kind": "%s", "rc": %d, "seconds": %.2f, "command": "%s", "said": "%s"}\n' "$name" "$kind" $rc \
    "$(echo "$(date +%s.%N) - $start" | bc -l 2>/dev/null || echo 0)" "$(echo "$*" | quote)" \
    "$(tail -c 6000 "$out/$name.log" | quote)" | tee -a "$lines"
  return $rc
}

# Every kernel test in a process and with a time of its own: a fault ends a process's use of the GPU, a barrier that is never
# reached ends nothing.
each() {
  local name
  for name in $("$1" --list --format terse | sed -n 's/: test$//p' | grep -v prebuilt); do
    timeout 15 "$1" --exact "$name" >/tmp/one.log 2>&1 && echo "ok $name" || echo "FAILED $name: $(tail -3 /tmp/one.log | tr '\n' ' ')"
  done
}
export -f each

skip() { printf '{"step": "%s", "kind": "skipped", "said": "SKIPPED: %s"}\n' "$1" "$2" | tee -a "$lines"; }

# A run of the main job: NAME SECONDS OPTIONS...
job() {
  local name=$1 limit=$2
  shift 2
  # shellcheck disable=SC2086
  step check "$name" "$limit" "$azr" --device cuda $sandbox --out "$out/$name" "$@"
  [ -f "$out/$name/metrics.jsonl" ] && cat "$out/$name/metrics.jsonl" >>"$out/metrics.jsonl"
}

# A run that is stopped after a step and resumed has the bits of one that is not: OPTIONS...
resumes() {
  local straight=$out/straight/checkpoints/step-00000002 broken=$out/broken/checkpoints/step-00000002
  job straight 200 --steps 2 --set checkpoint.every_steps=1 "$@"
  job broken 200 --steps 1 --set checkpoint.every_steps=1 --set rollout.max_running=3 "$@"
  # shellcheck disable=SC2086
  step check resume 200 "$azr" --device cuda $sandbox --resume "$out/broken" --steps 2
  step check resume-bits 20 cmp "$straight/model.safetensors" "$broken/model.safetensors"
}

# Results of azr bench: NAME SECONDS OPTIONS...
measure() {
  local name=$1 limit=$2
  shift 2
  step bench "$name" "$limit" "$azr" bench "$@" --device cuda --json "$out/$name.json"
}

if command -v nvidia-smi >/dev/null; then
  step info device 60 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
else
  skip device "no nvidia-smi"
fi
step info version 60 "$azr" --version
step info doctor 60 "$azr" doctor

if [ -n "$small" ]; then
  tiny="--set selfplay.batch_size=1 --set selfplay.seed_factor=1 --set selfplay.num_probes=1 --set selfplay.num_answers=1"
  tiny="$tiny --set rollout.max_solve=8 --set rollout.max_propose=16"
  step check selftest-quick 300 "$azr" selftest --device cuda --quick
  skip kernels "the test suite runs them on the emulator under every schedule"
  # shellcheck disable=SC2086
  resumes $tiny --set rollout.straggler_tokens=6 --set rollout.max_lag=1
  measure bench-small 300 decode --small --steps 2
else
  step check selftest-quick 120 "$azr" selftest --device cuda --quick
  step check selftest 200 "$azr" selftest --device cuda
  if [ -x "$tests" ]; then
    export AZR_TEST_DEVICE=gpu AZR_PROBES
    AZR_PROBES=$(dirname "$tests")
    step check kernels 90 "$tests" --test-threads=1 --skip prebuilt || step info kernels-each 240 bash -c 'each "$1"' - "$tests"
  else
    skip kernels "no test binary; tests/gpu/pack.sh makes it"
  fi
  job job 120 --steps 3
  resumes --set rollout.straggler_tokens=96 --set rollout.max_lag=1
  measure decode-0.5B 120 decode --model 0.5B --curves
  measure train-0.5B 120 train --model 0.5B
fi

# Hopper's arithmetic as the emulator models it, against the hardware's: a difference is news, not a failure.
sed -n 's/: bits \([0-9a-f]*\),.*/ \1/p' "$out/selftest-quick.log" >"$out/bits.txt"
step info bits-of-the-model 10 diff tests/gpu/bits.txt "$out/bits.txt"

if [ -x "$bench" ] && [ -z "$small" ]; then
  step bench kernel-bench 300 "$bench" --bench
  # Built with another NVRTC, where KERNEL_BENCH_OTHER names it.
  [ -n "${KERNEL_BENCH_OTHER:-}" ] && step bench kernel-bench-other 300 "$KERNEL_BENCH_OTHER" --bench
elif [ -z "$small" ]; then
  skip kernel-bench "no bench binary; tests/gpu/pack.sh makes it"
fi

if [ "$mode" = full ] && [ -z "$small" ]; then
  for size in 1.5B 3B 7B; do
    more=
    [ $size = 7B ] && more="--bf16-moments --recompute"
    measure decode-$size 120 decode --model $size
    # shellcheck disable=SC2086
    measure train-$size 120 train --model $size $more
  done
  measure step-0.5B 300 step --model 0.5B --workload paper
  if python3 -c 'import torch' 2>/dev/null && [ -s "$out/kernel-bench.log" ]; then
    step bench torch-kernels 300 sh -c "python3 tests/gpu/torch_kernels.py <$out/kernel-bench.log"
  else
    skip torch-kernels "no torch, or no kernel benchmark"
  fi
  if [ -n "${PEER:-}" ] && python3 -c 'import torch' 2>/dev/null; then
    for size in 0.5B 1.5B 3B; do
      step bench peer-rollout-$size 300 python3 "$PEER" --model $size rollout --batch 256 --prompt 1984 --new 128
      step bench peer-train-$size 300 python3 "$PEER" --model $size train --seqs 16 --seq 2048 --micro 4
    done
  else
    skip peer "no torch, or PEER names no script"
  fi
  if command -v compute-sanitizer >/dev/null; then
    step check sanitizer 400 compute-sanitizer --error-exitcode 9 --report-api-errors no "$azr" selftest --device cuda --quick
  else
    skip sanitizer "no compute-sanitizer"
  fi
fi

cp "$out"/*.json "$out"/*.jsonl "${RESULTS:-$out}" 2>/dev/null
echo "results: $lines" >&2
exit $failed
