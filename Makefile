# Two commands for a newcomer: `make demo` and `make test`. Each sets up its own virtual environment first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/lock.txt

.PHONY: help demo report test test-oldest test-latest lock native-check lint check clean

help:
	@echo "make demo   pack the small model in examples/, predict and measure its loss, generate text"
	@echo "make report the same, and keep its page as docs/report.html"
	@echo "make test   run the test suite"
	@echo "make lint   formatting, lint and types"
	@echo "make test-oldest, test-latest   the suite with the oldest and the newest of everything that pyproject.toml allows"
	@echo "make lock   pin the newest of everything, with hashes, in requirements/"
	@echo "make native-check   the C++ kernels of every instruction set against the scalar ones, with sanitizers"

# Exactly the files that were tested; without a LOCK the newest of everything.
$(VENV)/ready: pyproject.toml requirements/install.py $(LOCK) native/CMakeLists.txt $(wildcard native/src/* native/include/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python requirements/install.py $(LOCK)
	touch $@

demo: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

# With what `benchmarks.compare` has measured in the same cache folder, the page shows other methods too.
report: demo
	cp demo-out/packed.html docs/report.html

test: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST)

# Each in an environment of its own, at one end of what pyproject.toml allows.
test-oldest:
	$(MAKE) test VENV=.venv-oldest LOCK=requirements/oldest.txt

test-latest: # with every family of transformers
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest LOCK= PYTEST="-m 'not slow'"

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	$(COMPILE) --constraint requirements/constraints.txt --output-file requirements/lock.txt
	$(COMPILE) --resolution lowest-direct --output-file requirements/oldest.txt

COMPILE = .venv-lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	--generate-hashes --upgrade --quiet --custom-compile-command "make lock"

native-check: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" native/tests/run.sh

lint: $(VENV)/ready
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/clang-format --dry-run --Werror native/include/*.h native/src/*.hpp native/src/*.cpp native/tests/*.hpp native/tests/*.cpp
	$(BIN)/mypy

check: lint native-check test

clean:
	rm -rf .venv .venv-* build demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
