# Every target sets up what it needs; nothing has to be done before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PHOTOS ?= photos

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check example bench bench-pictures bench-peers bench-cam bench-engine bench-record bench-page docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[web]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed  ## set up .venv with the pinned versions

demo: install  ## draw what the filters of a trained network respond to
	$(BIN)/phosphene demo --out phosphene-demo
	@echo "to open it in a browser: $(BIN)/phosphene demo --serve"
	@echo "next: make example, to watch a small network learn (two minutes)"

example: install  ## train a small network and show how it learns
	$(BIN)/python examples/watch_training.py

test: $(VENV)/installed-dev  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --max-worker-restart 0

test-slow: $(VENV)/installed-dev  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-dev  ## lint, format, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: bench-pictures bench-cam bench-engine bench-record bench-page  ## run the benchmarks

PEERS := .venv-peers

$(PEERS)/installed: bench/peers.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable . --requirement bench/peers.txt
	touch $@

# TensorFlow pins other versions than phosphene's, and phosphene is not installed beside it
$(PEERS)/tensorflow/installed: bench/engine-peers.txt $(PEERS)/installed
	$(PYTHON) -m venv $(PEERS)/tensorflow
	$(PEERS)/tensorflow/bin/python -m pip install --quiet --requirement bench/engine-peers.txt
	touch $@

$(PEERS)/judges: bench/judges.txt $(PEERS)/installed
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement bench/judges.txt
	touch $@

bench-pictures: $(PEERS)/judges  ## measure what the pictures of recipes tell about photos (PHOTOS=folder)
	$(PEERS)/bin/python bench/pictures.py $(PHOTOS)

bench-peers: $(PEERS)/tensorflow/installed $(PEERS)/judges  ## set up .venv-peers with the packages that the benchmarks compare with

bench-cam: $(PEERS)/installed  ## time heat maps against other packages
	$(PEERS)/bin/python bench/cam.py

bench-engine: bench-peers  ## time rendering against other packages and the machine's limit (PHOTOS=folder, PARTS=…)
	$(PEERS)/bin/python bench/engine.py --photos $(PHOTOS) $(if $(PARTS),--parts $(PARTS))

bench-record: $(VENV)/installed-dev  ## time training with a recorder against training without
	$(BIN)/python bench/record.py

bench-page: $(VENV)/installed-dev  ## time the page over a store of 20,000 filters, and load it
	$(BIN)/python bench/page.py

docs: $(VENV)/installed-dev  ## draw the pictures of the README and docs again
	$(BIN)/python docs/make_pictures.py
	PHOSPHENE_SCREENSHOTS=docs/page $(BIN)/python -m pytest -q tests/web/test_browser.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache build *.egg-info src/*.egg-info
