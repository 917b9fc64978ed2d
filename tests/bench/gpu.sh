#!/usr/bin/env bash
# Everything that an accelerator should answer, in one call of at most 8 minutes on one H100.
#
#   bash tests/bench/gpu.sh results.json               needs torch, diffusers, transformers, peft, pyarrow; no Ray
#   MODEL=tiny LARGE=tiny bash tests/bench/gpu.sh out.json     the same steps in a minute on a CPU
#
# Figures are merged into the file as they come. A step that fails, or that its time ends, does not stop the next one;
# the exit code is 1 if any did. DEADLINE_S is the time for all of it; steps for which nothing is left are skipped.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:?which JSON file the figures are merged into}
MODEL=${MODEL:-sd15}
LARGE=${LARGE:-sdxl}
PYTHON=${PYTHON:-python3}
PAIRS=${PAIRS:-32}
MICRO=${MICRO:-8}
DEADLINE_S=${DEADLINE_S:-470}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
failed=0

step() { # step SECONDS MODULE ARGUMENTS...: that module, for at most so long
  local seconds=$1 module=$2 left=$((DEADLINE_S - SECONDS)) began=$SECONDS rc=0
  shift 2
  if [ "$left" -lt 15 ]; then echo "== skipped, no time is left: $module $*"; failed=1; return; fi
  echo "== $module $*"
  timeout "$((seconds < left ? seconds : left))" "$PYTHON" -W ignore -m "tests.bench.$module" "$@" --out "$OUT" || rc=$?
  echo "== exit code $rc after $((SECONDS - began)) s"
  [ "$rc" -eq 0 ] || failed=1
}

speed="gpu_step --model $MODEL --pairs $PAIRS --micro $MICRO --noise-pairs 0"
step 120 gpu_laws --model "$MODEL"
step 110 $speed --checkpointing off --steps 3
step 110 $speed --checkpointing on --steps 3
step 60 gpu_encode --model "$MODEL"
step 90 gpu_step --model "$LARGE" --pairs "$((PAIRS < 8 ? PAIRS : 8))" --micro "$((MICRO < 4 ? MICRO : 4))" \
  --noise-pairs 0 --checkpointing on --steps 2 --rounds 1
step 40 gpu_step --model "$MODEL" --micro 4 --noise-pairs 40 --checkpointing none
step 300 $speed --checkpointing off --steps 3 --rounds 1 --sides ours floor --compile # 110 s and 170 s
exit $failed
