# `make demo`, `make bench`, `make test` and `make docs` set themselves up in .venv on their first
# call; `make matrix` and `make install-check` make environments of their own and remove them.
PYTHON ?= python3
BIN := .venv/bin
# Where the versions are pinned and where the package says what it needs.
PINS := pyproject.toml constraints.txt
# A process per core, of one thread each (tests/conftest.py); a file's tests share their fixtures.
PARALLEL := -q -n auto --maxprocesses 8 --dist loadfile --durations 15

.PHONY: help install demo bench test test-all lint docs dist matrix install-check clean

help:
	@echo "make install EXTRAS=onnx,tensorboard   into .venv, with these extras; none if not given"
	@echo "make demo    built-in scenes, dense against sparse: a table and a page in runs/demo"
	@echo "make bench   measure this machine: the training step, data; minutes"
	@echo "make test    the tests to run before each commit; minutes"
	@echo "make test-all  all tests: also kills, mutants, the site, code in the docs, the browser"
	@echo "make lint    lint and types"
	@echo "make docs    build the pages of docs/ into site/"
	@echo "make dist    build wheel and sdist into dist/"
	@echo "make matrix  the tests on every supported Python and torch that is at hand; hours"
	@echo "make install-check   wheel and sdist in new environments, and the demo there"
	@echo "make clean   remove .venv, caches, site/ and dist/ (keeps runs/)"

install: .venv/bin/pip
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		-e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch .venv/installed

demo: .venv/installed
	$(BIN)/sparsejepa demo --out runs/demo

bench: .venv/installed
	$(BIN)/python bench/step.py
	$(BIN)/python bench/data.py

test: .venv/installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-all: test
	$(BIN)/python -m pytest $(PARALLEL) -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: .venv/installed-dev
	$(BIN)/python -m mkdocs build --strict

dist: .venv/installed-dev
	$(BIN)/python -m hatchling build

matrix:
	.ci/matrix

install-check:
	PYTHON=$(PYTHON) .ci/install-check

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist site
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
