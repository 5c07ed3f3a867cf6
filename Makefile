# Needs Python 3.10+ (python3), make and git; everything else is installed into .venv
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all check docs clean

demo: $(VENV)/.installed            ## fine-tune the built-in model on built-in rows, under 3 minutes on 2 cores
	$(BIN)/luthier tune recipes/demo.yaml

test: $(VENV)/.tested check         ## everything CI runs
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(VENV)/.tested check     ## the same with the slow tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(VENV)/.tested              ## style, types, docs up to date, recipes valid
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m luthier.tools.docs --check

docs: $(VENV)/.installed            ## build the site into build/site: guides, a page for every method, the API
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m luthier.tools.docs
	rm -rf build/docs && $(BIN)/python -m luthier.tools.docs --site build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
