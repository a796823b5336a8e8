# make demo and make test work on a fresh machine: Debian with python3-venv, the Python headers, a C compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc llmcoopt -name '*.c' -o -name '*.h' -o -name '*.py' 2>/dev/null) setup.py pyproject.toml

.PHONY: demo test lint format sanitize bench wheel clean

demo: $(STAMP)
	$(BIN)/llmcoopt demo

test: $(STAMP) $(VENV)/.test-tools
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.dev-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.c' '*.h' '*.cu' '*.cuh')

sanitize: $(STAMP) $(VENV)/.test-tools
	PYTHON=$(BIN)/python tools/sanitize.sh

bench: $(STAMP)
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/kv.py

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --no-deps -w dist .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llmcoopt needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "llmcoopt needs Python's venv module: install it with 'apt-get install python3-venv'"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=68" wheel

$(STAMP): $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

$(VENV)/.test-tools: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.dev-tools: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ruff==0.17.6 clang-format==23.1.5
	@touch $@

clean:
	rm -rf build dist *.egg-info llmcoopt/*.so
