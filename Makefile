# Everything runs in .venv, which is made from pyproject.toml when it is missing or out of date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: quickstart test lint bench fuzz crash flower-demo clean

quickstart: .venv/installed
	test -d runs/shapes_world || $(BIN)/python -m sap_lightning.data.shapes runs/shapes_world
	$(BIN)/python -m sap_lightning fit --config configs/shapes.yaml

# Two processes of one thread each: tests are many small models, which gain nothing from more threads.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/merge.py

# Ten thousand mutations of an upload; the tests do five hundred.
fuzz: .venv/installed
	SAP_LIGHTNING_FUZZ=10000 $(BIN)/python -m pytest -q tests/io/test_hostile.py

# Kills a run of one round and one of two at twenty places each; each must continue to the same bytes.
crash: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/crash.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/crash.py --rounds 2

# The commands of docs/flower.md: four sites and a server on this machine, with TLS and a key for each.
flower-demo: .venv/installed
	$(BIN)/python benchmarks/flower_demo.py

clean:
	rm -rf .venv build dist *.egg-info runs .mypy_cache .ruff_cache .pytest_cache

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
