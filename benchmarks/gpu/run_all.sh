#!/usr/bin/env bash
# Everything that wants a GPU, in one command: build, C++ and Python tests, compute-sanitizer, and
# benchmarks against what the device itself can do. No network.
#
#   benchmarks/gpu/run_all.sh [--parts build,cpp,python,sanitizer,bench] [--rehearse] [FOLDER]
#
# FOLDER (else $OUT, else gpu-results) gets a log for each part, results.json and table.txt. Wants
# python3 with torch 2.11 or newer, pytest, cmake, ninja and pybind11; nvcc for a build with CUDA;
# GoogleTest for the C++ part, which is left out, and said to be, where it is not installed.
# --rehearse: all of it on a machine without a GPU. What needs one skips, benchmarks are small and
# on the CPU, and nothing it writes is a measurement.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
parts=build,cpp,python,sanitizer,bench
rehearse=0
out=${OUT:-gpu-results}
while [ $# -gt 0 ]; do
  case $1 in
    --parts) parts=$2; shift 2 ;;
    --rehearse) rehearse=1; shift ;;
    -*) sed -n '2,14p' "$0"; exit 2 ;;
    *) out=$1; shift ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd)
build=${VRAMKIT_GPU_BUILD:-$root/build/gpu}
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
export PYTHONPATH="$root/python:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
declare -A verdict
order=()
note() { # part, verdict
  [ -n "${verdict[$1]:-}" ] || order+=("$1")
  verdict[$1]=$2
  printf '%4d s  %-10s %s\n' "$SECONDS" "$1" "$2"
}
# A part that hangs must not cost the others their turn: seconds, part, command.
run() {
  local limit=$1 part=$2
  shift 2
  if timeout "$limit" "$@" >"$out/$part.log" 2>&1; then
    note "$part" "passed"
  else
    local status=$?
    note "$part" "FAILED with status $status: $(grep -E 'error|Error|FAILED|failed' "$out/$part.log" | tail -n 1 | cut -c1-160)"
    return 1
  fi
}
wants() { [[ ,$parts, == *,$1,* ]]; }

gpu="none"
command -v nvidia-smi >/dev/null && gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || gpu=none
if [ "$gpu" = none ] && [ "$rehearse" = 0 ]; then
  echo "no GPU (nvidia-smi finds none); --rehearse runs what needs none" >&2
  exit 2
fi
[ "$rehearse" = 1 ] || export REQUIRE_GPU=1
echo "GPU: $gpu; rehearsal: $rehearse; $("$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)')"

gtest=OFF
if [ -e /usr/include/gtest/gtest.h ] || [ -n "${GTest_ROOT:-}" ]; then gtest=ON; fi
build_all() {
  "$python" -c 'import pybind11' &&
    cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVRAMKIT_TESTS=$gtest \
      -DPython_EXECUTABLE="$(command -v "$python")" \
      -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$build" -j "$jobs" &&
    for module in "$build"/_core*.so "$build"/_ops.so "$build"/_ops_cuda.so; do
      [ -e "$module" ] && cp -f "$module" "$root/python/vramkit/"
    done
  [ -e "$build/_ops.so" ] && { [ "$rehearse" = 1 ] || [ -e "$build/_ops_cuda.so" ]; }
}
export -f build_all
export root build gtest python jobs rehearse
if wants build; then
  run 420 build bash -c build_all || { echo "nothing else can run"; exit 1; }
fi

if wants cpp; then
  if [ -x "$build/vramkit_tests" ]; then
    filter='*Engine*:CudaDecode*'
    run 120 cpp "$build/vramkit_tests" --gtest_filter="$filter"
  elif [ $gtest = ON ]; then
    note cpp "NOT RUN: not built; run the part build first"
  else
    note cpp "NOT RUN: GoogleTest is not installed here"
  fi
fi

if wants python; then
  run 120 python "$python" -m pytest -q -p no:cacheprovider tests/python/test_cuda.py tests/python/test_engine.py
fi

if wants sanitizer; then
  if [ "$rehearse" = 1 ]; then
    note sanitizer "NOT RUN: needs a GPU"
  elif ! command -v compute-sanitizer >/dev/null; then
    note sanitizer "NOT RUN: compute-sanitizer is not installed here"
  else
    for tool in memcheck racecheck; do
      run 120 "sanitizer-$tool" compute-sanitizer --tool $tool --error-exitcode 9 --launch-timeout 60 \
        "$python" -m pytest -q -p no:cacheprovider tests/python/test_cuda.py \
        -k 'decoding_from_any_address or casts or an_engine_on'
    done
  fi
fi

if wants bench; then
  options=()
  [ "$rehearse" = 1 ] && options+=(--rehearse)
  run 180 bench "$python" -m benchmarks.gpu.bench --json "$out/bench.json" --table "$out/bench.txt" "${options[@]}"
fi

failed=0
{
  echo "GPU: $gpu"
  [ "$rehearse" = 1 ] && echo "REHEARSAL on a CPU: nothing below was measured on a GPU"
  for part in "${order[@]}"; do
    printf '%-20s %s\n' "$part" "${verdict[$part]}"
  done
  [ -e "$out/bench.txt" ] && cat "$out/bench.txt"
} >"$out/table.txt"
for part in "${order[@]}"; do [[ ${verdict[$part]} == FAILED* ]] && failed=1; done
"$python" - "$out" "$gpu" "$rehearse" "$SECONDS" "$(for part in "${order[@]}"; do printf '%s\t%s\n' "$part" "${verdict[$part]}"; done)" <<'PY'
import json, pathlib, sys
folder, gpu, rehearse, seconds, verdicts = sys.argv[1:]
bench = pathlib.Path(folder, "bench.json")
result = {
    "gpu": gpu,
    "rehearsal": rehearse == "1",
    "seconds": int(seconds),
    "parts": dict(line.split("\t", 1) for line in verdicts.splitlines()),
    "bench": json.loads(bench.read_text()) if bench.exists() else None,
}
pathlib.Path(folder, "results.json").write_text(json.dumps(result, indent=1) + "\n")
PY
cat "$out/table.txt"
exit $failed
