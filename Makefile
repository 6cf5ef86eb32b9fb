# marc-pipeline: `make nightly` sets everything up and runs a night; `make test` runs the tests.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup java nightly test test-slow test-avx2 test-faults check docs format ui clean

DS ?= $(shell date -u +%F)
TRIALS ?= 200
SEED ?= 1
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
JAVA := $(if $(JAVA_HOME),$(JAVA_HOME)/bin/java,java)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

export MARC_CONFIG ?= $(CURDIR)/marc.yaml
export AIRFLOW_HOME ?= $(CURDIR)/.airflow
export AIRFLOW__CORE__DAGS_FOLDER ?= $(CURDIR)/dags
export AIRFLOW__CORE__LOAD_EXAMPLES ?= False
export AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION ?= False
export AIRFLOW_CONN_SPARK_DEFAULT ?= {"conn_type": "spark", "host": "local[*,4]"}
export HF_HUB_OFFLINE ?= 1
# Two processes; the tests of one file share a process, and so do all that start the S3 server (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadgroup
# The model tests in which the CPU multiplies bfloat16 where it can.
BFLOAT16_TESTS := tests/model/test_encoder.py tests/model/test_packed.py tests/training/test_states.py tests/layers/test_sweep.py
AIRFLOW := PATH="$(BIN):$$PATH" $(BIN)/airflow
NIGHT_LOG = $(AIRFLOW_HOME)/logs/nightly-$(DS).log

help: ## Show this help
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  DS=YYYY-MM-DD chooses the date (default: today, $(DS)); MARC_CONFIG=FILE another configuration."

setup: java $(VENV)/.installed ## Create .venv and install everything into it (once)

$(VENV)/.installed: pyproject.toml constraints.txt | java
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	  || { echo "Python 3.11 or 3.12 is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there); install it or say PYTHON=..." >&2; exit 2; }
	@echo "Setting up $(VENV) (once; docs/quickstart.md says what is downloaded) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

java:
	@version=$$("$(JAVA)" -version 2>&1 | sed -n '1s/.*version "\([0-9]*\).*/\1/p' || true); [[ $${version:-0} -ge 17 ]] \
	  || { echo "Java 17 or newer is needed, '$(JAVA)' is $${version:-not there}; install a JRE (Debian: openjdk-17-jre-headless) or set JAVA_HOME" >&2; exit 2; }

nightly: setup ## Run the DAG marc_nightly for DS, on the example catalogue unless MARC_CONFIG says otherwise
	@started=$$(date +%s); mkdir -p $(AIRFLOW_HOME)/logs; \
	if [[ "$(MARC_CONFIG)" == "$(CURDIR)/marc.yaml" ]]; then $(BIN)/marc example --ds $(DS) > /dev/null; fi; \
	$(BIN)/marc train --if-none --ds $(DS) > /dev/null; \
	$(AIRFLOW) db migrate > $(NIGHT_LOG) 2>&1 || { tail -n 20 $(NIGHT_LOG) >&2; exit 1; }; \
	echo "DAG marc_nightly for $(DS); the whole log: $(NIGHT_LOG)"; \
	$(AIRFLOW) dags test marc_nightly $(DS) 2>&1 | tee -a $(NIGHT_LOG) \
	  | sed -un -e 's/.*\[DAG TEST\] starting task_id=\([a-z_]*\).*/task \1/p' \
	            -e 's/^\(marc_pipeline\.errors\.[A-Za-z]*: .*\)/  \1/p' \
	            -e 's/^[^ ]* \[[a-z]* *\] \([0-9:]\{8\} \(INFO\|WARNING\|ERROR\) .*[^ ]\) *\[airflow\.task\.hooks.*/  \1/p' \
	  || { echo "the night of $(DS) failed; see $(NIGHT_LOG)" >&2; exit 1; }; \
	$(BIN)/marc summary --ds $(DS) --since $$started

test: setup ## Run the tests, two files at a time
	@$(PYTEST)

test-slow: setup ## Run the tests that the default suite leaves out, and property tests with all their examples
	@$(PYTEST) -m slow --hypothesis-profile=slow

test-avx2: setup ## Run the tests of bfloat16 as on a CPU with AVX2 alone
	@ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) $(BFLOAT16_TESTS)

test-faults: setup ## Run TRIALS trials of the fault campaign (default 200), and print a table
	@$(BIN)/python tests/faults/campaign.py --trials $(TRIALS) --seed $(SEED)

check: setup ## Lint, check the format, the types and the import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo > /dev/null || $(BIN)/lint-imports

docs: setup ## Build the documentation into docs/_build/html; every warning is an error
	@$(BIN)/python -m sphinx -q -W -n --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

format: setup ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ui: setup ## Start Airflow's web interface on http://127.0.0.1:8080 with the DAGs scheduled
	@if [[ "$(MARC_CONFIG)" == "$(CURDIR)/marc.yaml" ]]; then $(BIN)/marc example --ds $(DS) > /dev/null; fi
	@$(BIN)/marc train --if-none --ds $(DS) > /dev/null
	@echo "Airflow at http://127.0.0.1:8080, everybody on this machine is admin; stop with Ctrl-C"
	@AIRFLOW__API__HOST=127.0.0.1 AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS=True $(AIRFLOW) standalone

clean: ## Remove what runs and tests left (data/, .airflow/, caches), not .venv
	@rm -rf data docs/_build .airflow .mypy_cache .ruff_cache .pytest_cache .hypothesis spark-warehouse
