# Everything a developer or an operator of one machine types. `make` alone prints the list.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
GOLDEN ?= tests/golden
BENCHMARKS := end_to_end dit restore vae gateway_path grant_router admission
# A checkout of github.com/thu-ml/Causal-Forcing, to time its transformer in the same rounds as ours.
REFERENCE ?=
JOBS ?= 2
SESSIONS ?= 1000
TRIALS ?= 200
KILLS ?= 5
DURATION ?= 10
ARGS ?=
# Generated code asks for the versions of protobuf and grpcio that it was made with, or later ones (pyproject.toml says so):
# these are as old as Daydream Scope's, and not those of .venv.
GRPC_TOOLS := grpcio-tools==1.76.0
PROTOC := $(VENV)/protoc

.PHONY: gpu-check help node-example setup demo showcase serve observe test test-fast test-scope lint type format check \
	manifests protos protos-breaking parity bench \
	bench-serve bench-cancel soak leaks full-size \
	readme-numbers constraints clean distclean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the pinned environment (again only when the pins change).

$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@echo 'installing the pinned environment into $(VENV): some minutes, once'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,dev]'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PROTOC) $(GRPC_TOOLS)
	touch $@

demo: $(STAMP) ## Run the whole service once on this machine and write demo.mp4.
	$(VENV)/bin/causal-forcing demo --output demo.mp4 $(ARGS)

showcase: $(STAMP) ## Make the README's contact sheet and animated GIF of the embedded model again.
	$(PYTHON) -m causal_forcing.training.showcase docs/media

serve: $(STAMP) ## Run the service on this machine until Ctrl-C.
	$(VENV)/bin/causal-forcing serve $(ARGS)

observe: $(STAMP) ## Run the service with Prometheus and a few viewers until Ctrl-C (docs/observability.md).
	$(PYTHON) -m serve.observe $(ARGS)

test: $(STAMP) ## Run every test (JOBS=2 processes; ARGS=... goes to pytest).
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) $(ARGS)

test-fast: $(STAMP) ## Run the tests that are not marked slow.
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) -m 'not slow' $(ARGS)

lint: $(STAMP) ## Check style: ruff, formatting, protos.
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	if [ -f protos/buf.yaml ]; then $(VENV)/bin/buf lint protos; fi
	$(VENV)/bin/hadolint k8s/Dockerfile

type: $(STAMP) ## Check types: mypy --strict on the packages.
	$(PYTHON) -m mypy

format: $(STAMP) ## Rewrite the code in our style.
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check: lint type test ## All that has to pass before a change is merged.

manifests: $(STAMP) ## Generate the Kubernetes manifests of k8s/overlays again.
	for folder in k8s/overlays/cpu-demo k8s/overlays/gpu; do \
		$(VENV)/bin/causal-forcing config kuberay $$folder/service.yaml $$folder/cluster.yaml --output $$folder; done

test-scope: $(STAMP) ## Run the Scope plugin's tests against a checkout of Daydream Scope (SCOPE=DIR).
	PYTHONPATH=$(SCOPE)/src CAUSAL_FORCING_REAL_SCOPE=1 $(PYTHON) -m pytest -q tests/causal_forcing/scope

node-example: ## Install the packages of the Node.js example, whose tests are skipped without them.
	cd examples/node && npm ci --ignore-scripts --no-audit --no-fund

protos: $(STAMP) ## Generate the Python code of protos/ again.
	PYTHONPATH=$(PROTOC) $(PYTHON) -m grpc_tools.protoc --proto_path=. --proto_path=protos/third_party \
		--python_out=. --pyi_out=. --grpc_python_out=. $$(find protos/causal_forcing -name '*.proto')

protos-breaking: $(STAMP) ## Compare the protos with the main branch: nothing may break a client.
	cd protos && ../$(VENV)/bin/buf breaking --against '../.git#branch=main,subdir=protos'

parity: $(STAMP) ## Compare the engine with golden tensors (GOLDEN=DIR).
	$(VENV)/bin/causal-forcing parity $(GOLDEN)

bench: $(STAMP) ## Measure everything again (minutes; REFERENCE=DIR: beside the reference) and fill the tables.
	for name in $(filter-out dit,$(BENCHMARKS)); do OMP_NUM_THREADS=2 $(PYTHON) benchmarks/$$name.py $(ARGS); done
	OMP_NUM_THREADS=2 $(PYTHON) benchmarks/dit.py $(if $(REFERENCE),--reference $(REFERENCE)) $(ARGS)
	$(MAKE) readme-numbers

bench-serve: $(STAMP) ## Measure the service: cadence, prompt switches, capacity, scaling (10 minutes), and fill the tables.
	$(PYTHON) benchmarks/serve_stream.py --engine simulated --switches 24 $(ARGS)
	$(PYTHON) benchmarks/serve_stream.py --engine tiny --chunks 80 --switches 18 $(ARGS)
	$(PYTHON) benchmarks/serve_stream.py --engine tiny --vae lightvae --chunks 80 --switches 18 $(ARGS)
	$(PYTHON) benchmarks/serve_sharing.py
	$(PYTHON) benchmarks/serve_sharing.py --engine tiny --places 6
	$(PYTHON) benchmarks/serve_sharing.py --engine tiny --vae lightvae --places 9
	$(PYTHON) benchmarks/serve_scaling.py
	$(PYTHON) benchmarks/serve_profiles.py
	$(PYTHON) benchmarks/serve_capacity.py --profile --seconds 9
	$(MAKE) readme-numbers

bench-cancel: $(STAMP) ## Measure how soon a generator is free, and what a kill costs (TRIALS=200 KILLS=5; 20 minutes).
	$(PYTHON) benchmarks/serve_cancel.py --trials $(TRIALS) --kills $(KILLS)
	$(MAKE) readme-numbers

soak: $(STAMP) ## Let viewers come and go for 10 minutes (DURATION=minutes): memory stays flat, nothing is left.
	$(PYTHON) benchmarks/serve_soak.py --minutes $(DURATION)

leaks: $(STAMP) ## Have 1,000 short sessions (SESSIONS=N) and look for what they leave behind (2 minutes).
	$(PYTHON) benchmarks/serve_leaks.py --sessions $(SESSIONS)

full-size: $(STAMP) ## Load and run parts of the real sizes, with random weights (12 GB of disk and memory).
	OMP_NUM_THREADS=2 $(PYTHON) benchmarks/full_size.py $(ARGS)

gpu-check: $(STAMP) ## Check parity, waits, copies, memory and speed on this machine's GPU; writes a report.
	if command -v nvidia-smi >/dev/null; then \
		$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torchao; fi
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

readme-numbers: $(STAMP) ## Fill the tables of docs/benchmarks.md and the README from benchmarks/results.
	$(PYTHON) benchmarks/readme.py

clean: ## Remove what builds and runs leave behind.
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .demo demo.mp4
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment, too.
	rm -rf $(VENV) examples/node/node_modules

# torchao is installed where there is a GPU only: elsewhere its pin stays.
constraints: $(STAMP) ## Write constraints.txt from what is installed now.
	{ echo '# The whole tested environment; written by `make constraints`.'; \
		{ $(PYTHON) -m pip freeze --exclude-editable --disable-pip-version-check | sed -E '/ @ /d; s/\+cpu$$//'; \
			grep '^torchao==' constraints.txt; } | LC_ALL=C sort -fsu -t= -k1,1; } > constraints.new
	mv constraints.new constraints.txt
