# Every target does its own set-up: virtual environment, dependencies, build.
#
#   make demo    a video and a grid of images, stock against accelrt, with a report
#   make test    the whole test suite
#   make bench   the operators against eager and torch.compile
#   make bench-levels    the operators at every instruction set, and those of the models, with tuned malloc
#   make bench-blocks    a transformer block against eager and torch.compile with freezing
#   make bench-models    whole forwards of the published models on the CPU: eager, compiled, accelrt
#                        (about two hours on two cores; ARGS="--model dit" for one of them)
#   make ptxas   the table of what the compiler made of the CUDA kernels (needs nvcc)
#   make lint    ruff, mypy, clang-format
#   make docs    the site, in build/site
#   make package    sdist and wheel, in build/package/dist, installed into a new environment and used
#
# Variables: PYTHON, VENV, TORCH (the torch requirement), ACCELRT_CUDA (auto, 0, 1),
# ACCELRT_CUDA_ARCHS, ACCELRT_RUNTIME_CUDA (1, 0), WORKERS (test processes), ARGS (passed on to
# pytest, or to `accelrt`).

PYTHON ?= python3
VENV ?= .venv
# A CPU build; e.g. TORCH=torch>=2.11 on a GPU machine.
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= 2

export ACCELRT_CUDA ?= auto
export ACCELRT_BUILD_DIR ?= $(CURDIR)/build/py-cuda-$(ACCELRT_CUDA)

BIN := $(VENV)/bin
# The environment's own cmake and ninja come before older ones of the system.
export PATH := $(abspath $(BIN)):$(PATH)
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := $(shell find csrc bindings -type f) CMakeLists.txt setup.py pyproject.toml
FORMATTED := $(shell find csrc bindings tests/cpp examples/embed_cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILT := $(VENV)/.built-cuda-$(ACCELRT_CUDA)

.PHONY: all setup demo test bench bench-levels bench-blocks bench-models ptxas lint format docs \
        package clean

all: setup

$(VENV)/.torch: Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -q "$(TORCH)"
	touch $@

$(VENV)/.dependencies: $(VENV)/.torch pyproject.toml
	$(PIP) install -q "setuptools>=70" "cmake>=3.31" ninja "pybind11>=2.13"
	$(PIP) install -q --group demo --group test
	touch $@

# Editable: Python files are used in place, the extension is rebuilt when its sources change.
$(BUILT): $(VENV)/.dependencies $(SOURCES)
	mkdir -p $(ACCELRT_BUILD_DIR)
	$(PIP) install -v --no-build-isolation -e . > $(ACCELRT_BUILD_DIR)/build.log 2>&1 \
	  || { tail -n 60 $(ACCELRT_BUILD_DIR)/build.log; exit 1; }
	rm -f $(VENV)/.built-cuda-*
	touch $@

setup: $(BUILT)

demo: setup
	$(BIN)/accelrt demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: setup
	$(BIN)/python -m pytest benchmarks $(ARGS)

bench-levels: setup
	$(BIN)/python benchmarks/ops/levels.py --save $(ARGS)
	$(BIN)/python benchmarks/ops/of_models.py --save $(ARGS)

bench-blocks: setup
	$(BIN)/python benchmarks/blocks/run.py --save $(ARGS)

bench-models: setup
	$(BIN)/python benchmarks/models/run.py --out benchmarks/results $(ARGS)

ptxas: setup
	$(BIN)/python benchmarks/ptxas.py --save $(ARGS)

$(VENV)/.lint: $(VENV)/.dependencies
	$(PIP) install -q --group lint
	touch $@

lint: setup $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install -q --group docs
	touch $@

# Reads the sources; nothing is built or imported.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.package: $(VENV)/.dependencies pyproject.toml
	$(PIP) install -q --group package
	touch $@

package: $(VENV)/.package
	.ci/package $(BIN)/python "$(TORCH)"

clean:
	rm -rf build dist *.egg-info accelrt/*.so $(VENV)/.built-cuda-*
