//! PostgreSQL: names, connections, session settings, catalog.

pub mod connect;
mod connect_error;
pub mod ident;
pub mod pool;
pub mod pooler;
mod session;
mod tls;
