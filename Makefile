# Needs python3 (3.10 or newer, with venv) and make; everything else is installed into .venv, to the versions of
# constraints.txt. Another interpreter: make sample PYTHON=python3.12. pip's own settings (a proxy, local wheels,
# an index with CPU-only builds of torch) apply.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help sample test bench lint clean
.NOTPARALLEL:

help: ## Say what there is to make
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

sample: $(VENV)/.sample ## Sample 100 handwritten digits into samples.png with the model in the package
	$(BIN)/fastdiff sample --model digits --num 100 --steps 20 --guidance 2 --out samples.png

# Two runs: TRITON_INTERPRET binds when a kernel is defined, and excludes compiled kernels. A file of tests stays
# in one worker, which keeps what its tests share, in the order of names: the last ones are short.
# `make test WORKERS=0` runs all in one process.
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.test ## Run the tests, and those of the Triton kernels in Triton's interpreter
	@status=0; \
	$(PYTEST) -m "not slow" || status=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) -m interpret || status=$$?; \
	exit $$status

bench: $(VENV)/.bench ## Measure against torch and diffusers, and bring the tables of benchmarks/README.md up to date
	$(BIN)/python -m pytest -q benchmarks
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/.test ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove .venv and all that building, testing and sampling left behind; runs/ stays
	rm -rf .venv build dist *.egg-info samples.png .hypothesis .benchmarks .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastdiff needs Python 3.10 or newer, \
	$(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# A stamp is younger than its installation; the extras hold all that `sample` needs.
$(VENV)/.sample: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e .
	touch $@

# The tests also run k-diffusion's own samplers, which need little of what that package asks for.
$(VENV)/.test $(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[$(subst .,,$(@F))]'
	$(if $(filter .test,$(@F)),$(INSTALL) --no-deps k-diffusion)
	touch $@ $(VENV)/.sample
