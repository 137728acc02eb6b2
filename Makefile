# make demo | compare | test | bench | bench-quality: see README.md. Nothing needs to be installed before but Python 3.11
# or 3.12 and Java 17 or newer.

PYTHON ?= python3.11
# cpu or cuda: which of requirements/*.txt is installed.
VARIANT ?= cpu
# Where pip finds the CPU build of torch when its own configuration does not: the index that
# PyTorch's install page names for "CPU".
TORCH_INDEX ?=
PIP_FLAGS = --quiet --no-deps --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BIN = .venv/bin
ARCHIVE = .venv/share/recsys_dist/spark.jsa

# Another log than MovieLens 1M: make compare CONF=conf/shop.yaml
CONF =

.PHONY: demo compare test bench bench-quality lint java browser setup setup-dev lock clean
.DELETE_ON_ERROR:

demo: java setup
	@$(BIN)/python -m recsys_dist.datasets movielens_100k data
	@$(BIN)/python jobs/nightly.py --conf conf/movielens_100k.yaml --samples 3

# An hour and a half. Of MovieLens 1M ratings of 4 and 5 are what is to be found; the parts of the log go by them.
compare: java setup
	@$(if $(CONF),,$(BIN)/python -m recsys_dist.datasets movielens_1m data)
	@$(BIN)/python jobs/compare.py --conf $(if $(CONF),$(CONF),conf/movielens_1m.yaml \
		--set split.events=positive --set score.filter_seen=positives)

# All tests, those too that take as long again: whole jobs, killed ones, long logs. CI does.
LONG =

# Two processes, a file's tests in one of them: half of the time Spark and Ray wait for themselves.
test: java browser setup-dev lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(filter 1,$(LONG)),,-m "not long")

bench: java setup-dev .venv/peers.done
	@$(BIN)/python -m tests.bench

# Hours: two trainers, three seeds each.
bench-quality: java setup-dev .venv/peers.done
	@$(BIN)/python -m tests.bench.quality

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint Dockerfile

java:
	@$(PYTHON) recsys_dist/java.py

# The report is tested in a real browser; no package of pip's carries one.
browser:
	@command -v chromium > /dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    || { echo "error: the tests need Chromium. Debian: apt-get install chromium, as root." >&2; exit 1; }; \
	  echo "setup: installing chromium for the tests of the report"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends \
	    chromium fonts-dejavu-core > /dev/null; }

setup: .venv/$(VARIANT).done $(ARCHIVE)
setup-dev: .venv/dev.done $(ARCHIVE)

.venv/bin/python:
	@echo "setup: making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/%.done: requirements/%.txt | .venv/bin/python
	@echo "setup: installing requirements/$*.txt (about 1.5 GB on disk, a few minutes the first time)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -r $< || { echo "error: requirements/$*.txt could not be installed. \
	Where torch's CPU build was not found: TORCH_INDEX=URL, the index that PyTorch's install page names for CPU." >&2; exit 1; }
	@touch $@

.venv/dev.done: .venv/$(VARIANT).done .venv/spark35.done .venv/ranking.done

# Every start of Spark is 4 s shorter with it.
$(ARCHIVE): .venv/$(VARIANT).done recsys_dist/spark.py
	@echo "setup: letting Java archive Spark's classes (once, less than a minute)"
	@$(BIN)/python -m recsys_dist.spark

# The oldest Spark that is supported, beside the one that is installed: a test reads the same log with both.
.venv/spark35.done: requirements/spark35.txt | .venv/bin/python
	@echo "setup: installing requirements/spark35.txt for the tests"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --target .venv/spark35 -r $<
	@touch $@

# Other libraries' metrics, which a test holds ours against, in an environment of their own: RecTools needs numpy 1.
.venv/ranking.done: requirements/ranking.txt | .venv/bin/python
	@echo "setup: installing requirements/ranking.txt for the tests"
	@$(PYTHON) -m venv .venv/ranking
	@.venv/ranking/bin/python -m pip install $(PIP_FLAGS) -r $<
	@touch $@

# What is measured beside, in an environment of its own: it needs other versions.
.venv/peers.done: requirements/peers.txt
	@echo "setup: installing requirements/peers.txt for the benchmarks"
	@$(PYTHON) -m venv .venv/peers
	@.venv/peers/bin/python -m pip install $(PIP_FLAGS) -r $<
	@touch $@

# Writes the pinned sets anew from pyproject.toml.
lock: setup-dev
	@flags="--quiet --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match)"; \
	$(BIN)/uv pip compile $$flags pyproject.toml --extra cpu --override requirements/overrides-cpu.txt -o requirements/cpu.txt; \
	env -u UV_FIND_LINKS $(BIN)/uv pip compile $$flags pyproject.toml --extra cuda -o requirements/cuda.txt; \
	$(BIN)/uv pip compile $$flags pyproject.toml --extra cpu --extra dev --extra mlflow --override requirements/overrides-cpu.txt \
	  --constraint requirements/cpu.txt -o .venv/dev.txt; \
	grep -vxFf requirements/cpu.txt .venv/dev.txt > requirements/dev.txt

clean:
	rm -rf .venv
