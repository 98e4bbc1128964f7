# Every target sets up what it needs; nothing has to be done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PHOTOS ?= photos

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check bench bench-quality docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed  ## set up .venv with the pinned versions

demo: install  ## draw what the filters of a trained network respond to
	$(BIN)/phosphene demo --out phosphene-demo

test: $(VENV)/installed-dev  ## run the tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed-dev  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-quality  ## run the benchmarks

bench-quality: $(VENV)/installed-dev  ## measure the pictures of every recipe against photos (PHOTOS=folder)
	$(BIN)/python bench/quality.py $(PHOTOS)

docs: install  ## draw the pictures of the README and docs again
	$(BIN)/python docs/make_pictures.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info src/*.egg-info
