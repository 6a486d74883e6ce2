#!/usr/bin/env bash
# Build, test and measure on a machine with a GPU, in one call of under nine minutes.
#
#   benchmarks/device.sh [OUT]
#
# Needs torch >= 2.11 with CUDA, nvcc, cmake, ninja, pybind11, pytest and pytest-benchmark in
# the current Python; tests that need diffusers are left out, and said so, where it is missing.
# Writes to OUT (default: out/device): build.log, tests.log, ops-*.json and models-cuda.json, each
# with a Markdown table. The models come last and get the time that is left; their results are
# written one by one.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-out/device}" && cd "${1:-out/device}" && pwd)
python=${PYTHON:-python3}
capability=$($python -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "")')
export ACCELRT_CUDA_ARCHS=${ACCELRT_CUDA_ARCHS:-${capability/90/90a}}
export ACCELRT_BUILD_DIR=$PWD/build/device
export PYTHONPATH=$PWD
status=0

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "build for sm_${ACCELRT_CUDA_ARCHS:-all}"
torch_dir=$($python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
cmake -S . -B "$ACCELRT_BUILD_DIR" -G Ninja -DACCELRT_PYTHON=ON -DCMAKE_BUILD_TYPE=Release \
  -DACCELRT_TORCH_DIR="$torch_dir" -Dpybind11_DIR="$($python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v $python)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/accelrt" \
  ${ACCELRT_CUDA_ARCHS:+-DACCELRT_CUDA_ARCHS=$ACCELRT_CUDA_ARCHS} > "$out/build.log" 2>&1 &&
  cmake --build "$ACCELRT_BUILD_DIR" --target _C >> "$out/build.log" 2>&1 ||
  { tail -n 40 "$out/build.log"; exit 1; }

step "tests"
selection=(tests)
if ! $python -c 'import diffusers' 2> /dev/null; then
  echo "diffusers is not installed: only the operators' tests run"
  selection=(tests/test_ops_*.py)
fi
# The simulator and the architectures are checked on machines without a GPU.
timeout 240 $python -m pytest "${selection[@]}" -k "not simulated and not simulator and not architectures" \
  > "$out/tests.log" 2>&1 || status=1
tail -n 3 "$out/tests.log"

step "operators"
timeout 200 $python -m pytest benchmarks/ops --bench-save --bench-dtypes "${BENCH_DTYPES:-bf16}" \
  > "$out/bench.log" 2>&1 || status=1
grep -E '^\|' "$out/bench.log"
cp benchmarks/results/ops-*.json benchmarks/results/ops-*.md "$out"/ 2> /dev/null

step "models"
if $python -c 'import diffusers, typer, rich, yaml' 2> /dev/null; then
  timeout $((SECONDS < 500 ? 530 - SECONDS : 30)) $python -m accelrt bench --model all \
    --device cuda --repeats 5 --out "$out" > "$out/models.log" 2>&1 ||
    { status=1; tail -n 20 "$out/models.log"; }
  cat "$out/models-cuda.md"
else
  echo "diffusers, typer, rich or PyYAML is not installed: no models are measured"
fi

step "done, status $status"
exit $status
