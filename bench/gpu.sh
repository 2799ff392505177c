#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, and prints a short table last:
#
#     bench/gpu.sh OUT
#
# Needs torch with CUDA, nvcc, ninja, setuptools, pybind11, numpy, pytest and no network; without
# matplotlib there are no pictures, without compute-sanitizer no sanitizer runs. Into the folder OUT
# come the benchmarks' JSON and PNG files, summary.txt, and under logs/ what each section printed.
# A section that fails or takes too long does not stop the next. The exit status is 1 if one did, or
# if one had no time left.
#
# Variables: SNF_GPU_BUDGET_S, seconds for everything (540); SNF_COMMIT, the commit where the
# working tree has no history; PYTHON, the interpreter (python, or python3); MAX_JOBS, compilers.
#
# SNF_TABLE1=DIR builds and then does one thing: the fully connected row of the paper's Table 1 at
# full scale, one seed, from MNIST in DIR, into OUT/reproduced. That is 6,000 epochs, which may need
# more than one call: SNF_EARLIER, the OUT/reproduced of the call before, is where it goes on. Needs
# the packages of the extra [train] too.
set -uo pipefail

[ $# = 1 ] || { echo "usage: bench/gpu.sh OUT" >&2; exit 2; }
mkdir -p "$1/logs" || exit 2
out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-$(command -v python || command -v python3)} || { echo "no python" >&2; exit 2; }
budget=${SNF_GPU_BUDGET_S:-540}
reserve=10 # seconds kept for the table and for what has to be killed
export PYTHONUNBUFFERED=1 MPLBACKEND=Agg
# What runs is what gets built, for the GPU that is here.
unset TORCH_CUDA_ARCH_LIST SNF_EXT_NO_CUDA SNF_EXT_NO_EXT SNF_EXT_BACKEND
rm -f "$out"/{conv,linear,models,spline}-cuda.{json,png} "$out"/inverse-time-*-cuda.json # earlier

table=() failed=0
row() { table+=("$(printf '%-14s %-9s %4d s  %s' "$@")"); }
skip() { row "$1" skipped 0 "$2"; echo "==== $1: skipped, $2"; }

# section NAME LIMIT COMMAND...: runs COMMAND for at most LIMIT seconds and what is left of the
# budget. The last line that it prints is its note in the table.
section() {
  local name=$1 limit=$2 log=$out/logs/$1.log began=$SECONDS status took word=FAILED
  shift 2
  local left=$((budget - reserve - SECONDS))
  if [ "$left" -lt 1 ]; then
    skip "$name" "no time left"
    failed=1
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "==== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 </dev/null
  status=$? took=$((SECONDS - began))
  case $status in
    0) word=ok ;;
    124) word="timed out" ;;
    137) [ "$took" -lt "$limit" ] || word="timed out" ;; # killed, by us or for its memory
  esac
  if [ "$word" != ok ]; then
    failed=1
    tail -n 25 "$log"
    echo "---- $name: $word, exit status $status, all of it in logs/$name.log"
  fi
  row "$name" "$word" "$took" "$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-90)"
  [ "$word" = ok ]
}

# A test module that cannot be imported for want of a package is skipped, another is an error.
tests=("$python" -m pytest -p bench.missing_packages -p no:cacheprovider -m cuda
  --continue-on-collection-errors -q -rfE)

# sanitizer TOOL LIMIT: our kernels against the dense ground truth, under compute-sanitizer.
sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [ -z "$tool" ]; then
    skip "$1" "compute-sanitizer is not installed"
    return
  fi
  # Our kernels alone: torch's are many, slow to instrument, and not ours to mend (racecheck itself
  # fails in its convolutions of many channels). Allocations come
  # one by one from the driver, so that memcheck sees the end of each tensor.
  section "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" \
    --target-processes all --report-api-errors no --error-exitcode 99 \
    --kernel-name kernel_substring=snf \
    "${tests[@]}" tests/test_ops.py \
    -k "equals_dense and float32 and native and not channels-66 and not channels-134"
}

# benchmark SUITE LIMIT
benchmark() {
  local compile=(--compile)
  [ "$1" != models ] || compile=() # it would take minutes
  section "$1" "$2" "$python" -m bench.compare "$1" --device cuda --graph "${compile[@]}" \
    --rounds 11 --min-sample 0.01 --out "$out/$1-cuda.json" --plot "$out/$1-cuda.png"
}

# inverses MODEL LIMIT: ways to keep the learned inverse
inverses() {
  section "inverse-$1" "$2" "$python" -m bench.inverse_time "$1" --device cuda --rounds 5 \
    --out "$out/inverse-time-$1-cuda.json"
}

nvcc --version 2>&1 | tail -n 2
section device 60 "$python" -m bench.report cuda && cat "$out/logs/device.log"
section build 270 env SNF_EXT_REQUIRE_EXT=1 FORCE_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
  "$python" setup.py build_ext --inplace
if [ -n "${SNF_TABLE1:-}" ]; then
  [ -z "${SNF_EARLIER:-}" ] || cp -r "$SNF_EARLIER" "$out/reproduced"
  section table1 "$budget" "$python" -m snf_ext reproduce table1 --only fc-snf --seeds 1 \
    --data-dir "$SNF_TABLE1" --out "$out/reproduced" --device cuda --no-progress
  printf '%s\n' "${table[@]}" >"$out/summary.txt"
  cat "$out/summary.txt"
  exit $failed
fi
section tests 120 "${tests[@]}" tests --junitxml "$out/logs/tests.xml"
if compgen -G "tests/test_graphed*.py" >/dev/null; then
  section graph 60 "${tests[@]}" tests/test_graphed*.py
else
  skip graph "there are no tests/test_graphed*.py"
fi
# The times before the sanitizers: if something has to fall to the deadline, then what can be
# repeated with less.
benchmark conv 150
benchmark linear 90
benchmark models 40
benchmark spline 40
inverses fc 40
inverses conv 60
sanitizer memcheck 75
sanitizer racecheck 75

{
  printf '%s\n' "${table[@]}" "total $SECONDS s" ""
  "$python" -m bench.summary "$out" || echo "no table of the layers"
} >"$out/summary.txt.part" 2>&1
mv "$out/summary.txt.part" "$out/summary.txt"
printf '\n'
cat "$out/summary.txt"
exit $failed
