# `make demo` and `make test` each do all the set-up they need: uv and the locked environment, inside this folder.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
UV := .uv/bin/uv
BIN := .venv/bin
STAMP := .venv/.synced

.PHONY: help setup check test test-slow test-gpu demo clean

help:
	@echo "make demo      prepare text, train a small nested LM on the CPU, resume it, sample from two widths"
	@echo "make test      lint, types and every test that needs neither a GPU nor hours"
	@echo "make setup     uv and the locked environment, in .venv"
	@echo "make check     lint and types"
	@echo "make test-gpu  tests that need a CUDA GPU"
	@echo "make test-slow stress tests"

setup: $(STAMP)

$(UV):
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3.12 on PATH: apt-get install python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or 3.12: make PYTHON=/path/to/python3.11"; exit 1; }
	@command -v gcc > /dev/null || { echo "error: no gcc on PATH (mamba-ssm builds with it): apt-get install gcc"; exit 1; }
	$(PYTHON) -m venv .uv || { echo "error: no venv module: apt-get install $(notdir $(PYTHON))-venv"; rm -rf .uv; exit 1; }
	.uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# Compiled here, once: where Python may not write beside its modules (PYTHONDONTWRITEBYTECODE, as in many images; a folder that
# is read-only on the nodes) every process would compile torch and DeepSpeed anew, and start in 27 s instead of 9.
$(STAMP): $(UV) pyproject.toml uv.lock
	UV_COMPILE_BYTECODE_TIMEOUT=600 $(UV) sync --frozen --compile-bytecode --python $(PYTHON)
	@touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

TEST := $(BIN)/python -m pytest -m "not gpu and not slow"

# Triton's interpreter keeps one core busy for minutes: beside the kernels' tests, on the other, all that starts no ranks. Ranks
# have both for themselves.
KERNELS := tests/parity/test_float8.py $(wildcard tests/parity/test_*kernels.py)
BESIDE := $(filter-out $(KERNELS),$(wildcard tests/parity/test_*.py))

test: check
ifdef PYTEST_ARGS
	$(TEST) $(PYTEST_ARGS)
else
	@log=$$(mktemp); failed=0; \
	$(TEST) $(KERNELS) > $$log 2>&1 & kernels=$$!; \
	$(TEST) tests/unit tests/data || failed=1; \
	$(TEST) $(BESIDE) || failed=1; \
	wait $$kernels || failed=1; \
	cat $$log; rm $$log; \
	$(TEST) tests/distributed tests/slurm || failed=1; \
	exit $$failed
endif

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

demo: $(STAMP)
	$(BIN)/python -m pretrain.demo

clean:
	rm -rf .venv .uv demo
