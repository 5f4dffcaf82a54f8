# make demo    shows rayfwd at work on this machine
# make test    everything: format, lint, types, layers, tests
# make bench   rayfwd beside ssh -L and others; writes docs/benchmarks.md
# make manual  writes config.example.toml, the man pages and the completions anew
# make recording  the demo to docs/demo.svg, for README
# make site    the documents as a site, in build/site
# make fast    unit tests only;  make lint, make types, make checks: what they say;  make clean
#
# All is made in this checkout: the environment in .venv, Ray's environments in .cache/ray-envs, the
# Debian roots that are booted in .cache/roots.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
DEMO_RAY := 2.60.0

# The first Python that is new enough and really starts (a pyenv shim may not); of those that can
# make an environment and compile, if there are any. The system's own goes before another of the same
# version: distributions build it with optimizations. pyenv does not, and all takes a fifth longer.
PYTHONS := $(foreach v,3.11 3.12 3.13 3.14,/usr/bin/python$(v) python$(v)) python3
PYTHON_WHOLE := import ensurepip, venv, os, sys, sysconfig; \
	sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PYTHON ?= $(shell for ask in '$(PYTHON_WHOLE)' pass; do for p in $(PYTHONS); do \
	if $$p -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1 \
	&& $$p -c "$$ask" >/dev/null 2>&1; then echo $$p; exit; fi; done; done)

# What is imported is compiled once, and not by each of some thousand processes.
export PYTHONDONTWRITEBYTECODE :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# The lab runs what a user with a compiler gets.
export RAYFWD_COMPILE ?= 1
ifdef CI
export PIP_PROGRESS_BAR := off
endif

# The fast ones first, so that a plain mistake is seen in seconds.
OTHER_TESTS = $(filter-out tests/unit/,$(sort $(dir $(wildcard tests/*/test_*.py))))
# Four files at a time, each whole on one side: a test of the lab waits as much as it computes.
SIDE_BY_SIDE = -n 4 --dist loadfile --no-loadscope-reorder
PYTEST = $(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=25 tests/unit $(OTHER_TESTS)

.PHONY: test demo bench manual recording site checks lint types fast packages demo-packages ray-envs roots wheel bytecode show-pytest clean
.DEFAULT_GOAL := test

test: packages checks wheel bytecode ray-envs roots
	$(PYTEST)

demo: $(VENV)/.usable
	$(BIN)/python tests/setup_envs.py $(DEMO_RAY)
	$(BIN)/rayfwd demo --ray "$${RAYFWD_RAY_ENVS:-.cache/ray-envs}/ray-$(DEMO_RAY)/bin/ray"

# On a machine that does nothing else; writes docs/benchmarks.md.
bench: packages $(VENV)/.installed
	$(BIN)/python -m bench.run

checks: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff format --check src tests bench tools
	$(BIN)/ruff check src tests bench tools

types: $(VENV)/.installed
	$(BIN)/mypy
	$(BIN)/lint-imports

fast: $(VENV)/.installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/unit

manual: $(VENV)/.installed
	$(BIN)/python -m tools.manual

# Of a real run of the demo; writes docs/demo.svg.
recording: $(VENV)/.installed
	$(BIN)/python tests/setup_envs.py $(DEMO_RAY)
	$(BIN)/python -m tools.recording "$${RAYFWD_RAY_ENVS:-.cache/ray-envs}/ray-$(DEMO_RAY)/bin/ray"

site: $(VENV)/.installed
	$(BIN)/python -m tools.site

# How `make test` calls pytest, for .ci/run.
show-pytest:
	@echo $(PYTEST)

packages:
	@tests/setup_packages.sh tests '$(PYTHON)'

# What the demo takes, and no more.
demo-packages:
	@tests/setup_packages.sh demo '$(PYTHON)'

# Only root can make the machines that need these. They take nothing of the environment's, which is
# made meanwhile.
ray-envs: packages
	@if [ "$$(id -u)" -eq 0 ]; then $(PYTHON) tests/setup_envs.py; \
	else echo "not root: the lab with its real Ray is not run"; fi

# They ask pip where its packages come from, and Debian's own Python has no pip.
roots: packages
	@if [ "$$(id -u)" -eq 0 ]; then python=$(PYTHON); \
		$$python -c 'import pip' 2>/dev/null \
			|| { $$python -m venv .cache/pip && python=.cache/pip/bin/python; }; \
		$$python tests/setup_roots.py && $(PYTHON) -m tests.setup_firewalls; \
	else echo "not root: the machines that are booted are not made"; fi

wheel: $(VENV)/.installed
	$(BIN)/python -m tests.setup_wheel

# The tests' own: where there is none, each of those that run files side by side makes all of it.
bytecode: $(VENV)/.installed
	@said=$$($(BIN)/pytest --collect-only -qq tests) || { echo "$$said"; exit 1; }

$(VENV)/.installed: pyproject.toml | packages
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed, with venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	RAYFWD_COMPILE=0 $(BIN)/python -m pip install --quiet --use-pep517 --editable '.[dev]'
	@touch $(VENV)/.usable $@

$(VENV)/.usable: pyproject.toml | demo-packages
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed, with venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	RAYFWD_COMPILE=0 $(BIN)/python -m pip install --quiet --use-pep517 --editable .
	@touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf build dist
