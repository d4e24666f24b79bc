# `make demo` and `make test` work in a fresh clone: each first creates $(VENV) and installs into it.
# The stamp files keep a second call from installing again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file of tests stays in one process: its fixtures and compiled kernels are made once.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/mal-kernels demo

# Triton reads TRITON_INTERPRET when a kernel is defined: its tests need a process of their own.
test: lint
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) $(wildcard tests/kernels/test_interpreter.py tests/kernels/test_triton_*.py)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/%.stamp: pyproject.toml constraints.txt
	@echo "installing mal-kernels[$*] into $(VENV); this takes a minute or two"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
