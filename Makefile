# `make demo` and `make test` need nothing but Python 3.11 or newer, make and a package index.

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST_ARGS ?=

# The first interpreter that is new enough; name another with: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; exit; }; done; echo python3)

# Nothing is fetched from a hub, and forked tokenizers do not warn.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean distclean bench-gpu

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## create .venv, install, refactor the pocket model and print its receipts
	$(BIN)/moesaic demo

test: lint ## create .venv, install, lint, and run every test that is not slow
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/.test ## run the slow tests too
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.test ## style, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.test ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test ## measure the printed numbers; TRACE=file.trace adds the policy lab's, LLAMA=folder llama.cpp
	$(BIN)/python benchmarks/quality.py --out benchmarks/results/quality.json
	$(BIN)/python benchmarks/quality.py --sweep recipes --seeds 1 --out benchmarks/results/recipes.json
	$(BIN)/python benchmarks/quality.py --sweep rates --seeds 1 --out benchmarks/results/rates.json
	$(BIN)/python benchmarks/speed.py --model wide --out benchmarks/results/speed-wide.json
	$(BIN)/python benchmarks/ffn_paths.py --out benchmarks/results/ffn_paths.json
	$(BIN)/python benchmarks/ffn_floor.py --out benchmarks/results/ffn_floor.json
	$(BIN)/python benchmarks/whole_model.py --model wide $(if $(LLAMA),--llama $(LLAMA)) --out benchmarks/results/whole_model-wide.json
	$(BIN)/python benchmarks/whole_model.py --model 1b --sides dense moe engine llama --cells prefill --rounds 3 $(if $(LLAMA),--llama $(LLAMA)) --out benchmarks/results/whole_model-1b-prefill.json
	$(BIN)/python benchmarks/whole_model.py --model 1b --sides dense moe engine llama --cells decode --rounds 3 $(if $(LLAMA),--llama $(LLAMA)) --out benchmarks/results/whole_model-1b-decode.json
	$(BIN)/python benchmarks/healing_step.py --out benchmarks/results/healing_step.json
	$(BIN)/python benchmarks/start.py --out benchmarks/results/start.json
	$(BIN)/python benchmarks/routing_overhead.py --out benchmarks/results/routing_overhead.json
	$(BIN)/python benchmarks/pregate_distillation.py --out benchmarks/results/pregate_distillation.json
	$(BIN)/python benchmarks/route_predictor.py --out benchmarks/results/route_predictor.json
	$(BIN)/python benchmarks/serving_throughput.py $(if $(LLAMA),--llama $(LLAMA)) --out benchmarks/results/serving_throughput.json
	$(BIN)/python benchmarks/affinity.py --seeds 2 --limit 20 --out benchmarks/results/affinity.json
	$(if $(TRACE),$(BIN)/python benchmarks/policy_lab.py --trace $(TRACE) --out benchmarks/results/policy_lab.json)

bench-gpu: $(VENV)/.test ## time the Triton kernels and whole models on a GPU; says so where there is none
	$(BIN)/python benchmarks/gpu_blocks.py --out benchmarks/results/gpu_blocks.json
	$(BIN)/python benchmarks/whole_model.py --device cuda --model 1b --sides dense moe engine engine-dense --chunk 2048 --rounds 3 --out benchmarks/results/whole_model-gpu.json

clean: ## remove caches and build products, keep .venv
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# Stamps, touched last, so that an interrupted install is done again and a finished one is not.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "moesaic needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
		echo "Install one, or name it: make demo PYTHON=/path/to/python3.11"; exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,plots]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.created
	$(BIN)/python -m pip install -c constraints.txt -e '.[all,test,dev]'
	@touch $(VENV)/.demo $@
