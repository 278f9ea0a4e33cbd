# Every command here works in a fresh clone: it makes an environment of its own first.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= auto
DEMO_ARGS ?=

# Threads that spin while they wait for work make small calls a hundred times slower where other
# programs share the cores.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

# What an installation is made of: a change reinstalls. Python files are used where they lie.
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help demo test lint gpu install clean

help:  ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "variables:"
	@echo "  PYTHON       interpreter, 3.10 or newer ($(PYTHON))"
	@echo "  VENV         folder of the environment ($(VENV))"
	@echo "  PIP_ARGS     further arguments of pip install; Linux without an NVIDIA GPU, to save GBs:"
	@echo '               PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'
	@echo '  PYTEST_ARGS  further arguments of pytest: PYTEST_ARGS="-k philox"'
	@echo '  WORKERS      processes that share the tests, one per core unless given ($(WORKERS))'
	@echo '  DEMO_ARGS    further flags of the demo: DEMO_ARGS="--steps 300 --seed 1"'

demo: $(VENV)/installed-train  ## train on the embedded digits, 2 minutes on two cores: runs/demo/
	@$(VENV)/bin/fastcontrast train semisup --name demo --overwrite $(DEMO_ARGS)
	@echo
	@echo "The results are in runs/demo/; the embedding as a picture: runs/demo/embedding.png"

# Neighbouring tests stay in one process as long as both have work: they share what they prepare.
SHARED = -n $(WORKERS) --dist worksteal

# Triton's interpreter has to be chosen before Python starts, so its part is a run of its own.
test: $(VENV)/installed-test  ## run the whole test suite
	$(VENV)/bin/python -m pytest $(SHARED) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest $(SHARED) $(PYTEST_ARGS)

lint: $(VENV)/installed-dev  ## check style and types, without changing a file
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Of the machine's own interpreter: torch with CUDA is there, and nothing can be installed.
gpu:  ## on a machine with a GPU: build, tests, timings, benchmark and sanitizers there, in nine minutes
	$(PYTHON) -m benchmarks.gpu_gate

install: $(VENV)/installed-dev  ## make the environment for development, and nothing else

clean:  ## remove the environment and everything built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info fastcontrast/_C.*.so .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `test` holds all of `train`, and `dev` all of `test`: the larger stamp stands for the smaller.
$(VENV)/installed-train: $(INPUTS) | $(VENV)/bin/python
	$(call install,train)
	@touch $@

$(VENV)/installed-test: $(INPUTS) | $(VENV)/bin/python
	$(call install,test)
	@touch $(VENV)/installed-train $@

$(VENV)/installed-dev: $(INPUTS) | $(VENV)/bin/python
	$(call install,dev)
	@touch $(VENV)/installed-train $(VENV)/installed-test $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	  "fastcontrast wants Python 3.10 or newer, this is %d.%d; try: make PYTHON=python3.12 ..." \
	  % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# pip hides what a build prints, so what is missing is said here.
define install
$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[$(1)]"
@$(VENV)/bin/python -c 'from fastcontrast.backends import native; \
  print("\nSlower than it could be:", native.IMPORT_PROBLEM, "(make clean first)\n") \
  if native.IMPORT_PROBLEM else None'
endef
