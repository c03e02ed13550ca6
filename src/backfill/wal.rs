//! Compression of full-page images in the WAL of batches.
//!
//! After a checkpoint the first change of each page writes all of it to the WAL, and under checkpoint pressure these images
//! are most of what a backfill writes. `wal_compression` applies to what our own session writes, so nobody else notices.

use tokio_postgres::Client;
use tracing::{debug, info};

use crate::error::{Error, Result};
use crate::job::spec::WalCompression;

/// What `auto` asks for: measured on rows of 300 bytes it takes off a third to a half of the WAL and costs a twentieth to a
/// tenth of the time; pglz takes as much off for half the time more.
const AUTO: &str = "lz4";
/// The login may not set it.
const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// The server knows no such method: before 15, or built without it.
const INVALID_VALUE: &str = "22023";

/// Sets it in a session, as the job wants. `auto` leaves the server's value where the login may not set it, or where the
/// server does not know the method.
///
/// # Errors
/// The job names a method that cannot be set here.
pub async fn compress(client: &Client, job: &str, wanted: WalCompression) -> Result<()> {
    let method = match wanted {
        WalCompression::Server => return Ok(()),
        WalCompression::Auto => AUTO,
        WalCompression::Off => "off",
        WalCompression::Lz4 => "lz4",
        WalCompression::Pglz => "pglz",
        WalCompression::Zstd => "zstd",
    };
    let Err(error) = client.batch_execute(&format!("set wal_compression = {method}")).await.map_err(Error::from) else {
        info!(job, method, "full-page images in the WAL of batches are compressed so");
        return Ok(());
    };
    let refused = matches!(error.sqlstate(), Some(INSUFFICIENT_PRIVILEGE | INVALID_VALUE));
    if wanted == WalCompression::Auto && refused {
        debug!(job, sqlstate = error.sqlstate(), "wal_compression stays as the server has it");
        return Ok(());
    }
    Err(error.context(format!("wal_compression cannot be set to {method}")).with_hint(
        "grant set on parameter wal_compression to this login (PostgreSQL 15 and later), or set \
         batching.wal_compression = \"auto\" in the job; lz4 and zstd also depend on how the server was built",
    ))
}
