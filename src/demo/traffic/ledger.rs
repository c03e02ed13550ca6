//! What the server acknowledged, and the check that it kept its word.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::Cursor;
use std::pin::pin;

use futures_util::SinkExt as _;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio_postgres::Client;
use uuid::Uuid;

use super::TrafficReport;
use crate::error::{Error, Result};

const TABLES_SQL: &str = include_str!("../sql/oracle_tables.sql");
const ORACLE_SQL: &str = include_str!("../sql/oracle.sql");

/// What must be found for a message that the traffic wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Live([u8; 32]),
    Deleted,
    /// The connection was lost in COMMIT: both outcomes are right.
    Unknown,
}

/// Acknowledged writes: the last one for each message.
#[derive(Default)]
pub(in crate::demo) struct Ledger {
    messages: HashMap<Uuid, (Uuid, Expected)>,
    moved: HashSet<Uuid>,
    gone: HashMap<Uuid, bool>,
    /// Messages whose update was broadcast.
    pub(super) broadcasts: HashSet<Uuid>,
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ledger({} messages)", self.messages.len())
    }
}

/// What the oracle found; all zero, or something is wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Oracle {
    /// Rows that must exist and do not.
    pub lost: u64,
    /// Rows whose content, conversation or other old columns differ from what was last acknowledged or generated.
    pub altered: u64,
    /// Rows that exist although their deletion was acknowledged.
    pub resurrected: u64,
    /// Rows that nobody wrote.
    pub unexpected: u64,
    /// Rows that the application did not write and whose `updated_at` moved.
    pub touched: u64,
    /// Messages that the application did not write and whose update was broadcast.
    pub stray_broadcasts: u64,
}

impl Oracle {
    /// Whether every acknowledged write is there and nothing else happened.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

impl Ledger {
    pub(super) fn live(&mut self, id: Uuid, conversation: Uuid, content: &str) {
        self.messages.insert(id, (conversation, Expected::Live(Sha256::digest(content).into())));
    }

    pub(super) fn deleted(&mut self, id: Uuid, conversation: Uuid) {
        self.messages.insert(id, (conversation, Expected::Deleted));
    }

    pub(super) fn unknown(&mut self, id: Uuid, conversation: Uuid) {
        self.messages.insert(id, (conversation, Expected::Unknown));
    }

    /// A conversation that changed hands, or may have.
    pub(super) fn moved(&mut self, conversation: Uuid) {
        self.moved.insert(conversation);
    }

    /// A conversation whose owner's account was deleted; not `certain` if the answer to COMMIT was lost.
    pub(super) fn gone(&mut self, conversation: Uuid, certain: bool) {
        self.gone.insert(conversation, certain);
    }

    fn lines(&self) -> String {
        let mut out = String::new();
        for (id, (conversation, expected)) in &self.messages {
            let (word, hash) = match expected {
                Expected::Live(hash) => ("live", hash.iter().map(|b| format!("{b:02x}")).collect()),
                Expected::Deleted => ("deleted", String::new()),
                Expected::Unknown => ("unknown", String::new()),
            };
            out.push_str(&format!("{id}\t{conversation}\t{word}\t{hash}\n"));
        }
        out
    }
}

impl TrafficReport {
    /// Compares every row of `public.messages` with what was generated and what was acknowledged since.
    ///
    /// `client` is a superuser in the traffic's database, where [`crate::demo::sample::take_baseline`] has run before
    /// the traffic started. The traffic has stopped. Works in temporary tables; call it once per session.
    ///
    /// # Errors
    /// What the server says.
    pub async fn check_oracle(&self, client: &Client) -> Result<Oracle> {
        let context = |e: tokio_postgres::Error| Error::from(e).context("oracle");
        client.batch_execute(TABLES_SQL).await.map_err(context)?;
        let ids = |set: &HashSet<Uuid>| set.iter().map(|id| format!("{id}\n")).collect::<String>();
        let gone = self.ledger.gone.iter().map(|(id, certain)| format!("{id}\t{certain}\n")).collect();
        copy(client, "traffic_ledger", self.ledger.lines()).await.map_err(context)?;
        copy(client, "traffic_moved", ids(&self.ledger.moved)).await.map_err(context)?;
        copy(client, "traffic_gone", gone).await.map_err(context)?;
        copy(client, "traffic_broadcast", ids(&self.ledger.broadcasts)).await.map_err(context)?;
        let row = client.query_one(ORACLE_SQL, &[]).await.map_err(context)?;
        let count = |name: &str| row.try_get::<_, i64>(name).map(i64::unsigned_abs).map_err(context);
        Ok(Oracle {
            lost: count("lost")?,
            altered: count("altered")?,
            resurrected: count("resurrected")?,
            unexpected: count("unexpected")?,
            touched: count("touched")?,
            stray_broadcasts: count("stray_broadcasts")?,
        })
    }
}

/// COPY `target` from text lines; returns the number of rows.
pub(super) async fn copy(client: &Client, target: &str, lines: String) -> Result<u64, tokio_postgres::Error> {
    let mut sink = pin!(client.copy_in::<_, Cursor<Vec<u8>>>(&format!("copy {target} from stdin")).await?);
    sink.send(Cursor::new(lines.into_bytes())).await?;
    sink.finish().await
}
