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

# Real processes and the browser want the machine for themselves; all other tests share its cores, a file to each at a time.
# pytest ends with 5 where ARGS leaves nothing to one of the two.
test: .venv/installed          ## everything but the tests marked slow or gpu; about 11 minutes on 2 cores
	@$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist=loadfile -m 'not (net or browser or slow or gpu)' $(ARGS) || [ $$? -eq 5 ]
	@$(BIN)/python -m pytest -m '(net or browser) and not (slow or gpu)' $(ARGS) || [ $$? -eq 5 ]

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
