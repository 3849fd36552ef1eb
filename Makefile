# `make demo` and `make test` work from a clean clone: they need CPython 3.11 to 3.13 with pip, gcc and a package index.
#   make PYTHON=/path/to/python3.12 test     another interpreter
#   make test ARGS="-k salience -x"          arguments for pytest, the demo or a benchmark

VENV := .venv
BIN := $(VENV)/bin

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
endif

export PATH := $(abspath $(BIN)):$(PATH)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test quality style docs bench dist clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 $(ARGS)

quality: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.test  # for a GPU; the studies of quality take their own arguments, see benchmarks/README.md
	$(BIN)/python benchmarks/decision.py
	$(BIN)/python benchmarks/training_step.py $(ARGS)
	$(BIN)/python benchmarks/compressed_speed.py
	$(BIN)/python benchmarks/tables.py

dist: $(VENV)/.test
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site src/*.egg-info

# The fallback is for distributions whose Python comes without ensurepip.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "CPython 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install pip; }

# One stamp for each extra, so that repeated runs are quick. Torch goes first and pinned: a free choice could bring
# another build of it, and DeepSpeed, which has no wheels, looks at it while it is built.
$(VENV)/.%: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[$*]"
	@touch $@
