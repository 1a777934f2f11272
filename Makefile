# Everything runs in .venv, which scripts/bootstrap makes from requirements.lock on first use (0.1 s when it is there).
# Nothing but Python 3.11+, make, g++ and git is needed beforehand. `make` alone lists the targets.

LLAMA_MESH_VENV ?= .venv
BIN := $(LLAMA_MESH_VENV)/bin
# Passed on: make test ARGS="-k sniff", make test ARGS="-n0 --pdb", make demo ARGS="--prompt 'Tell me a joke'", make demo
# ARGS=--transcribe
ARGS ?=
# Most tests wait for processes and sockets. A file's tests stay together, for the nodes that they share.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
export LLAMA_MESH_VENV

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-build lint format types model bench mutants spec lock clean

help:            ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup:           ## make or update the virtual environment
	@scripts/bootstrap

demo: setup      ## fetch a small real model and stream its answer through llama-mesh (ARGS=--transcribe: speech to text, too)
	@$(BIN)/llama-mesh demo $(ARGS)

test: lint model ## check the style, the types and the architecture, then run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-build: setup model ## build the real llama.cpp once (4 to 9 minutes, cached) and test with it
	MESH_BUILD_REAL=1 $(BIN)/python -m pytest tests/build_real $(ARGS)

lint: setup      ## check formatting, style, types and the import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup    ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

model: setup     ## fetch the model of the end-to-end tests into the cache (93 MB, once)
	@$(BIN)/python -m mesh.cli.demo_model

bench: setup     ## compare llama-mesh with nginx over a fast mock server, on one node and on two; measure the link
	$(BIN)/python -m benchmarks.proxy $(ARGS)
	$(BIN)/python -m benchmarks.link_micro

mutants: setup   ## plant bugs in the scheduler and the placement, one at a time, and show what catches each
	@$(BIN)/python scripts/mutants.py

spec: setup      ## write the generated parts of SPEC.md, the example config and the JSON Schemas anew
	$(BIN)/python scripts/spec.py
	$(BIN)/python -m mesh.config.schema

lock: setup      ## resolve pyproject.toml anew and write requirements.lock
	$(BIN)/python scripts/lock.py

clean:           ## remove the virtual environment and everything generated
	rm -rf "$(LLAMA_MESH_VENV)" "$(LLAMA_MESH_VENV).lock" build dist ./*.egg-info benchmarks/out
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
