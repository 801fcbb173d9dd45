# make first   install into .venv, quantize the bundled sample model three ways, print how they compare
# make test    install the development tools as well, run the notebooks and the test suite
# make quick   the tests that are done within a minute on two cores: none of the slow ones, none that runs llama.cpp
# make docs    build the documentation site into _docs
# make check   ruff and mypy; are notebooks, modules and README in step?
#
# PYTHON=python3.12          another interpreter for .venv (3.10 or newer)
# TORCH_INDEX=URL            take torch from this package index, for instance its CPU-only builds
# JOBS=4                     notebooks and tests that run side by side

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
TORCH_INDEX ?=

BIN     := $(abspath $(VENV))/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
LEVELS  := Q8_0 Q4_K_M Q2_K
WINDOWS := 32
FILES   := $(LEVELS:%=first/sample-4m-%.gguf)

export PATH := $(BIN):$(PATH)

.PHONY: first test quick docs check clean
.DELETE_ON_ERROR:

first: first/comparison.txt
	@cat first/comparison.txt

first/comparison.txt: $(FILES)
	cd first && llm-quantize quality compare sample-4m $(notdir $(FILES)) --calibration-samples $(WINDOWS) > comparison.txt

first/sample-4m: | $(VENV)/.installed
	mkdir -p first
	cd first && llm-quantize sample

first/sample-4m-%.gguf: $(shell find llm_quantize -name "*.py") | first/sample-4m
	cd first && llm-quantize quantize sample-4m gguf -q $*

test: export OMP_NUM_THREADS ?= $(shell echo $$(( ($$(nproc 2>/dev/null || echo 2) + $(JOBS) - 1) / $(JOBS) )))
test: $(VENV)/.developed
	nbdev_test --n_workers $(JOBS) --timing
	python -m pytest -q -n $(JOBS) --dist worksteal --durations 15

quick: export OMP_NUM_THREADS ?= 1
quick: $(VENV)/.developed
	python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not llama and not shared"

docs: $(VENV)/.developed
	python tools/site.py

check: $(VENV)/.developed
	ruff check llm_quantize nbs
	mypy
	nbdev_export && nbdev_clean
	python tools/site.py --readme
	git diff --exit-code -- nbs llm_quantize README.md

$(VENV)/.made:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "llm_quantize needs Python 3.10 or newer with the venv module; '$(PYTHON)' is not (or not there)."; \
	  echo "Name another one: make first PYTHON=python3.12   (on Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: settings.ini setup.py pyproject.toml constraints.txt | $(VENV)/.made
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch)
	$(INSTALL) --use-pep517 --editable .
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(INSTALL) --use-pep517 --editable '.[dev]'
	touch $@

clean:
	rm -rf first build dist _proc _docs _site_src .mypy_cache .ruff_cache *.egg-info
