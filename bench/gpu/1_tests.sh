#!/usr/bin/env bash
# Does a library that was built elsewhere load here? Then the build from source, and every operator on every GPU backend.
# Needs no network: a PYTHON with torch, triton, numpy, pytest and setuptools, and nvcc. Logs go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/gpu/out}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for so in moment_ops/_C*.so; do
  [ -e "$so" ] && echo "built elsewhere: $so" && "$PYTHON" -m moment_ops.training.command_line env | tee "$OUT/built-elsewhere.txt"
done
"$PYTHON" setup.py -q build_ext --inplace >"$OUT/build.log" 2>&1 || { tail -40 "$OUT/build.log"; exit 1; }
"$PYTHON" -m moment_ops.training.command_line env | tee "$OUT/built-here.txt"
"$PYTHON" -m pytest tests/gpu -q -rs --maxfail=40 2>&1 | tee "$OUT/tests.log" | tail -60
exit "${PIPESTATUS[0]}"
