# Two commands for a newcomer: `make demo` and `make test`. Each makes its own .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test test-all check bench clean

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llm-node needs Python 3.11 or newer, this is `$(PYTHON) --version`; set it with: make PYTHON=python3.11"; exit 1; }
	@echo "Making .venv (about a minute with a warm package cache) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed          ## one bootstrap and three peers train a small model on this machine
	@$(BIN)/llm-node demo $(ARGS)

test: .venv/installed          ## everything but the tests marked slow or gpu; under 10 minutes on 2 cores
	@$(BIN)/python -m pytest $(ARGS)

test-all: .venv/installed      ## the slow tests too
	@$(BIN)/python -m pytest -m 'not gpu' $(ARGS)

check: .venv/installed         ## lint, types, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: .venv/installed         ## every benchmark, or NAMES="sync scale"; results, tables and plots in docs/benchmarks.md
	@$(BIN)/python -m tests.benchmarks.report --run $(NAMES) --options='$(ARGS)'

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-run
