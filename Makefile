# Set-up and main jobs. `make verify` is the one to run first; every target builds .venv when it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m verify

.PHONY: verify verify-all reports pages training-pages readme tables mutants speed memory transforms gpu gpu-static test test-all lint venv clean

# Every layer in the sixteen-bit formats, and GELU and SiLU over all 4,278,190,080 finite float32 inputs.
verify: .venv/stamp
	$(RUN) gradient --all gelu:float32 silu:float32 --dtype bfloat16 float16

# Every layer in the three formats, and some in float64.
EVERYTHING := --all gelu:float64 gelu_tanh:float64 silu:float64 quick_gelu:float64 --dtype bfloat16 float16 float32
verify-all: .venv/stamp
	$(RUN) gradient $(EVERYTHING)

# The committed results: a full verification, torch's own accuracy, then the pages, and the README's table and picture.
reports: .venv/stamp
	$(RUN) gradient $(EVERYTHING) --json reports/gradient.json
	$(RUN) gradient --native --all
	$(MAKE) pages readme

# A page per activation and the index, from the committed results.
pages: .venv/stamp
	$(RUN) report --all --records reports/gradient.json

readme: .venv/stamp
	$(BIN)/python -m verify.guarantees
	$(BIN)/python -m verify.figure

# The pages and pictures of the training runs, from the committed results.
training-pages: .venv/stamp
	$(BIN)/python -m verify.training_page reports/training

# The decoders' coefficients: the same each time, but for what is calibrated on torch's float32 forward on a processor.
tables: .venv/stamp
	$(BIN)/python -m invref.fit
	$(BIN)/python -m invref.binfit tanhshrink laplace

# The verifier verified: every planted fault must be caught by the check that is meant for it.
mutants: .venv/stamp
	$(RUN) mutants

# Speed beside torch's own layers: on an idle machine.
speed: .venv/stamp
	$(RUN) speed --peers --out reports

# What converting saves in each model: beside other ways to save memory, on an idle machine; in bfloat16; with dropout.
memory: .venv/stamp
	$(RUN) memory --no-dropout --peers --json reports/memory.json --markdown reports/memory.md
	$(RUN) memory --no-dropout --dtype bfloat16 --seconds 0 --json reports/memory-bfloat16.json \
		--markdown reports/memory-bfloat16.md
	$(RUN) memory --seconds 0 --json reports/memory-dropout.json --markdown reports/memory-dropout.md

# Every transform of torch on every layer: docs/transforms.md.
transforms: .venv/stamp
	$(BIN)/python -m verify.matrix

# On a machine with a GPU: every layer over all inputs there, and its speed beside torch's kernels and a copy.
gpu: .venv/stamp
	$(RUN) gradient --all --device cuda --dtype bfloat16 float16 float32 --json reports/gradient-gpu.json
	$(RUN) speed --device cuda --out reports/gpu

# The GPU kernels' registers, spills, loads and stores, compiled ahead of time: reports/gpu-static.md.
gpu-static: .venv/stamp
	$(BIN)/python -m verify.gpu_static

lint: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One process a core, at most four; all tests of a file in one of them. Threads that wait must not spin where others work.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "slow or not slow"

venv: .venv/stamp

# The stamp comes last, so an interrupted install is done again. Constraints go through the environment to reach isolated
# builds as well: older pip reads PIP_CONSTRAINT there, newer pip PIP_BUILD_CONSTRAINT. Relative, because pip splits at spaces.
.venv/stamp: pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "invref needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in 'make venv PYTHON=python3.12'" >&2; \
		exit 1; }
	@$(PYTHON) -m venv --clear .venv || { \
		echo "could not create .venv: install Python's venv module (on Debian the package python3-venv)" >&2; \
		exit 1; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
