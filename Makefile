# Sets up everything by itself: `make demo` and `make test` need Python >= 3.11, git and make, nothing else.

PYTHON ?= python3
OUTPUT ?= out/demo
MODELS ?= miniature
WORKERS ?= 2
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help env demo claim test test-slow test-real lint format constraints dist clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12]"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

env: .venv/ready  ## install the project and what it needs into .venv
	@echo "installed; now: source $(BIN)/activate"

demo: .venv/ready  ## the whole factory at a small scale: photographs to scored dataset in OUTPUT (out/demo, or s3://...)
	$(BIN)/facediffuser demo --output $(OUTPUT)

claim: OUTPUT = out/claim
claim: .venv/ready  ## all methods on the miniature, of MODELS=folder, to OUTPUT (out/claim); exit 1 when the paper's ordering fails
	$(BIN)/facediffuser miniature claim --models $(MODELS) --output $(OUTPUT)

test: .venv/ready .swift/ready lint  ## lint and the quick tests, by WORKERS=2 processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready .swift/ready test-real  ## the tests that take minutes, those on real weights among them
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow --durations 60

test-real: .real/ready  ## the tests on real weights and photographs, which packages bring
	$(BIN)/python -m pytest -m real -rA tests/real

lint: .venv/ready  ## what a commit must pass before any test: ruff, its format, the import law of .importlinter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

format: .venv/ready  ## write all code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: .venv/ready  ## the source distribution and the wheel, into dist/
	$(BIN)/uv build --no-build-isolation --python $(BIN)/python --out-dir dist

# Keeps every version that is pinned and still fits; `make constraints UPGRADE=--upgrade` takes the newest of all.
constraints: $(BIN)/uv  ## write constraints.txt anew from pyproject.toml; UPGRADE=--upgrade for new versions
	$(BIN)/uv pip compile --quiet --python $(BIN)/python --all-extras --no-header --no-annotate $(UPGRADE) \
	  --output-file constraints.txt pyproject.toml
	@{ echo "# Every package of the environment at the version that was tried: names and versions only, for pip and uv"; \
	  echo "# alike. Written by \`make constraints\`."; cat constraints.txt; } > constraints.new && mv constraints.new constraints.txt


clean:  ## remove the environments and the caches; datasets in out/ stay
	rm -rf .venv .swift .real build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
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
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

# Photographs come in the source distribution of face-recognition, which is not installed.
.real/ready: .venv/ready
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev,real]'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --no-binary face-recognition --dest .real face-recognition==1.3.0
	@touch $@

# The S3 server of the tests, apart: what it needs is none of the project's business.
.swift/ready: tests/swift-constraints.txt | .venv/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .swift
	$(BIN)/uv pip install --python .swift/bin/python --compile-bytecode -c tests/swift-constraints.txt swift
	@touch $@
