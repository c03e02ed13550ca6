//! Batched online backfills for live PostgreSQL tables.
//!
//! The modules in reading order: what the operator wrote ([`job`], [`settings`]), what will be done ([`plan`]), the
//! phases that do it, the state they leave in the database, and what they tell. ARCHITECTURE.md is the map.

pub mod error;
pub mod pg;

pub use error::{Error, Kind, Result};
