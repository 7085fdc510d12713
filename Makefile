# Two commands set up and do everything: `make simulate` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: help setup simulate test test-quick fault-matrix lint format clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv and install fedward with its tools.

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

simulate: $(STAMP) ## Run the default study: four hospitals, encrypted updates, differential privacy.
	$(BIN)/fedward-sim run $(SCENARIO) $(ARGS)

test: $(STAMP) ## Run all tests, on two cores (WORKERS=N for another number).
	$(BIN)/python -m pytest -n $(WORKERS)

test-quick: $(STAMP) ## Run the tests that take seconds.
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

fault-matrix: $(STAMP) ## Break a real deployment in every way; takes an hour, goes on where it stopped.
	$(BIN)/python -m simulations.fault_matrix $(ARGS)

lint: $(STAMP) ## Check style, types and the arrows between the packages.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the sources in the house style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and caches; runs/ stays.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
