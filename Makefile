# `make` or `make help` lists the targets. Each makes .venv when it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test soak test-fast lint format type tables pictures clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with everything that is needed

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train baseline and CutMix on embedded digits (CPU, minutes), print the table
	$(BIN)/python scripts/run_table.py table=demo_digits results_dir=runs/demo
	@echo "compare the two runs: $(BIN)/tensorboard --logdir runs"

test: $(INSTALLED)  ## run the whole test suite (no GPU, no network, no data needed)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)  ## run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

soak: $(INSTALLED)  ## kill a small run 50 times and compare it with the unbroken one (CPU, long)
	$(BIN)/python -m tests.soak 50

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(INSTALLED)  ## check types
	$(BIN)/mypy

tables: $(INSTALLED)  ## render results/tables from results/records
	$(BIN)/python scripts/make_tables.py

pictures: $(INSTALLED)  ## draw docs/pictures, one for each regularizer that acts on images
	$(BIN)/python scripts/preview.py every=docs/pictures dataset=samples rows=2 seed=68

clean:  ## remove .venv and caches (runs stay)
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
