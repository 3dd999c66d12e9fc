# Every target sets up what it needs: a fresh machine with Python, make and a C compiler will do.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# A formula holds * and (, so it reaches the shell as a variable and never as text.
export FORMULA ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test thorough check docs fuzz bench

help:  ## show this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install normc with everything its tests need

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,demo]"
	touch $@

demo: $(INSTALLED)  ## compile a layer, check it and train with it (FORMULA="x/group_std(x)" for your own)
	$(BIN)/normc demo $${FORMULA:+-- "$$FORMULA"}

test: $(INSTALLED)  ## run the tests, cheapest first; those for a GPU are skipped without one
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not interpret and not thorough"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "interpret and not thorough"

thorough: $(INSTALLED)  ## run the tests that try the same on more layers
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest -n 2 -m "thorough and not interpret"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "thorough and interpret"

check: $(INSTALLED)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(INSTALLED)  ## write the pages of docs/ that come from tables
	$(BIN)/python docs/generate.py

fuzz: $(INSTALLED)  ## test with many new random formulas, shapes and dtypes
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 2 --timeout 7200 tests/properties

bench: $(INSTALLED)  ## measure the table of docs/benchmarks/cpu.md on this machine
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.cpu --layout channels_last
	$(BIN)/python -m benchmarks.report
