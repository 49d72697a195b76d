# Every target sets up .venv by itself, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST_ARGS ?=

.PHONY: help demo test lint format clean

help:
	@echo "make demo    fit glasses to the shipped model and measure them (a few minutes, no network after set-up)"
	@echo "make test    all tests"
	@echo "make lint    ruff, formatting, pyright"
	@echo "make format  let ruff mend what it can"
	@echo "make clean   remove .venv and caches"

demo: $(VENV)/demo.stamp
	@$(BIN)/safeglasses demo

# One thread per process: the tests' models are small, and processes share the cores better than threads do.
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 $(PYTEST_ARGS)

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
