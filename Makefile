# make test    set-up, lint and types, tests
# make test-slow  the tests that take minutes each: the benchmark, a stopped sweep, a table
# make demo    set-up, the main job at the quick preset
# make bench   set-up, speed of this machine and of every stage
# make faults  set-up, 100 kills over all stages; what is left is compared
# make fuzz    set-up, 100,000 damaged and hostile files for every reader
# make lint    set-up, formatting, lint and types only
# make setup-safe  set-up and the safe simulators, Bullet-Safety-Gym and MetaDrive; their
#              tests, skipped without them, then run in make test
# make setup-metaworld  the same for Meta-World
# make setup-ogbench  the same for OGBench
# make setup-mjx  set-up and MJX, dm_control's tasks on the device; its tests, skipped
#              without it, then run in make test and make test-slow
# make setup-onnx  set-up and the packages that write and run policies as ONNX, likewise
# make clean   remove .venv and caches; results, runs and data stay
.POSIX:
.PHONY: test test-slow demo bench faults fuzz lint install setup-safe setup-metaworld \
  setup-ogbench setup-mjx setup-onnx clean

# The first of these that is 3.11 or newer makes the environment.
PYTHON = python3.11 python3 python3.12 python3.13
VENV = .venv
STAMP = $(VENV)/.installed
SAFE_STAMP = $(VENV)/.installed-safe
METAWORLD_STAMP = $(VENV)/.installed-metaworld
OGBENCH_STAMP = $(VENV)/.installed-ogbench
MJX_STAMP = $(VENV)/.installed-mjx
ONNX_STAMP = $(VENV)/.installed-onnx
PIP_ARGS = --disable-pip-version-check -qq
# Huge memory pages on Linux, unless the user has set GLIBC_TUNABLES: training with large
# batches is a tenth to a third faster.
PAGES = GLIBC_TUNABLES=$${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
# Test processes: two, so that compilation, most of the time, uses both cores.
JOBS = 2

test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

demo: install
	$(PAGES) $(VENV)/bin/python -m experiments.demo

bench: install
	$(PAGES) $(VENV)/bin/python -m experiments.tools.benchmark

faults: install
	$(VENV)/bin/python -m experiments.tools.faults $(FAULTS_ARGS)

fuzz: install
	$(VENV)/bin/python tests/fuzz.py --workers=$(JOBS) $(FUZZ_ARGS)

test-slow: install
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m slow $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

install: $(STAMP)

setup-safe: $(SAFE_STAMP)

setup-metaworld: $(METAWORLD_STAMP)

setup-ogbench: $(OGBENCH_STAMP)

# Without dependencies: these packages ask for old versions of what is already there.
$(SAFE_STAMP): $(STAMP) requirements-safe.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements-safe.txt
	@touch $(SAFE_STAMP)

$(METAWORLD_STAMP): $(STAMP) requirements-metaworld.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements-metaworld.txt
	@touch $(METAWORLD_STAMP)

$(OGBENCH_STAMP): $(STAMP) requirements-ogbench.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements-ogbench.txt
	@touch $(OGBENCH_STAMP)

setup-mjx: $(MJX_STAMP)

# Without dependencies: the others are pinned in requirements.txt.
$(MJX_STAMP): $(STAMP) requirements-mjx.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements-mjx.txt
	@touch $(MJX_STAMP)

setup-onnx: $(ONNX_STAMP)

# Without dependencies: one of these packages asks for an old version of what is there.
$(ONNX_STAMP): $(STAMP) requirements-onnx.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements-onnx.txt
	@touch $(ONNX_STAMP)

# The stamp is written last: a set-up that was interrupted starts again. Candidates are
# run, not looked up: the shim of a version manager may exist and not work.
$(STAMP): requirements.txt setup.py pyproject.toml
	@for python in $(PYTHON) ""; do \
	  [ -n "$$python" ] || break; \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    >/dev/null 2>&1 && break; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "psec_jax needs Python 3.11 or newer: tried $(PYTHON);" \
	    "say make PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 \
	  || $$python -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -r requirements.txt
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps --editable .
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
