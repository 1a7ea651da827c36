# Everything is installed into .venv once; a target run again starts at once.
PYTHON ?= python3
VENV ?= .venv
# Further pip requirements, to pin torch: make test VENV=.venv-2.6 TORCH="torch==2.6.* torchvision==0.21.*"
TORCH ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-random test-timm format bench-accuracy bench-overhead gpu tables figures docs dist clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 18

demo: $(INSTALLED) ## train IR-Net and Bi-Real without and with CMIM: what their codes keep (DEMO_ARGS=--quick for a short one)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(INSTALLED) ## lint, check types, run the tests (PYTEST_ARGS="-k name" for some of them)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-random: $(INSTALLED) ## run the tests in random order, each from its own seed
	$(BIN)/python -m pytest -n auto -o addopts="-ra --strict-markers --strict-config" -m "not slow" $(PYTEST_ARGS)

test-timm: $(INSTALLED) ## one training step with every architecture family of timm (half an hour at most)
	$(BIN)/python -m pytest tests/test_timm.py -m "slow or not slow" --timm-record benchmarks/results/timm.json $(PYTEST_ARGS)

format: $(INSTALLED) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-accuracy: $(INSTALLED) ## compare accuracies over several seeds (BENCH_ARGS=--help for its options)
	$(BIN)/python benchmarks/accuracy.py $(BENCH_ARGS)

bench-overhead: $(INSTALLED) ## measure what CMIM costs (BENCH_ARGS=--help for its options)
	$(BIN)/python benchmarks/kernel_count.py
	$(BIN)/python benchmarks/overhead.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/tables.py

gpu: $(INSTALLED) ## check and measure everything on a GPU, in four minutes (BENCH_ARGS=--help for its options)
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

tables: $(INSTALLED) ## rewrite every measured number of README, docs and benchmarks, and draw the gains
	$(BIN)/python benchmarks/tables.py

figures: $(INSTALLED) ## draw the figures of docs/inside.md (some minutes)
	$(BIN)/python docs/figures.py

docs: $(INSTALLED) ## build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -d build/doctrees docs build/docs
	@echo "Open build/docs/index.html"

dist: $(INSTALLED) ## build wheel and sdist into dist/
	$(BIN)/python -m build --outdir dist

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@echo "Installing into $(VENV): once, some minutes, mostly torch."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -e ".[dev]" $(foreach requirement,$(TORCH),"$(requirement)")
	touch $@
