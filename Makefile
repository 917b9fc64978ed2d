# What people and CI run. Every target sets up .venv first and adds nothing where that is in place.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export RAY_AUTH_MODE := disabled

.PHONY: demo up test test-slow bench golden settings check validate-k8s format clean

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed   ## the main job, end to end, then everything is shut down
	$(BIN)/dde demo $(ARGS)

up: .venv/installed     ## the same system, left running until Ctrl-C
	$(BIN)/dde up

test: .venv/installed   ## everything but the slow tests, in two processes
	$(BIN)/python -m pytest -m 'not slow' -n 2 --no-loadscope-reorder $(ARGS)

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: .venv/installed  ## ratios measured in one run, into tests/bench/results.json; BENCH=name for one of them
	$(BIN)/python -m tests.bench $(BENCH)

golden: .venv/installed ## rewrite the golden loss curve
	DDE_WRITE_GOLDEN=1 $(BIN)/python -m pytest tests/e2e/test_training.py -k golden

settings: .venv/installed ## rewrite docs/settings.md from the code, and the alerts of k8s/ from those of deploy/
	$(BIN)/python -m tests.support.settings_page
	$(BIN)/python -m tests.support.alerts_manifest

check: .venv/installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

validate-k8s: .venv/installed   ## every overlay of k8s/; ARGS=--mutate also tries every single mistake
	$(BIN)/python -m tests.validate_k8s $(ARGS)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .dde build *.egg-info
