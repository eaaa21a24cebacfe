# Both `make demo` and `make test` do all set-up themselves; they need Python 3.11 or newer and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CHECKS := .venv/checks

.PHONY: setup demo test test-all check audit docs clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: $(READY)
	$(BIN)/python e2e_rlhf.py

test: $(READY)
	$(BIN)/python -m pytest -m "not long"

test-all: $(READY)
	$(BIN)/python -m pytest

check: $(READY) $(CHECKS)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dschat
	$(BIN)/python docs/flags.py --check
	git ls-files -z | xargs -0 $(CHECKS)/bin/detect-secrets-hook

# Needs the network: asks for the known vulnerabilities of what is pinned.
audit: $(CHECKS)/.ready
	$(CHECKS)/bin/pip-audit --requirement requirements.txt

$(CHECKS)/.ready: requirements-check.txt $(READY)
	$(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/pip install --quiet --requirement requirements-check.txt
	touch $@

docs: $(READY)
	$(BIN)/python docs/flags.py

clean:
	rm -rf .venv output .pytest_cache .mypy_cache .ruff_cache .hypothesis
