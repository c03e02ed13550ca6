//! Who there is, and for whom policies are tried as the server enforces them.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::rules::{Kind, Role};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::access::Access;
use crate::plan::access_sql;
use crate::plan::verify_sql;

/// Most users that are read: beyond, the list is cut, and the run says so.
pub const MOST_USERS: usize = 1_000_000;
/// Users with the most rows who are always tried.
const LARGEST: usize = 3;
/// Users without rows who are always tried.
const WITHOUT_ROWS: usize = 2;
/// Most users that differ by sets who are tried: where more differ, nobody needs another example.
pub const MOST_TOUCHED: usize = 200;

/// A target row for attempts. The JSON text holds values: it goes back to the server and nowhere else.
#[derive(Clone)]
pub struct TargetRow {
    /// Its key, as text.
    pub key: Vec<String>,
    /// Its owner: the job's first column.
    pub owner: Option<String>,
    /// The columns by which it finds its source rows.
    pub joins: Vec<Option<String>>,
    /// The whole row.
    pub json: String,
}

/// The users and what they own.
pub struct People {
    /// All users, sorted.
    pub all: Vec<String>,
    /// There are more.
    pub cut: bool,
    /// By owner: number of rows, and where one is.
    pub owners: BTreeMap<String, (i64, String)>,
}

impl People {
    /// Reads them, page range by page range.
    ///
    /// # Errors
    /// Database errors; input errors for the job's own query.
    pub async fn read(ctx: &Context, client: &Client, access: &Access) -> Result<Self> {
        let mut all = BTreeSet::new();
        match &access.users {
            Some(query) => all.extend(list(client, query).await.map_err(|e| e.context("access.users").into_input())?),
            None => {
                let paths = std::iter::once(&ctx.facts.shape).chain(&ctx.facts.agree);
                let referenced = access_sql::referenced_values(&ctx.facts.shape, &ctx.spec.foreign_keys);
                for sql in paths.filter_map(access_sql::distinct_values).chain(referenced) {
                    all.extend(list(client, &sql).await?);
                }
            }
        }
        let owners = owners(ctx, client).await?;
        let cut = all.len() > MOST_USERS;
        Ok(Self { all: all.into_iter().take(MOST_USERS).collect(), cut, owners })
    }

    /// Whom to try, in order: those that `touched` names, the largest owners, some without rows, and others by the hash of
    /// their names, so that it is the same ones each time.
    pub fn sample(&self, touched: &BTreeSet<String>, n: usize) -> Vec<String> {
        let mut out: Vec<String> = touched.iter().take(MOST_TOUCHED).cloned().collect();
        let mut add = |user: &String| {
            if !out.contains(user) {
                out.push(user.clone());
            }
        };
        let mut largest: Vec<(&String, i64)> = self.owners.iter().map(|(user, o)| (user, o.0)).collect();
        largest.sort_by_key(|(user, rows)| (-rows, (*user).clone()));
        largest.iter().take(LARGEST).for_each(|(user, _)| add(user));
        self.all.iter().filter(|u| !self.owners.contains_key(*u)).take(WITHOUT_ROWS).for_each(&mut add);
        let mut others: Vec<([u8; 8], &String)> = self
            .all
            .iter()
            .map(|u| (Sha256::digest(u.as_bytes()).first_chunk::<8>().copied().unwrap_or_default(), u))
            .collect();
        others.sort_unstable();
        for (_, user) in others {
            if out.len() >= n.max(touched.len().min(MOST_TOUCHED)) {
                break;
            }
            if !out.contains(user) {
                out.push(user.clone());
            }
        }
        out
    }

    /// A row of the user's own, if there is one.
    ///
    /// # Errors
    /// Database errors.
    pub async fn own_row(&self, ctx: &Context, client: &Client, user: &str) -> Result<Option<TargetRow>> {
        let Some((_, at)) = self.owners.get(user) else { return Ok(None) };
        let shape = &ctx.facts.shape;
        let text = |s: &str| s.to_owned();
        let (at, user) = (text(at), text(user));
        let found = client.query_typed(&access_sql::row_at(shape), &[(&at, Type::TEXT), (&user, Type::TEXT)]).await?;
        if let Some(row) = found.first() {
            return Ok(Some(target_row(row)));
        }
        // It has moved meanwhile.
        let found = client.query_typed(&access_sql::row_of(shape, true), &[(&user, Type::TEXT)]).await?;
        Ok(found.first().map(target_row))
    }

    /// A row of somebody else: of the largest owner who is not `user`.
    ///
    /// # Errors
    /// Database errors.
    pub async fn foreign_row(&self, ctx: &Context, client: &Client, user: Option<&str>) -> Result<Option<TargetRow>> {
        let others = self.owners.iter().filter(|(owner, _)| Some(owner.as_str()) != user);
        let Some((owner, _)) = others.max_by_key(|(owner, o)| (o.0, std::cmp::Reverse((*owner).clone()))) else {
            return Ok(None);
        };
        self.own_row(ctx, client, owner).await
    }
}

fn target_row(r: &Row) -> TargetRow {
    TargetRow { key: r.get(0), owner: r.get(1), joins: r.get(2), json: r.get(3) }
}

async fn list(client: &Client, query: &str) -> Result<Vec<String>> {
    let limited = format!("select x.v::text from ({query}) as x(v) where x.v is not null limit {}", MOST_USERS + 1);
    Ok(client.query_typed(&limited, &[]).await?.iter().map(|r| r.get(0)).collect())
}

async fn owners(ctx: &Context, client: &Client) -> Result<BTreeMap<String, (i64, String)>> {
    let mut out: BTreeMap<String, (i64, String)> = BTreeMap::new();
    let mut stopped: Result<()> = Ok(());
    for_each_range(ctx, client, async |low, high| {
        let sql = access_sql::owners(&ctx.facts.shape, &verify_sql::page_range(low, high));
        for r in client.query_typed(&sql, &[]).await? {
            let entry = out.entry(r.get(0)).or_insert_with(|| (0, r.get(2)));
            entry.0 += r.get::<_, i64>(1);
        }
        stopped = ctx.check();
        Ok(stopped.is_ok())
    })
    .await?;
    stopped.map(|()| out)
}

/// Goes through the target's pages; the last range has no end. Stops when `body` says false.
///
/// # Errors
/// Database errors, and what `body` returns.
pub async fn for_each_range(
    ctx: &Context,
    client: &Client,
    mut body: impl AsyncFnMut(u64, Option<u64>) -> Result<bool>,
) -> Result<()> {
    let pages: i64 = client
        .query_one(
            "select pg_relation_size(to_regclass($1)) / current_setting('block_size')::int8",
            &[&ctx.spec.target.table.sql()],
        )
        .await?
        .get(0);
    let step = u64::from(ctx.spec.verification.chunk_pages);
    let mut low = 0;
    loop {
        let high = low + step;
        let last = high >= pages.unsigned_abs();
        if !body(low, (!last).then_some(high)).await? || last {
            return Ok(());
        }
        low = high;
    }
}

/// A user that does not exist: the same for each run, of the type of the job's first column.
///
/// # Errors
/// Database errors.
pub async fn stranger(ctx: &Context, client: &Client, people: &People) -> Result<Option<String>> {
    let sql_type = ctx.facts.shape.columns.first().map_or("text", |c| c.sql_type.as_str());
    let candidates = ["57a6e200-0000-4000-8000-000000000000", "-1", "2147483646", "nobody-of-this-name"];
    for candidate in candidates {
        if people.all.iter().any(|u| u == candidate) {
            continue;
        }
        let fits =
            client.query_typed(&format!("select ($1::text::{sql_type})::text"), &[(&candidate, Type::TEXT)]).await;
        match fits.map_err(Error::from) {
            Ok(_) => return Ok(Some(candidate.to_owned())),
            Err(e) if e.sqlstate().is_some_and(|s| s.starts_with("22") || s.starts_with("23")) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// For whom a role is tried.
pub fn people_of(role: &Role, sample: &[String], stranger: Option<&String>) -> Vec<(&'static str, Option<String>)> {
    let mut out = vec![("nobody", None)];
    if role.kind == Kind::User {
        out.extend(sample.iter().map(|u| ("user", Some(u.clone()))));
        out.extend(stranger.map(|u| ("stranger", Some(u.clone()))));
    }
    out
}
