//! Batched online backfills for live PostgreSQL tables.
//!
//! The modules in reading order: what the operator wrote ([`job`], [`settings`]), what will be done ([`plan`]), the
//! phases that do it, the state they leave in the database, and what they tell. ARCHITECTURE.md is the map.

pub mod access;
pub mod backfill;
pub mod cli;
pub mod context;
pub mod cutover;
pub mod daemon;
pub mod ddl;
pub mod demo;
pub mod error;
pub mod eta;
pub mod expand;
mod fault;
pub mod hooks;
pub mod http;
pub mod job;
pub mod ledger;
pub mod live;
pub mod metrics;
mod pem;
pub mod pg;
pub mod phase;
pub mod plan;
mod post;
pub mod preflight;
pub mod progress;
pub mod report;
pub mod rollback;
pub mod settings;
pub mod telemetry;
pub mod terminal;
pub mod throttle;
pub mod verify;
pub mod watch;

pub use error::{Error, Kind, Result};
