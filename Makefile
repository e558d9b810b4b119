# On a fresh machine: `make demo` runs the main job, `make test` passes the tests. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
IN_PARALLEL := -n auto --maxprocesses 8 --dist worksteal
PIP := $(BIN)/pip --quiet --disable-pip-version-check
SOURCES := pyproject.toml requirements/build.txt requirements/dev.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help install demo test any-input sanitize docs docs-serve lint format bench bench-quick kill-test gpu-check release-tools lock wheel compat clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/installed ## Make .venv and install the package in it, editable, kernels compiled

$(VENV)/installed: $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing tde_kernels into $(VENV); the first time fetches torch (some minutes)."
	@$(PIP) install --require-hashes --no-deps -r requirements/build.txt
	@$(PIP) install --require-hashes --no-deps --no-build-isolation -r requirements/dev.txt
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -m tde_kernels
	@touch $@

demo: install ## Train digits_lt: linear, cosine and de-confounded heads, with and without TDE; writes runs/digits_lt
	$(BIN)/tde train digits_lt overwrite=true

# A worker a core; one that waits for a turn does not spin meanwhile, nor does numpy share its products out
test: export OMP_WAIT_POLICY = passive
test: export OPENBLAS_NUM_THREADS = 1
test: install ## Run all tests
	$(BIN)/python -m pytest tests -q $(IN_PARALLEL)
	$(BIN)/python -m pytest bench --benchmark-disable --shapes cifar100 -q $(IN_PARALLEL)
	$(BIN)/python tests/emulated.py -q $(IN_PARALLEL)
	$(BIN)/python tests/sanitized.py --c-api address

sanitize: install ## Test the core, CUDA kernels emulated, under sanitizers of addresses, undefined behaviour, threads
	$(BIN)/python tests/sanitized.py

any-input: install ## Draw 3,000 examples of any input, others at every run (some minutes)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/any_input -q $(IN_PARALLEL)

# The site's builder has a successor, and says so at length
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: install ## Build the documentation into build/site; a broken link fails
	$(BIN)/mkdocs build --clean

docs-serve: install ## Show the documentation at localhost:8000, built anew when a page changes
	$(BIN)/mkdocs serve

kill-test: install ## Kill trainings 50 times each and compare what they end in, bit by bit (KILLS=50)
	TDE_KILLS=$(or $(KILLS),50) $(BIN)/python -m pytest tests/trainer/test_kill.py -q -s

lint: install ## Check formatting, lint, types, licences, and for known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.[ch]*')
	$(BIN)/mypy
	$(BIN)/pip --disable-pip-version-check check
	$(BIN)/python -m release.licences
	$(BIN)/python -m release.audit

format: install ## Put formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.[ch]*')

bench: install ## Measure on this CPU: bench/results, docs/performance.md and its plots (half an hour or more)
	@mkdir -p bench/results
	results=bench/results/$$($(BIN)/python -m bench.results)-$$(date +%F).json && \
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=$$results && \
	$(BIN)/python -m bench.report $$results

bench-quick: install ## The same in two minutes, of few shapes: tables, and build/bench/performance.md
	@mkdir -p build/bench
	$(BIN)/python -m pytest bench -q --benchmark-only --quick --benchmark-json=build/bench/quick.json
	$(BIN)/python -m bench.report build/bench/quick.json --page build/bench/performance.md

gpu-check: ## With a GPU: build, test, sanitise and measure with the python at hand, offline (override with PYTHON=...)
	$(PYTHON) -m bench.gpu_check

release-tools: install # beside the rest only where a release is made
	@$(PIP) install --require-hashes --no-deps -r requirements/release.txt

lock: release-tools ## Pin and hash requirements/ anew from pyproject.toml; UPGRADE=1 takes the newest of all
	$(BIN)/python -m release.lock $(if $(UPGRADE),--upgrade)

wheel: release-tools ## Build dist/: sdist and checked wheel, CUDA inside where there is nvcc; PYTHONS="3.10 3.11" for several
	$(BIN)/python -m release.wheel $(if $(PYTHONS),--pythons $(PYTHONS))

compat: release-tools ## Test wheels with oldest and newest torch, Python 3.10 to 3.13 (an hour): docs/results/compat.json; ONLY="oldest" for some
	$(BIN)/python -m release.compat $(ONLY) --json docs/results/compat.json

clean: ## Remove what was built, not what was trained
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache tde_kernels/_C*.so
