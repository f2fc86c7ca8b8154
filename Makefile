# On a machine with Python 3.11 to 3.13 and make, two commands do everything:
#   make train-ranker   environment, dependencies, dataset, tables, features, training, report
#   make test           the same environment plus the development tools, then the tests
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment, CUDA=1 the GPU build.

PYTHON ?= python3
CUDA ?= 0
FLAVOUR := $(if $(filter 1,$(CUDA)),cuda,cpu)
# The two fbgemm builds overwrite each other, so each flavour has an environment of its own.
VENV ?= $(if $(filter cuda,$(FLAVOUR)),.venv-cuda,.venv)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp says that the installation ended well; it is older than a changed requirement.
RUNTIME := $(VENV)/.installed-$(FLAVOUR)
DEVELOPMENT := $(VENV)/.installed-$(FLAVOUR)-dev

.PHONY: train-ranker test lint setup
.DELETE_ON_ERROR:

train-ranker: $(RUNTIME)
	$(BIN)/train-ranker

test: $(DEVELOPMENT)
	$(BIN)/python -m pytest

lint: $(DEVELOPMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(RUNTIME)

$(RUNTIME): requirements/common.txt requirements/$(FLAVOUR).txt requirements/torchrec.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("Python 3.11, 3.12 or 3.13 is needed and $(PYTHON) is %d.%d: name another, as in `make PYTHON=python3.12`" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/$(FLAVOUR).txt
	$(PIP) install --no-deps -r requirements/torchrec.txt
	$(PIP) install --no-deps --editable .
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements/dev.txt
	$(PIP) install -r requirements/dev.txt
	@touch $@
