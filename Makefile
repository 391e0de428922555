# Everything runs from .venv, which `make setup` makes with the pinned versions in constraints.txt.
# Options: HOST, PORT, MODEL and ARGS for `serve`; PYTHON to choose the interpreter; PYTEST_ARGS for the tests.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastserve-setup
# The first interpreter that is Python 3.11 or newer.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

SERVING_PATH := fastserve/scheduler fastserve/engine fastserve/models fastserve/kernels
# Lines that hold something: code, comments and docstrings; an empty line is no line of Python. The second limit is for
# the files as they are, empty lines included, so that nobody makes room by leaving them out.
SERVING_PATH_LIMIT := 7500
SERVING_PATH_LIMIT_WITH_EMPTY := 9000
# Part of those rooms, with a limit of its own: what a decoder's token does not pass through. Networks that do not
# generate, and what encoder-decoders have besides.
ONE_ANSWER := $(addprefix fastserve/models/,encoder.py encoder_loader.py pooling.py servable.py families/encoders.py \
	encoder_decoder.py encoder_decoder_loader.py families/encoder_decoders.py) \
	$(addprefix fastserve/engine/,arbiter.py array_client.py array_codec.py pooling_runtime.py runtimes.py \
	servable_runtime.py sources.py text_runtime.py)
ONE_ANSWER_LIMIT := 2700

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast test-native lint format bench bench-peers builtin-model size clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## make .venv with the pinned versions (a CPU-only torch: see README)

$(STAMP): pyproject.toml constraints.txt $(wildcard csrc/* csrc/isa/*)
	@test -n "$(PYTHON)" || { echo "FastServe needs Python 3.11 or newer; install it or set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setup: making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "setup: installing FastServe and what it needs (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "setup: done; the command is $(BIN)/fastserve"

serve: $(STAMP) ## serve MODEL (the built-in one by default) on HOST:PORT
	@exec $(BIN)/fastserve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMP) ## all tests that this machine can run
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-fast: $(STAMP) ## the everyday subset, under three minutes
	@$(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

# The C++ tests in one build folder per kind; `plain` is what users get, the others watch memory and threads.
SANITIZE_plain :=
SANITIZE_address := address,undefined
SANITIZE_thread := thread
SANITIZERS ?= plain address thread

test-native: $(STAMP) ## the C++ tests: plain, with ASan and UBSan, with TSan (SANITIZERS=plain for the first alone)
	@for kind in $(SANITIZERS); do $(MAKE) --no-print-directory test-native-$$kind || exit 1; done

test-native-%: $(STAMP)
	@cmake -S csrc -B build/native-$* -DFASTSERVE_PYTHON=OFF -DFASTSERVE_TESTS=ON \
		-DFASTSERVE_SANITIZE=$(SANITIZE_$*) > /dev/null
	@cmake --build build/native-$* --parallel 2 > build/native-$*/build.log || { cat build/native-$*/build.log; exit 1; }
	@echo "test-native: $*"
	@ctest --test-dir build/native-$* --output-on-failure --timeout 600 | grep -E 'Test +#|tests passed|rror'

lint: $(STAMP) ## ruff, mypy, import-linter, and the size limit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(MAKE) --no-print-directory size

format: $(STAMP) ## apply ruff's fixes and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## benchmarks beside transformers and against this machine's limits (about 40 minutes on two cores)
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/serve_vs_transformers.py | tee benchmarks/results/serve_vs_transformers.json
	$(BIN)/python benchmarks/soak.py | tee benchmarks/results/soak.json
	$(BIN)/python benchmarks/cpu_roofline.py --plot docs/img/cpu_roofline.svg | tee benchmarks/results/cpu_roofline.json

bench-peers: $(STAMP) ## other engines that `benchmarks/peers.py install NAME` installed (about 5 minutes for each and precision)
	$(BIN)/python benchmarks/cpu_peers.py | tee benchmarks/results/cpu_peers.json

builtin-model: $(STAMP) ## train the built-in model anew from raw books into build/builtin-model (about 90 minutes on a core)
	@examples/builtin_model.sh

size: ## lines of Python per room; fails when the serving path exceeds one of its limits
	@for room in $(filter-out %__pycache__/,$(wildcard fastserve/*/)); do \
		printf '%7d  %s\n' "$$(find $$room -name '*.py' -exec cat {} + | wc -l)" "$$room"; \
	done
	@others=$$(cat $(ONE_ANSWER) | wc -l); \
	all=$$(($$(find $(SERVING_PATH) -name '*.py' -exec cat {} + | wc -l) - $$others)); \
	empty=$$(($$(find $(SERVING_PATH) -name '*.py' -exec cat {} + | grep -c '^[[:space:]]*$$') - \
		$$(cat $(ONE_ANSWER) | grep -c '^[[:space:]]*$$'))); \
	filled=$$((all - empty)); \
	echo "serving path (scheduler, engine, models, kernels): $$filled of $(SERVING_PATH_LIMIT) lines that are not empty"; \
	echo "the same with empty lines: $$all of $(SERVING_PATH_LIMIT_WITH_EMPTY) lines"; \
	echo "encoders and networks of the user's own, in the same rooms: $$others of $(ONE_ANSWER_LIMIT) lines"; \
	test $$filled -lt $(SERVING_PATH_LIMIT) -a $$all -lt $(SERVING_PATH_LIMIT_WITH_EMPTY) -a $$others -lt $(ONE_ANSWER_LIMIT)

clean: ## remove .venv and everything that is built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
