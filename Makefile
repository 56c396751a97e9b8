# gpu3d on a machine with Python >= 3.10 and make: every target sets up what it needs in .venv, once.
#
#   make demo         bucket a real LiDAR scan and draw it
#   make test         the tests (those that need a GPU skip without one)
#   make test-interop the tests that use torch or JAX, which it installs
#   make kernels      compile every CUDA kernel with no GPU; prints registers and spills
#   make lint         ruff and mypy; clang-format for the kernels
#   make clean        remove .venv and everything built
#
# Another Python: PYTHON=python3.12 make test (make clean first where .venv already has a different one).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# CuPy for the newest CUDA that the NVIDIA driver supports; without a driver, no CUDA package at all.
# (nvidia-smi prints "CUDA Version: 12.8", from driver 610 on "CUDA UMD Version: 13.3".)
DRIVER_CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA.*Version: *\([0-9][0-9]*\).*/\1/p')
ifneq ($(DRIVER_CUDA),)
CUDA := $(shell if [ $(DRIVER_CUDA) -ge 13 ]; then echo ,cuda13; elif [ $(DRIVER_CUDA) -eq 12 ]; then echo ,cuda12; fi)
endif

.PHONY: demo test test-interop kernels lint clean
.NOTPARALLEL:

demo: $(VENV)/.has-io$(CUDA)
	$(BIN)/gpu3d demo

test: $(VENV)/.has-test$(CUDA)
	$(BIN)/python -m pytest

test-interop: $(VENV)/.has-test,torch,jax$(CUDA)
	$(BIN)/python -m pytest -k "torch or jax or interop"

kernels: $(VENV)/.has-kernels
	$(BIN)/python tests/compile_kernels.py

lint: $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels_cu/*

# A stamp file says which extras .venv has; pyproject.toml changed: installed anew.
$(VENV)/.has-%: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch '$@'

clean:
	rm -rf $(VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache gpu3d-demo*.png
	find gpu3d tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
