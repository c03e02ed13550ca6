//! What every integration test needs: one shared server, a database per test, sessions that can be interleaved.

mod browser;
mod daemon;
mod db;
mod dump;
mod server;
mod session;
mod terminal;

pub use browser::{Browser, free_port};
pub use daemon::{Cli, Ended, JOB, JobDir, Ledger, Local, Process, run_once, settings};
pub use db::{Template, TestDb};
pub use dump::schema_dump;
pub use server::{block_on, has_version, server};
pub use session::{Session, wait_until};
pub use terminal::Terminal;
