# `make demo` and `make test` are all that a newcomer needs: each sets up what it uses, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
TOOLS := all
SHELL_SCRIPTS := .ci/run tools/setup.sh deploy/triton.sh

# The console is built from clients/web when its sources are newer than what was built last.
WEB := clients/web
WEB_BUILT := server/onebase_server/web/index.html
WEB_MODULES := $(WEB)/node_modules/.package-lock.json
WEB_SOURCES := $(shell find $(WEB) -path $(WEB)/node_modules -prune -o -type f ! -name '*.md' ! -name '*.test.ts' -print)
NPM := PATH="$(CURDIR)/$(BIN):$$PATH" npm --prefix $(WEB)

.PHONY: help setup base demo test lint lint-python lint-console lint-files docs format check every-test check-long chaos audit bench gpu-check console clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# Of the tools only what the demo needs, unless all are there already.
demo: TOOLS := demo
demo: base console ## Serve the base and two adapters, watch them answer at once, try your own requests
	@exec $(BIN)/python examples/demo.py

# Files of tests run side by side, four at most: two more than there are cores, since tests also wait, as far as
# memory goes, of which each may take 3 GB. Each computes with one thread: more would wait for each other's cores.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); \
	fit=$$(awk '/^MemAvailable/ { print int($$2 / 3e6) }' /proc/meminfo 2>/dev/null || echo 4); \
	printf '%s\n' 4 $$((cores + 2)) $$((fit > 1 ? fit : 1)) | sort -n | head -1)

# What only repeats a behaviour, over more combinations or on the real base, is marked `full`: `make check` runs it too.
SELECT ?= -m "not full"
# Bytecode is written whatever the environment says: without it each of hundreds of processes compiles the sources.
# A server's helpers step aside for what serves: under tests that leave them little to step aside to (19 is the
# last niceness), they get their turn beside the other tests' servers too.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 nice -n 17 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: base console ## Run the tests, on the real default base (PYTEST_ARGS="-k name" picks some, WORKERS=0 one by one)
	@echo "==> Running the tests"
	@$(PYTEST) $(SELECT) $(PYTEST_ARGS)

# Two at a time, each printed in one piece when it is done; what a make of its own prints comes as it is printed.
TWO := --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
LINTS := lint-python lint-console docs lint-files

lint: setup $(WEB_MODULES) ## Check style, types, import rules, the console, shell scripts and the Dockerfile
	@$(MAKE) $(TWO) $(LINTS)

lint-python: setup
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> the synchronous client"
	@$(BIN)/python tools/generate_sync.py --check
	@echo "==> the docstrings"
	@$(BIN)/python tools/check_docstrings.py
	@echo "==> the pages made from code"
	@$(BIN)/python tools/reference_pages.py --check
	@echo "==> import-linter"
	@$(BIN)/lint-imports

lint-console: setup $(WEB_MODULES)
	@echo "==> the console"
	@$(BIN)/python tools/console_types.py --check
	@$(NPM) run --silent check
	@$(NPM) run --silent test

lint-files: setup
	@echo "==> shellcheck and hadolint"
	@$(BIN)/shellcheck $(SHELL_SCRIPTS)
	@$(BIN)/hadolint Dockerfile
	@echo "==> what deploy/ and .github/ hold"
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose*.yaml
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/kubernetes-validate --quiet --strict deploy/kubernetes/cpu/onebase.yaml

console: setup $(WEB_BUILT) ## Build the console, the page at /console (done by demo and test when needed)

$(WEB_BUILT): $(WEB_SOURCES) $(WEB_MODULES)
	@echo "==> Building the console"
	@$(NPM) run --silent build

$(WEB_MODULES): $(WEB)/package-lock.json $(WEB)/package.json | setup
	@echo "==> Installing what the console is built with"
	@$(NPM) ci

docs: setup ## Build the documentation site into build/site, with every link checked
	@echo "==> the documentation site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site: look at it with $(BIN)/mkdocs serve"

# Lint beside the tests, which leave a fifth of the cores' time over where they wait.
check: base console $(WEB_MODULES) ## Everything that continuous integration checks: lint, and every test in all combinations
	@$(MAKE) $(TWO) every-test $(LINTS)

every-test:
	@$(MAKE) test SELECT=

check-long: ## The same with ten times as many random examples
	@ONEBASE_EXAMPLES=long $(MAKE) check

chaos: base ## Break servers under load at random, and judge what they lose (CHAOS_ARGS="--faults 100 --seed 7 --setup two")
	@exec $(BIN)/python -m tests.server.chaos $(CHAOS_ARGS)

# Without +cpu and the like, since PyPI knows those versions by their plain names. What it does not know fails the audit.
audit: setup ## Ask PyPI for known vulnerabilities of what is installed
	@$(BIN)/python -m pip install --quiet "pip-audit>=2.10,<3"
	@$(BIN)/python -m pip list --format freeze --exclude-editable | sed 's/+.*//' >$(VENV)/installed.txt
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/installed.txt

bench: base ## Measure OneBase next to vLLM, llama.cpp, PEFT and TRL, which it installs (BENCH_ARGS=--quick: a look)
	@exec $(BIN)/python benchmarks/goals.py $(BENCH_ARGS)

# Without `setup`, which asks the network; a bundle's own Python has no .venv.
gpu-check: ## Check and measure all of it on a GPU, without a network (CHECK_ARGS="--bundle FILE": what to carry there)
	@exec $$([ -x $(BIN)/python ] && echo $(BIN)/python || echo python3) benchmarks/gpu_check.py $(CHECK_ARGS)

format: setup ## Rewrite the sources in the project's style, and the synchronous client from the asynchronous one
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python tools/generate_sync.py

setup: ## Create .venv and install into it (done by every other target when needed)
	@tools/setup.sh $(VENV) $(TOOLS)

base: setup ## Fetch the default base into the user's cache (done by demo and test when needed)
	@echo "==> Default base model"
	@$(BIN)/onebase base fetch

clean: ## Remove .venv and the tools' caches; the cached base stays
	@rm -rf $(VENV) $(WEB)/node_modules server/onebase_server/web .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
