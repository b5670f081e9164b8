# Everything a fresh clone needs: `make demo`, `make test`. The environment is .venv, with the versions of constraints.txt;
# build tools come as wheels, so Python, pip and a C++ compiler are enough. ARGS is handed on: make test ARGS="-k adam".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
BUILD_TOOLS := 'pip>=23.1' scikit-build-core pybind11 cmake ninja
SOURCES := CMakeLists.txt pyproject.toml constraints.txt \
  $(shell find cpp -type f) $(shell find python/fusedopt -name '*.py')
CPP := $(shell find cpp tests/sanitize -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# A kit that is named is used as it is, be it from another machine; the one that is not is kept up to date.
KIT ?= build/gpu-kit
FRESH_KIT := $(if $(filter file,$(origin KIT)),$(KIT)/.made)
export PYTHON
CHECKED := python tests bench examples docs

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test docs gpu-kit test-gpu integrations bench bench-gpu lint format stubs sanitize arm matrix cuda vectorized clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.demo ## train on real data with torch.optim, fusedopt and NumPy; table and pictures in demo-output
	$(PY) examples/digits.py $(ARGS)

test: $(VENV)/.test ## the tests, on every processor; ARGS="-n 0 -k adam" in one process
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

gpu-kit: ## all that a machine with a GPU needs, in one folder, for PYTHON's version; CUDAARCHS=90; needs nvcc, no GPU
	sh tests/gpu/kit.sh kit $(KIT)

test-gpu: $(FRESH_KIT) ## the tests that need a GPU, with the torch that PYTHON has; KIT=folder takes that kit
	sh tests/gpu/kit.sh test $(KIT) $(ARGS)

docs: $(VENV)/.docs ## the documentation site, in build/docs/index.html; a warning is an error; ARGS="-E" reads every page anew
	$(PY) -m sphinx -W --keep-going -q -d build/docs-cache $(ARGS) docs build/docs

integrations: $(VENV)/.integrations ## the tests with every trainer installed; writes docs/integrations-table.md
	$(PY) -m pytest --integrations -m integration $(ARGS)

bench: $(VENV)/.bench ## every rule against PyTorch; table, JSON and pictures in bench-output
	$(PY) -m fusedopt bench --json bench-output/bench.json --plot bench-output $(ARGS)

bench-gpu: $(FRESH_KIT) ## a GPU's steps against PyTorch and other projects; writes bench/results/gpu.json
	sh tests/gpu/kit.sh bench $(KIT) --json bench/results/gpu.json $(ARGS)

lint: $(VENV)/.dev ## ruff, mypy, clang-format, stubs
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy python/fusedopt python/make_stubs.py bench examples docs/conf.py docs/matrix.py
	$(BIN)/mypy python/fusedopt/__init__.py python/fusedopt/numpy.py python/fusedopt/torch/__init__.py # behind their stubs
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(PY) python/make_stubs.py --check

format: $(VENV)/.dev ## what of lint can be put right by machine
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/clang-format -i $(CPP)

stubs: $(VENV)/.dev ## write the type stubs from the rules
	$(PY) python/make_stubs.py

sanitize: $(VENV)/.test ## the core under the address, undefined-behaviour and thread sanitizers; the torch front end under the first two
	PYTHON=$(PY) sh tests/sanitize/run.sh

arm: ## the results of aarch64, under emulation, are those of this processor; needs a cross compiler and qemu
	sh tests/arm/run.sh

matrix: ## the tests on the versions that are promised, in environments of their own; ARGS="--pair 3.10 -n 2"
	$(PYTHON) tests/versions.py $(ARGS)

cuda: $(VENV)/.dev ## compile the CUDA library and read its code; needs nvcc, no GPU
	$(PY) bench/ptx.py $(ARGS)

vectorized: ## which loops the compiler vectorises
	$(PYTHON) bench/vectorized.py $(ARGS)

clean: ## remove what was built and written, but not .venv
	rm -rf build dist wheelhouse demo-output bench-output docs/gallery .benchmarks .hypothesis .*_cache $(addprefix $(VENV)/.,demo test docs integrations bench dev)
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv, too
	rm -rf $(VENV)

# One environment; the stamp's name is the extra that has been installed into it. Built without isolation, so that the
# pinned build tools are used and only what changed is compiled again. A warning is an error, and the tests' simulated
# device is built, but not for somebody who only wants to see the demo.
$(VENV)/.%: strict = $(if $(filter test dev,$*)$(wildcard $(VENV)/.test $(VENV)/.dev),ON,OFF)
$(VENV)/.%: $(SOURCES) | $(PY)
	@echo "Installing fusedopt[$*] into $(VENV); the first time this takes minutes, most of them PyTorch's download"
	@$(PY) -m pip install --quiet -c constraints.txt $(BUILD_TOOLS)
	@$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation --editable '.[$*]' -C build-dir=build/dev \
	  -C cmake.define.FUSEDOPT_WERROR=$(strict) -C cmake.define.FUSEDOPT_SIMULATED=$(strict) \
	  -C cmake.define.FUSEDOPT_QUICK=$(or $(QUICK),OFF)
	@# The optimizers of timm need none of its dependencies, and the index's torchvision does not fit a torch for the CPU.
	@$(if $(filter integrations,$*),$(PY) -m pip install --quiet -c constraints.txt --no-deps timm)
	@touch $@

$(KIT)/.made: $(SOURCES) $(shell find tests bench -name '*.py') tests/gpu/kit.sh
	sh tests/gpu/kit.sh kit $(KIT)

$(PY):
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
