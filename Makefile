# What one does with this project: demo, test, check, bench, soak, build, lock, runner. Needs Python >= 3.11 with pip, and make.

PYTHON ?= python3
export UV_SYSTEM_CERTS ?= 1
export UV_PYTHON_DOWNLOADS ?= never
# Set, every process that a test starts would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# The project's own uv where there is none: a folder of its own, since many Pythons refuse global installs.
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.txt
PACKAGES := $(wildcard packages/*)
EDITABLE := $(foreach package,$(PACKAGES),-e $(package))
SOAK_ROUNDS ?= 20

.PHONY: demo test check bench soak build lock runner clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    run the example job: real environment, log, exit code and result"
	@echo "make test    run the tests"
	@echo "make check   format, lint, types, layering, lock"
	@echo "make bench   measure against the floor and the peers"
	@echo "make soak    run the long fault schedules"
	@echo "make build   build the wheels into dist/"
	@echo "make lock    bring $(LOCK) up to date"
	@echo "make runner  compile the runner for images without Python"

.tools/bin/uv: requirements/uv.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools --upgrade --require-hashes -r requirements/uv.txt
	@touch $@

# The environment that everything below runs in: the lock, and the packages as they stand in the tree.
$(VENV)/.ready: $(LOCK) $(wildcard packages/*/pyproject.toml) $(filter .tools/bin/uv,$(UV))
	rm -rf $(VENV)
	$(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r $(LOCK)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation $(EDITABLE)
	@touch $@

demo: $(VENV)/.ready
	@cd examples/digits && "$(CURDIR)/$(BIN)/fray" run --package scikit-learn --fetch outputs -- python train.py --folds 5
	@echo && echo "The job left its result in examples/digits/outputs/:" && cat examples/digits/outputs/metrics.json

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check_lock.py $(UV)
	$(BIN)/python tools/check_wheels.py $(UV)
	$(BIN)/python tools/build_runner.py $(UV) --check

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

soak: $(VENV)/.ready
	$(BIN)/python tools/soak.py --rounds $(SOAK_ROUNDS) $(SOAK_ARGS)

build: $(VENV)/.ready
	rm -rf dist
	for package in $(PACKAGES); do $(UV) build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist $$package || exit 1; done
	@ls dist

lock: $(filter .tools/bin/uv,$(UV))
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 requirements/dev.in $(patsubst %,%/pyproject.toml,$(PACKAGES)) --all-extras $(patsubst packages/%,--no-emit-package %,$(PACKAGES)) -o $(LOCK)
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 requirements/uv.in -c $(LOCK) -o requirements/uv.txt
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 requirements/runner.in -o requirements/runner.txt

# Committed, for the build of the wheels compiles nothing.
runner: $(VENV)/.ready
	$(BIN)/python tools/build_runner.py $(UV)

clean:
	rm -rf $(VENV) .tools dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
