# The only list of commands. Each sets up what it needs; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo lab test test-browser soak lint fix bench docs clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade "pip>=24"
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)  ## train the built-in model on real text; leaves build/demo.html
	$(BIN)/tensafe-nb demo

lab: $(READY)  ## JupyterLab on the notebooks
	$(BIN)/tensafe-nb lab

test: lint  ## everything fast
	$(BIN)/python -m pytest -m "not soak and not browser"

test-browser: $(READY)  ## real JupyterLab in real Chromium
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core)
	$(BIN)/python -m pytest tests/browser -m browser

soak: $(READY)  ## long and many-seed tests, outside CI
	$(BIN)/python -m pytest -m soak -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## ratios against named peers, measured in one run; writes build/bench.json
	$(BIN)/python -m bench

docs: $(READY)  ## the pages and the API reference; leaves build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build $(VENV)
