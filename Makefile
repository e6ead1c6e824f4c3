# Each target makes the environment it needs in $(VENV), from nothing but Python and make; later runs reuse it.
PYTHON ?= python3
VENV ?= .venv
INSTALL = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable

# Triton's interpreter is chosen when a kernel is defined, so its tests have a process of their own.
INTERPRETED = tests/kernels tests/encoder/test_encoder_triton.py

# A process that dies ends the run: pytest-xdist hangs after it has replaced one (3.8.0, --dist loadfile).
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
PARALLEL = -n 2 --max-worker-restart 0

.PHONY: demo test lint check format bench

demo: $(VENV)/core
	$(VENV)/bin/modernbert demo

test: $(VENV)/dev
	$(PYTEST) $(PARALLEL) --dist loadfile
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m interpreter $(INTERPRETED)

lint: $(VENV)/dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/codespell
	$(VENV)/bin/python tests/test_words.py

check: lint
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python --project pyright-strict.json
	$(MAKE) test
	$(PYTEST) --all-architectures tests/kernels/test_resources.py
	$(PYTEST) --timeout 0 --sweep tests/inference/test_growth.py tests/retrieval/test_sweep.py
	$(PYTEST) $(PARALLEL) --timeout 0 --dist loadfile --sweep -m sweep

format: $(VENV)/dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/bench
	$(VENV)/bin/python -m benchmarks cpu

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) .
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) ".[dev]"
	touch $@ $(VENV)/core

$(VENV)/bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) ".[dev,bench]"
	touch $@ $(VENV)/core $(VENV)/dev
