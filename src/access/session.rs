//! Attempts: statements made as somebody else, in transactions that are rolled back. The only place where
//! `row_security` is on.

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use crate::error::{Error, Result, Retry};
use crate::job::access::Access;
use crate::plan::steps::quote;

/// As whom an attempt is made.
#[derive(Debug, Clone)]
pub struct Actor {
    /// The role that the statement runs as: the job's, or its stand-in.
    pub role: String,
    /// The settings that say who the user is.
    pub settings: Vec<(String, String)>,
}

/// What an attempt gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gave {
    /// Visible rows, with a hash of their keys.
    Seen(i64, i64),
    /// Rows written.
    Wrote(u64),
    /// A call came back.
    Called,
    /// An error is a result, too: its SQLSTATE.
    Error(String),
}

impl Gave {
    /// As stored and shown.
    pub fn text(&self) -> String {
        let rows = |n: i128| if n == 1 { "1 row".to_owned() } else { format!("{n} rows") };
        match self {
            Self::Seen(n, _) => rows(i128::from(*n)),
            Self::Wrote(n) => rows(i128::from(*n)),
            Self::Called => "ok".into(),
            Self::Error(state) => format!("error {state}"),
        }
    }

    /// How much was given: an error gives nothing.
    pub fn amount(&self) -> i128 {
        match self {
            Self::Seen(n, _) => i128::from(*n),
            Self::Wrote(n) => i128::from(*n),
            Self::Called => 1,
            Self::Error(_) => 0,
        }
    }
}

/// Makes attempts on one connection.
pub struct Attempts<'a> {
    client: &'a Client,
    timeout_ms: u128,
}

/// How long an attempt waits for somebody's lock; then the user is tried again later.
const LOCK_TIMEOUT: &str = "500ms";

impl<'a> Attempts<'a> {
    /// On this connection, which does nothing else meanwhile.
    pub fn new(client: &'a Client, access: &Access) -> Self {
        Self { client, timeout_ms: access.statement_timeout.as_millis() }
    }

    /// Begins, as `actor` in the end; `first` are statements of the job that run as ourselves. One round trip as a rule.
    async fn begin(&self, level: &str, first: &[String], actor: &Actor) -> Result<()> {
        let mut begin = format!("begin isolation level {level}");
        for sql in first {
            begin.push_str(";\n");
            begin.push_str(sql);
        }
        begin.push_str(&format!(
            ";\nset local row_security = on; set local search_path to default; set local statement_timeout = {}; \
             set local lock_timeout = '{LOCK_TIMEOUT}'; set local synchronous_commit = off",
            self.timeout_ms
        ));
        let (names, values): (Vec<&str>, Vec<&str>) =
            actor.settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).unzip();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&names, Type::TEXT_ARRAY), (&values, Type::TEXT_ARRAY)];
        let become_role = format!("set local role {}", quote(&actor.role));
        let (begun, set, role) = tokio::join!(
            self.client.batch_execute(&begin),
            self.client.query_typed(
                "select pg_catalog.set_config(n, v, true) from unnest($1::text[], $2::text[]) as s(n, v)",
                &parameters,
            ),
            self.client.batch_execute(&become_role)
        );
        begun?;
        set?;
        role.map_err(|e| may_not_become(&actor.role, e))
    }

    async fn rollback(&self) -> Result<()> {
        Ok(self.client.batch_execute("rollback").await?)
    }

    async fn become_role(&self, role: &str) -> Result<()> {
        let set = format!("set local role {}", quote(role));
        self.client.batch_execute(&set).await.map_err(|e| may_not_become(role, e))
    }

    /// Tries a statement as `actor` and takes it back. `first`: statements of the job that run as ourselves before it.
    ///
    /// # Errors
    /// What says nothing about access: connections, locks, timeouts, and roles that cannot be assumed.
    pub async fn attempt(
        &self,
        actor: &Actor,
        first: &[String],
        sql: &str,
        params: &[&str],
        call: bool,
    ) -> Result<Gave> {
        if let Err(e) = self.begin("read committed", first, actor).await {
            self.rollback().await?;
            return Err(e);
        }
        let typed: Vec<(&(dyn ToSql + Sync), Type)> =
            params.iter().map(|p| (p as &(dyn ToSql + Sync), Type::TEXT)).collect();
        // Sent together: locks on the application's rows are held for one round trip. Constraints fire now, as they would
        // at a commit; after an error of the statement this one fails, too, and says nothing.
        let (done, constraints, back) = tokio::join!(
            self.client.execute_typed(sql, &typed),
            self.client.batch_execute("set constraints all immediate"),
            self.client.batch_execute("rollback")
        );
        let gave = match (done, constraints) {
            (Ok(_), Err(e)) | (Err(e), _) => result(Err(e), |()| Gave::Called),
            (Ok(n), Ok(())) => Ok(if call { Gave::Called } else { Gave::Wrote(n) }),
        };
        back?;
        gave
    }

    /// What two actors see, in one snapshot. When that differs, `buckets` and `keys` find out which rows: their keys, up to
    /// `limit` each.
    ///
    /// # Errors
    /// As [`Self::attempt`].
    pub async fn see(&self, old: &Actor, new: &Actor, sql: &Seeing<'_>, limit: i64) -> Result<Seen> {
        let tried = async {
            self.begin("repeatable read", &[], old).await?;
            self.client.batch_execute("reset role").await?;
            let before = self.look(&old.role, sql.visible).await?;
            let after = self.look(&new.role, sql.visible).await?;
            let mut seen = Seen { before, after, only_before: Vec::new(), only_after: Vec::new() };
            if let (Gave::Seen(..), Gave::Seen(..)) = (&seen.before, &seen.after)
                && seen.before != seen.after
            {
                let (a, b) = self.differing(old, new, sql, limit).await?;
                (seen.only_before, seen.only_after) = (a, b);
            }
            Ok(seen)
        };
        let seen = tried.await;
        self.rollback().await?;
        seen
    }

    async fn look(&self, role: &str, sql: &str) -> Result<Gave> {
        self.client.batch_execute("savepoint look").await?;
        self.become_role(role).await?;
        let row = self.client.query_typed_one(sql, &[]).await;
        self.client.batch_execute("rollback to savepoint look").await?;
        result(row, |r| Gave::Seen(r.get(0), r.get(1)))
    }

    async fn rows_as(
        &self,
        role: &str,
        sql: &str,
        params: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<tokio_postgres::Row>> {
        self.client.batch_execute("savepoint look").await?;
        self.become_role(role).await?;
        let rows = self.client.query_typed(sql, params).await?;
        self.client.batch_execute("rollback to savepoint look").await?;
        Ok(rows)
    }

    async fn differing(&self, old: &Actor, new: &Actor, sql: &Seeing<'_>, limit: i64) -> Result<(Keys, Keys)> {
        let mut buckets: std::collections::BTreeMap<i32, [(i64, i64); 2]> = std::collections::BTreeMap::new();
        for (i, actor) in [old, new].into_iter().enumerate() {
            for r in self.rows_as(&actor.role, sql.buckets, &[]).await? {
                buckets.entry(r.get(0)).or_default()[i] = (r.get(1), r.get(2));
            }
        }
        let (mut only_before, mut only_after) = (Vec::new(), Vec::new());
        // A few parts at a time, until there are enough keys: of a million rows a part has a thousand.
        let differing: Vec<i32> = buckets.into_iter().filter(|(_, [a, b])| a != b).map(|(n, _)| n).collect();
        for part in differing.chunks(16) {
            let part = part.to_vec();
            let most = 1_000_000i64;
            let params: [(&(dyn ToSql + Sync), Type); 2] = [(&part, Type::INT4_ARRAY), (&most, Type::INT8)];
            let mut sets = Vec::new();
            for actor in [old, new] {
                let rows = self.rows_as(&actor.role, sql.keys, &params).await?;
                let key = |r: &tokio_postgres::Row| (0..r.len()).map(|i| r.get::<_, String>(i)).collect::<Vec<_>>();
                sets.push(rows.iter().map(key).collect::<std::collections::BTreeSet<_>>());
            }
            only_before.extend(sets[0].difference(&sets[1]).cloned());
            only_after.extend(sets[1].difference(&sets[0]).cloned());
            let most = only_before.len().max(only_after.len());
            if most as i64 >= limit {
                break;
            }
        }
        only_before.truncate(limit.unsigned_abs() as usize);
        only_after.truncate(limit.unsigned_abs() as usize);
        Ok((only_before, only_after))
    }

    /// How many rows a statement sees as `actor`.
    ///
    /// # Errors
    /// As [`Self::attempt`]; an error of the statement counts as none.
    pub async fn count(&self, actor: &Actor, sql: &str, param: &str) -> Result<i64> {
        let tried = async {
            self.begin("read committed", &[], actor).await?;
            let rows = self.client.query_typed(sql, &[(&param, Type::TEXT)]).await;
            Ok(rows.ok().and_then(|r| r.first().map(|r| r.get(0))).unwrap_or(0))
        };
        let n = tried.await;
        self.rollback().await?;
        n
    }

    /// Runs `body` between `first` and a rollback, as ourselves.
    ///
    /// # Errors
    /// Database errors.
    pub async fn rehearse<T>(&self, first: &[String], body: impl AsyncFnOnce(&Client) -> Result<T>) -> Result<T> {
        let tried = async {
            self.client.batch_execute("begin").await?;
            if !first.is_empty() {
                self.client.batch_execute(&first.join(";\n")).await?;
            }
            body(self.client).await
        };
        let done = tried.await;
        self.rollback().await?;
        done
    }
}

/// Keys of rows.
pub type Keys = Vec<Vec<String>>;

/// The statements of [`Attempts::see`].
pub struct Seeing<'a> {
    /// Number and hash of what is visible.
    pub visible: &'a str,
    /// The same by parts.
    pub buckets: &'a str,
    /// Keys of some parts.
    pub keys: &'a str,
}

/// What [`Attempts::see`] found.
pub struct Seen {
    /// Visible before.
    pub before: Gave,
    /// Visible after.
    pub after: Gave,
    /// Keys of rows visible only before.
    pub only_before: Keys,
    /// Keys of rows visible only after.
    pub only_after: Keys,
}

fn may_not_become(role: &str, e: tokio_postgres::Error) -> Error {
    Error::from(e).context(format!("access: becoming {role}")).with_hint(format!(
        "this login must be a member of it: grant {role} to it; backfilld check prints the statement"
    ))
}

/// An error of the server is a result, unless it says nothing about access.
fn result<T>(done: Result<T, tokio_postgres::Error>, gave: impl FnOnce(T) -> Gave) -> Result<Gave> {
    match done {
        Ok(done) => Ok(gave(done)),
        Err(e) => {
            let e = Error::from(e);
            match e.sqlstate() {
                Some(state) if e.retry() == Retry::Never => Ok(Gave::Error(state.to_owned())),
                _ => Err(e),
            }
        }
    }
}
