//! PostgreSQL: names, connections, session settings, catalog.

pub mod ident;
