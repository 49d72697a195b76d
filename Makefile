# Every target sets up .venv by itself, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST_ARGS ?=
# One thread per process: the tests' models are small, and processes share the cores better than threads do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8
MARKED = $(shell grep -rl --include='test_*.py' 'mark\.torchvision' tests)

.PHONY: help demo test lint format clean

help:
	@echo "make demo    fit glasses to the shipped model and measure them (a few minutes, no network after set-up)"
	@echo "make test    all tests"
	@echo "make lint    ruff, formatting, pyright"
	@echo "make format  let ruff mend what it can"
	@echo "make clean   remove .venv and caches"

demo: $(VENV)/demo.stamp
	@$(BIN)/safeglasses demo

# Tests marked `torchvision` run a second time, with it on the path: their files alone, since to collect all the others
# takes longer. Under PYTEST_ARGS there may be none (status 5).
test: $(VENV)/dev.stamp $(VENV)/torchvision.stamp
	$(PYTEST) $(PYTEST_ARGS)
	PYTHONPATH=$(VENV)/torchvision $(PYTEST) $(or $(PYTEST_ARGS),$(MARKED)) -m torchvision || test $$? = 5

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed; name one with make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

# The build backend is installed first, pinned, and used as it is: pip would fetch the newest one for an isolated build.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (a minute or two) …"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) for development (a minute or two) …"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $(VENV)/demo.stamp $@

# Apart from all else: an index may have torchvision for CUDA alone, and beside a PyTorch for the CPU that stops every
# import of transformers. The tests that want it declare what its compiled half would (tests/half_torchvision.py).
$(VENV)/torchvision.stamp: constraints.txt | $(VENV)/dev.stamp
	@$(PIP) --no-deps --upgrade --target $(VENV)/torchvision torchvision num2words
	@touch $@
