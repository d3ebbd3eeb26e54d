# make setup | demo | test | test-gpu | check | format | docs | bench | lock | clean.  Needs Python 3.11+, pip and a C++ compiler
# (without one everything works, but slowly); everything else lands in .venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SLOW ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The tests run in WORKERS processes: one OpenMP thread each, or they fight for the cores.
test test-gpu bench: export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-gpu check format docs bench lock clean

setup: $(STAMP)

# What was compiled is compiled again when its source changes.
$(STAMP): requirements-dev.lock pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitwright needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(STAMP)

demo: setup
	$(BIN)/bitwright demo

# `make test` leaves out what is marked slow; `make test SLOW=1` runs everything.
test: setup
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup $(if $(SLOW),-m "slow or not slow") $(ARGS)

# The programs for GPUs, interpreted on the CPU; with SLOW=1 every scheme and size, and the machine code for GPUs that are not
# here. Installs Triton, 200 MB without anything else; `make test` then runs these tests, too. A GPU is not needed.
test-gpu: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-gpu.lock
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup $(if $(SLOW),-m "slow or not slow") \
		tests/kernels/gpu tests/models/test_decoder_cuda.py $(ARGS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Writes docs/reference/ and the output shown in README.md.
docs: setup
	$(BIN)/python -m docs.generate

# Streams generated checkpoints of 1.5 billion parameters (12 GB of disk, for a while), then measures third-party models and
# every algorithm; beside the peers where `make bench PEERS=DIR` says that benchmarks.peers.setup put them.
bench: setup
	$(BIN)/python -m benchmarks.stream --work-dir out/stream --json benchmarks/results/stream.json
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.quality --work-dir out/quality $(if $(PEERS),--peers-dir $(PEERS))

# Writes down the newest version of everything. torch stays at the release that the figures in the docs were measured with.
TORCH := torch==2.13.0
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(TORCH) scikit-build-core nanobind cmake ninja '.[dev]'
	{ sed '/^[^#]/,$$d' requirements-dev.lock; \
	  .venv-lock/bin/python -m pip freeze --exclude bitwright | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > .venv-lock/lock
	mv .venv-lock/lock requirements-dev.lock && rm -rf .venv-lock

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
