# `make benchmark`, the other benchmarks, `make test`, `make docs` and `make lint` do all their set-up, in the virtual
# environment .venv.
# They take the newest torch; for another: make test TORCH=torch==2.13.0 TRITON=triton==3.7.1 (first `make clean`).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
# Named besides torch because torch's CPU builds do not bring it, and the tests interpret its kernels.
TRITON ?= $(if $(filter Linux,$(shell uname)),triton)
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: benchmark benchmark-linear benchmark-parallel paper-synthetic compare-eta test docs lint clean

# For example: make benchmark ARGS=--full
benchmark: $(VENV)/installed
	$(BIN)/python benchmarks/bench_vocab.py $(ARGS)

benchmark-linear: $(VENV)/installed
	$(BIN)/python benchmarks/bench_linear.py $(ARGS)

benchmark-parallel: $(VENV)/installed
	$(BIN)/python benchmarks/bench_parallel.py $(ARGS)

# For example: make paper-synthetic ARGS=--full
paper-synthetic: $(VENV)/installed
	$(BIN)/python benchmarks/paper_synthetic.py $(ARGS)

compare-eta: $(VENV)/installed
	$(BIN)/python examples/train_gpt.py --compare 1 0.9 0.5 0.1 0 --seeds 0 1 --threads 1 --steps 1100 \
		--vocab-size 2048 --held-out-tokens 32768 --samples 128 --out benchmarks/results $(ARGS)

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

# Passive waiting, because the workers share the cores: threads that spin would take them from one another. A file stays
# with its worker, which builds or starts once what its tests share; those with long tests come first.
test: $(VENV)/installed $(VENV)/oldest $(VENV)/peers
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/linters
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info mixce_kernels/_C.*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The extension of an earlier build is removed, so that one that fails to compile is not mistaken for it.
$(VENV)/installed: setup.py pyproject.toml $(shell find csrc -type f) | $(BIN)/python
	rm -f mixce_kernels/_C.*.so
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[benchmark,docs,examples,test,transformers,trl]' $(TORCH) $(TRITON)
	@$(BIN)/python -c 'from mixce_kernels import _C' || \
		echo "No native extension: $(BIN)/pip install -v -e . says why. Continuing without the backends 'cpu' and 'cuda'."
	@touch $@

# The oldest releases that the integrations take, with what they need instead of the newest's: tests/test_oldest_releases.py
# puts a folder of them first.
OLDEST_TRANSFORMERS := transformers==4.49.0 tokenizers==0.21.4 huggingface_hub==0.36.2 datasets==3.6.0
OLDEST_TRL := trl==1.0.0 transformers==4.56.2 tokenizers==0.22.2 huggingface_hub==0.36.2 accelerate==1.4.0 \
	peft==0.17.1 datasets==4.7.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0
$(VENV)/oldest: Makefile | $(VENV)/installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@/transformers \
		$(OLDEST_TRANSFORMERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@/trl $(OLDEST_TRL)
	@touch $@

# Other packages whose losses docs/migration.md and docs/integrations.md compare with; without what they require, which
# would bring another torch or Triton.
PEERS := liger-kernel cut-cross-entropy torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring-parser typeguard
$(VENV)/peers: Makefile | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PEERS)
	@touch $@

# The extra by itself: installing the package once more would compile it once more.
LINTERS = from importlib.metadata import requires; \
	print(*(line.partition(";")[0] for line in requires("mixce_kernels") if "lint" in line.partition(";")[2]))
$(VENV)/linters: pyproject.toml | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c '$(LINTERS)')
	@touch $@
