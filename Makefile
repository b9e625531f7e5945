# Each target builds what it needs in VENV. A new VENV gets TORCH, e.g. `make test VENV=.venv-2.13 TORCH=torch==2.13.0`.
VENV ?= .venv
TORCH ?= torch
PYTHON ?= python3
LINTERS := ruff==0.17.* clang-format==23.1.*

BIN := $(VENV)/bin
LIBRARY := cmd_ext/_ops.abi3.so
SOURCES := pyproject.toml setup.py $(filter-out %.json,$(wildcard build_backend/*.py csrc/*.cpp csrc/*.h csrc/*/*))
CXX_FILES := $(wildcard $(addprefix csrc/,*.cpp *.h */*.cpp */*.h */*.cu */*.cuh) $(addprefix cpp_tests/,*.cpp *.h */*.cpp */*.h))
CUDA_HEADER := $(firstword $(wildcard $(addsuffix /include/cuda_bf16.h,$(CUDA_HOME) /usr/local/cuda /usr/local/cuda-*)))
SIMT := build/simt/libcmd_ext_simt.so
CMAKE_TOOLS := $(and $(shell command -v cmake 2>&1),$(shell command -v ninja 2>&1))
export PATH := $(PATH):$(abspath $(BIN))

.PHONY: install demo test cpp-test cpp-test-threads bench lint simt mutants kernel-ledger kernel-check clean FORCE

install: $(VENV)/.installed

demo: install
	$(BIN)/python -m cmd_ext demo

test: cpp-test install $(if $(CUDA_HEADER),simt)
	$(if $(CUDA_HEADER),CMD_EXT_SIMT_LIBRARY=$(abspath $(SIMT))) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The operators with their CUDA path under the emulator, for the device "simt" of the Python tests.
simt: install
	cmake -S . -B build/simt -G Ninja -DCMD_EXT_TORCH=$$($(BIN)/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
	cmake --build build/simt --target cmd_ext_simt

bench: install
	$(BIN)/python -m cmd_ext.bench

# The kernels without Python, under the address and undefined-behaviour sanitizers.
cpp-test: $(if $(CMAKE_TOOLS),,$(VENV)/.cmake)
	cmake -S . -B build/cpp -G Ninja -DCMD_EXT_SANITIZE=ON
	cmake --build build/cpp
	ctest --test-dir build/cpp --output-on-failure --no-tests=error --parallel $(shell nproc)

# The CPU kernels under the thread sanitizer.
cpp-test-threads: $(if $(CMAKE_TOOLS),,$(VENV)/.cmake)
	cmake -S . -B build/threads -G Ninja -DCMD_EXT_SANITIZE_THREAD=ON
	cmake --build build/threads
	ctest --test-dir build/threads --output-on-failure --no-tests=error

# One planted fault after another in the CUDA kernels: their tests must see it. About 15 minutes on 2 cores.
mutants: | $(BIN)/pip
	$(BIN)/python cpp_tests/mutants.py

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python .ci/lint

# What nvcc makes of each CUDA kernel, written to csrc/cuda/ledger.json or compared with it, and the roofline figures of
# their heads. Needs nvcc 13.0, no GPU.
kernel-ledger kernel-check: $(VENV)/.disassembler $(if $(CMAKE_TOOLS),,$(VENV)/.cmake)
	cmake -S . -B build/cpp -G Ninja -DCMD_EXT_SANITIZE=ON
	cmake --build build/cpp --target cuda_access
	$(BIN)/python cpp_tests/roofline.py
	$(BIN)/python cpp_tests/ledger.py --build build/cpp $(if $(filter kernel-check,$@),--check)

clean:
	rm -rf build dist *.egg-info $(VENV)/.installed
	rm -f cmd_ext/*.so

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Editable, so that Python run in this folder finds the libraries beside the sources.
$(VENV)/.installed: $(SOURCES) $(if $(wildcard $(LIBRARY)),,FORCE) | $(BIN)/pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(foreach name,$(TORCH),'$(name)')
	$(BIN)/pip install -e '.[test,demo]'
	touch $@

$(VENV)/.linters: Makefile | $(BIN)/pip
	$(BIN)/pip install $(foreach name,$(LINTERS),'$(name)')
	touch $@

$(VENV)/.disassembler: | $(BIN)/pip
	$(BIN)/pip install 'nvidia-cuda-nvdisasm==13.*'
	touch $@

$(VENV)/.cmake: | $(BIN)/pip
	$(BIN)/pip install cmake ninja
	touch $@
