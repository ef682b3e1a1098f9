# The build itself is cargo's; this is what stands around it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo systems client test test-core test-clients test-browser test-versions soak fuzz autobahn unit lint bench dist clean
MINUTES ?= 10
# Tests mostly wait for each other's servers, so more of them run at a time than there are processors.
TEST_THREADS ?= $(shell echo $$((3 * $$(nproc 2>/dev/null || echo 2))))

# Node.js from here where the system's is too old.
export PATH := $(CURDIR)/target/node/bin:$(PATH)
cluster := tests/support/cluster.sh
tests = $(cluster) run target/cluster -c fsync=off -- cargo test
core = $(tests) -- --test-threads=$(TEST_THREADS) --skip clients:: --skip browser::
VERSIONS ?= 14 15 16 17 18

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: PostgreSQL, Node.js, npm and Python packages, Chromium
	@tests/support/setup.sh

demo: ## start everything and serve a page with live rows; Ctrl-C stops it
	@tests/support/setup.sh postgres node
	@cargo build --release
	@examples/demo/run.sh

systems: ## the same for the five systems of examples/systems, with buttons that run SQL
	@tests/support/setup.sh postgres node
	@cargo build --release
	@examples/systems/run.sh

client: ## compile the client of examples/client into examples/client/dist
	@tests/support/setup.sh node
	@examples/client/node_modules/.bin/tsc -p examples/client

test: test-core test-clients test-browser ## all tests, on a throwaway PostgreSQL cluster, with the real clients

test-core: ## all tests but those with the real clients
	@tests/support/setup.sh postgres pooler
	@$(core)

test-clients: ## the unmodified clients from npm and PyPI
	@tests/support/setup.sh postgres node python
	@$(tests) --test main -- --test-threads=$(TEST_THREADS) clients::

test-browser: ## a page in a headless Chromium
	@tests/support/setup.sh postgres node browser
	@$(tests) --test main -- browser::

test-versions: ## test-core on each of VERSIONS="14 15 16 17 18" of PostgreSQL; the results are in target/versions
	@tests/support/setup.sh postgres pooler versions
	@cargo test --no-run --quiet
	@mkdir -p target/versions; failed=; for version in $(VERSIONS); do \
	  export RELAY_PG_BIN=$(CURDIR)/target/postgresql/$$version/bin; \
	  echo "PostgreSQL $$("$$RELAY_PG_BIN"/postgres --version | grep -oE '[0-9.]+' | head -n 1):" \
	    "target/versions/$$version.log"; \
	  $(core) >target/versions/$$version.log 2>&1 || failed+=" $$version"; \
	  grep -E '^test result|^test .* FAILED$$|^error' target/versions/$$version.log || true; \
	done; if [ -n "$$failed" ]; then echo "Failed on:$$failed"; exit 1; fi

soak: ## the fault run for MINUTES=10 (kills of two relays and PostgreSQL), and readers who change between 1, 2 and 3 relays
	@tests/support/setup.sh postgres
	@RELAY_TEST_MINUTES=$(MINUTES) RELAY_TEST_SECONDS=30 $(cluster) run target/cluster -- \
	  cargo test --test main -- --test-threads=1 --nocapture faults:: one_cursor::each_change

fuzz: ## random input for the parsers, MINUTES=10 each
	@tests/support/setup.sh fuzz
	@tests/fuzz/run.sh $(MINUTES)

autobahn: ## the Autobahn test suite of WebSocket servers; wants a Python 2.7
	@tests/support/setup.sh cargo
	@python=$$(tests/autobahn/setup.sh) && RELAY_TEST_AUTOBAHN=$$python cargo test --test main -- autobahn:: --nocapture

unit: ## the tests of the pure parts; no PostgreSQL
	@tests/support/setup.sh cargo
	@cargo test --quiet --lib

lint: ## formatting, clippy and rustdoc, warnings denied
	@tests/support/setup.sh cargo
	@cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
	@cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

bench: ## latency, writers' rate, fan-out and memory; AGAINST=an older relay's binary measures both, BENCH=sections
	@tests/support/setup.sh postgres
	@$(cluster) run target/bench/cluster -- cargo bench -- $(if $(AGAINST),--against $(abspath $(AGAINST))) $(BENCH)

dist: ## a stripped binary without dependencies: target/dist/relay
	@tests/support/setup.sh cargo
	@host=$$(rustc -vV | sed -n 's/^host: //p'); \
	  RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile dist --target $$host && \
	  mkdir -p target/dist && cp target/$$host/dist/relay target/dist/relay && \
	  echo "target/dist/relay: $$(($$(stat -c %s target/dist/relay) / 1000000)) MB, without dependencies"

clean: ## remove all that was built and stop our clusters
	@for dir in target/cluster target/demo/cluster target/systems/cluster target/bench/cluster; do $(cluster) drop $$dir; done
	rm -rf target tests/clients/node_modules examples/client/node_modules examples/client/dist
