# Everything a fresh machine needs is Python 3.11 or newer and make.
#
#   make demo   install into .venv, train on real data, load the model in another process
#   make test   install what tests need, run all of them
#   make help   the rest
#
# The stamp files under .venv make a second run quick: pip runs again only when pyproject.toml or
# constraints.txt changed. Another interpreter: `make PYTHON=python3.12 test` (after `make clean`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
ARGS ?=
# Tests wait more than they compute: for leases, for servers, for processes that they kill. Those that compute
# need no second thread each.
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: chromium help install demo test soak long mutation bench lint format docs site packages lowest clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

install: $(VENV)/.stamp-demo ## what the demo needs, into .venv

demo: $(VENV)/.stamp-demo ## train on digits in a MongoDB, load the model in another process
	@$(BIN)/mongotorch demo $(ARGS)

test: $(VENV)/.stamp-dev ## all tests, on mongomock and on a real mongod (more options: ARGS='-k query')
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS) -m "not soak and not long"

long: $(VENV)/.stamp-dev chromium ## the slow tests that `make test` leaves out and CI runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS) -m "long and not soak"

soak: $(VENV)/.stamp-dev ## the long runs that `make test` leaves out
	@$(BIN)/python -m pytest -n 2 $(ARGS) -m soak

mutation: $(VENV)/.stamp-dev ## change the code at random places and see whether tests notice (ARGS='--count 200')
	@nice -n 10 $(BIN)/python -m tests.mutation $(ARGS)

bench: $(VENV)/.stamp-bench ## the stream against its rivals, a step against a loop by hand, and small jobs: tables, docs/benchmarks.json and .png (ARGS='--docs 1000000')
	@$(VENV)/bench/bin/python -W ignore -m tests.benchmarks.bench_stream $(ARGS)
	@$(VENV)/bench/bin/python -W ignore -m tests.benchmarks.bench_recipe
	@$(VENV)/bench/bin/python -W ignore -m tests.benchmarks.bench_jobs --jobs 200

lint: $(VENV)/.stamp-dev ## ruff, mypy --strict, the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config .importlinter

format: $(VENV)/.stamp-dev ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.stamp-dev ## write the pages of docs/reference again, after a public name came or went
	@$(BIN)/python docs/make_reference.py

site: $(VENV)/.stamp-dev docs ## the documentation as a site, into site/ (ARGS=serve: at http://127.0.0.1:8000 instead)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet $(or $(ARGS),build) --strict

packages: $(VENV)/.stamp-dev ## the wheel and the source distribution, into dist/
	@$(PIP) install --quiet build
	@$(BIN)/python -m build --outdir dist .

lowest: ## the tests with the lowest versions that pyproject.toml allows, in build/lowest (ARGS='--pin torch==2.13.0')
	@$(PYTHON) tests/packaging/lowest.py build/lowest $(ARGS)

# The tests of the dashboard need a browser. Who is not root, or not on Debian, sees them skipped, with this reason.
chromium:
	@command -v chromium > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	  && { apt-get -qq update; apt-get install -yqq --no-install-recommends chromium; } > /dev/null 2>&1; } \
	  || echo 'chromium is missing: the tests in a browser are skipped (on Debian: apt-get install chromium)'

clean: ## remove .venv and every cache (not .mongotorch, which holds data)
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find plugin tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mongotorch needs Python 3.11 or newer; '$(PYTHON)' is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# torch first and alone: the wheel is large, and its absence is the one failure that needs words.
$(VENV)/.stamp-torch: constraints.txt | $(BIN)/python
	@echo 'installing $(TORCH) into $(VENV) (once; the large one)'
	@$(PIP) install --quiet '$(TORCH)' -c constraints.txt || { \
	  echo "pip could not install $(TORCH), the version that constraints.txt pins (its own message is above)." >&2; \
	  echo "Either no configured index has a wheel of it for this Python and platform, or there is no network." >&2; \
	  echo "Another index: PIP_EXTRA_INDEX_URL=... make demo; another version: edit the torch line of constraints.txt." >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo 'installing mongotorch[server,demo] into $(VENV)'
	@$(PIP) install --quiet -e '.[server,demo]' -c constraints.txt
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo 'installing mongotorch[server,demo,docs,dev] into $(VENV)'
	@$(PIP) install --quiet -e '.[server,demo,docs,dev]' -c constraints.txt
	@touch $@ $(VENV)/.stamp-demo

# The rivals bring some eighty packages: they live in an environment of their own that sees the other one.
$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	@echo 'installing pymongoarrow, mosaicml-streaming and matplotlib into $(VENV)/bench'
	@$(BIN)/python -m venv $(VENV)/bench
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(VENV)/bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth
	@for rival in matplotlib pymongoarrow mosaicml-streaming; do \
	  $(VENV)/bench/bin/pip install --quiet -c constraints.txt '$(TORCH)' $$rival \
	    || echo "$$rival could not be installed: the table leaves it out"; done
	@touch $@
