# Two commands do everything on a fresh machine with python3 and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints-cpu.txt

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.installed-test $(VENV)/.installed-demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# csrc/ is compiled here, once, against the torch it will be loaded with.
$(VENV)/.installed: pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*.* csrc/*/*.*) | $(BIN)/python
	$(PIP) 'setuptools>=77' torch
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.installed-demo: $(VENV)/.installed
	EMBEDGRAD_BUILD_EXT=0 $(PIP) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	EMBEDGRAD_BUILD_EXT=0 $(PIP) --no-build-isolation -e '.[test,hub,report]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python -m embedgrad.demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" --durations=30

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info embedgrad/_native*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
