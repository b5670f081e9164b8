#!/bin/sh
# Builds the core with main.cpp under the address and undefined-behaviour sanitizers, then under the thread sanitizer,
# and runs both. Needs g++ or clang++ (CXX) and nothing of Python. Flags that decide results are those of CMakeLists.txt.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cpp="$here/../../cpp"
build="${1:-$here/../../build/sanitize}"
CXX="${CXX:-c++}"
common="-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -Wall -Wextra -pthread -I$cpp"

case "$(uname -m)" in
  x86_64 | amd64) isas="baseline avx2 avx512" common="$common -DFUSEDOPT_X86" ;;
  *) isas="baseline" ;;
esac

flags_of() {
  case "$1" in
    avx2) echo "-mavx2 -mfma" ;;
    avx512) echo "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl" ;;
  esac
}

for sanitizers in address,undefined thread; do
  out="$build/$sanitizers"
  mkdir -p "$out"
  flags="$common -fsanitize=$sanitizers -fno-sanitize-recover=all"
  pids="" objects=""
  for isa in $isas; do # shellcheck disable=SC2046,SC2086
    $CXX $flags $(flags_of "$isa") -DFUSEDOPT_ISA="$isa" -c "$cpp/cpu.cpp" -o "$out/cpu_$isa.o" &
    pids="$pids $!" objects="$objects $out/cpu_$isa.o"
  done
  for pid in $pids; do wait "$pid"; done
  # shellcheck disable=SC2086
  $CXX $flags "$here/main.cpp" "$cpp/dispatch.cpp" "$cpp/network.cpp" "$cpp/plan.cpp" "$cpp/threads.cpp" $objects -ldl -o "$out/core"
  echo "== $sanitizers"
  UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 "$out/core"
done
