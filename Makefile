# make qa     set up, tune the bundled demo base on the article's five Q&As, show the answers
# make search  find the best adapter for a small task, in minutes on two cores
# make test   set up what tests need, then run them
# make lint   ruff and pyright
# make bench  the CPU benchmarks, whose results take the place of their earlier ones
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

CPU    := benchmarks/results/cpu.jsonl
NEW    := build/cpu.jsonl
BENCH  := --device cpu --against peft --out $(NEW)

.PHONY: qa search test lint bench clean

qa: $(VENV)/.scripts
	$(BIN)/python scripts/train_qa.py

search: $(VENV)/.search
	$(BIN)/python scripts/search.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.test
	mkdir -p build && rm -f $(NEW)
	$(BIN)/python -m benchmarks.train_step --B 1 --T 22 --repeats 9 $(BENCH)
	$(BIN)/python -m benchmarks.train_step --B 4 --T 128 --repeats 4 --warmup 1 $(BENCH)
	$(BIN)/python -m benchmarks.decode --new 24 --peft_new 24 --repeats 4 $(BENCH)
	$(BIN)/python -m benchmarks.routing --repeats 3 $(BENCH)
	$(BIN)/python -m benchmarks.article_run --cases startup --repeats 3 $(BENCH)
	$(BIN)/python -m benchmarks.results --replace $(NEW) $(CPU)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

# One stamp a group of dependencies, so that `make qa` installs only what it needs.
$(VENV)/.scripts: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; pass PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) -e '.[scripts]'
	touch $@

$(VENV)/.search: $(VENV)/.scripts
	$(PIP) -e '.[scripts,search]'
	touch $@

$(VENV)/.test: $(VENV)/.scripts
	$(PIP) -e '.[scripts,search,scores,parquet,export,test,peers]'
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(PIP) -e '.[scripts,search,scores,parquet,export,test,peers,check]'
	touch $@
