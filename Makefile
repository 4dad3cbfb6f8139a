# Everything a developer runs. `make demo` and `make test` work on a fresh clone with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 10000
MINUTES ?= 30
KILLS ?= 300
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(16, 2 * (os.cpu_count() or 1)))')

.PHONY: demo test engines-live check bench soak clean

demo: .venv/installed ## run the main job end to end over an embedded store
	@$(BIN)/trajstore demo $(DIR)

test: .venv/installed ## the test suite; half of its time is waiting, so by more workers than there are cores
	@$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

engines-live: ## the suites over a real vLLM, SGLang and verl on this CPU; builds their environments (13 GB; ENGINES=vllm for one)
	@PYTHON=$(PYTHON) tests/live/run.sh $(ENGINES)

check: .venv/installed ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/installed ## throughput, as ratios measured in one run
	@$(BIN)/python -m benchmarks.append
	@$(BIN)/python -m benchmarks.hotpath
	@$(BIN)/python -m benchmarks.fold
	@$(BIN)/python -m benchmarks.archive
	@$(BIN)/python -m benchmarks.engines
	@$(BIN)/python -m benchmarks.reader
	@$(BIN)/python -m benchmarks.router_replay
	@$(BIN)/python -m benchmarks.audit

soak: .venv/installed ## the simulation (SEEDS=10000), everything killed at once, clusters too (MINUTES=30), the archive's crash loop (KILLS=300)
	@$(BIN)/python -m tests.simulation --seeds 0:$(SEEDS)
	@$(BIN)/python -m tests.soak.chaos --seed 1 --minutes $(MINUTES)
	@$(BIN)/python -m tests.soak.archive --kills $(KILLS)
	@$(BIN)/python -m tests.soak.archive --kills $(KILLS) --s3

clean:
	rm -rf .venv .venv-* dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trajstore needs Python 3.11 or newer; name one with PYTHON=")'
	@echo "Installing into .venv (torch and transformers among others; a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
