//! What the operator wrote: `job.toml` and its SQL files, parsed and validated. Knows no database.

pub mod access;
pub mod batching;
pub mod lex;
pub mod load;
pub mod policies;
#[cfg(test)]
mod reference;
pub mod report;
pub mod spec;
pub mod throttle;
pub mod tune;
mod validate;
pub mod verification;
pub mod window;

pub use load::load;
pub use spec::JobSpec;
