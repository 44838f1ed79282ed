# Sets up everything by itself: `make demo` and `make test` need Python >= 3.11, git and make, nothing else.

PYTHON ?= python3
OUTPUT ?= out/demo
MODELS ?= miniature
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help env demo claim test test-slow lint clean
.DELETE_ON_ERROR:

help:  ## tell the targets
	@echo "usage: make TARGET [PYTHON=python3.12]"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

env: .venv/ready  ## install the project and what it needs into .venv

demo: .venv/ready  ## the whole factory at a small scale: photographs to scored dataset in OUTPUT (out/demo, or s3://...)
	$(BIN)/facediffuser demo --output $(OUTPUT)

claim: OUTPUT = out/claim
claim: .venv/ready  ## all methods on the miniature, of MODELS=folder, to OUTPUT (out/claim); 1 when the paper's ordering fails
	$(BIN)/facediffuser miniature claim --models $(MODELS) --output $(OUTPUT)

test: .venv/ready .swift/ready lint  ## lint and the quick tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready .swift/ready  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: .venv/ready  ## ruff, and the import law of .importlinter
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache --no-logo

clean:  ## remove the environments and the caches; datasets in out/ stay
	rm -rf .venv .swift build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv installs in seconds what takes pip minutes, and shares the files of several environments on one disk. Bytecode is
# made once, here: where PYTHONDONTWRITEBYTECODE is set, each of the many processes of a run would compile torch anew.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON): not Python 3.11 or newer; name one, e.g. make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON): no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv

.venv/ready: pyproject.toml constraints.txt | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[test]'
	@touch $@

# The S3 server of the tests, apart: what it needs is none of the project's business.
.swift/ready: tests/swift-constraints.txt | .venv/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .swift
	$(BIN)/uv pip install --python .swift/bin/python --compile-bytecode -c tests/swift-constraints.txt swift
	@touch $@
