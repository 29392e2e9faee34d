# make setup   an environment in .venv with everything (needs Python 3.11 or later, make and a package index)
# make test    everything that must hold: style, imports, types, tests
# make demo    the whole path on real pictures, with a report at its end
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

BIN := .venv/bin
STAMP := .venv/.installed
JOBS ?= 2
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: setup test lint demo parity heavy build clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "mmtp needs Python 3.11 or later with its venv module: make PYTHON=/path/to/python" >&2; exit 1; fi
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check

test: lint
	$(BIN)/python -m pytest -q -n $(JOBS)

parity: $(STAMP)
	$(BIN)/python -m pytest -q -m parity

heavy: $(STAMP)
	$(BIN)/python -m pytest -q -m heavy --timeout 3600

demo: $(STAMP)
	$(BIN)/mmtp demo

build: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
