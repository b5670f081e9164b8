#!/bin/sh
# Builds the core with main.cpp under the address and undefined-behaviour sanitizers, then under the thread sanitizer,
# and runs both; needs g++ or clang++ (CXX). With PYTHON, which must have torch and pybind11, it also builds the extension
# module under the first two and runs the fuzzer of the torch front end with it, for CASES programs.
# Flags that decide results are those of CMakeLists.txt. One instruction set: at -O1 no loop is vectorised, and the others
# would only be compiled again. For races it does not matter how an element is stored: a few formats stand for all. The
# bindings are not optimised, so that nothing they read is optimised away.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root="$here/../.."
cpp="$root/cpp"
build="${1:-$root/build/sanitize}"
CXX="${CXX:-c++}"
PYTHON="${PYTHON:-}"
case "$PYTHON" in
  */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; # from here: the compiler is run elsewhere
esac
common="-std=c++17 -g1 -fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -Wall -Wextra -pthread -I$cpp"
common="$common -fno-sanitize-recover=all -DFUSEDOPT_ISA=baseline -DFUSEDOPT_VERSION=\"sanitized\""
core="cpu/cpu cpu/forms cpu/interpret cpu/dispatch cpu/programs network/kernels network/network network/linear step/step step/host
  step/rows step/device step/tensor step/threads"
module="bindings/module bindings/numpy bindings/network bindings/program"
torch="bindings/torch bindings/torch_tensor bindings/arrays bindings/rows"
mkdir -p "$build/memory" "$build/races"

object() { # folder, unit
  echo "$build/$1/$(echo "$2" | sed "s|^$here/||; s|/|_|g").o"
}

compile() { # folder, flags, units
  folder=$1 flags=$2
  shift 2
  for unit; do # shellcheck disable=SC2086
    $CXX $common $flags -c "$unit.cpp" -o "$(object "$folder" "$unit")"
  done
}

run() {
  echo "== $1"
  shift
  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 "$@"
}

memory="-fsanitize=address,undefined" races="-fsanitize=thread"
cd "$cpp"
# shellcheck disable=SC2086
(compile races "-O1 $races -DFUSEDOPT_FEW_FORMATS" $core "$here/main") &
others=$!
# shellcheck disable=SC2086
compile memory "-O1 $memory -fPIC" $core "$here/main"
wait $others
for name in memory races; do
  objects=$(for unit in $core "$here/main"; do object "$name" "$unit"; done)
  eval "sanitizers=\$$name" # shellcheck disable=SC2086,SC2154
  $CXX $sanitizers -pthread $objects -ldl -o "$build/$name/main"
  run "$name" "$build/$name/main"
done

if [ -z "$PYTHON" ]; then
  echo "== no PYTHON given: the torch front end is not run"
  exit
fi
includes=$("$PYTHON" -c 'import pybind11, sysconfig, torch
print("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))')
flags="-O0 $memory -fPIC -fvisibility=hidden $includes"
# shellcheck disable=SC2086
(compile memory "$flags" $module) &
others=$!
# shellcheck disable=SC2086
compile memory "$flags" $torch
wait $others
objects=$(for unit in $core $module $torch; do object memory "$unit"; done)
# shellcheck disable=SC2086
$CXX $memory -shared -pthread $objects -ldl -o "$build/_core.so"
# libstdc++ with it: the sanitizer looks for the function that throws when it starts.
preload="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libstdc++.so)"
run "the torch front end" env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 \
  "$PYTHON" "$here/../torch_front/fuzz_torch.py" --core "$build/_core.so" --cases "${CASES:-40}"
