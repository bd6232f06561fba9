# `make help` lists every target.
.DEFAULT_GOAL := help
.ONESHELL:
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

# TORCH=auto: the CUDA build where an NVIDIA driver answers, else the CPU build.
# TORCH=installed: use the torch of the Python that makes the environment.
TORCH ?= auto
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KILLS ?= 200
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
SOURCES := setup.py $(shell find csrc -type f)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.dependencies: constraints.txt pyproject.toml
	@if [ "$(TORCH)" = installed ]; then
		echo "environment: $(VENV), with the installed torch"
		$(PYTHON) -m venv --system-site-packages $(VENV)
		$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
		sed '/^torch==/d; /^triton==/d' constraints.txt > $(VENV)/constraints.txt
		CONSTRAINTS=$(VENV)/constraints.txt
	else
		echo "environment: $(VENV)"
		[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
		TORCH_VERSION=$$(sed -n 's/^torch==//p' constraints.txt)
		if nvidia-smi -L >/dev/null 2>&1; then
			$(PIP) "torch==$$TORCH_VERSION"
		else
			$(PIP) "torch==$$TORCH_VERSION+cpu" numpy 2>/dev/null || \
			$(PIP) "torch==$$TORCH_VERSION+cpu" numpy --extra-index-url https://download.pytorch.org/whl/cpu
		fi
		CONSTRAINTS=constraints.txt
	fi
	$(BIN)/python -m pip --disable-pip-version-check install -qq -c $$CONSTRAINTS setuptools wheel
	$(BIN)/python - <<-'PY' > $(VENV)/requirements.txt
		import re, pathlib
		extras = re.findall(r'^(?:train|dev) = \[(.*?)\]$$', pathlib.Path("pyproject.toml").read_text(), re.M | re.S)
		print("\n".join(name for extra in extras for name in re.findall(r'"([^"]+)"', extra)))
	PY
	$(BIN)/python -m pip --disable-pip-version-check install -qq -c $$CONSTRAINTS -r $(VENV)/requirements.txt
	if [ "$(TORCH)" != installed ]; then
		PEERS=$$(sed -n '/^# Peers/,$$ s/==.*//p' constraints.txt)
		$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps -c constraints.txt $$PEERS
	fi
	OLDER=$$(sed -n 's/^# triton for the compiled tests: //p' constraints.txt)
	if [ ! -d $(VENV)/triton-$$OLDER ] && $(BIN)/python -c 'import triton' 2>/dev/null; then
		$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --target $(VENV)/triton-$$OLDER triton==$$OLDER
	fi
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "building the extension"
	MOMENT_OPS_EXTENSION=0 $(BIN)/python -m pip --disable-pip-version-check install -qq --no-build-isolation --no-deps -e .
	$(BIN)/python setup.py -q build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	grep "^moment_ops:" $(VENV)/build.log || true
	touch $@

build: $(VENV)/.built  ## make the environment in .venv and build the extension

demo: build  ## train GFMN on handwritten digits, two minutes; results in runs/gfmn-mnist
	@$(BIN)/moment-ops train gfmn $(ARGS)

demo-molm: build  ## train MoLM on handwritten digits, six minutes; results in runs/molm-mnist
	@$(BIN)/moment-ops train molm $(ARGS)

test: build  ## run every test that needs no GPU
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-emulated: build  ## run all Triton kernels in an emulator and the interpreter, an hour; continues a stopped run
	@MOMENT_OPS_TEST=emulated OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 tests/triton/emulated/full tests/triton/emulated/test_range.py tests/triton/test_older_triton.py tests/triton/test_interpreter.py $(ARGS)

test-kill: build  ## kill a training 200 times, and compare its end with an uninterrupted one; KILLS=N
	@MOMENT_OPS_KILLS=$(KILLS) OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/training/test_kept_checkpoints.py $(ARGS)

test-gpu: build  ## compare every operator on every GPU backend with float64 on the CPU
	@$(BIN)/python -m pytest tests/gpu -rs $(ARGS)

lint: build  ## check the Python code with ruff and mypy
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: build  ## format the Python code
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: build  ## compare the ops with eager PyTorch and torch.compile
	@$(BIN)/python -m bench $(ARGS)

bench-gpu: build  ## check and time every operator on a GPU, the most important ones first, nine minutes
	@$(BIN)/python -m bench.gpu $(ARGS)

clean:  ## remove the environment and all build outputs
	@rm -rf $(VENV) build *.egg-info moment_ops/*.so

.PHONY: help build demo demo-molm test test-emulated test-kill test-gpu lint format bench bench-gpu clean
