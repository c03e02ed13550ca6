//! JobSpec + catalog facts -> every statement that will run, with its lock level and its reason. Immutable.

pub mod access_sets;
pub mod access_sql;
pub mod batch_sql;
pub mod contract;
pub mod facts;
pub mod heap_sql;
pub mod owners_sql;
pub mod repair_sql;
pub mod rounds;
pub mod shape;
pub mod steps;
pub mod sync_body;
pub mod sync_sql;
pub mod verify_sql;

#[cfg(test)]
mod golden_tests;

pub use facts::Facts;
pub use shape::Shape;
