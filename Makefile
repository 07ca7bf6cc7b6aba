# Every target makes the environment it needs: `make demo` and `make test` are all a fresh machine wants.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test files run side by side on the cores there are; torch then takes one thread in each.
JOBS   ?= 2

.PHONY: setup demo test test-slow test-browser test-gpu bench-gpu bench bench-check bench-learning lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/appo demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not slow and not browser and not gpu'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Peers are in an environment of their own, never in the package's.
BENCH := .venv-bench
$(BENCH)/.installed: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH)/bin/python -m pip install --quiet --editable '.[train,bench]'
	@touch $@

bench: $(BENCH)/.installed
	$(BENCH)/bin/python -m pytest benchmarks
	$(BENCH)/bin/python -m benchmarks
	$(BENCH)/bin/python -m benchmarks.whole_model
	$(BENCH)/bin/python -m benchmarks.training_step
	$(BENCH)/bin/python -m benchmarks.growth
	$(BENCH)/bin/python -m benchmarks.page

bench-check: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks.check

bench-learning: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks.learning
	$(BENCH)/bin/python -m benchmarks.learning --task cue
	$(BENCH)/bin/python -m benchmarks.page

clean:
	rm -rf $(VENV) $(BENCH) build .pytest_cache .mypy_cache .ruff_cache
