# Every target makes what it needs: with Python 3.11 alone, the first call creates .venv and installs
# the versions of constraints.txt. Extra options go in ARGS, e.g. make align ARGS="--reward red".

SHELL := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= emoji
OUT ?= results/$(if $(filter emoji-text,$(MODEL)),emoji-text,align)
ARGS ?=
PIP_ARGS ?=
DEFAULT_ARGS = $(if $(filter emoji,$(MODEL)),--class flags --reward green)$(if $(filter emoji-text,$(MODEL)),--prompt "red apple")
# Threads that spin while they wait make a network many times slower as soon as one core is busy.
export OMP_WAIT_POLICY ?= PASSIVE
# The tests work on small tensors, for which a second thread costs more than it gives.
THREADS ?= 1

extras-run := plots,rewards
extras-run-emoji := $(extras-run)
extras-run-emoji-text := $(extras-run)
extras-run-digits := $(extras-run)
extras-run-molecules := $(extras-run),molecules
extras-run-text := $(extras-run),text
extras-run-antiberty := $(extras-run),antibodies
extras-run-sapiens := $(extras-run),antibodies
extras-test := test
extras-docs := docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: matrix inverse mixture preferences calibration help align test lint type docs tutorials bench statespace amortisation compare compare-full ci clean distclean compare-discrete compare-discrete-full

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# The environment, once per set of extras and again when what is installed changes.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt requirements-antibodies.txt
	@test -x "$(BIN)/pip" || { echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv "$(VENV)"; }
	@echo "Installing pyro-twist[$(extras-$*)]: a minute or two the first time"
	@for try in 1 2 3; do \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check --retries 5 --timeout 60 \
	        --constraint constraints.txt $(PIP_ARGS) --editable '.[$(extras-$*)]' && break; \
	    if [ $$try = 3 ]; then exit 1; fi; \
	    echo "The installation failed; trying again in $$((10 * try)) s" >&2; \
	    sleep $$((10 * try)); \
	done
	@# weights alone: what these packages ask for is not needed
	@if [[ "$*" =~ ^(test|run-antiberty|run-sapiens)$$ ]]; then $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
	    $(PIP_ARGS) -r requirements-antibodies.txt; fi
	@touch $@

align: $(VENV)/.installed-run-$(MODEL)  ## align the emoji model, or MODEL=molecules, text, ..., to a reward
	@$(BIN)/pyro-twist align $(MODEL) --out "$(OUT)" $(or $(ARGS),$(DEFAULT_ARGS))

test: $(VENV)/.installed-test  ## run the tests
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test  ## check the style of the code
	@$(BIN)/ruff check $(ARGS) .
	@$(BIN)/ruff format --check --quiet .

type: $(VENV)/.installed-test  ## check the types of the whole package
	@$(BIN)/mypy $(ARGS)

docs: $(VENV)/.installed-docs  ## build the documentation, warnings are errors
	@$(BIN)/sphinx-build -W --keep-going -E -q -b html docs docs/_build/html $(ARGS)
	@echo "The documentation is in docs/_build/html; open docs/_build/html/index.html"

tutorials: $(VENV)/.installed-test  ## run the tutorials in smoke mode
	@VENV="$(VENV)" bash scripts/tutorials.sh $(ARGS)

bench: $(VENV)/.installed-test  ## run the benchmarks, JSON into results/bench
	@mkdir -p results/bench
	@set -e; for script in tests/perf/bench_*.py; do name=$$(basename "$$script" .py); \
	    $(BIN)/python -m "tests.perf.$$name" --out "results/bench/$$name.json" $(ARGS); \
	done

statespace: $(VENV)/.installed-test  ## log-likelihoods of state-space models, some 15 minutes
	@$(BIN)/python -m tests.perf.statespace --out docs/_static/benchmarks/statespace.json $(ARGS)

amortisation: $(VENV)/.installed-test  ## a fitted twist used again, 2 minutes
	@$(BIN)/python -m tests.perf.amortisation --out docs/_static/benchmarks/amortisation.json $(ARGS)

compare: $(VENV)/.installed-test  ## TRI-TSMC, FK steering and best-of-N at equal cost
	@$(BIN)/python -m tests.perf.compare $(ARGS)

compare-full: $(VENV)/.installed-test  ## the same on all tasks, with more particles and ablations
	@$(BIN)/python -m tests.perf.compare --full $(ARGS)

compare-discrete: $(VENV)/.installed-test  ## the same comparison on molecules and texts
	@$(BIN)/python -m tests.perf.compare_discrete $(ARGS)

compare-discrete-full: $(VENV)/.installed-test  ## with all seeds at the largest size and ablations
	@$(BIN)/python -m tests.perf.compare_discrete --full $(ARGS)

matrix: $(VENV)/.installed-test  ## every algorithm, twist, threshold and scheme on exact models
	@$(BIN)/python -m tests.matrix $(ARGS)

preferences: $(VENV)/.installed-test  ## a taste learnt from favourites, round by round
	@$(BIN)/python -m tests.perf.preferences --out docs/_static/benchmarks/preferences.json $(ARGS)

inverse: $(VENV)/.installed-test  ## inverse problems on digits, 10 minutes
	@$(BIN)/python -m tests.perf.inverse $(ARGS)

mixture: $(VENV)/.installed-test  ## a tilted Gaussian mixture, by every algorithm
	@$(BIN)/python -m tests.perf.mixture $(ARGS)

calibration: $(VENV)/.installed-test  ## coverage of pictures and instruments on digits
	@$(BIN)/python -m tests.perf.calibration $(ARGS)

ci:  ## everything that is checked before a merge
	@.ci/run

clean:  ## remove what the other targets made, but not the environment
	rm -rf build dist docs/_build .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean  ## and the environment as well
	rm -rf "$(VENV)"
