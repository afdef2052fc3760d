# SPDX-License-Identifier: Apache-2.0
# Human verbs.  Everything they need they fetch: Python packages into .venv, Debian packages by
# name, the lab (QEMU, guest kernels) into a cache folder.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GUEST  ?= qemu
LAB    ?= on
# What has a compiled form beside the one in NumPy; the first run of the tests has it compiled.
PURE   := $(addprefix tests/unit/test_,native*.py memory_*.py skipmap_*.py balloon_*.py virtqueue_engines.py)

# Four distributions, one repository: pip gets all of them in one call, since no registry has them.
PROJECTS := spec/virtio-formats spec/virtio-conformance device/vfio-user .
# The tests of the other distributions, which run without the balloon too.
OTHERS   := device/vfio-user/tests spec/virtio-conformance/tests

.PHONY: help venv demo test unit bench lint format clean
help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(VENV)/.stamp ## the virtual environment
$(VENV)/.stamp: $(PROJECTS:=/pyproject.toml) $(wildcard device/vballoon/native/*.[ch])
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || apt-get install -y --no-install-recommends python3-venv \
		|| { echo "as root, please: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group dev $(addprefix --editable ,$(PROJECTS))
	touch $@

demo: venv ## boot a real guest on stock QEMU with the balloon attached (GUEST=embedded: without)
	$(BIN)/python -m examples.demo --guest $(GUEST)

test: venv lint unit ## all tests (LAB=off: no virtual machines, FULL=1: the whole matrix)
ifneq ($(LAB),off)
	$(BIN)/python -m tests.lab setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "$(if $(FULL),lab,lab and not full)" tests/lab_tests
endif

unit: venv ## all tests that need no virtual machine
	$(BIN)/python -m tests.lab prerequisites
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not lab" --cov --cov-fail-under=0 --cov-report= tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --cov --cov-append $(OTHERS)
	VBALLOON_NATIVE=0 $(BIN)/python -m pytest -q $(PURE)

bench: venv ## measure, beside C, QEMU's balloon and copying memory (FULL=1: every size, many turns)
	$(BIN)/python -m tests.lab setup
	$(BIN)/python -m tests.bench $(if $(FULL),--full)

lint: venv ## formatting, style, spelling, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

format: venv ## put the formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and build products
	rm -rf $(VENV) build dist
