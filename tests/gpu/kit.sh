#!/bin/sh
# The tests and the benchmark of a GPU, from a kit: a folder with a wheel of fusedopt (the CUDA library in it), the tools
# that the tests import, tests and scripts. To use a kit takes the torch and NumPy that PYTHON has, and no network.
#   kit.sh kit FOLDER                 makes one for the version of PYTHON and the GPUs of CUDAARCHS; needs nvcc, no GPU
#   kit.sh test FOLDER [arguments]    of pytest, which stops at the first failure unless told otherwise
#   kit.sh bench FOLDER --json FILE [--case TEXT] [arguments of fusedopt bench]    each case in a process of its own
set -eu
verb=$1 kit=$2
shift 2
PYTHON=${PYTHON:-python3}

make_kit() {
  here=$(cd "$(dirname "$0")/../.." && pwd)
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  architectures=${CUDAARCHS:-$(if command -v nvidia-smi >/dev/null; then echo native; else echo 90; fi)}
  builder="$here/build/gpu-builder-$version"
  [ -x "$builder/bin/python" ] || "$PYTHON" -m venv "$builder"
  pip="$builder/bin/python -m pip --disable-pip-version-check --quiet"
  $pip install -c "$here/constraints.txt" scikit-build-core pybind11 cmake ninja
  rm -rf "$kit"
  mkdir -p "$kit/tests" "$kit/bench"
  $pip wheel --no-deps --no-build-isolation --wheel-dir "$kit" "$here" -C build-dir="$here/build/gpu-$version" \
    -C cmake.define.FUSEDOPT_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$architectures"
  $pip download --no-deps --only-binary=:all: -c "$here/constraints.txt" --dest "$kit/tools" \
    pytest iniconfig packaging pluggy pygments hypothesis sortedcontainers ml_dtypes
  cp -r "$here/tests/conftest.py" "$here/tests/support" "$here/tests/gpu" "$kit/tests"
  cp "$here"/bench/*.py "$kit/bench"
  cp "$here/pyproject.toml" "$kit"
  touch "$kit/.made"
  echo "$kit: for Python $version and the architectures $architectures"
}

# In a folder of its own and not where PYTHON keeps its packages; rebuilt when the wheel is another.
install() {
  [ "$kit/site/.installed" -nt "$kit/.made" ] && return
  rm -rf "$kit/site"
  "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --target "$kit/site" \
    "$kit"/*.whl "$kit"/tools/*.whl
  touch "$kit/site/.installed"
}

case $verb in
  kit) make_kit ;;
  test)
    install
    cd "$kit"
    # Plugins that the machine happens to have are none of the tests'; and what its torch or NumPy will do away with in
    # a later version is no failure.
    PYTHONPATH=$PWD/site PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$PYTHON" -m pytest -m gpu --gpu -x --tb=short --no-showlocals \
      -W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning \
      -p no:cacheprovider -o testpaths=tests/gpu "$@"
    ;;
  bench)
    install
    PYTHONPATH=$(cd "$kit" && pwd)/site "$PYTHON" -c '
import sys
from fusedopt.bench.gpu import main
sys.exit(main())' "$@"
    ;;
  *) echo "kit.sh: kit, test or bench, not '$verb'" >&2 && exit 2 ;;
esac
