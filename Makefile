# `make demo` and `make test` set up what they need; `make help` lists the rest.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.set-up
PROTOS := $(wildcard protos/baton/v1/*.proto)
EXTRAS ?= cpu,nixl-cu12,dev
# Of the host that `make gpu-bundle` packs for.
GPU_PYTHON ?= 3.12
GPU_NIXL ?= nixl-cu13==1.5.1

# The first Python that is new enough; PYTHON=... names another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { command -v "$$name"; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults mutation lint fmt types protos protos-fresh evaluate bench-overhead \
	gpu-bundle clean

help:  ## what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(READY)  ## virtual environment with all dependencies

# pip takes the CPU build of torch where one is offered, because torch comes first and by itself.
$(READY): pyproject.toml requirements/torch.txt requirements/constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.11 or newer here: apt-get install python3 python3-venv," \
			"or name one with PYTHON=/path/to/python3.12" >&2; exit 1; }
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: there is no $(PYTHON) here" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is `"$(PYTHON)" -V 2>&1`, and Baton needs 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; \
		exit 1; }
	test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet -c requirements/constraints.txt -r requirements/torch.txt
	$(BIN)/pip install --quiet -c requirements/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)  ## a cluster on this machine, one talk through it, and what happened
	@$(BIN)/python -P examples/demo.py

test: $(READY)  ## all tests
	$(BIN)/python -P -m pytest $(ARGS)

test-faults: $(READY)  ## every fault of the suite, the slow ones too, and the simulation
	$(BIN)/python -P -m pytest -m "" tests/faults tests/sim $(ARGS)

mutation: $(READY)  ## whether planted faults are caught, and by whom
	@PYTHONPATH=tests $(BIN)/python -P -m mutation.run $(ARGS)

lint: $(READY) protos-fresh  ## format, ruff, types, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(READY)  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy alone
	$(BIN)/mypy

protos: $(READY)  ## write the code generated from protos/ again
	$(call generate,protos)

protos-fresh: $(READY)  ## whether the committed generated code is that of the protos
	@made=`mktemp -d` && trap 'rm -rf "$$made"' EXIT && \
	$(call generate,"$$made") && \
	for file in "$$made"/baton/v1/*; do \
		cmp -s "$$file" "protos/baton/v1/`basename "$$file"`" || { \
			echo "error: protos/baton/v1/`basename "$$file"` is stale; run make protos" >&2; exit 1; }; \
	done

define generate
$(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(1) --pyi_out=$(1) \
	--grpc_python_out=$(1) $(PROTOS)
endef

evaluate: $(READY)  ## the exam of baton-tiny, as a table
	@$(BIN)/python -P -m baton.models.training.evaluate $(ARGS)

bench-overhead: $(READY)  ## what a cluster adds to the engine's own time
	$(BIN)/python -P benchmarks/overhead.py $(ARGS)

gpu-bundle: $(READY)  ## what a GPU host without network lacks, in parts
	$(BIN)/python -P benchmarks/gpu_bundle.py --python $(GPU_PYTHON) --nixl $(GPU_NIXL) $(ARGS)

clean:  ## remove what make and the tools made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
