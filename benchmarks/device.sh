#!/usr/bin/env bash
# Build, test and measure on a machine with a GPU, in one call of under nine minutes.
#
#   benchmarks/device.sh [OUT]          results to OUT (default: out/device)
#
# Needs a GPU, nvcc, torch >= 2.11 with CUDA and what `pip install --group test` installs;
# benchmarks/device/device_probe.py says what is missing, before anything is built (status 2).
#
# OUT/device.md and OUT/device.json hold the ceilings (copy, large product), every operator and
# its share of them against eager, each backend of SDPA and torch.compile (max-autotune), with
# torch's products and with our own kernels for them (ACCELRT_CUDA_PRODUCTS), and whole forwards
# with memory and energy, also as CUDA graphs, and with two slices at a time (pipeline_slices)
# against one. They are written anew after every section; logs lie beside them. A section that runs
# out of its seconds is ended, one for which none are left is left out, and both are said.
#
# Variables:
#   PYTHON                default python3
#   SECTIONS              which run, default "build tests exactness operators models"; also:
#                         sanitizer ncu (they want time: name fewer others)
#   TOTAL                 seconds of all sections, default 530
#   KERNELS               operators that ncu looks at, default attention,linear,temporal_attention
#   ACCELRT_CUDA_ARCHS    default: that of the GPU
# Compiled code stays in build/device, so that a second call on the same machine gets further.
# shellcheck disable=SC2317,SC2153  # functions are called by name in a shell of their own
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
sections=${SECTIONS:-build tests exactness operators models}
total=${TOTAL:-530}
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
capability=$("$python" benchmarks/device/device_probe.py) || {
  echo "device.sh: this machine is not fit for it; nothing was built" >&2
  exit 2
}

out=$(mkdir -p "${1:-out/device}" && cd "${1:-out/device}" && pwd)
export ACCELRT_CUDA_ARCHS=${ACCELRT_CUDA_ARCHS:-$capability}
export ACCELRT_BUILD_DIR=$PWD/build/device
export TORCHINDUCTOR_CACHE_DIR=$ACCELRT_BUILD_DIR/inductor
export PYTHONPATH=$PWD
work=$ACCELRT_BUILD_DIR/results
rm -rf "$work" && mkdir -p "$work"
status=0

# run NAME SECONDS COMMAND...: within its seconds and those that are left; its output is NAME.log.
run() {
  local name=$1 limit=$2 began=$SECONDS result=passed
  shift 2
  [[ " $sections " == *" $name "* ]] || return 0
  ((limit > total - SECONDS)) && limit=$((total - SECONDS))
  printf '== %s (%ss gone, %ss at most)\n' "$name" "$SECONDS" "$limit"
  if ((limit < 3)); then
    result="left out: no time" limit=0
  else
    # The commands stop by themselves a little earlier; this is for those that hang.
    LIMIT=$((limit > 20 ? limit - 8 : limit - 1)) timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
    case $? in
      0) ;;
      124 | 137) result="out of time" ;;
      *) result=failed ;;
    esac
  fi
  [[ $result == passed ]] || { status=1; echo "$result"; tail -n 15 "$out/$name.log" 2> /dev/null; }
  printf '%s\t%s\t%s\t%s\n' "$name" "$result" $((SECONDS - began)) "$limit" >> "$work/sections.tsv"
  "$python" benchmarks/device/device_report.py "$work" "$out"
  [[ $result == passed ]]
}

build() {
  local torch_dir
  torch_dir=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))') &&
    cmake -S . -B "$ACCELRT_BUILD_DIR" -G Ninja -DACCELRT_PYTHON=ON -DCMAKE_BUILD_TYPE=Release \
      -DACCELRT_CUDA=1 -DACCELRT_CUDA_ARCHS="$ACCELRT_CUDA_ARCHS" \
      -DACCELRT_TORCH_DIR="$torch_dir" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
      -DPython_EXECUTABLE="$(command -v "$python")" \
      -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/accelrt" &&
    cmake --build "$ACCELRT_BUILD_DIR" --target _C
}

# What takes the device as a parameter or wants a GPU; the simulator is built and tested on
# machines without one.
tests() {
  local workers=() chosen="(cuda or a_gpu) and not simulat and not cuda_source"
  "$python" -c 'import xdist' 2> /dev/null && workers=(-n 4 --dist worksteal)
  "$python" -m pytest tests/test_ops_*.py tests/test_arena.py tests/test_products.py \
    tests/test_graphs.py tests/test_pipelining.py "${workers[@]}" -k "$chosen" -rs &&
    ACCELRT_CUDA_PRODUCTS=own "$python" -m pytest "${workers[@]}" -k "$chosen" -rs \
      tests/test_ops_attention.py tests/test_ops_linear.py tests/test_ops_block.py
}

# Every model at a trial size, wrapped, against the rule on errors.
exactness() {
  local dtype
  for dtype in fp32 bf16; do
    "$python" -m accelrt bench --model all --size tiny --device cuda --dtype "$dtype" \
      --repeats 0 --no-switches || return
  done
}

operators() { "$python" benchmarks/device/device_operators.py --device cuda --seconds "$LIMIT" "$@"; }
models() { "$python" benchmarks/device/device_models.py --device cuda --seconds "$LIMIT" "$@"; }

# Out of bounds, and races in shared memory, of the kernels on the device itself.
sanitizer() {
  local tool
  command -v compute-sanitizer || { echo "compute-sanitizer is not installed"; return 0; }
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 86 --target-processes all \
      "$python" benchmarks/device/device_operators.py --once --size tiny || return
  done
}

# What limits the chosen kernels; needs the right to read the counters.
counters() {
  command -v ncu || { echo "ncu is not installed"; return 0; }
  ncu --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis \
    --section Occupancy --section LaunchStats --section WarpStateStats \
    --kernel-name-base demangled --kernel-name regex:accelrt --launch-count 40 \
    "$python" benchmarks/device/device_operators.py --once \
    --only "${KERNELS:-attention,linear,temporal_attention}"
}

# `timeout` runs programs, not functions: each section is this script's function in a new shell.
export python
export -f build tests exactness operators models sanitizer counters
section() { run "$1" "$2" bash -c 'set -uo pipefail; "$@"' section "${@:3}"; }

section build 150 build || exit 1
section tests 100 tests
section exactness 40 exactness
section operators 130 operators --out "$work/operators.json"
section models 250 models --out "$work/models.json"
section sanitizer 120 sanitizer
section ncu 90 counters

cat "$out/device.md"
echo "== done after ${SECONDS}s, status $status: $out/device.md, $out/device.json"
exit $status
