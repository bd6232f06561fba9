#!/usr/bin/env bash
# Every benchmark on the GPU, against eager PyTorch and torch.compile in the same run; raw results and plots.
# Needs the library built for this machine (1_tests.sh does it). Results go to $OUT, to be kept in bench/results/<device>.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/gpu/out}
mkdir -p "$OUT"
timeout 560 "$PYTHON" -m bench --device cuda --output "$OUT" 2>&1 | tee "$OUT/bench.log" | tail -80
exit "${PIPESTATUS[0]}"
