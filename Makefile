# Two commands do everything from a fresh clone: `make serve` and `make test`. Both set up .venv first if it is
# missing, or if requirements.lock or pyproject.toml is newer than it.
PYTHON ?= python3
MODEL ?= random:tiny
ARGS ?=
WORKERS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch-version = "\([^"]*\)".*/\1/p' pyproject.toml)
UV := uv==0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast test-gpu test-clients test-api check format lock lock-clients clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(INSTALLED) ## make .venv, as every target below does when it is missing or stale

serve: $(INSTALLED) ## serve MODEL (random:tiny); more flags: make serve ARGS="--port 8001"
	@$(BIN)/lfm serve $(MODEL) $(ARGS)

test: $(INSTALLED) ## all tests; pick some: make test ARGS="-k prefix"
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: $(INSTALLED) ## the tests that start no processes and no clients
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu" $(ARGS)

test-gpu: $(INSTALLED) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-clients: $(INSTALLED) ## other projects' clients, each from its own lock, and what they did
	$(BIN)/python -m pytest tests/clients -m clients -rsP -p no:cacheprovider $(ARGS)

test-api: $(INSTALLED) ## schemathesis against our own OpenAPI document: no 5xx, every answer as described
	$(BIN)/python -m pytest tests/clients/test_api_document.py -m clients -rsP -p no:cacheprovider $(ARGS)

check: $(INSTALLED) ## formatting, lint, types, and the README's table
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python bench/table.py --check

format: $(INSTALLED) ## format, and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lock: $(BIN)/python ## rebuild requirements.lock, keeping its versions; newer ones: make lock ARGS=--upgrade
	$(PIP) install --quiet $(UV)
	echo torch | $(BIN)/uv --no-config pip compile pyproject.toml requirements.in --extra agent --extra search --extra dev --excludes /dev/stdin \
	    --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
	    --quiet --output-file requirements.lock $(ARGS)

lock-clients: $(BIN)/python ## rebuild the locks of make test-clients and test-api; newest versions: make lock-clients ARGS=--upgrade
	$(PIP) install --quiet $(UV)
	for name in agents instructor litellm schemathesis; do $(BIN)/uv --no-config pip compile tests/clients/locks/$$name.in \
	    --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock-clients" \
	    --quiet --output-file tests/clients/locks/$$name.txt $(ARGS) || exit 1; done

clean: ## remove .venv and the tools' caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# torch has no hash: pip takes a CPU wheel where the machine offers one and the CUDA build elsewhere. Its needs are
# locked. No build isolation: it would fetch a setuptools that no hash covers; the locked one is there.
$(INSTALLED): requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install torch==$(TORCH)
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# A half-made environment (no pip) would be taken for a whole one by the next run, so it is removed.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed. lfm needs Python 3.11 to 3.13:" \
	    "install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	    "$(PYTHON) is Python %d.%d; lfm needs 3.11 to 3.13. Name another: make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make environments." \
	    "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
