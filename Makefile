# make demo   set up, and run the main job on a real model
# make test   set up, and run the tests
# make check  set up, and run formatter, linter, type checker and import contracts

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format clean weights

demo: $(STAMP) weights
	@$(BIN)/python -m fixtures.demo

test: $(STAMP) weights
	@$(BIN)/python -m pytest -q -n auto --dist loadfile

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

weights: $(STAMP)
	@$(BIN)/python -m fixtures.weights

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "loratool needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e '.[dev]' \
	  || { echo "Set-up failed: can the package index be reached? (pip config list)" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
