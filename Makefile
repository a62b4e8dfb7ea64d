# `make demo` and `make test` do all the set-up themselves; the second time they start at once.

IMAGE := examples/demo.png
QUESTION := Where is the cyst?

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests run in two processes: one thread each keeps them off each other's cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
TEST_PROCESSES ?= 2

.PHONY: demo test lint native bench clean

demo: $(INSTALLED)
	$(BIN)/vitalrt ask $(IMAGE) "$(QUESTION)"

test: lint native
	$(TEST_ENV) $(BIN)/pytest -n $(TEST_PROCESSES)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The C++ core alone, under sanitizers.
native: $(INSTALLED)
	$(BIN)/cmake -S . -B build/native -DVITALRT_TESTS=ON -DVITALRT_SANITIZE=ON
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

bench: $(INSTALLED)
	$(BIN)/pytest bench

$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) or sys.exit("$(PYTHON) is not Python 3.11 or 3.12; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
