# The SLURM tests run alone: a job's port follows from its number, and two test clusters would use the same numbers.
# make demo, make test: each builds .venv first where it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format docs pictures clean

demo: .venv/ready
	$(BIN)/python -m sftlab.train name=demo

test: .venv/ready
	$(BIN)/python -m pytest tests/slurm
	$(BIN)/python -m pytest --ignore=tests/slurm -n 2 --dist loadfile

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) test

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "sftlab needs Python 3.11 to 3.13, this is %d.%d; set PYTHON=" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --target .venv/torchao torchao
	@touch $@

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

pictures: .venv/ready
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv
