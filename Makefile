# Two commands matter:  make train   trains, evaluates and reports the quickstart run
#                       make test    runs the whole test suite
# Both set up .venv first, from a clean clone with nothing else done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Only what the venv itself holds: a user's PYTHONPATH or pip configuration of packages must not leak in.
export PYTHONNOUSERSITE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: campaign bench-cpu help setup train test test-oldest-triton lint format ablation sanitize clean

help:
	@sed -n '1,3p' Makefile

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; Debian/Ubuntu: apt-get install python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed" >&2; exit 2; }
	@command -v c++ >/dev/null || { echo "error: no C++ compiler; Debian/Ubuntu: apt-get install g++" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "error: no Python headers; Debian/Ubuntu: apt-get install python3-dev" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { echo "error: venv failed; Debian/Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 2; }
	$(BIN)/pip install --upgrade --quiet pip
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

data/emoji/dataset.json: | $(INSTALLED)
	$(BIN)/pinclip data emoji --out data/emoji

train: $(INSTALLED) data/emoji/dataset.json
	$(BIN)/deepspeed train.py --config configs/quickstart.toml

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data/openclipart/dataset.json: | $(INSTALLED)
	$(BIN)/pinclip data openclipart --out data/openclipart

# About an hour and a quarter on two cores; runs that have finished are not trained again.
ablation: $(INSTALLED) data/emoji/dataset.json data/openclipart/dataset.json
	$(BIN)/pinclip ablation --config configs/quickstart.toml --seeds 3 --out runs/ablation
	$(BIN)/pinclip ablation --config configs/openclipart.toml --seeds 3 --out runs/ablation-openclipart

# The C++ core under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
sanitize: build/sanitize-address build/sanitize-thread
	build/sanitize-address
	build/sanitize-thread

build/sanitize-address: SANITIZERS := address,undefined -fno-sanitize-recover=all
build/sanitize-thread: SANITIZERS := thread
build/sanitize-%: tests/csrc/sanitize.cpp $(wildcard csrc/*.cpp csrc/*.h)
	@mkdir -p build
	c++ -std=c++17 -O1 -g -pthread -fsanitize=$(SANITIZERS) -Icsrc tests/csrc/sanitize.cpp \
		$(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp)) -o $@

# The kernels with the oldest Triton that they support, and a numpy that its interpreter can work with.
build/oldest-triton: | $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --target $@ triton==3.6.0 numpy==2.2.6

test-oldest-triton: build/oldest-triton
	PYTHONPATH=$(CURDIR)/build/oldest-triton $(BIN)/python -m pytest tests/bench/test_compile.py $(wildcard tests/ops/test_*_triton.py)

# On a GPU machine with Python, torch and triton alone: nothing is installed, nothing is fetched.
# CAMPAIGN="--quick", or CAMPAIGN="--part 2/12", or CAMPAIGN="--rehearse" where there is no GPU.
campaign:
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(PYTHON) -m bench campaign $(CAMPAIGN)

# A quarter of an hour on two cores that do nothing else.
bench-cpu: $(INSTALLED)
	$(BIN)/python -m bench run --cpu --minutes 14.5 --out results/cpu.json
	$(BIN)/python -m bench compile --out results/compile.json
	$(BIN)/python -m bench report

clean:
	rm -rf build *.egg-info runs
