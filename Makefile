# make help lists the targets. Everything runs in .venv, made on first use.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= configs/tiny_cpu.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
PROMPT ?= Return the
WORKERS ?= 2
ARGS ?=
BUDGET ?= cpu
PYTHON_GPU ?= python3
AOT_JAX ?= 0.12.0.1
AOT_EXTRAS ?=
AOT_VENV := .venv-aot-$(AOT_JAX)
NVDISASM ?=

.DEFAULT_GOAL := help
.PHONY: help setup train generate plan test test-slow test-deep hf lint format notebooks \
  docs docs-serve faults bench bench-serve replicate gpu aot aot-all model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' \
	  $(MAKEFILE_LIST)
	@echo
	@echo "  variables: CONFIG=$(CONFIG) WORKDIR=$(WORKDIR) ARGS='--flag=value'"

setup: $(READY) ## create .venv and install the package with its test tools

$(READY): pyproject.toml constraints.txt tools/find_python.sh
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) || exit 1; \
	echo "Setting up $(VENV) with $$python"; \
	"$$python" -m venv $(VENV) || { \
	  echo "$$python could not make $(VENV), see above. Is its venv module" \
	    "installed (Debian: python3-venv), this folder writable, and an old" \
	    "$(VENV) removed? PYTHON=... names another Python." >&2; \
	  exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(READY) ## train, evaluate and sample the tiny model (CPU, ~5 minutes)
	$(BIN)/python -m gdn2_jax.train --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

generate: $(READY) ## sample from the trained model: PROMPT="..."
	$(BIN)/python -m gdn2_jax.generate --workdir=$(WORKDIR) \
	  --prompt="$(PROMPT)" $(ARGS)

plan: $(READY) ## parameters, memory and FLOPs of CONFIG, nothing allocated
	$(BIN)/python -m gdn2_jax.plan --config=$(CONFIG) $(ARGS)

test: $(READY) ## run the test suite, but for the slow tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'not slow and not deep' \
	  --durations=10 $(ARGS)

test-slow: $(READY) ## run rehearsals, kill loops and long interpreter cases
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'slow and not deep' \
	  --durations=10 $(ARGS)

test-deep: $(READY) ## run the longest tests, which CI leaves out (~35 minutes)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m deep \
	  --durations=10 $(ARGS)

hf: .venv-hf/.ready ## test folders for transformers, with torch on the CPU
	.venv-hf/bin/python -m pytest -q -n $(WORKERS) --dist loadfile \
	  --durations=10 tests/interop/hf/with_torch $(ARGS)

.venv-hf/.ready: pyproject.toml constraints.txt tools/find_python.sh
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) && \
	"$$python" -m venv .venv-hf
	@.venv-hf/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev,eval,hf]'
	@touch $@

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## apply style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(READY) ## run the notebooks top to bottom
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
	  --durations=10 tests/test_notebooks.py $(ARGS)

# Not --quiet: it would hide warnings from --strict.
docs: .venv-docs/.ready ## build the documentation site into site/ (strict)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)
	@echo "site/index.html is the start page"

docs-serve: .venv-docs/.ready ## show the site at localhost:8000, rebuilt on changes
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve --watch gdn2_jax \
	  --watch benchmarks $(ARGS)

# The reference is read from the source: the package is not installed here.
.venv-docs/.ready: tools/site/requirements.txt tools/find_python.sh
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) && \
	"$$python" -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check \
	  --requirement tools/site/requirements.txt
	@touch $@

faults: $(READY) ## kill, damage and starve real training runs (~15 minutes)
	$(BIN)/python -m tests.faults --json=benchmarks/results/faults.json \
	  $(ARGS)

bench: $(READY) ## time the op against the token scan
	$(BIN)/python -m gdn2_jax.bench op $(ARGS)

bench-serve: $(READY) ## time serving against a softmax transformer
	$(BIN)/python -m gdn2_jax.bench serve $(ARGS)

replicate: $(READY) ## compare mixers with seeds: BUDGET=ci, cpu, gpu15, gpuday
	$(BIN)/python -m gdn2_jax.replicate --budget=$(BUDGET) $(ARGS)

# A machine with a GPU often has its own JAX and no way to a package index.
gpu: ## on a GPU: check every kernel, time it, time the train step
	@case " $(ARGS) " in *" --rehearse "*) see=cpu ;; *) see=gpu ;; esac; \
	if $(PYTHON_GPU) -c "import absl, jax, jaxtyping, tqdm; \
	  jax.devices('$$see')" 2>/dev/null; then python=$(PYTHON_GPU); else \
	  $(MAKE) --no-print-directory $(READY) || exit 1; \
	  python=$(BIN)/python; \
	  test $$see = cpu || $$python -m pip install --quiet \
	    --disable-pip-version-check --constraint constraints.txt \
	    --editable '.[cuda13]' || exit 1; \
	fi; \
	$$python -m gdn2_jax.bench gpu $(ARGS)

aot: $(AOT_VENV)/.ready ## compile every kernel for an H100; no GPU needed
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m gdn2_jax.aot $(ARGS)

aot-all: ## the same with the oldest and the newest JAX supported
	@for version in 0.11.2 0.12.0.1; do \
	  $(MAKE) --no-print-directory aot AOT_JAX=$$version || exit 1; \
	done

model: $(AOT_VENV)/.ready ## model the kernels' times on an H100; no GPU needed
	@$(AOT_VENV)/bin/python -c "from tools.kernel_model import disassembly as d; \
	  d.find_nvdisasm('$(NVDISASM)')" 2>/dev/null || test -n "$(NVDISASM)" || \
	$(AOT_VENV)/bin/python -m pip install --quiet --no-deps \
	  --disable-pip-version-check 'nvidia-cuda-nvdisasm>=13,<14' || { \
	  echo "make model: cannot install nvdisasm into $(AOT_VENV); name one:" \
	    "NVDISASM=PATH" >&2; exit 1; }
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tools.kernel_model \
	  $(NVDISASM:%=--nvdisasm=%) $(ARGS)

# JAX's CUDA plugin compiles without a driver; of NVIDIA's wheels it needs those
# with ptxas and libdevice, where no CUDA toolkit is installed.
.venv-aot-%/.ready: pyproject.toml constraints.txt tools/find_python.sh
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) || exit 1; \
	echo "Setting up .venv-aot-$* with $$python"; \
	"$$python" -m venv .venv-aot-$* || { \
	  echo "$$python cannot make a virtual environment" >&2; exit 1; }; \
	grep -Ev '^jax(lib)?==' constraints.txt >.venv-aot-$*/constraints.txt; \
	pip=".venv-aot-$*/bin/python -m pip --disable-pip-version-check"; \
	$$pip install --quiet --constraint .venv-aot-$*/constraints.txt \
	  jax==$* jaxlib==$* --editable '.$(AOT_EXTRAS:%=[%])' && \
	$$pip install --quiet --no-deps \
	  jax-cuda13-plugin==$* jax-cuda13-pjrt==$* && \
	{ command -v ptxas || command -v "$${CUDA_HOME:-/usr/local/cuda}/bin/ptxas" \
	  || $$pip install --quiet --no-deps 'nvidia-cuda-nvcc>=13,<14' \
	  'nvidia-nvvm>=13,<14'; } >/dev/null || { \
	  echo "make aot: cannot install jax $* and its CUDA 13 plugin into" \
	    ".venv-aot-$*; is a package index reachable?" >&2; exit 1; }
	@touch $@

clean: ## remove .venv and caches (runs/ stays)
	rm -rf $(VENV) .venv-aot-* .venv-docs site .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
