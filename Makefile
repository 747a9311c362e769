# `make demo`, `make test`, `make search`, `make smoke` and `make lint` set up all they need in .venv, given Python 3.11 or newer with venv.
# `make test PYTHON=path` uses an environment that you made yourself and installs nothing.

.DEFAULT_GOAL := help
.PHONY: help demo test suite search smoke lint style types

# Tried by running: a name on the PATH may be a stub for an interpreter that is not installed.
BASE := $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)

ifneq ($(origin PYTHON), command line)
PYTHON := .venv/bin/python
READY := .venv/ready-$(shell { $(BASE) -VV; cat pyproject.toml constraints.txt; } 2>/dev/null | cksum | cut -d ' ' -f 1)
endif

help:
	@echo 'make demo    prepare text, pretrain small arms with different KV compression, resume one, compare (minutes)'
	@echo 'make test    lint, types and the whole CPU suite'
	@echo 'make search  the property-based tests with thousands of new examples each, and many random layer plans'
	@echo 'make smoke   on a machine with a GPU: its kernels, and layouts of several ranks (on the CPU) against one process'
	@echo 'make lint    ruff and mypy alone'

demo: $(READY)
	$(PYTHON) -m launch demo

# Types beside the tests: they take a minute on one core, and the suite leaves a core idle now and then.
test: style
	$(MAKE) --no-print-directory --jobs=2 types suite

suite: $(READY)
	$(PYTHON) -m pytest --whole --numprocesses logical --dist worksteal

search: $(READY)
	$(PYTHON) -m pytest --numprocesses logical --hypothesis-profile search --plans 200 \
		$(shell grep --files-with-matches '^from hypothesis' tests/test_*.py) tests/test_mixed_plans.py

smoke: $(READY)
	$(PYTHON) -m pytest tests/test_gpu.py tests/test_engine.py

lint: style types

style: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: $(READY)
	$(PYTHON) -m mypy

# Its name is a hash of what decides the environment's content, so that any change of it makes a new one.
.venv/ready-%:
	@test -n '$(BASE)' || { echo 'no Python 3.11 or newer with venv was found; install one (Debian: python3-venv)' >&2; exit 1; }
	$(BASE) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
