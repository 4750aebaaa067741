# Two commands do everything on a fresh machine with python3 and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints-cpu.txt

.PHONY: setup demo test test-all wheel lint clean

setup: $(VENV)/.installed-test $(VENV)/.installed-demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# csrc/ is compiled here, once, against the torch it will be loaded with; hence torch comes first.
BUILD := pyproject.toml setup.py $(wildcard build_backend/*.py) constraints-cpu.txt
$(VENV)/.installed: $(BUILD) $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) | $(BIN)/python
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	EMBEDGRAD_BUILD_EXT=0 $(PIP) -e '.[demo]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	EMBEDGRAD_BUILD_EXT=0 $(PIP) -e '.[test,hub,report]'
	touch $@

# dist/: a wheel for this platform and this torch release, and the sources.
wheel: $(VENV)/.installed
	$(PIP) build
	EMBEDGRAD_BUILD_PYTHON=$(CURDIR)/$(BIN)/python $(BIN)/python -m build

demo: $(VENV)/.installed-demo
	$(BIN)/python -m embedgrad.cli.demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" --durations=30

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info embedgrad/_native*.so embedgrad/_cuda.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
