# `make demo`, `make bench` and `make test`. Each sets itself up in .venv on its first call.
PYTHON ?= python3
BIN := .venv/bin
# Where the versions are pinned and where the package says what it needs.
PINS := pyproject.toml constraints.txt

.PHONY: help demo bench test lint clean

help:
	@echo "make demo    built-in scenes, dense against sparse: a table and a page in runs/demo"
	@echo "make bench   measure this machine: tables, bench.jsonl and bench.png in runs/bench"
	@echo "make test    lint, types and tests"
	@echo "make lint    lint and types only"
	@echo "make clean   remove .venv and caches (keeps runs/)"

demo: .venv/installed
	$(BIN)/sparsejepa demo --out runs/demo

bench: .venv/installed
	$(BIN)/sparsejepa bench --out runs/bench

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv installs: if it is there, the environment is whole.
.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version 2>&1) is too old: make PYTHON=... with Python 3.11 or newer"; \
		exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip $(PINS)
	@echo "installing into .venv; the first time this takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/bin/pip $(PINS)
	@echo "installing into .venv; the first time this takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch .venv/installed $@
