# SPDX-License-Identifier: Apache-2.0
# Human verbs.  Everything they need they fetch: Python packages into .venv, Debian packages by
# name, the lab (QEMU, guest kernels) into a cache folder.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GUEST  ?= qemu
LAB    ?= on

.PHONY: help venv demo test bench lint format lab clean
help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(VENV)/.stamp ## the virtual environment
$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --group dev --editable .
	touch $@

clean: ## remove the virtual environment and build products
	rm -rf $(VENV) build dist
