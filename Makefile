# From a fresh machine: `make test` or `make demo`. Both make a virtual environment in .venv first.

# The first that runs and is new enough: a name on the path may be a stub that does not.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
    "$$p" -c "$(NEW_ENOUGH)" 2>/dev/null && { echo "$$p"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLINIC := .venv-clinic
CLINIC_READY := $(CLINIC)/.ready

# Enough for made-up scans, in under six minutes on two cores.
DEMO_ARGS ?= --rounds 2 --set max_iterations=650 first_round_factor=1 learning_rate=0.005 pool_batch=1 affine_prob=0.4 view_turn=0
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 300
CODE := semisam_o1 tests benchmarks docs setup.py
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup check test clinic extras fuzz demo bench wheel dist clean

help:  ## what there is (this list)
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
	    while IFS="$$(printf '\t')" read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done
	@echo '  Settings: PYTHON=python3.11  PYTEST_ARGS="-k mind"  FUZZ_SECONDS=60  DEMO_ARGS="--rounds 1"  BENCH_ARGS=...'

setup: $(READY)  ## makes .venv with pinned versions; does nothing while it is up to date

# The stamp comes last, so an installation that broke off is taken up again.
$(READY): setup.cfg setup.py pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c "$(NEW_ENOUGH)"; then \
	    echo "Python 3.11 or newer is needed; found: $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
	    echo "Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv)," >&2; \
	    echo "or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! $(PYTHON) -c "import ensurepip, venv" 2>/dev/null; then \
	    v=$$($(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	    echo "$$v has no venv or no ensurepip, so it cannot make a virtual environment." >&2; \
	    echo "Debian, Ubuntu: apt-get install $$v-venv; elsewhere: a Python built with ensurepip." >&2; exit 1; fi
	@$(BIN)/python -c "$(NEW_ENOUGH)" 2>/dev/null || \
	    { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing the package and its pinned dependencies into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

check: setup  ## ruff (rules and formatting) and mypy, in some 20 seconds
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

# Two processes; coverage by file (of all but the slow tests) at the end, and a file below 80% fails unless
# tests/coverage.txt says why.
test: setup  ## every test; PYTEST_ARGS="-m 'not slow'" leaves the long ones out
	@rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n 2 --cov --cov-report= $(PYTEST_ARGS)
	@$(BIN)/python -m tests.coverage $(if $(PYTEST_ARGS),--report-only)

# MONAI Label in an environment of its own (some three minutes), and the tests that start its server. sam2 must see the
# torch that is there: built in isolation it fetches another one with several GB of CUDA libraries.
$(CLINIC_READY): setup.cfg setup.py pyproject.toml constraints-clinic.txt
	@$(CLINIC)/bin/python -c "$(NEW_ENOUGH)" 2>/dev/null || $(PYTHON) -m venv --clear $(CLINIC)
	@echo "Installing MONAI Label, the package and their pinned dependencies into $(CLINIC)"
	@$(CLINIC)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-clinic.txt torch setuptools wheel
	@SAM2_BUILD_CUDA=0 $(CLINIC)/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation \
	    -c constraints-clinic.txt monailabel pytest pytest-cov pytest-xdist hypothesis -e .
	@touch $@

clinic: $(CLINIC_READY)  ## tests of the bundle in a real MONAI Label server, in .venv-clinic
	$(CLINIC)/bin/python -m pytest tests/clinic $(PYTEST_ARGS)

extras: setup  ## tests of tracking (MLflow) and of exports (ONNX), which they add to .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,tracking,export]'
	$(BIN)/python -m pytest tests/job/test_tracking.py tests/job/test_exports.py

# A wrong end is printed with its seed: python -m tests.hostile.fuzz --seed SEED --only FAMILY/NAME tries it again.
fuzz: setup  ## bad inputs and faults with new seeds, for FUZZ_SECONDS (300)
	$(BIN)/python -m tests.hostile.fuzz --seconds $(FUZZ_SECONDS)

demo: setup  ## the whole job on a small phantom cohort, and one correction, in demo/data and demo/run
	$(BIN)/semisam-o1 demo-data demo/data
	$(BIN)/semisam-o1 run demo/data --output demo/run --preset quick $(DEMO_ARGS)
	@echo "A person mends the label of the scan that review names; here, the truth stands for the person."
	@table=$$($(BIN)/semisam-o1 review demo/run) && echo "$$table" && \
	    next=$$(echo "$$table" | sed -n 's/.*; next: \([^ ]*\) .*/\1/p') && \
	    echo "semisam-o1 review demo/run --take demo/data/labels/$$next.nii.gz" && \
	    $(BIN)/semisam-o1 review demo/run --take "demo/data/labels/$$next.nii.gz"
	$(BIN)/semisam-o1 run demo/data --output demo/run --preset quick $(DEMO_ARGS)

bench: setup  ## the benchmarks, with their rivals (ANTs, convexAdam)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# build/ keeps files that have since been removed, and a wheel would take them along.
wheel: setup  ## a wheel in dist/, the bundle in it
	rm -rf build
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

dist: setup  ## wheel and source distribution in dist/, checked by twine
	@$(BIN)/python -m pip install -qq --disable-pip-version-check build twine
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m twine check --strict dist/*

clean:  ## removes what the other targets made, .venv too; data and weights stay
	rm -rf $(VENV) $(CLINIC) build dist demo .pytest_cache .mypy_cache .ruff_cache .coverage* *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
