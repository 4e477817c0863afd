# make quickstart   create the environment and run the main job on a task made here (no download of data or weights)
# make test         the same, then lint and every test;  PYTHON=python3.12 uses another interpreter and environment
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: quickstart test tests lint format wheel-check clean

quickstart: $(VENV)/installed
	$(BIN)/python -m eval.quickstart --workdir $(WORKDIR)

test: quickstart tests

tests: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "fpo_jax needs Python 3.11 or newer, $(PYTHON) is %d.%d; run make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[report]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info runs
