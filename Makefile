# Everything a newcomer needs: `make demo` and `make test` set up what they use in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
KEEP ?= 0.95

.PHONY: demo test lint bench bench-peers kernels golden clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,sample,genai,report,rtx,kernels,dev]'
	touch $@

# The README's main job on the real model, then the same question to the original and to the compressed model.
demo: export PATH := $(abspath $(BIN)):$(PATH)
demo: $(VENV)/.installed  ## compress, export, prove and run a real model
	mkdir -p $(DEMO)
	test -d $(DEMO)/smollm2 || mixt sample -o $(DEMO)/smollm2
	mixt compress $(DEMO)/smollm2 --keep $(KEEP) -o $(DEMO)/model --overwrite
	mixt-export $(DEMO)/model --target ort -o $(DEMO)/out --overwrite
	mixt eval $(DEMO)/out --against $(DEMO)/smollm2 --windows 8
	mixt-export $(DEMO)/smollm2 --target ort -o $(DEMO)/dense --no-verify --overwrite
	@for folder in dense out; do for question in "What is the capital of France?" "Why is the sky blue? Two sentences."; do \
		echo; echo "[$$folder] $$question"; mixt run $(DEMO)/$$folder -p "$$question" --max-tokens 64 --temperature 0; done; done
	@echo; echo "$(DEMO)/out is the exported folder, $(DEMO)/out/report.html its proof; talk to it: $(BIN)/mixt chat $(DEMO)/out"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run

bench-peers: $(VENV)/.installed  ## llama.cpp, ONNX Runtime GenAI and PyTorch on the same model; table and plot in docs/
	$(BIN)/python -m benchmarks.peers

kernels: $(VENV)/.installed  ## compile every kernel, check it with the assembler, compare with the pinned ones
	$(BIN)/python -m mixt_export.building.kernels

golden: $(VENV)/.installed  ## rewrite graphs/golden after an intended change of lowering
	MIXT_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/lower/test_golden.py

clean:
	rm -rf $(DEMO) $(VENV)
