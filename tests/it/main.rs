//! Integration tests on a real PostgreSQL server.

#[allow(dead_code, unused_imports, reason = "helpers are there for the tests to come")]
#[path = "../support/mod.rs"]
mod support;

mod access;
mod access_meanwhile;
mod bad_input;
mod batches;
mod cluster;
mod control;
mod cutover;
mod demo;
mod demo_migration;
mod guide;
mod heap;
mod heap_model;
mod hooks;
mod https;
mod interleaving;
mod killed;
mod lanes;
mod lease;
mod life;
mod lint;
mod logs;
mod mutations;
mod page;
mod pieces;
mod pooler;
mod preflight;
mod proof;
mod pruning;
mod quarantine;
mod report;
mod rollback;
mod service;
mod sync_access;
mod sync_contract;
mod sync_cost;
mod sync_fixture;
mod sync_races;
mod sync_random;
mod sync_refusals;
mod sync_sources;
mod sync_values;
mod terminal;
mod throttle;
mod throttle_reaction;
mod throttle_servers;
mod throttle_signals;
mod tune;
mod unwatched;
mod verdict;
mod verify;
mod watch;
mod watching;
