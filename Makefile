# make lab | make test | make demo | make lint | make bench | make audit     (each sets up .venv by itself)
# Settings: PORT=8501  RUNS=runs  PYTHON=python3  SHARE=1 (others may come in, by a password)

PORT ?= 8501
RUNS ?= runs
PYTHON ?= python3
BIN := .venv/bin
export PRUNEDM_RUNS := $(abspath $(RUNS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: lab demo test nightly lint audit bench screenshots cluster browser postgres clean

lab: .venv/.user
	@echo "PruneDM Lab: http://$(if $(SHARE),$$(hostname),127.0.0.1):$(PORT)   (Ctrl-C ends it; runs are kept in $(PRUNEDM_RUNS))"
	@$(BIN)/python -m prunedm lab --port $(PORT) $(if $(SHARE),--share-on-network)

demo: .venv/.user
	$(BIN)/python -m prunedm run --preset smoke --name demo

test: .venv/.dev browser postgres
	@# One torch thread a process: two processes with two threads each on two cores would wait for one another.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Every test, the slow ones too, of which `make test` runs some each day, in turn.
nightly: export PRUNEDM_SLOW := all
nightly: test

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Known vulnerabilities of the installed versions, looked up in PyPI's advisories: needs the network. The auditor and
# its packages stay out of the lab's environment.
audit: .venv/.user
	@$(BIN)/python -m venv .venv/audit && .venv/audit/bin/python -m pip install -q pip-audit
	@$(BIN)/python -m pip list --format freeze | grep -v -e '^pip==' -e '^prunedm==' > .venv/installed.txt
	.venv/audit/bin/pip-audit --requirement .venv/installed.txt --no-deps --disable-pip

bench: .venv/.dev browser
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/structured.py targets
	$(BIN)/python benchmarks/structured.py latency
	$(BIN)/python benchmarks/packed.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/app.py

screenshots: .venv/.dev browser
	$(BIN)/python assets/build/screenshots.py

# Debian's chromium for the browser test; without it the test is skipped and says so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  SUDO=$$( [ "$$(id -u)" = 0 ] || echo "sudo -n" ); \
	  $$SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq chromium >/dev/null; } || \
	  echo "chromium could not be installed: the browser test will be skipped"

# Debian's PostgreSQL for sweeps that several machines share; without it those tests are skipped and say so.
postgres:
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { \
	  SUDO=$$( [ "$$(id -u)" = 0 ] || echo "sudo -n" ); \
	  $$SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq postgresql >/dev/null; } || \
	  echo "PostgreSQL could not be installed: the tests of sweeps on it will be skipped"

# What runs and sweeps on several machines need.
cluster: .venv/.user
	$(BIN)/python -m pip install -q -r requirements-cluster.txt -c constraints.txt

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.10 to 3.13 is needed and $(PYTHON) is $$($(PYTHON) -V 2>&1); use make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

.venv/.user: .venv/.made requirements.txt constraints.txt
	@echo "Installing the packages (a few minutes, once)…"
	@$(BIN)/python -m pip install -q -r requirements.txt -c constraints.txt
	@touch $@

.venv/.dev: .venv/.user requirements-dev.txt requirements-cluster.txt
	@$(BIN)/python -m pip install -q -r requirements-dev.txt -c constraints.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
