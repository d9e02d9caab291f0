# `make demo` and `make test` need python3 (3.11 or newer), pip, make and git; both set up .venv.
# Another interpreter: make test PYTHON=python3.12 VENV=.venv312
# JOBS is the number of test processes; one test: make test PYTEST_ARGS="tests/test_quant.py -x"

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# A file's tests stay in one process: a notebook's cells must, and fixtures are then made once.
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
PIP := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check -qq

# Debian's own browser: Playwright would download one, which this project never does.
CHROMIUM ?= /usr/bin/chromium

.PHONY: help demo test test-slow test-browser lint format docs bench clean

help:
	@echo "make demo         load the shipped model onto eight virtual devices and watch it write"
	@echo "make test         run every test but the slow ones, and the notebooks"
	@echo "make test-slow    run the slow tests"
	@echo "make test-browser drive the explorers in JupyterLab with a real browser"
	@echo "make lint         ruff and pyright"
	@echo "make format       let ruff rewrite the code"
	@echo "make docs         build docs/_build/html; a warning is an error"
	@echo "make bench        run the benchmarks, but benchmarks/full_width.py, which writes 8 GB"
	@echo "make clean        remove what was built and downloaded: $(VENV) too"

demo: $(VENV)/.installed
	@$(BIN)/python -m grokkit.demo

test: $(VENV)/.installed-dev
	@$(PYTEST) $(PYTEST_ARGS)

# Compiled in full, as for a user, and so are the golden arrays' tests here; the others are not
# (conftest.py), or half their time would be spent in the compiler.
test-slow: $(VENV)/.installed-dev
	@GROKKIT_TEST_OPTIMISED=1 $(PYTEST) -m "not slow" tests/test_golden.py
	@GROKKIT_TEST_OPTIMISED=1 $(PYTEST) -m slow $(PYTEST_ARGS)

test-browser: $(VENV)/.installed-browser $(CHROMIUM)
	@CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -q -m browser tests/browser $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.installed-dev
	@$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.installed-dev
	@set -e; for script in $(filter-out benchmarks/full_width.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python "$$script"; done
	@$(BIN)/python -m benchmarks.speed --write

clean:
	rm -rf $(VENV) docs/_build docs/reference docs/notebooks docs/_explorers tests/browser/screenshots build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --without-pip, since Debian's python3 has pip without ensurepip; pip then installs from outside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("grokkit needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ": name another with make PYTHON=python3.12")'
	@echo "Setting up $(VENV)"
	@$(PYTHON) -m venv --without-pip $(VENV)

# Each stamp is newer than pyproject.toml once what it names is installed; the second waits for
# the first, so that a parallel make never runs two pips in one environment.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing grokkit into $(VENV) (the first time takes a minute or more)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	@echo "Installing what the tests, the docs and the notebooks need"
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.installed-browser: pyproject.toml | $(VENV)/.installed-dev
	@echo "Installing what drives a browser"
	@$(PIP) install --editable '.[dev,browser]'
	@touch $@

# Only root can install it; anyone else is told what to do.
$(CHROMIUM):
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
		echo "The browser's tests need Chromium: as root, apt-get install chromium; or name yours with make test-browser CHROMIUM=/path/to/chromium"; \
		exit 1; \
	fi
