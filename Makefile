# `make demo` shows what it does, `make test` proves it, `make nano` trains the shipped model again from nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Busy-waiting OpenMP threads on shared cores cost a factor of four.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test test-long torture nano lint checks clean

help:
	@echo "make setup      build $(VENV) from constraints.txt (instant when nothing changed)"
	@echo "make demo       pictures, films, answers and chat by the shipped model, on one page"
	@echo "make test       the everyday tests;  make test-long: more;  make torture: the rest"
	@echo "make nano       train the shipped model again from nothing (hours); STEPS=3: the same way in a minute"
	@echo "make lint       ruff and mypy;  make checks: lint and test"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vilau needs Python 3.11 or newer, and $(PYTHON) is %d.%d; run: make setup PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing about 2 GB into $(VENV): some minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/vilau demo --out demo

test: $(STAMP)
	$(BIN)/python -m pytest -q

test-long: $(STAMP)
	$(BIN)/python -m pytest -q -m "not torture"

torture: $(STAMP)
	$(BIN)/python -m pytest -q -m "torture" --timeout 0

# STEPS=3 takes every stage for three steps only: the whole way in a minute or two.
nano: $(STAMP)
	$(BIN)/vilau train configs/nano/nano-cpu.yaml $(if $(STEPS),$(foreach stage,align vision_tower pretrain sft,stages.$(stage).steps=$(STEPS)))
	$(BIN)/vilau train configs/nano/nano-cpu-shifted.yaml $(if $(STEPS),stages.sft.steps=$(STEPS))
	$(BIN)/vilau convert --force --guidance-scale 1 runs/nano-cpu-shifted/sft/final runs/nano-cpu/model

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

checks: lint test

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
