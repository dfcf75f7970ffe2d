# make demo     set everything up and open the Gradio page (ARGS="--port 8000 --share" passes options)
# make test     set everything up and run the checks and all tests, in two processes
# make check    ruff, mypy, the docs' links   make format   apply the fixes of ruff
# make docs     serve the documentation at http://127.0.0.1:8000 (ARGS="--dev-addr 0.0.0.0:8001" passes options)
# make setup    create the virtual environment .venv with all developer tools
# make clean    remove .venv and the caches
#
# PYTHON=python3.12 selects an interpreter. PIP_ARGS is passed to pip. Without a GPU, the index of the CPU builds of PyTorch (see
# its install page) saves some gigabytes.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: demo test check docs format setup clean

# The first interpreter that is new enough; otherwise python3, for the message below.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && exit; done; echo python3)
PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq $(PIP_ARGS)
ARGS ?=

demo: .venv/ready-demo
	@.venv/bin/python apps/denoise.py $(ARGS)

test: check
	@.venv/bin/python -m pytest -n 2 $(ARGS)

check: .venv/ready-dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet . || { echo "make check: run 'make format' and commit" >&2; exit 1; }
	@.venv/bin/mypy
	@said=$$(NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict 2>&1) || { echo "$$said" >&2; exit 1; } # --quiet would let warnings pass

docs: .venv/ready-dev
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve $(ARGS)

format: .venv/ready-dev
	@.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format .

setup: .venv/ready-dev

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info

# Stamps, which are made again only if pyproject.toml changes.
.venv/ready-demo: pyproject.toml | .venv/bin/python
	@echo "Setting up .venv: this downloads PyTorch and takes some minutes, once."
	@$(PIP) --editable '.[app]' && touch $@

.venv/ready-dev: pyproject.toml | .venv/bin/python
	@echo "Setting up .venv for development: this downloads PyTorch and takes some minutes, once."
	@$(PIP) --editable '.[classical,deepinv,dev,onnx,spandrel,text]' && touch $@ .venv/ready-demo

.venv/bin/python:
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
		echo "ebt_vision needs Python 3.11 or newer, found '$$($(PYTHON) -V 2>&1)'; install one and run make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
