#!/usr/bin/env bash
# compute-sanitizer over every CUDA kernel on the small shapes of small_shapes.py: memcheck, then racecheck.
# Needs the library built for this machine (1_tests.sh does it). Logs go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/gpu/out}
mkdir -p "$OUT"
status=0
for tool in memcheck racecheck; do
  timeout 280 compute-sanitizer --tool "$tool" --kernel-regex kns=moment_ops --error-exitcode 9 \
    "$PYTHON" -m bench.gpu.small_shapes >"$OUT/$tool.log" 2>&1
  code=$?
  echo "$tool: exit $code; $(tail -1 "$OUT/$tool.log")"
  [ "$code" = 0 ] || status=1
done
exit "$status"
