# Two commands matter: `make demo` runs the main job, `make test` passes the tests. Each does its own set-up.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMPS  = $(VENV)/.stamp
PIP     = $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo test bench bench-full bench-fold gpu gpu-sim gpu-compile lint types torch-test wheel-test clean

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit("fastbn needs Python >= 3.11, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# An editable install with the extras named in the stamp; made again when pyproject.toml changes.
$(STAMPS)/demo: $(STAMPS)/venv pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

$(STAMPS)/test: $(STAMPS)/demo
	$(PIP) -e '.[demo,test,bench]'
	touch $@

$(STAMPS)/lint: $(STAMPS)/test
	$(PIP) -e '.[demo,test,bench,lint]'
	touch $@

# torch is pinned and never a dependency: an unpinned one brings gigabytes of CUDA.
$(STAMPS)/torch: $(STAMPS)/test
	$(PIP) torch==2.13.0
	touch $@

# XLA; torch.compile needs a C++ compiler besides.
$(STAMPS)/peers: $(STAMPS)/torch
	$(PIP) jax
	touch $@

demo: $(STAMPS)/demo
	$(BIN)/fastbn demo --out demo-out

test: $(STAMPS)/test
	$(BIN)/python -m pytest -n auto tests -m "not torch"

torch-test: $(STAMPS)/torch $(STAMPS)/cuda
	$(BIN)/python -m pytest tests -m torch
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest tests/cuda/test_torch.py

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMPS)/lint
	$(BIN)/mypy

wheel-test: $(STAMPS)/test
	$(BIN)/python tests/check_wheel.py

bench: $(STAMPS)/test
	$(BIN)/python -m bench

bench-full: $(STAMPS)/peers
	$(BIN)/python -m bench --full

# The exporter's speed, memory and benefit, beside the peers that are installed.
bench-fold: $(STAMPS)/test
	$(BIN)/python -m bench.fold

# Every GPU kernel compiled for sm_80 and sm_90 and compared with the committed table: needs no GPU, but 866 MB.
gpu-compile: $(STAMPS)/cuda
	$(PIP) "numba-cuda[cu13]==0.30.4" "cuda-toolkit==13.0.*" "nvidia-nvjitlink==13.0.*" \
	  nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python -m bench.gpu_compile --check

# Kernels in the simulator: numba-cuda brings it, greenlets are its threads; no CUDA packages and no GPU are needed.
$(STAMPS)/cuda: $(STAMPS)/test
	$(PIP) numba-cuda==0.30.4 greenlet==3.5.6
	touch $@

gpu-sim: $(STAMPS)/cuda
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest -n auto tests/cuda

gpu: $(STAMPS)/test
	$(BIN)/python -m bench.gpu

clean:
	rm -rf $(VENV) demo-out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
