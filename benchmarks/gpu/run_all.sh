#!/usr/bin/env bash
# Everything that wants a GPU, in one command: build, C++ and Python tests, compute-sanitizer, and
# benchmarks against what the device itself can do. No network. Under 8 minutes on 16 cores.
#
#   benchmarks/gpu/run_all.sh [--parts build,cpp,python,sanitizer,bench] [--rehearse] [FOLDER]
#
# FOLDER (else $OUT, else gpu-results) gets a log for each part, results.json and table.txt; parts
# run later into the same folder add to both, so that where a command may last only so long the
# parts can be split: --parts build,cpp,python, then --parts sanitizer, then --parts bench.
# bench=limits+offload runs only these modules of benchmarks/gpu/bench.py.
# Wants python3 with torch 2.11 or newer, pytest, cmake, ninja and pybind11; nvcc for a build with
# CUDA; GoogleTest for the C++ part, which is left out, and said to be, where it is not installed.
# --rehearse: all of it on a machine without a GPU. What needs one skips, benchmarks are small and
# on the CPU, and nothing it writes is a measurement.
# Environment: VRAMKIT_GPU_BUILD (build folder, kept between runs), JOBS, PYTHON, SANITIZED (a
# selection of tests as for pytest's -k).
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
    -*) sed -n '2,18p' "$0"; exit 2 ;;
    *) out=$1; shift ;;
  esac
done
modules=()
IFS=, read -ra asked <<<"$parts"
for part in "${asked[@]}"; do
  case $part in
    build | cpp | python | sanitizer | bench) ;;
    bench=*) IFS=+ read -ra modules <<<"${part#bench=}" ;;
    *) echo "no part '$part': build, cpp, python, sanitizer, bench, bench=MODULE+MODULE" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd)
build=${VRAMKIT_GPU_BUILD:-$root/build/gpu}
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
sanitized=${SANITIZED:-address or kernel or casts or pieces or quantiz or recurrences or convolutions_on_a_gpu or rounded or steps_are or sums_are or an_engine_on}
export PYTHONPATH="$root/python:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
declare -A verdict
order=()
note() { # part, verdict
  [ -n "${verdict[$1]:-}" ] || order+=("$1")
  verdict[$1]=$2
  printf '%4d s  %-28s %s\n' "$SECONDS" "$1" "$2"
}
why() { # log
  grep -E 'error|Error|ERROR|FAILED|failed' "$1" | tail -n 1 | cut -c1-160
}
# A part that hangs must not cost the others their turn: seconds, part, command.
run() {
  local limit=$1 part=$2 begin=$SECONDS
  shift 2
  if timeout --kill-after=10 "$limit" "$@" >"$out/$part.log" 2>&1; then
    note "$part" "passed in $((SECONDS - begin)) s"
  else
    local status=$?
    note "$part" "FAILED with status $status: $(why "$out/$part.log")"
    return 1
  fi
}
# The same for pytest: what it counted, and a selection that has no test here is none.
tests() {
  local limit=$1 part=$2 begin=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$part.log" 2>&1
  status=$?
  case $status in
    0) note "$part" "$(tail -n 1 "$out/$part.log" | tr -d '=' | cut -c1-100)" ;;
    5) note "$part" "NOT RUN: no test of this selection" ;;
    124 | 137) note "$part" "FAILED: not done after $((SECONDS - begin)) s; $(why "$out/$part.log")" ;;
    *) note "$part" "FAILED with status $status: $(why "$out/$part.log")" ;;
  esac
}
wants() { [[ ,$parts, == *,$1,* || ,$parts, == *,$1=* ]]; }

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
# Tests in C++ are built where they are asked for: they take longer than all else.
if wants cpp && { [ -e /usr/include/gtest/gtest.h ] || [ -n "${GTest_ROOT:-}" ]; }; then gtest=ON; fi
build_all() {
  "$python" -c 'import pybind11' &&
    cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVRAMKIT_TESTS=$gtest \
      -DPython_EXECUTABLE="$(command -v "$python")" \
      -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$build" -j "$jobs" || return 1
  for module in "$build"/_core*.so "$build"/_ops.so "$build"/_ops_cuda.so; do
    [ -e "$module" ] || continue
    # Renamed into place: a file that a running Python has loaded must not change.
    cp -f "$module" "$root/python/vramkit/.new" && mv -f "$root/python/vramkit/.new" "$root/python/vramkit/$(basename "$module")" || return 1
  done
  [ -e "$build/_ops.so" ] && { [ "$rehearse" = 1 ] || [ -e "$build/_ops_cuda.so" ]; }
}
export -f build_all
export root build gtest python jobs rehearse
if wants build; then
  run 480 build bash -c build_all || { echo "nothing else can run"; tail -n 20 "$out/build.log"; exit 1; }
fi

if wants cpp; then
  if [ -x "$build/vramkit_tests" ]; then
    run 120 cpp "$build/vramkit_tests" --gtest_filter='*Engine*:*Cuda*' --gtest_brief=1
  elif [ $gtest = ON ]; then
    note cpp "NOT RUN: not built; run the part build first"
  else
    note cpp "NOT RUN: GoogleTest is not installed here"
  fi
fi

pytest=("$python" -m pytest -q -p no:cacheprovider --no-header)
if wants python; then
  for file in tests/python/test_{cuda*,offload_cuda*,offload_graphs,engine,int8,recurrent_int8,stochastic,fp8_*}.py; do
    [ -e "$file" ] || continue
    name=$(basename "$file" .py)
    # A rehearsal may be on a machine that is slow, and others' too.
    tests $((rehearse ? 400 : 120)) "python-${name#test_}" "${pytest[@]}" "$file"
  done
fi

if wants sanitizer; then
  if [ "$rehearse" = 1 ]; then
    # What would run under it does so here, as far as it needs no GPU.
    tests 120 sanitizer-rehearsed "${pytest[@]}" tests/python/test_cuda*.py -k "$sanitized"
  elif ! command -v compute-sanitizer >/dev/null; then
    note sanitizer "NOT RUN: compute-sanitizer is not installed here"
  else
    for tool in memcheck racecheck synccheck; do
      tests 120 "sanitizer-$tool" compute-sanitizer --tool $tool --error-exitcode 9 \
        --target-processes all --launch-timeout 60 \
        "${pytest[@]}" -x tests/python/test_cuda*.py -k "$sanitized"
    done
  fi
fi

if wants bench; then
  options=()
  [ "$rehearse" = 1 ] && options+=(--rehearse)
  run 300 bench "$python" -m benchmarks.gpu.bench "${modules[@]}" --json "$out/bench.json" --table "$out/bench.txt" "${options[@]}"
fi

"$python" - "$out" "$gpu" "$rehearse" "$SECONDS" "$(for part in "${order[@]}"; do printf '%s\t%s\n' "$part" "${verdict[$part]}"; done)" <<'PY'
import json, pathlib, sys

folder, gpu, rehearse, seconds, verdicts = sys.argv[1:]
path, bench = pathlib.Path(folder, "results.json"), pathlib.Path(folder, "bench.json")
before = json.loads(path.read_text()) if path.exists() else {}
if (before.get("gpu"), before.get("rehearsal")) != (gpu, rehearse == "1"):
    before = {}
parts = dict(line.split("\t", 1) for line in verdicts.splitlines())
result = {
    "gpu": gpu,
    "rehearsal": rehearse == "1",
    "seconds": int(seconds) + before.get("seconds", 0),
    "parts": {**before.get("parts", {}), **parts},
    "bench": json.loads(bench.read_text()) if bench.exists() else None,
}
path.write_text(json.dumps(result, indent=1) + "\n")
lines = [f"GPU: {gpu}"]
if result["rehearsal"]:
    lines.append("REHEARSAL on a CPU: nothing below was measured on a GPU")
lines += [f"{part:28} {text}" for part, text in result["parts"].items()]
table = pathlib.Path(folder, "bench.txt")
if table.exists():
    lines += ["", table.read_text().rstrip()]
pathlib.Path(folder, "table.txt").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
PY
failed=0
for part in "${order[@]}"; do [[ ${verdict[$part]} == FAILED* ]] && failed=1; done
exit $failed
