# Both `make demo` and `make test` do all set-up themselves; they need Python 3.11 or newer and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CHECKS := .venv/checks

.PHONY: setup demo test test-all browser check audit docs clean

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

test: $(READY) browser
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

test-all: $(READY) browser
	$(BIN)/python -m pytest

# A browser for the tests of pages, where it costs no password and not much time; without one they are skipped.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& timeout 20 apt-get update -qq >/dev/null 2>&1 \
		&& timeout 40 apt-get install -qq -y --no-install-recommends --download-only chromium >/dev/null 2>&1 \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1; } \
		|| echo "no chromium, and it cannot be installed here: the tests in a browser will be skipped"

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
