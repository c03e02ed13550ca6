//! A job on a database of its own: facts, Expand, batches and proof, each with the statements that the daemon runs.

use std::collections::BTreeMap;

use backfilld::demo::sample::{APP_OWNER, DAEMON};
use backfilld::error::Error;
use backfilld::job::{JobSpec, load};
use backfilld::pg::connect::SESSION_SETTINGS;
use backfilld::plan::{Facts, batch_sql, steps, sync_sql};
use backfilld::verify::Proof;
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::support::{Session, Template, TestDb};

/// Isolation levels as `begin isolation level` writes them.
pub const LEVELS: [&str; 3] = ["read committed", "repeatable read", "serializable"];

/// Schema and job of a test, with a hand-written oracle.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Run by the application's owner in an empty database.
    pub schema: &'static str,
    /// `job.toml`.
    pub job: &'static str,
    /// The value of the first column, written independently of the job: a scalar expression over a target row `t`.
    pub oracle: &'static str,
}

/// Parents own kids; a foreign key says so; an owner may be NULL.
pub const OWNED: Case = Case {
    schema: "create table public.parents (id bigint primary key, owner text, note text);
        create table public.kids (id bigint primary key, parent_id bigint not null
          references public.parents on delete cascade on update cascade, body text);
        create index on public.kids (parent_id);
        insert into public.parents values (1, 'a'), (2, 'b'), (3, null);
        insert into public.kids values (1, 1, 'x'), (2, 2, 'x'), (3, 3, 'x'), (4, 1, 'x');",
    job: r#"name = "owned"
        target.table = "public.kids"
        [[source]]
        alias = "p"
        table = "public.parents"
        on = { id = "t.parent_id" }
        [[columns]]
        name = "owner"
        value = "p.owner""#,
    oracle: "(select p.owner from public.parents p where p.id = t.parent_id)",
};

/// No foreign key: a parent may be missing, come and go; the kid has a value of its own to fall back to.
pub const LOOSE: Case = Case {
    schema: "create table public.parents (id bigint primary key, owner text, note text);
        create table public.kids (id bigint primary key, parent_id bigint, body text, own text);
        create index on public.kids (parent_id);
        insert into public.parents values (1, 'a'), (2, 'b'), (3, null);
        insert into public.kids values
          (1, 1, 'x', null), (2, 2, 'x', null), (3, 3, 'x', 'mine'), (4, 9, 'x', 'mine'), (5, null, 'x', null);",
    job: r#"name = "loose"
        target.table = "public.kids"
        [[source]]
        alias = "p"
        table = "public.parents"
        on = { id = "t.parent_id" }
        join = "left"
        [[columns]]
        name = "owner"
        value = "coalesce(p.owner, t.own)""#,
    oracle: "coalesce((select p.owner from public.parents p where p.id = t.parent_id), t.own)",
};

/// Two hops: the value is the name of the account of the parent.
pub const CHAIN: Case = Case {
    schema: "create table public.accounts (id bigint primary key, name text);
        create table public.parents (id bigint primary key, account_id bigint not null references public.accounts);
        create table public.kids (id bigint primary key, parent_id bigint not null references public.parents, body text);
        create index on public.kids (parent_id);
        create index on public.parents (account_id);
        insert into public.accounts values (1, 'a'), (2, 'b'), (3, null);
        insert into public.parents values (1, 1), (2, 2), (3, 3);
        insert into public.kids values (1, 1, 'x'), (2, 2, 'x'), (3, 3, 'x'), (4, 1, 'x');",
    job: r#"name = "chain"
        target.table = "public.kids"
        [[source]]
        alias = "p"
        table = "public.parents"
        on = { id = "t.parent_id" }
        [[source]]
        alias = "a"
        table = "public.accounts"
        on = { id = "p.account_id" }
        [[columns]]
        name = "owner"
        value = "a.name""#,
    oracle: "(select a.name from public.parents p join public.accounts a on a.id = p.account_id where p.id = t.parent_id)",
};

/// A database with a job's tables, and perhaps its triggers.
pub struct Fixture {
    pub db: TestDb,
    pub spec: JobSpec,
    pub facts: Facts,
    pub admin: Client,
    proof: Client,
    oracle: String,
    schema: &'static str,
}

impl Fixture {
    /// Tables, triggers, and all rows filled; batches run as the dedicated login.
    pub async fn new(case: Case) -> Self {
        Self::with(case, true).await
    }

    /// As [`Self::new`]; `dedicated`: whether the daemon's login is exempt.
    pub async fn with(case: Case, dedicated: bool) -> Self {
        let f = Self::on(tables(case.schema).await, spec(case.job), case.oracle, dedicated).await;
        Self { schema: case.schema, ..f }
    }

    /// The rows as the case's schema made them, filled.
    pub async fn reset(&self) {
        let mut tables: Vec<&str> =
            self.schema.split("create table ").skip(1).filter_map(|s| s.split(' ').next()).collect();
        tables.dedup();
        let mut sql = format!("truncate {};", tables.join(", "));
        for row in self.schema.split(';').filter(|s| s.trim_start().starts_with("insert")) {
            // The column that Expand added is last and not in these lists.
            sql.push_str(row);
            sql.push(';');
        }
        self.sql(&sql).await;
    }

    /// As [`Self::with`], on tables that are there.
    pub async fn on(db: TestDb, spec: JobSpec, oracle: &str, dedicated: bool) -> Self {
        let facts = read(&db, &spec, dedicated).await.unwrap_or_else(|e| panic!("{}", e.render()));
        let admin = db.admin().await;
        let proof = db.client(DAEMON).await;
        proof.batch_execute(SESSION_SETTINGS).await.expect("settings");
        let fixture = Self { db, spec, facts, admin, proof, oracle: oracle.to_owned(), schema: "" };
        fixture.expand().await;
        fixture.sweep(100).await;
        fixture
    }

    /// Expand's statements in one transaction, as the daemon's login.
    async fn expand(&self) {
        let step = steps::expand(&self.spec, &self.facts, "2s");
        let client = self.db.client(DAEMON).await;
        let all = format!("{SESSION_SETTINGS} begin; {}; commit", step.sql.join(";\n"));
        client.batch_execute(&all).await.unwrap_or_else(|e| panic!("{all}\n{}", Error::from(e).render()));
    }

    pub async fn app(&self, name: &'static str) -> Session {
        self.db.session(name, APP_OWNER).await
    }

    /// Makes every row look as if nobody had been there since before Expand.
    pub async fn unfill(&self) {
        let target = self.facts.shape.target.sql();
        let mut sql = format!("alter table {target} disable trigger all;");
        for column in &self.facts.shape.columns {
            sql.push_str(&format!("update {target} set {} = null;", column.name.sql()));
        }
        sql.push_str(&format!("alter table {target} enable trigger all;"));
        for trigger in sync_sql::triggers(&self.facts.shape).iter().filter(|t| t.table == target) {
            sql.push_str(&sync_sql::enable_always(trigger));
            sql.push(';');
        }
        self.sql(&sql).await;
    }

    /// Runs statements as a superuser.
    pub async fn sql(&self, sql: &str) {
        self.admin.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}\n{}", Error::from(e).render()));
    }

    /// One value, as text, read as a superuser.
    pub async fn text(&self, sql: &str) -> Option<String> {
        let rows = self.admin.simple_query(sql).await.unwrap_or_else(|e| panic!("{sql}\n{}", Error::from(e).render()));
        values(&rows).into_iter().next().flatten()
    }

    /// The first column of the row with this `id`.
    pub async fn value(&self, id: i64) -> Option<String> {
        let shape = &self.facts.shape;
        self.text(&format!("select {} from {} where id = {id}", shape.columns[0].name.sql(), shape.target.sql())).await
    }

    /// What the proof finds, without the zeros.
    pub async fn findings(&self) -> BTreeMap<String, i64> {
        let verdict = Proof::new(&self.spec, &self.facts).run(&self.proof, async |_| Ok(())).await;
        let verdict = verdict.unwrap_or_else(|e| panic!("{}", e.render()));
        verdict.counts.into_iter().filter(|(_, n)| *n > 0).collect()
    }

    /// No row is stale: neither to the product's proof nor to the oracle. `unusable_sources`, `nulls` and `orphans` are
    /// properties of the data, not of the triggers.
    pub async fn assert_no_drift(&self, what: &str) {
        let mut found = self.findings().await;
        found.retain(|kind, _| !matches!(kind.as_str(), "unusable_sources" | "nulls" | "orphans"));
        let stale = self.stale().await;
        assert!(found.is_empty() && stale.is_none(), "{what}: {found:?}, stale: {stale:?}");
    }

    /// The rows whose value is not the oracle's.
    pub async fn stale(&self) -> Option<String> {
        let shape = &self.facts.shape;
        let sql = format!(
            "select string_agg(t::text, ' ') from {} t where t.{}::text is distinct from ({})::text",
            shape.target.sql(),
            shape.columns[0].name.sql(),
            self.oracle
        );
        self.text(&sql).await
    }

    /// A session that can run the statements of a batch one by one.
    pub async fn batch(&self, name: &'static str) -> BatchSession {
        let session = self.db.session(name, DAEMON).await;
        let shape = &self.facts.shape;
        let mut sql = format!("{SESSION_SETTINGS} set lock_timeout = 0; set enable_seqscan = off;");
        if self.facts.server_version >= 150_000 {
            sql.push_str("set session_replication_role = replica;");
        }
        for after in [false, true] {
            let range = batch_sql::key_range(shape, after);
            let n = usize::from(after);
            sql.push_str(&format!("prepare bound{n} as {};", batch_sql::bound(shape, after, true)));
            sql.push_str(&format!("prepare fill{n} as {};", batch_sql::fill(shape, &range)));
            if let Some(recheck) = batch_sql::recheck(shape, &range) {
                sql.push_str(&format!("prepare recheck{n} as {recheck};"));
            }
        }
        session.run(&sql).await;
        let has_recheck = batch_sql::recheck(shape, "true").is_some();
        let last_key = batch_sql::last_key(shape);
        BatchSession { session, has_recheck, last_key, cursor: None, upper: None, last: None }
    }

    /// Walks the whole table in batches.
    pub async fn sweep(&self, rows: u32) -> u64 {
        let mut batch = self.batch("sweep").await;
        let mut updated = 0;
        while let Some(n) = batch.step(rows).await {
            updated += n;
        }
        updated
    }
}

/// A database with `schema`, whose tables belong to the application's owner.
pub async fn tables(schema: &str) -> TestDb {
    let db = TestDb::new(Template::Empty).await;
    let sql = format!(
        "create extension citext; grant all on schema public to {APP_OWNER}; grant usage on schema public to public;
         grant create on database {} to {APP_OWNER}; set role {APP_OWNER}; {schema}; reset role",
        db.name()
    );
    let admin = db.admin().await;
    admin.batch_execute(&sql).await.unwrap_or_else(|e| panic!("{schema}\n{}", Error::from(e).render()));
    db
}

/// A job without files.
pub fn spec(job: &str) -> JobSpec {
    load::parse(job, "job.toml", |name| Err(Error::input(format!("no file {name}"))))
        .unwrap_or_else(|e| panic!("{job}\n{}", e.render()))
}

/// Reads the catalog as the daemon's login.
pub async fn read(db: &TestDb, spec: &JobSpec, dedicated: bool) -> backfilld::Result<Facts> {
    let client = db.client(DAEMON).await;
    client.batch_execute(SESSION_SETTINGS).await.expect("settings");
    Facts::read(&client, spec, dedicated).await
}

/// The first column of every row of the answers.
pub fn values(messages: &[SimpleQueryMessage]) -> Vec<Option<String>> {
    let row = |m: &SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
        _ => None,
    };
    messages.iter().filter_map(row).collect()
}

/// The statements of a batch on a session of the daemon's login, one by one, with their parameters in the text.
pub struct BatchSession {
    pub session: Session,
    has_recheck: bool,
    last_key: String,
    cursor: Option<Vec<String>>,
    upper: Option<Vec<String>>,
    last: Option<Vec<String>>,
}

impl BatchSession {
    /// `begin` and the range of the next batch; `false`: there is none.
    pub async fn begin(&mut self, rows: u32) -> bool {
        if self.upper.is_none() {
            self.upper = self.row(&self.last_key.clone()).await;
        }
        let Some(upper) = self.upper.clone() else { return false };
        self.session.run("begin").await;
        let parameters: Vec<String> = std::iter::once(rows.to_string())
            .chain(self.cursor.iter().flatten().map(|v| literal(v)))
            .chain(upper.iter().map(|v| literal(v)))
            .collect();
        let bound =
            self.row(&format!("execute bound{}({})", usize::from(self.cursor.is_some()), parameters.join(", "))).await;
        self.last = bound.map(|row| row[1..].to_vec());
        if self.last.is_none() {
            self.session.run("rollback").await;
        }
        self.last.is_some()
    }

    /// The statement that fills, for [`Session::send`].
    pub fn fill(&self) -> String {
        self.execute("fill")
    }

    /// What follows [`Self::fill`] until the end.
    pub async fn finish(&mut self) {
        if self.has_recheck {
            self.session.run(&self.execute("recheck")).await;
        }
        self.session.run("commit").await;
        self.cursor = self.last.take();
    }

    /// Begins a new sweep.
    pub fn rewind(&mut self) {
        (self.cursor, self.upper, self.last) = (None, None, None);
    }

    /// One whole batch; the number of rows filled, `None` at the end.
    pub async fn step(&mut self, rows: u32) -> Option<u64> {
        if !self.begin(rows).await {
            return None;
        }
        let fill = self.fill();
        self.session.send(&fill);
        let messages = self.session.finish_ok().await;
        self.finish().await;
        let count = messages.iter().find_map(|m| match m {
            SimpleQueryMessage::CommandComplete(n) => Some(*n),
            _ => None,
        });
        Some(count.unwrap_or_default())
    }

    fn execute(&self, name: &str) -> String {
        let last = self.last.iter().flatten();
        let parameters: Vec<String> = self.cursor.iter().flatten().chain(last).map(|v| literal(v)).collect();
        format!("execute {name}{}({})", usize::from(self.cursor.is_some()), parameters.join(", "))
    }

    async fn row(&self, sql: &str) -> Option<Vec<String>> {
        let messages = self.session.client().simple_query(sql).await;
        let messages = messages.unwrap_or_else(|e| panic!("{sql}: {}", Error::from(e).render()));
        messages.iter().find_map(|m| match m {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|i| row.get(i).expect("a key is not NULL").to_owned()).collect())
            }
            _ => None,
        })
    }
}

fn literal(value: &str) -> String {
    backfilld::pg::ident::literal(value)
}
