# make lab   opens JupyterLab on notebooks/00_start_here.ipynb     PORT=8889, BROWSER=none, ARGS=... are passed on
# make test  ruff, mypy and every test                             ARGS="-k locks -x" goes to pytest
# make check · make notebooks · make zoo · make bench · make lock · make clean
# From nothing: Python >= 3.11 (or uv) and make. Everything goes into .venv (VENV=... elsewhere); nothing else on the machine changes.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
WARM := distsys, IPython, hypothesis, ipykernel.kernelapp, ipywidgets, jupyterlab.labapp, matplotlib.figure, matplotlib.font_manager, \
  nbconvert, psycopg_pool, pytest, redis.asyncio
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help lab test check notebooks zoo bench lock readme clean

help:
	@sed -n '/^#/!q;s/^# //p' Makefile

lab: $(READY)
	@exec $(PY) -m distsys lab $(if $(PORT),--port $(PORT)) $(if $(filter none,$(BROWSER)),--no-browser) $(ARGS)

test: check
	@$(PY) -m pytest -n 3 --dist worksteal -m "not alone" $(ARGS)  # two cores: many tests wait
	@$(PY) -m pytest -m alone $(ARGS) || [ $$? = 5 ]  # 5: ARGS chose none of them

check: $(READY)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-cache

notebooks: $(READY)
	@$(PY) -m tests.notebooks.execute $(ARGS)

zoo: $(READY)
	@$(PY) -m tests.lab.zoo

bench: $(READY)
	@for script in $(filter-out %/common.py,$(wildcard benchmarks/*.py)); do $(PY) "$$script" $(ARGS) || exit 1; done

readme: $(READY)
	@$(PY) -m tests.decide.readme

lock: $(READY)
	@$(PY) -m uv pip compile pyproject.toml --all-extras --universal --upgrade --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links --quiet --output-file requirements.lock

clean:
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

# The environment belongs to the folder it was made in: a copied or moved tree makes its own.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

$(READY): requirements.lock pyproject.toml
	@fail() { echo "distsys: $$1" >&2; exit 1; }; \
	uv=$$(command -v uv); \
	mkdir -p $(VENV) 2>/dev/null && [ -w $(VENV) ] || \
	  fail "$(VENV) cannot be written here: copy this folder to one of your own, or say VENV=/a/folder/of/yours make $(MAKECMDGOALS)"; \
	if [ -n "$$uv" ]; then \
	  echo "[1/3] $(VENV) with uv"; \
	  uv venv --quiet --allow-existing --python '>=3.11,<3.15' $(VENV) || fail "uv found no Python >= 3.11: run  uv python install 3.13"; \
	  uv="uv pip install --python $(PY)"; \
	else \
	  command -v $(PYTHON) >/dev/null || fail "no $(PYTHON): install Python >= 3.11, or say PYTHON=/path/to/python make $(MAKECMDGOALS)"; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    fail "$$($(PYTHON) -V) is too old: say PYTHON=python3.13 make $(MAKECMDGOALS)  (any Python >= 3.11)"; \
	  echo "[1/3] $(VENV) with $$($(PYTHON) -V)"; \
	  $(PYTHON) -m venv $(VENV) >/dev/null || fail "$(PYTHON) cannot make environments: on Debian run  apt install python3-venv"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check uv && uv="$(PY) -m uv pip install --python $(PY)" || \
	    uv="$(PY) -m pip install --disable-pip-version-check"; \
	fi; \
	echo "[2/3] the packages of requirements.lock (about 150)"; \
	$$uv --require-hashes -r requirements.lock || \
	  { [ -x $(VENV)/bin/pip ] && $(PY) -m pip install --require-hashes -r requirements.lock; } || \
	  fail "the packages could not be installed: is the package registry reachable? run make $(MAKECMDGOALS) again"; \
	$$uv --quiet --no-deps --editable . || fail "distsys itself could not be installed: see the lines above"; \
	echo "[3/3] first imports: byte code and matplotlib's font cache"; \
	PYTHONDONTWRITEBYTECODE= $(PY) -c 'import $(WARM)' || fail "the environment does not start: see the lines above"; \
	printf %s '$(CURDIR)' > $(READY)
