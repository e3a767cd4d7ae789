# bus_kv from a checkout. `make` lists what there is. Every target sets up what it needs first.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo test check up sim bench lock clean

# The interpreter for .venv: 3.11 or later. Default: the first of these that is, and was built with optimizations.
PYTHON ?=
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11
# More arguments for demo, test, up, sim and bench, such as: make test ARGS='-k codec'
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

help:  ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do
		printf '  make %-7s %s\n' "$$name" "$$text"
	done

setup: .venv/installed  ## .venv with the locked packages and bus-kv; nats-server found or fetched
	@$(BIN)/python bus_kv/runtime/nats_program.py --get || exit 1

demo: setup  ## set up, then show the main job on real data, and end
	@exec $(BIN)/python -m bus_kv.cli.demo $(ARGS)

# Two at once: most tests wait for processes. Those of one file share a cluster, so they stay together.
test: setup  ## set up, then run all tests
	@exec $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

check: setup  ## set up, then formatting, linting, types, import rules
	@$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

up: setup  ## set up, then a development cluster in the foreground
	@exec $(BIN)/bus-kv up $(ARGS)

sim: setup  ## set up, then the simulator: SEEDS=n runs n seeds, SEED=n replays one
	@exec $(BIN)/python -m tests.simulator $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: setup  ## set up, then the benchmarks
	@exec $(BIN)/bus-kv bench $(ARGS)

lock:  ## pin again what pyproject.toml asks for (needs uv)
	@uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-emit-index-url \
		--no-header --no-annotate --group dev pyproject.toml --output-file requirements.lock

clean:  ## remove all that the other targets made, but no data
	@rm -rf .venv .tools build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache \
		.pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up, step by step; a stamp file says that a step is done ----

.venv/installed: .venv/locked pyproject.toml
	@$(PIP) install --quiet --no-index --no-build-isolation --no-deps --editable . >.venv/pip.log 2>&1 ||
		{ cat .venv/pip.log >&2; echo 'make setup: bus_kv itself could not be installed: see above' >&2; exit 1; }
	touch $@

# Source packages are built with the locked setuptools, not with one that pip picks.
.venv/locked: requirements.lock .venv/created
	@echo 'make setup: installing the locked packages into .venv (takes minutes, once)' >&2
	sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock >.venv/build.lock
	install() { $(PIP) install --require-hashes "$$@" >>.venv/pip.log 2>&1; }
	: >.venv/pip.log
	install -r .venv/build.lock && install --no-build-isolation --use-pep517 -r requirements.lock || {
		echo "make setup: pip could not install the locked packages:" \
			"$$(grep '^ERROR' .venv/pip.log | tail -n 1) (log: .venv/pip.log):" \
			"check the network, or name your mirror in pip's configuration (pip config set global.index-url URL)" >&2
		exit 1
	}
	touch $@

.venv/created:
	@python= slow=
	for name in $(if $(PYTHON),$(PYTHON),$(PYTHONS)); do
		while read -r path; do
			fitness=0
			"$$path" -I bus_kv/runtime/interpreter.py >/dev/null 2>&1 </dev/null || fitness=$$?
			case $$fitness in
				0) python=$$path; break 2 ;;
				3) slow=$${slow:-$$path} ;;
			esac
		done < <(type -aP "$$name")
	done
	if [ -z "$$python" ] && [ -n "$$slow" ]; then
		python=$$slow
		echo "make setup: $$slow is built without optimizations, which costs about a quarter of the speed:" \
			'--enable-optimizations is what it lacks (pyenv: PYTHON_CONFIGURE_OPTS=--enable-optimizations)' >&2
	fi
	if [ -z "$$python" ]; then
		echo 'make setup: Python 3.11 or later with its venv is missing$(if $(PYTHON), ($(PYTHON) is not)):' \
			'apt-get install python3 python3-venv (python3.12-venv for a python3.12), or name one: make setup PYTHON=/path/to/python3.11' >&2
		exit 1
	fi
	echo "make setup: .venv is made by $$python" >&2
	"$$python" -m venv --clear .venv
	touch $@
