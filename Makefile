# Two commands from a fresh clone: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# glibc takes large arrays from huge pages: XLA asks for a step's memory anew each time, and a page fault is dear in a
# virtual machine. Without effect elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# A file's tests share what they compile, so one process has all of them.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint hosts parity clean

demo: .venv/installed
	$(BIN)/python benchmarks/demo.py

test: lint
	$(PYTEST) --ignore tests/parity -m "not slow"

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Jobs of four processes, too long for every day.
hosts: .venv/installed-test
	$(BIN)/python -m pytest -m slow --ignore tests/parity

# The tests against torch, transformers and peft, and a real pretrained encoder.
parity: .venv/installed-parity
	$(PYTEST) tests/parity

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"modjax needs Python 3.11 or newer, this is {v[0]}.{v[1]}: say make PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/installed-parity: .venv/installed-test
	$(INSTALL) -e '.[parity,minilm]'
	@touch $@

clean:
	rm -rf .venv runs
