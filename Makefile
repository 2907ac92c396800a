# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 3

.PHONY: demo test test-all test-hosts lint format bench bench-peers docs lock clean

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ringfence needs Python 3.11 or newer: make PYTHON=python3.11"; exit 2; }
	@# without python3-venv Debian's venv leaves a .venv that has no pip: pip is what is looked for
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 2; }
	$(BIN)/pip install -qq --require-hashes --requirement requirements.lock
	$(BIN)/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(BIN)/pip install -qq --require-hashes --requirement requirements-dev.lock
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/ringfence demo

# What tests of the isolation technologies need; says what it could not get, and fails nothing.
test-hosts:
	@PYTHON=$(PYTHON) tools/test-hosts

test: lint test-hosts
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not storm" --second-look 3 --durations 30 --durations-min 10

test-all: lint test-hosts
	$(BIN)/pytest -n $(JOBS) --dist worksteal --second-look 3 --durations 30 --durations-min 10

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

# What benchmarks run beside ringfence and no Debian package brings.
PEERS := benchmarks/.peers
bench-peers:
	PYTHON=$(PYTHON) tools/sandbox-runtime $(PEERS)
	$(PEERS)/python/bin/pip install -qq mitmproxy
	test -x $(PEERS)/litellm/bin/python || $(PYTHON) -m venv $(PEERS)/litellm
	$(PEERS)/litellm/bin/pip install -qq 'litellm[proxy]'

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

# The lock holds hashes and names no host.
lock: $(VENV)/.installed-dev
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra build --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra build --extra dev --extra aws --extra gcp --extra keyring --extra platform --extra redis --extra s3 --extra telemetry --extra temporal --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist src/*.egg-info
