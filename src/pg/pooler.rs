//! Poolers in transaction mode: seen before anything of ours is set, since what one session sets there stays behind in a
//! server process that others use next.

use tokio_postgres::{Client, SimpleQueryMessage};

use crate::error::Result;

/// The pair of questions is asked so often. A pooler hands out the process that came back last, so one pair is enough where
/// nobody else is there; on a busy one, somebody can slip in between.
const TRIES: usize = 4;

/// Whether two idle sessions are served by a pooler in transaction mode: while one is in a transaction, the other must
/// still be where it was. Both must be outside a transaction. Sets nothing, and leaves nothing behind.
///
/// # Errors
/// Whatever the server says.
pub async fn in_transaction_mode(first: &Client, second: &Client) -> Result<bool> {
    for _ in 0..TRIES {
        let before = backend_pid(first).await?;
        second.batch_execute("begin read only").await?;
        let held = backend_pid(second).await;
        // With a pool of one process, the first session would now wait for the second one.
        let moved = match &held {
            Ok(held) if *held == before => Ok(true),
            _ => backend_pid(first).await.map(|after| after != before),
        };
        second.batch_execute("rollback").await?;
        held?;
        if moved? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The server process, by the simple protocol, which every pooler passes on.
///
/// # Errors
/// Whatever the server says.
pub async fn backend_pid(client: &Client) -> Result<String> {
    let answer = client.simple_query("select pg_catalog.pg_backend_pid()").await?;
    Ok(answer
        .iter()
        .find_map(|m| match m {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .unwrap_or_default())
}
