#!/bin/sh
# Builds the core with main.cpp under the address and undefined-behaviour sanitizers, then under the thread sanitizer,
# and runs both. Needs g++ or clang++ (CXX) and nothing of Python. Flags that decide results are those of CMakeLists.txt.
# One instruction set: at -O1 no loop is vectorised, and the others would only be compiled again. For races it does not
# matter how an element is stored: a few formats stand for all.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cpp="$here/../../cpp"
build="${1:-$here/../../build/sanitize}"
CXX="${CXX:-c++}"
common="-std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -Wall -Wextra -pthread -I$cpp -DFUSEDOPT_VERSION=\"sanitize\""
mkdir -p "$build"

compile() { # name, sanitizers, more flags
  name=$1 sanitizers=$2
  shift 2 # shellcheck disable=SC2086
  $CXX $common -fsanitize="$sanitizers" -fno-sanitize-recover=all "$@" -DFUSEDOPT_ISA=baseline "$cpp/cpu/cpu.cpp" "$cpp/network/kernels.cpp" \
    "$here/main.cpp" "$cpp/cpu/dispatch.cpp" "$cpp/network/network.cpp" "$cpp/step/step.cpp" "$cpp/step/host.cpp" \
    "$cpp/step/device.cpp" "$cpp/step/tensor.cpp" "$cpp/step/threads.cpp" -ldl -o "$build/$name"
}

compile races thread -DFUSEDOPT_FEW_FORMATS &
races=$!
compile memory address,undefined
wait $races
for name in memory races; do
  echo "== $name"
  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 "$build/$name"
done
