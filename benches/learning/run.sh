#!/usr/bin/env bash
# benches/learning/run.sh NAMES [SEEDS]: what self-play does to the embedded model's accuracy on held-out tasks.
#
#   preset                                       the tiny preset as it is
#   solver-only no-gate no-references            the same without a part,
#   global-baseline type-baseline plain-rates    or with the paper's way in its place
#   higher-rate fixed-temperature                as the preset was: at 2.5 times the rate; and without a rising temperature
#   small-gate small-bare                        many small steps, with the gate; without it, repeats of programs allowed
#
# Every run has THREADS threads and ends after STEPS steps or MINUTES minutes, whichever comes first, and is evaluated every
# EVERY steps at temperature 1 and, at its beginning and end, greedily. Runs go one after another, into OUT; collect.py makes
# JSON and a picture of what is there. A run that is there already goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

names=${1:?names of runs, see the head of this file}
seeds=${2:-1 2 3}
azr=${AZR:-target/release/azr}
out=${OUT:-target/learning}
steps=${STEPS:-100000} minutes=${MINUTES:-60} every=${EVERY:-50} threads=${THREADS:-2}
[ -x "$azr" ] || cargo build --release --locked

# Programs of each level of the suite: 1,002 tasks of each type.
suite=(--eval-suite grammar --set eval.num_builtin=334)

# The preset before its rate was lowered, and induction tasks kept that half of the answers solve.
higher=(--set train.learning_rate=5e-5 --set train.final_norm_rate=400 --set selfplay.gate.misleading=0.5)
# Without the gate.
bare=(--set selfplay.gate.identity=false --set selfplay.gate.constant=false --set selfplay.gate.coin_flips=false
  --set selfplay.gate.max_guess=1 --set selfplay.gate.misleading=0)
# Steps of about a second.
small=(--set selfplay.batch_size=8 --set selfplay.seed_factor=64 --set selfplay.num_answers=4 --set selfplay.num_probes=4
  --set rollout.max_propose=96)

# run NAME SEED OPTIONS...
run() {
  local name=$1 seed=$2 rc=0
  shift 2
  local dir=$out/$name-$seed
  mkdir -p "$out"
  if [ -d "$dir/checkpoints" ]; then
    set -- --resume "$dir"
  else
    set -- --preset tiny --seed "$seed" --out "$dir" --eval-every "$every" --set eval.temperature=1 "${suite[@]}" \
      --set checkpoint.every_steps="$every" --set checkpoint.keep=0 "$@"
  fi
  # On a signal azr saves and ends with 75.
  TIMEFORMAT='%U %S'
  { time timeout --preserve-status -s TERM "${minutes}m" \
    "$azr" --threads "$threads" --executors "$threads" --steps "$steps" "$@" >>"$dir.log" 2>&1 || rc=$?; } 2>>"$dir.cpu"
  [ "$rc" = 0 ] || [ "$rc" = 75 ] || { echo "$dir: exit code $rc" >&2 && tail -3 "$dir.log" >&2; }
  local first last
  first=$dir/checkpoints/step-00000000 last=$(ls -d "$dir"/checkpoints/step-* | tail -1)
  for at in "$first" "$last"; do
    local scores=$dir/greedy-${at##*-}
    [ -d "$scores" ] || "$azr" eval --suite grammar --limit 334 --weights "$at" --threads "$threads" --out "$scores" >>"$dir.log"
  done
}

for name in $names; do
  case $name in
    preset) options=() ;;
    solver-only) options=(--set selfplay.train_proposer=false) ;;
    no-gate) options=("${bare[@]}") ;;
    no-references) options=(--set selfplay.num_references=0) ;;
    global-baseline) options=(--set selfplay.baseline=global) ;;
    type-baseline) options=(--set selfplay.baseline=sequence) ;;
    higher-rate) options=("${higher[@]}") ;;
    fixed-temperature) options=("${higher[@]}" --set rollout.hold_entropy=0) ;;
    plain-rates) options=(--set train.final_norm_rate=1) ;;
    small-gate) options=("${small[@]}") ;;
    small-bare) options=("${small[@]}" "${bare[@]}" --set selfplay.duplicates=allow) ;;
    *) echo "there is no run $name" >&2 && exit 2 ;;
  esac
  for seed in $seeds; do run "$name" "$seed" "${options[@]}"; done
done
