//! All users at once: the policies as sets. They say who may differ; what the server enforces says who does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::rules::{Kind, Rules};
use super::users::{self, People};
use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::job::access::Access;
use crate::plan::access_sets::{self, Way};
use crate::plan::access_sql;

/// Planner cost beyond which a comparison by sets is no longer cheap. A unit is a few microseconds: some minutes.
const MOST_COST: f64 = 3e7;
/// Users per statement at first, where it goes by users.
const FIRST_USERS: usize = 50;
/// How long such a statement should take, in milliseconds: short snapshots.
const TARGET_MS: u128 = 1000;

/// What users see: number of rows and hash of their keys.
type Seen = BTreeMap<String, (i64, i64)>;

/// What came of it.
#[derive(Debug, Default)]
pub struct Sets {
    /// Users compared.
    pub users: i64,
    /// Pairs of user and row under the old policies.
    pub rows: i64,
    /// How long it took.
    pub duration_ms: i64,
    /// Users who see other rows, or may write others.
    pub differing: BTreeSet<String>,
    /// What writes differ in.
    pub writes: Vec<Differing>,
    /// Why it was not made.
    pub not_made: Option<String>,
    /// Users were seen to differ, and it could not be told whether they do: why.
    pub undecided: Vec<String>,
}

/// A command for which policies let other rows through.
#[derive(Debug)]
pub struct Differing {
    /// The role.
    pub role: String,
    /// The command's keyword.
    pub command: &'static str,
    /// Rows as they are written (WITH CHECK), not rows that are there (USING).
    pub written: bool,
    /// Rows let through before and after, over all users.
    pub rows: [i64; 2],
    /// Users with other rows than before.
    pub users: Vec<String>,
}

/// Compares for each role that acts for users, each command, and rows that are there and that are written: those of the table
/// stand for both. What one UPDATE or DELETE with a condition does is also bounded by the policies for SELECT, one without
/// is not, and nobody tries that on a whole table; so for writes this is the proof, but for what [`hidden`] names.
///
/// # Errors
/// Database errors, interrupted.
pub async fn compare(ctx: &Context, client: &Client, access: &Access, rules: &Rules, people: &People) -> Result<Sets> {
    let began = Instant::now();
    let mut out = Sets { users: people.all.len() as i64, ..Sets::default() };
    let Some(user) = &access.user else {
        out.not_made = Some("access.user does not say by which expression policies know the user".into());
        return Ok(out);
    };
    'pairs: for ((old, new), of) in cases(rules) {
        let mut sides = Vec::new();
        for (which, condition) in [("old", &old), ("new", &new)] {
            let seen = match access_sets::bind_user(condition, user) {
                Ok(bound) => one(ctx, client, access, &bound, people).await?,
                Err(why) => Err(why),
            };
            match seen {
                Ok(seen) => sides.push(seen),
                Err(why) => {
                    // Another pair may be fit for it.
                    let why = format!("the {which} policies for {}: {why}", of[0].1);
                    out.not_made = Some(out.not_made.map_or(why.clone(), |before| format!("{before}; {why}")));
                    continue 'pairs;
                }
            }
        }
        let (seen_before, seen_after) = (&sides[0], &sides[1]);
        if of.iter().any(|c| c.1 == "select") {
            out.rows = seen_before.values().map(|s| s.0).sum();
        }
        // The application goes on between one side and the other, so these users may differ.
        let candidates: Vec<String> = seen_before
            .keys()
            .chain(seen_after.keys())
            .filter(|u| seen_before.get(*u) != seen_after.get(*u))
            .cloned()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let bound = [&old, &new].map(|condition| access_sets::bind_user(condition, user).unwrap_or_default());
        match at_once(ctx, client, &bound, &candidates).await {
            Ok((users, rows)) if !users.is_empty() => {
                for (role, command, written) in of.into_iter().filter(|c| c.1 != "select") {
                    out.writes.push(Differing { role, command, written, rows, users: users.clone() });
                }
                out.differing.extend(users);
            }
            Ok(_) => {}
            Err(e) if e.sqlstate().is_some() && e.retry() == Retry::Never || e.sqlstate() == Some("57014") => {
                ctx.check()?;
                let why =
                    format!("{} users who may differ in {}: {}", candidates.len(), of[0].1, e.line_without_values());
                out.undecided.push(why);
            }
            Err(e) => return Err(e),
        }
    }
    out.duration_ms = began.elapsed().as_millis() as i64;
    Ok(out)
}

/// Tables that the target's policies read and that have row level security: as enforced, a policy sees of them what its user may see;
/// by sets it sees everything.
///
/// # Errors
/// Database errors.
pub async fn hidden(ctx: &Context, client: &Client) -> Result<Vec<String>> {
    let rows = client
        .query(
            "select distinct c.oid::regclass::text from pg_policy p
             join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = p.oid and d.refclassid = 'pg_class'::regclass
             join pg_class c on c.oid = d.refobjid
             where p.polrelid = to_regclass($1) and c.oid <> p.polrelid and c.relrowsecurity order by 1",
            &[&ctx.spec.target.table.sql()],
        )
        .await?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}

/// Those of `candidates` for whom both conditions differ in one snapshot, and the rows of these users under each. The snapshot is
/// that of one statement for some users; what every commit leaves is whole (I1), so nobody differs in it by being between two.
async fn at_once(
    ctx: &Context,
    client: &Client,
    conditions: &[String; 2],
    candidates: &[String],
) -> Result<(Vec<String>, [i64; 2])> {
    let [old, new] = conditions.each_ref().map(|c| access_sets::seen(&ctx.facts.shape, c, Way::Users, "true"));
    let sql = access_sets::differing(&old, &new);
    let (mut users, mut rows) = (Vec::new(), [0, 0]);
    let (mut at, mut size) = (0, 1);
    while at < candidates.len() {
        ctx.check()?;
        let part = &candidates[at..candidates.len().min(at + size)];
        let began = Instant::now();
        for r in client.query_typed(&sql, &[(&part, Type::TEXT_ARRAY)]).await? {
            users.push(r.get(0));
            rows = [rows[0] + r.get::<_, i64>(1), rows[1] + r.get::<_, i64>(2)];
        }
        at += part.len();
        let took = began.elapsed().as_millis().max(1);
        let fits = (part.len() as u128 * TARGET_MS / took) as usize;
        size = fits.clamp(1, size * 4);
        ctx.progress.update(|p| p.note = format!("comparing access, {at} of {} users again", candidates.len()));
    }
    Ok((users, rows))
}

/// What a pair of conditions is for: role, command, whether for rows as written.
type Case = (String, &'static str, bool);

/// Old and new condition, where they are not the same text, with what they are for.
fn cases(rules: &Rules) -> BTreeMap<(String, String), Vec<Case>> {
    let mut out: BTreeMap<(String, String), Vec<Case>> = BTreeMap::new();
    for role in rules.roles.iter().filter(|r| r.kind == Kind::User && !r.bypasses) {
        let (before, after) = (rules.of(&rules.before, role), rules.of(&rules.after, role));
        for (code, keyword) in access_sql::COMMANDS {
            for written in [false, true] {
                // USING decides about rows that are there, WITH CHECK about those that are written.
                if (code == "a" && !written) || (written && matches!(code, "r" | "d")) {
                    continue;
                }
                let [old, new] = [&before, &after].map(|of| access_sql::condition(of, code, written));
                if old != new {
                    out.entry((old, new)).or_default().push((role.name.clone(), keyword, written));
                }
            }
        }
    }
    out
}

/// What all users see under one condition; or why that is too expensive to ask.
async fn one(
    ctx: &Context,
    client: &Client,
    access: &Access,
    condition: &str,
    people: &People,
) -> Result<Result<Seen, String>> {
    let shape = &ctx.facts.shape;
    let all = access_sets::pages(&shape.target, 0, None);
    let mut ways = Vec::new();
    for way in [Way::Rows, Way::Users] {
        match cost(client, &access_sets::seen(shape, condition, way, &all), &people.all).await {
            Ok(cost) => ways.push((cost, way)),
            Err(e) if e.sqlstate().is_some() && e.retry() == Retry::Never => return Ok(Err(e.line())),
            Err(e) => return Err(e),
        }
    }
    ways.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (cost, way) = ways[0];
    if cost > MOST_COST {
        return Ok(Err(format!(
            "the planner expects a cost of {cost:.0}; an index on what they join by may be missing"
        )));
    }
    let seen = match way {
        Way::Rows => by_rows(ctx, client, condition, people).await,
        Way::Users => by_users(ctx, client, condition, people).await,
    };
    match seen {
        Ok(seen) => Ok(Ok(seen)),
        // statement_timeout: the planner was wrong. Anything else the server says about the operator's expression is a reason, too.
        Err(e) if e.sqlstate() == Some("57014") => {
            ctx.check()?;
            let limit = humantime::format_duration(access.statement_timeout);
            Ok(Err(format!("a statement took longer than access.statement_timeout = {limit}")))
        }
        Err(e) if e.sqlstate().is_some() && e.retry() == Retry::Never => Ok(Err(e.line())),
        Err(e) => Err(e),
    }
}

async fn cost(client: &Client, sql: &str, users: &[String]) -> Result<f64> {
    let row = client.query_typed_one(&format!("explain (format json) {sql}"), &[(&users, Type::TEXT_ARRAY)]).await?;
    let plan: serde_json::Value = row.get(0);
    plan[0]["Plan"]["Total Cost"].as_f64().ok_or_else(|| Error::internal("a plan without cost"))
}

async fn by_rows(ctx: &Context, client: &Client, condition: &str, people: &People) -> Result<Seen> {
    let shape = &ctx.facts.shape;
    let mut out = Seen::new();
    users::for_each_range(ctx, client, async |low, high| {
        ctx.check()?;
        let sql = access_sets::seen(shape, condition, Way::Rows, &access_sets::pages(&shape.target, low, high));
        for r in client.query_typed(&sql, &[(&people.all, Type::TEXT_ARRAY)]).await? {
            let entry = out.entry(r.get(0)).or_default();
            *entry = (entry.0 + r.get::<_, i64>(1), entry.1 ^ r.get::<_, i64>(2));
        }
        Ok(true)
    })
    .await?;
    Ok(out)
}

async fn by_users(ctx: &Context, client: &Client, condition: &str, people: &People) -> Result<Seen> {
    let sql = access_sets::seen(&ctx.facts.shape, condition, Way::Users, "true");
    let mut out = Seen::new();
    let (mut at, mut size) = (0, FIRST_USERS);
    while at < people.all.len() {
        ctx.check()?;
        let part = &people.all[at..people.all.len().min(at + size)];
        let began = Instant::now();
        for r in client.query_typed(&sql, &[(&part, Type::TEXT_ARRAY)]).await? {
            out.insert(r.get(0), (r.get(1), r.get(2)));
        }
        at += part.len();
        let took = began.elapsed().as_millis().max(1);
        let fits = (part.len() as u128 * TARGET_MS / took) as usize;
        size = fits.clamp(1, size * 4);
        ctx.progress.update(|p| p.note = format!("comparing access, {at} of {} users by sets", people.all.len()));
    }
    Ok(out)
}
