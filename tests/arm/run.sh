#!/bin/sh
# The results of aarch64 are those of this processor: builds the core with tests/sanitize/main.cpp for both, with the
# flags of CMakeLists.txt, runs the aarch64 program under emulation, and compares a digest of every rule and form, and of
# the losses and layers. CXX is this processor's compiler (g++ or clang++), ARM_CXX the cross compiler, EMULATOR runs its
# programs. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cpp="$here/../../cpp"
build="${1:-$here/../../build/arm}"
CXX="${CXX:-c++}"
ARM_CXX="${ARM_CXX:-aarch64-linux-gnu-g++}"
EMULATOR="${EMULATOR:-qemu-aarch64-static}"
flags="-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -pthread -I$cpp"
flags="$flags -DFUSEDOPT_ISA=baseline -DFUSEDOPT_VERSION=\"arm\""
units="cpu/forms cpu/interpret cpu/dispatch cpu/programs network/kernels network/network network/linear step/step step/host
  step/rows step/device step/tensor step/threads"

for tool in "$ARM_CXX" "$EMULATOR"; do
  command -v "$tool" >/dev/null || { echo "$tool was not found: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 2; }
done

compile() { # folder, compiler; further flags of the instruction set
  folder="$build/$1" compiler=$2
  shift 2
  mkdir -p "$folder"
  for unit in $units; do # shellcheck disable=SC2086
    $compiler $flags "$@" -c "$cpp/$unit.cpp" -o "$folder/$(basename "$unit").o"
  done
  for part in 0 1; do # shellcheck disable=SC2086
    $compiler $flags "$@" -DFUSEDOPT_PART=$part -DFUSEDOPT_PARTS=2 -c "$cpp/cpu/cpu.cpp" -o "$folder/cpu_$part.o"
  done
  # shellcheck disable=SC2086
  $compiler $flags -O1 -c "$here/../sanitize/main.cpp" -o "$folder/main.o"
  # shellcheck disable=SC2086
  $compiler $flags -static "$folder"/*.o -ldl -o "$folder/main"
}

# On this processor with fused multiply-add in hardware where the compiler knows how: the baseline of x86 emulates it.
case $(uname -m) in x86_64) native="-mavx2 -mfma" ;; *) native="" ;; esac
# shellcheck disable=SC2086
compile host "$CXX" $native &
host=$!
compile aarch64 "$ARM_CXX"
wait $host
"$build/host/main" --digest >"$build/host.txt"
"$EMULATOR" "$build/aarch64/main" --digest >"$build/aarch64.txt"
diff "$build/host.txt" "$build/aarch64.txt" || { echo "aarch64 differs from $(uname -m)" >&2; exit 1; }
echo "aarch64 gives the results of $(uname -m): $(wc -l <"$build/host.txt") of $(wc -l <"$build/host.txt") digests are equal"
