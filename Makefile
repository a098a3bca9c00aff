# Two commands on a fresh machine with Python 3.11 and a C++ compiler:
#   make quickstart    the whole journey on sample photographs
#   make test          the tests, the linters and the types
#
# torch's release is pinned in constraints.txt. For another one, such as a CUDA build:
#   make quickstart CONSTRAINTS=/dev/null
#
# Files of tests are shared by PROCESSES processes: the short ones first, then those that start
# processes themselves.
#   make unit PROCESSES=4

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PROCESSES ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint unit long chaos clean

quickstart: $(INSTALLED)
	$(BIN)/teasr quickstart

test: lint unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(INSTALLED)
	$(BIN)/python -m pytest -m "not journey and not long and not chaos" -n $(PROCESSES) --dist loadfile
	$(BIN)/python -m pytest -m "journey and not long" -n $(PROCESSES) --dist loadfile --durations=15

# Retraining by schedule through crashes, new data and a store that goes away; a season of it;
# ablations; other numbers of workers: some twenty minutes.
long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

# Nodes of a cluster that die, hang, are cut off, run full: prints the table of docs/reliability.md.
chaos: $(INSTALLED)
	$(BIN)/python -m pytest -m chaos

# The environment is made anew whenever what it is made from changes. pip would compile on one core,
# and calls nothing an error that is written for another Python.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("teasr needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS) -e '.[samples,dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
