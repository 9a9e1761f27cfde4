# `make test` and `make quickstart` need Python 3.11 or newer, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

export TF_CPP_MIN_LOG_LEVEL ?= 3
export TF_ENABLE_ONEDNN_OPTS ?= 0

.PHONY: help env test lint format quickstart demo clean

help:
	@echo "make quickstart   train, build memory, evaluate and answer on the built-in corpus (minutes)"
	@echo "make demo         ask the shipped GLIMMER on a page in the browser"
	@echo "make test         the default tests"
	@echo "make lint         ruff, mypy and the other pre-commit hooks over all files"
	@echo "make format       reformat with ruff and apply its automatic fixes"
	@echo "make env          create only the environment, in $(VENV); PYTHON=... chooses the interpreter"

env: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 \
	or newer is needed; %s is %d.%d. Try: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "$(PYTHON) has no venv module (on Debian: apt install python3-venv)." >&2; exit 1; }
	@echo "Installing into $(VENV) (once; about 3 GB, most of it tensorflow) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP)
	@$(BIN)/pre-commit run --all-files

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

demo: $(STAMP)
	@$(BIN)/python -m experiments.demo $(ARGS)

quickstart: $(STAMP)
	@$(BIN)/python -m experiments.quickstart $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
