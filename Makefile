# `make check` is what a change must pass; the other targets but `compile-all` are its parts.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
RUN := $(PYTHON) -m

.PHONY: check lint types imports test wheels compile-all format

check: lint types imports test wheels

lint:
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types:
	$(RUN) pyright --pythonpath $(PYTHON)

imports:
	PYTHONPATH=ops $(PYTHON) -c "import sys; from importlinter.cli import lint_imports_command as main; sys.exit(main())"

test:
	$(RUN) pytest -n 2 --dist loadgroup -q --durations 10

wheels:
	$(PYTHON) tests/wheels.py

# Hours: the whole grid of tile sizes for every chip. A part: make compile-all PART="--net gpt2s --arch 86 --limit 9".
compile-all:
	$(PYTHON) tests/compile_all.py $(PART)

format:
	$(RUN) ruff format .
	$(RUN) ruff check --fix .
