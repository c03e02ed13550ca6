//! Typed access to our own tables in schema `backfilld`.
//!
//! Nothing here decides anything; it stores and reads. Whoever changes a job's phase, a checkpoint or a verdict passes a
//! transaction in which [`lease::fence`] has succeeded.

pub mod access;
pub mod checkpoint;
pub mod event;
pub mod heap;
pub mod job;
pub mod lease;
pub mod migrate;
pub mod objects;
pub mod plans;
pub mod sample;
pub mod tuning;
pub mod verdict;
pub mod verification;
pub mod watch;
