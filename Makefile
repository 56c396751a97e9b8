# Needs Python >= 3.10 and make. Every target first installs what it needs into .venv, once.
#
#   make demo         bucket a real LiDAR scan and draw it
#   make test         the tests, on all cores; then those that need a GPU, where there is one
#   make test-interop the tests that use torch or JAX, which it installs, in the same way
#   make kernels      compile every CUDA kernel, without a GPU; prints registers and spills
#   make lint         ruff and mypy; clang-format for the kernels
#   make clean        remove .venv and everything built
#
# To use another Python: PYTHON=python3.12 make test (run make clean first if .venv has a different one).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Installs CuPy for the newest CUDA version that the NVIDIA driver supports; without a driver, no CUDA package.
# (nvidia-smi prints "CUDA Version: 12.8", and since driver 610 "CUDA UMD Version: 13.3".)
DRIVER_CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA.*Version: *\([0-9][0-9]*\).*/\1/p')
ifneq ($(DRIVER_CUDA),)
CUDA := $(shell if [ $(DRIVER_CUDA) -ge 13 ]; then echo ,cuda13; elif [ $(DRIVER_CUDA) -eq 12 ]; then echo ,cuda12; fi)
endif

.PHONY: demo test test-interop kernels lint clean
.NOTPARALLEL:

demo: $(VENV)/.has-io$(CUDA)
	$(BIN)/gpu3d demo

# Tests on the CPU share the cores; tests on a GPU share its memory, and run one after another.
ON_CPU := -m pytest -m "not gpu" -n auto --dist worksteal
ON_GPU := -m pytest -m gpu

test: $(VENV)/.has-test$(CUDA)
	$(BIN)/python $(ON_CPU)
	$(if $(CUDA),$(BIN)/python $(ON_GPU))

test-interop: $(VENV)/.has-test,torch,jax$(CUDA)
	$(BIN)/python $(ON_CPU) -k "torch or jax or interop"
	$(if $(CUDA),$(BIN)/python $(ON_GPU) -k "torch or jax or interop")

kernels: $(VENV)/.has-kernels
	$(BIN)/python tests/compile_kernels.py

lint: $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels_cu/*

# A stamp file records which extras are in .venv. A newer pyproject.toml makes them install again.
$(VENV)/.has-%: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch '$@'

clean:
	rm -rf $(VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache gpu3d-demo*.png
	find gpu3d tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
