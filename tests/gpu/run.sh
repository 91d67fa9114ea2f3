#!/usr/bin/env bash
# tests/gpu/run.sh [quick|full|PART...]: everything that only a GPU can tell, as JSON lines.
#
#   checks      selftest, every kernel's tests, the main job, a resumption bit for bit
#   sanitize    the quick selftest under compute-sanitizer
#   bench       decoding and training of 0.5B, every kernel
#   models      decoding and training of 1.5B, 3B and 7B
#   steps       whole steps of the paper's workload
#   torch       PyTorch on the kernels' shapes, after bench
#   peer        the PyTorch peer, whose script PEER names, on SIZES
#   quick       checks bench, within 3 minutes
#   full        all of them, within 10: what does not fit is SKIPPED, and can be named in a further call
#
# Steps end after BUDGET seconds at the latest. Needs the programs that tests/gpu/pack.sh puts into target/gpu, not a compiler
# (or AZR, KERNEL_TESTS and KERNEL_BENCH name them). WORK is the folder for everything, OUT the one for what is to be kept:
# results.jsonl, and all.tgz with logs and JSON, both written after every step. SMALL=1 takes tiny shapes, for the emulated
# driver (LD_LIBRARY_PATH); faults of this script show there. SANDBOX=best-effort is for boxes whose kernel has no Landlock,
# and taken by itself where the doctor misses a layer.
# The exit status is 1 when a check failed or found no time; a benchmark that failed is recorded and fails nothing else.
set -uo pipefail
cd "$(dirname "$0")/../.."

parts=${*:-quick} budget=${BUDGET:-570}
[ "$parts" = quick ] && parts="checks bench" budget=${BUDGET:-175}
[ "$parts" = full ] && parts="checks sanitize bench models steps torch peer"
deadline=$((SECONDS + budget))
small=${SMALL:-}
azr=${AZR:-target/gpu/azr}
tests=${KERNEL_TESTS:-target/gpu/kernel-tests}
bench=${KERNEL_BENCH:-target/gpu/kernel-bench}
work=${WORK:-$(mktemp -d)}
out=${OUT:-$work}
sandbox=${SANDBOX:+--sandbox $SANDBOX}
mkdir -p "$work" "$out"
rm -rf "${work:?}"/{job,straight,broken,metrics.jsonl}
lines=$work/results.jsonl
: >"$lines"
failed=0

quote() { sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g; s/[[:cntrl:]]//g' | awk '{ printf "%s%s", sep, $0; sep = "\\n" }'; }

# Writes a result down: the line, and its beginning for those who watch.
record() {
  printf '%s\n' "$1" >>"$lines"
  printf '%.400s\n' "$1"
  [ "$lines" -ef "$out/results.jsonl" ] || cp "$lines" "$out/results.jsonl"
  (cd "$work" && find . -maxdepth 1 -type f -regex '.*\.\(log\|json\|jsonl\|txt\)' -print0 | tar czf "$out/all.tgz" --null -T -)
}

skip() { record "$(printf '{"step": "%s", "kind": "skipped", "said": "SKIPPED: %s"}' "$1" "$2")"; }

# step KIND NAME SECONDS COMMAND...: runs it, and writes down how it went with the end of what it said.
step() {
  local kind=$1 name=$2 limit=$3 left=$((deadline - SECONDS)) start rc
  shift 3
  if [ $left -lt 3 ]; then
    skip "$name" "$budget seconds are over"
    [ "$kind" = check ] && failed=1
    return 125
  fi
  start=$(date +%s.%N)
  # Two signals: the first may ask a process to save that waits for a GPU which never ends.
  timeout -k 5 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1
  rc=$?
  [ "$kind" = check ] && [ $rc != 0 ] && failed=1
  record "$(printf '{"step": "%s", "kind": "%s", "rc": %d, "seconds": %s, "command": "%s", "said": "%s"}' "$name" "$kind" $rc \
    "$(awk "BEGIN { printf \"%.2f\", $(date +%s.%N) - $start }")" "$(echo "$*" | quote)" \
    "$(tail -c 6000 "$work/$name.log" | quote)")"
  return $rc
}

# Every kernel test in a process and with a time of its own: a fault ends a process's use of the GPU, a barrier that is never
# reached ends nothing.
each() {
  local name
  for name in $("$1" --list --format terse | sed -n 's/: test$//p' | grep -v prebuilt); do
    timeout -k 1 7 "$1" --exact "$name" >/tmp/one.log 2>&1 && echo "ok $name" || echo "FAILED $name: $(tail -3 /tmp/one.log | tr '\n' ' ')"
  done
}
export -f each

# A run of the main job: NAME SECONDS OPTIONS...
job() {
  local name=$1 limit=$2
  shift 2
  # shellcheck disable=SC2086
  step check "$name" "$limit" "$azr" --device cuda $sandbox --out "$work/$name" --set seeds="$work/seeds.jsonl" "$@"
  [ -f "$work/$name/metrics.jsonl" ] && cat "$work/$name/metrics.jsonl" >>"$work/metrics.jsonl"
}

# A run that is stopped after a step and resumed has the bits of one that is not: OPTIONS...
resumes() {
  local straight=$work/straight/checkpoints/step-00000002 broken=$work/broken/checkpoints/step-00000002
  job straight $((small ? 300 : 60)) --steps 2 --set checkpoint.every_steps=1 "$@"
  job broken $((small ? 300 : 60)) --steps 1 --set checkpoint.every_steps=1 --set rollout.max_running=3 "$@"
  # shellcheck disable=SC2086
  step check resume $((small ? 300 : 60)) "$azr" --device cuda $sandbox --resume "$work/broken" --steps 2
  step check resume-bits 20 cmp "$straight/model.safetensors" "$broken/model.safetensors"
}

# Results of azr bench: NAME SECONDS OPTIONS...
measure() {
  local name=$1 limit=$2
  shift 2
  step bench "$name" "$limit" "$azr" bench "$@" --device cuda --json "$work/$name.json"
}

# A measurement of training; 7B keeps its moments in bf16, and computes activations again only where they do not fit.
trains() {
  local name=$1 size=$2 moments=
  shift 2
  [ "$size" = 7B ] && moments=--bf16-moments
  # shellcheck disable=SC2086
  measure "$name" 90 train --model "$size" $moments "$@"
  # shellcheck disable=SC2086
  [ $? != 5 ] || measure "$name-recompute" 90 train --model "$size" $moments --recompute "$@"
}

has_torch() { python3 -c 'import torch' 2>/dev/null; }

checks() {
  step check selftest-quick $((small ? 300 : 40)) "$azr" selftest --device cuda --quick
  local rc=$?
  # Hopper's arithmetic as the emulator models it, against the hardware's: a difference is news, not a failure.
  sed -n 's/: bits \([0-9a-f]*\),.*/ \1/p' "$work/selftest-quick.log" >"$work/bits.txt"
  step info bits-of-the-model 10 diff tests/gpu/bits.txt "$work/bits.txt"
  if [ -n "$small" ]; then
    local tiny="--set selfplay.batch_size=1 --set selfplay.seed_factor=1 --set selfplay.num_probes=1"
    tiny="$tiny --set selfplay.num_answers=1 --set rollout.max_solve=8 --set rollout.max_propose=16"
    skip kernels "the test suite runs them on the emulator under every schedule"
    # shellcheck disable=SC2086
    resumes $tiny --set rollout.straggler_tokens=6 --set rollout.max_lag=1
    return
  fi
  export AZR_TEST_DEVICE=gpu AZR_PROBES
  AZR_PROBES=$(dirname "$tests")
  if [ ! -x "$tests" ]; then
    skip kernels "no test binary; tests/gpu/pack.sh makes it"
  elif [ $rc = 124 ] || [ $rc = 137 ]; then
    # What hangs here hangs everywhere: which kernel is it?
    step info kernels-each 240 bash -c 'each "$1"' - "$tests"
  else
    step check selftest 90 "$azr" selftest --device cuda
    step check kernels 90 "$tests" --test-threads=1 --skip prebuilt || step info kernels-each 240 bash -c 'each "$1"' - "$tests"
  fi
  job job 60 --steps 3
  resumes --set rollout.straggler_tokens=96 --set rollout.max_lag=1
}

sanitize() {
  if command -v compute-sanitizer >/dev/null; then
    step check sanitizer 200 compute-sanitizer --error-exitcode 9 --report-api-errors no "$azr" selftest --device cuda --quick
  else
    skip sanitizer "no compute-sanitizer"
  fi
}

bench() {
  if [ -n "$small" ]; then
    measure bench-small 300 decode --small --steps 2
    measure train-small 300 train --small
    return
  fi
  measure decode-0.5B 60 decode --model 0.5B --curves
  trains train-0.5B 0.5B
  if [ -x "$bench" ]; then
    step bench kernel-bench 200 "$bench" --bench
    grep '^{' "$work/kernel-bench.log" >"$work/kernel-bench.jsonl"
    # Built with another NVRTC, where KERNEL_BENCH_OTHER names it.
    [ -n "${KERNEL_BENCH_OTHER:-}" ] && step bench kernel-bench-other 200 "$KERNEL_BENCH_OTHER" --bench
  else
    skip kernel-bench "no bench binary; tests/gpu/pack.sh makes it"
  fi
}

models() {
  local size
  for size in 1.5B 3B 7B; do
    measure decode-$size 90 decode --model $size
    trains train-$size $size
  done
}

steps() {
  local size moments=
  for size in ${SIZES:-0.5B 1.5B 3B 7B}; do
    [ "$size" = 7B ] && moments=--bf16-moments
    # shellcheck disable=SC2086
    measure "step-$size" 300 step --model "$size" --workload paper $moments
  done
}

torch() {
  if has_torch && [ -s "$work/kernel-bench.jsonl" ]; then
    step bench torch-kernels 200 sh -c "python3 tests/gpu/torch_kernels.py <$work/kernel-bench.jsonl"
  else
    skip torch-kernels "no torch, or no kernel benchmark"
  fi
}

peer() {
  local size states=
  if [ -z "${PEER:-}" ] || ! has_torch; then
    skip peer "no torch, or PEER names no script"
    return
  fi
  for size in ${SIZES:-0.5B 1.5B 3B 7B}; do
    [ "$size" = 7B ] && states="--states bfloat16"
    # The peer's loss is on every token: so is ours beside it.
    trains "train-all-$size" "$size" --prompt 1
    # shellcheck disable=SC2086
    step bench "peer-train-$size" 200 python3 "$PEER" --model "$size" train --seqs 16 --seq 2048 --micro 4 $states
    step bench "peer-rollout-$size" 300 python3 "$PEER" --model "$size" rollout --batch 256 --prompt 1984 --new 128
  done
}

if command -v nvidia-smi >/dev/null; then
  step info device 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
else
  skip device "no nvidia-smi"
fi
step info version 20 "$azr" --version
step info doctor 60 "$azr" doctor
[ $? = 6 ] && [ -z "$sandbox" ] && sandbox="--sandbox best-effort"
for part in $parts; do
  case $part in
    checks | sanitize | bench | models | steps | torch | peer) [ -n "$small" ] && [[ $part != checks && $part != bench ]] || $part ;;
    *) echo "there is no part $part" >&2 && exit 2 ;;
  esac
done
echo "results: $out/results.jsonl" >&2
exit $failed
