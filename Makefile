# Needs Python 3.11 or later with pip and venv, nothing else. The first target of a clean clone installs into .venv;
# afterwards each starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test slow lint benchmarks clean

train: $(STAMP)  ## the main job: digits from a local S3 endpoint, two ranks
	$(BIN)/dltrain demo

test: $(STAMP)  ## the default suite
	$(BIN)/python -m pytest

slow: $(STAMP)  ## the checks that the default suite leaves out
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: $(STAMP)  ## quick benchmarks on this machine; results go to benchmarks/results
	$(BIN)/python -m benchmarks trainer_overhead --quick
	$(BIN)/python -m benchmarks throughput --quick

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# its build asks the torch that is installed, so it comes after, and sees this environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
