# Every target works in a fresh clone: it first creates $(VENV) and installs into it. The stamp files keep a second call
# from installing again. Times are those of two quiet cores.
#
#   make demo     see what it does                                          a minute
#   make check    the loop of a developer: lint, types, the core            under 3 minutes
#   make test     what a change must pass: check, and all that is not slow   under 15 minutes
#   make prove    what a release must pass: everything marked slow           nightly in CI
#   make ptx      of that, the GPU kernels executed from their PTX            an hour; needs g++, better nvcc too
#   make bench    what it costs, into mal-bench/ (bench/README.md)           half an hour
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file of tests stays in one process: its fixtures and compiled kernels are made once.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Triton reads TRITON_INTERPRET when a kernel is defined: its tests need a process of their own.
INTERPRETED := tests/kernels/test_interpreter.py $(wildcard tests/kernels/test_triton_*.py)
CORE := tests/ops tests/memory tests/dialogues tests/project

.PHONY: demo check test prove ptx bench lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/mal-kernels demo

check: lint
	$(PYTEST) -m "not slow" $(CORE)

test: lint
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" $(INTERPRETED)

prove: $(VENV)/test.stamp
	$(PYTEST) -m slow
	TRITON_INTERPRET=1 $(PYTEST) -m slow $(INTERPRETED)

ptx: $(VENV)/test.stamp
	$(PYTEST) tests/ptx

bench: $(VENV)/bench.stamp
	$(BIN)/python -m bench

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
