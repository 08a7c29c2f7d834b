# Every target creates the virtual environment by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint type bench docs clean

demo: $(READY)  ## train a small decoder with and without tilewright, write report.html
	$(BIN)/tilewright demo

test: $(READY)  ## every test that runs without a GPU; the conformance suite also by both interpreters
	$(BIN)/python -m pytest -n auto -m "not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto tests/conformance
	TILEWRIGHT_CPU_EXECUTOR=interpreter $(BIN)/python -m pytest -q -n auto tests/conformance

lint: $(READY)  ## style, imports, docstrings, generated tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/make_tables.py --check

type: $(READY)  ## strict type checking
	$(BIN)/mypy

bench: $(READY)  ## measure the operations on this machine
	$(BIN)/tilewright bench rope
	$(BIN)/tilewright bench rms_norm
	$(BIN)/tilewright bench qk_norm_rope
	$(BIN)/tilewright bench quant_fp8
	$(BIN)/tilewright bench mhc
	$(BIN)/tilewright bench fusion
	$(BIN)/tilewright bench cpu

docs: $(READY)  ## write the generated tables of the documentation anew
	$(BIN)/python tools/make_tables.py

$(READY): pyproject.toml constraints.txt tools/make_venv.sh
	tools/make_venv.sh $(PYTHON) $(VENV)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache report.html
