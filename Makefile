# Two commands for a newcomer: `make demo` and `make test`. Each sets up its own virtual environment first.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo report test native-check lint check clean

help:
	@echo "make demo   pack the small model in examples/, predict and measure its loss, generate text"
	@echo "make report the same, and keep its page as docs/report.html"
	@echo "make test   run the test suite"
	@echo "make lint   formatting, lint and types"
	@echo "make native-check   the C++ kernels of every instruction set against the scalar ones, with sanitizers"

# constraints.txt pins torch, so that every machine computes with the same one
$(VENV)/ready: pyproject.toml constraints.txt $(wildcard native/CMakeLists.txt native/src/* native/include/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

# With what `benchmarks/compare.py` has measured in the same cache folder, the page shows other methods too.
report: demo
	cp demo-out/packed.html docs/report.html

test: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses auto

native-check: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/run.sh

lint: $(VENV)/ready
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

check: lint native-check test

clean:
	rm -rf $(VENV) build demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
