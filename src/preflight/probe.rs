//! How checks ask the server: every question is a read-only transaction of its own that leaves nothing behind.
//!
//! `begin`, the question and `commit` go out together, in one round trip, with an unnamed statement and SET LOCAL only.
//! So the session is the caller's again after each question, even if a future is dropped half way; snapshots are short;
//! and it works on standbys and through transaction poolers.

use std::time::Duration;

use futures_util::join;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::PreflightOptions;
use super::check::Check;
use super::report::Server;
use crate::error::{Error, Result};
use crate::job::JobSpec;
use crate::ledger::job::JobRow;
use crate::phase::{Phase, Status as JobStatus};
use crate::plan::shape::SEARCH_PATH;

/// Nothing a check does waits for a lock other than behind somebody's ACCESS EXCLUSIVE; then it says so instead.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// A parameter with its type.
pub type Param<'a> = (&'a (dyn ToSql + Sync), Type);

/// A parameter of type text.
pub fn text<'a>(value: &'a (impl ToSql + Sync)) -> Param<'a> {
    (value, Type::TEXT)
}

/// What every check works with.
pub struct Probe<'a> {
    /// The session.
    pub client: &'a Client,
    /// The job.
    pub spec: &'a JobSpec,
    /// How to look.
    pub options: &'a PreflightOptions<'a>,
    /// Whom we talk to.
    pub server: Server,
    /// The job's row in our ledger, if it has been started.
    pub started: Option<JobRow>,
}

impl<'a> Probe<'a> {
    /// Learns whom we talk to.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn new(client: &'a Client, spec: &'a JobSpec, options: &'a PreflightOptions<'a>) -> Result<Self> {
        let server = Server {
            version: String::new(),
            version_num: 0,
            database: String::new(),
            login: String::new(),
            in_recovery: false,
        };
        let mut probe = Self { client, spec, options, server, started: None };
        let row = probe
            .one(
                "select current_setting('server_version'), current_setting('server_version_num')::int4,
                        current_database()::text, session_user::text, pg_is_in_recovery()",
                &[],
            )
            .await?;
        probe.server = Server {
            version: row.get::<_, String>(0).split_whitespace().next().unwrap_or_default().to_owned(),
            version_num: row.get(1),
            database: row.get(2),
            login: row.get(3),
            in_recovery: row.get(4),
        };
        Ok(probe)
    }

    fn begin(&self) -> String {
        format!(
            "begin transaction isolation level read committed read only; set local row_security = off; \
             set local search_path = {SEARCH_PATH}; set local statement_timeout = {}; set local lock_timeout = {}; \
             set local jit = off",
            self.options.statement_timeout.as_millis().clamp(1, i32::MAX as u128),
            LOCK_TIMEOUT.as_millis()
        )
    }

    /// Asks. Types of results that are not built in must be cast to text.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn rows(&self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        let begin = self.begin();
        let (begun, rows, _) = join!(
            self.client.batch_execute(&begin),
            self.client.query_typed(sql, params),
            self.client.batch_execute("commit")
        );
        begun?;
        Ok(rows?)
    }

    /// Asks for exactly one row.
    ///
    /// # Errors
    /// Whatever the server says; internal, if it is not one row.
    pub async fn one(&self, sql: &str, params: &[Param<'_>]) -> Result<Row> {
        let mut rows = self.rows(sql, params).await?;
        match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => Ok(row),
            _ => Err(Error::internal("expected one row").with_hint(sql.to_owned())),
        }
    }

    /// A column of text.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn texts(&self, sql: &str, params: &[Param<'_>]) -> Result<Vec<String>> {
        Ok(self.rows(sql, params).await?.iter().map(|r| r.get(0)).collect())
    }

    /// Parses and analyses a statement without running it; gives the type of its first column.
    ///
    /// # Errors
    /// Whatever the server says.
    pub async fn prepare(&self, sql: &str) -> Result<Option<Type>> {
        let begin = self.begin();
        let (begun, statement, _) =
            join!(self.client.batch_execute(&begin), self.client.prepare(sql), self.client.batch_execute("commit"));
        begun?;
        Ok(statement?.columns().first().map(|c| c.type_().clone()))
    }

    /// Whether a SET is allowed here, by trying it in a transaction that is rolled back.
    ///
    /// # Errors
    /// Why not.
    pub async fn may_set(&self, set_local: &str) -> Result<()> {
        let sql = format!("begin read only; {set_local}");
        let (tried, ended) = join!(self.client.batch_execute(&sql), self.client.batch_execute("rollback"));
        tried?;
        Ok(ended?)
    }

    /// A check's result: an error of the check is a failed check, unless the connection is gone.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn settle(&self, name: &'static str, result: Result<Check>) -> Result<Check> {
        match result {
            Ok(check) => Ok(check),
            Err(error) if self.client.is_closed() => Err(error.context(format!("check {name}"))),
            Err(error) => Ok(Check::could_not(name, &error)),
        }
    }

    /// The same error for several checks that depend on one answer.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn settle_all(&self, names: &[&'static str], result: Result<Vec<Check>>) -> Result<Vec<Check>> {
        match result {
            Ok(checks) => Ok(checks),
            Err(error) if self.client.is_closed() => Err(error.context(format!("check {}", names.join(", ")))),
            Err(error) => Ok(names.iter().map(|name| Check::could_not(name, &error)).collect()),
        }
    }

    /// Whether the job's triggers and column are there because we put them there.
    pub fn expanded(&self) -> bool {
        self.started.as_ref().is_some_and(|j| j.phase > Phase::Expand && j.status != JobStatus::RolledBack)
    }

    /// Whether the policies and functions are the new ones because we put them there.
    pub fn flipped(&self) -> bool {
        self.started.as_ref().is_some_and(|j| j.phase > Phase::Flip && j.status != JobStatus::RolledBack)
    }
}
