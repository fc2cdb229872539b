# Everything a newcomer needs: `make demo` and `make test` set up what they use in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
KEEP ?= 0.9

.PHONY: demo test lint bench golden clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,sample,genai,dev]'
	touch $@

demo: $(VENV)/.installed  ## compress, export, prove and run a real model
	$(BIN)/python -m mixt_export.demo --keep $(KEEP) --output $(DEMO)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run

golden: $(VENV)/.installed  ## rewrite graphs/golden after an intended change of lowering
	MIXT_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/lower/test_golden.py

clean:
	rm -rf $(DEMO) $(VENV)
