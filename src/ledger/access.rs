//! Runs of the access comparison and what each attempt gave.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value as Json;
use tokio_postgres::types::Type;
use tokio_postgres::{GenericClient, Row};

use super::verdict::ServerIdentity;
use crate::error::Result;
use crate::job::access::Accept;
use crate::pg::ident::Ident;

/// What a run holds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Basis {
    /// Hash of the job with its `[access]`.
    pub content_hash: String,
    /// Hash of policies, functions, triggers and roles.
    pub state_hash: String,
    /// The server.
    pub server: ServerIdentity,
}

/// One attempt of one user, before and after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The role.
    pub role: String,
    /// `user`, `stranger` or `nobody`.
    pub who: String,
    /// The user, empty for nobody.
    pub user_id: String,
    /// `select`, `insert`, `update`, `delete`, `call`, `execute`, or `policies` (does a policy apply to the role at all).
    pub command: String,
    /// Which attempt, such as `foreign parent`.
    pub attempt: String,
    /// What it gave before: `12 rows`, `1 row`, `error 42501`, `ok`.
    pub before: String,
    /// What it gave after.
    pub after: String,
    /// `same`, `accepted` or `different`.
    pub verdict: String,
    /// `wider`, `narrower`, `other`; empty if the same.
    pub effect: String,
    /// Keys seen only before.
    pub only_before: Vec<Vec<String>>,
    /// Keys seen only after.
    pub only_after: Vec<Vec<String>>,
    /// Why; for an accepted difference the job's reason.
    pub cause: String,
}

/// A run, as `status` and `report` show it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Number of the run.
    pub id: i64,
    /// `before` or `after` the flip.
    pub stage: String,
    /// `None`: not finished.
    pub passed: Option<bool>,
    /// Users compared by sets; `None`: not made.
    pub set_users: Option<i64>,
    /// Pairs of user and row seen by sets.
    pub set_rows: Option<i64>,
    /// How long that took, in milliseconds.
    pub set_ms: Option<i64>,
    /// Users compared as enforced, over all roles.
    pub users: i64,
    /// Attempts made twice.
    pub attempts: i64,
    /// Differences that are not accepted.
    pub differences: i64,
    /// Differences that the job accepts.
    pub accepted: i64,
    /// What was left out, and why.
    pub notes: Vec<String>,
    /// When it began, UTC.
    pub started_at: String,
    /// How long it took, in milliseconds; so far, if it is not finished.
    pub duration_ms: i64,
}

/// Goes on with the newest run if it is unfinished and on the same basis, else begins one. Gives its number.
///
/// # Errors
/// Whatever the server says.
pub async fn begin(client: &impl GenericClient, job: &str, stage: &str, basis: &Basis) -> Result<i64> {
    let open = client
        .query_opt(
            "select id from (select * from backfilld.access_run where job = $1 order by id desc limit 1) r
             where r.stage = $2 and r.passed is null and r.content_hash = $3 and r.state_hash = $4
               and r.system_identifier = $5 and r.timeline = $6",
            &[
                &job,
                &stage,
                &basis.content_hash,
                &basis.state_hash,
                &basis.server.system_identifier,
                &basis.server.timeline,
            ],
        )
        .await?;
    if let Some(row) = open {
        return Ok(row.get(0));
    }
    let row = client
        .query_one(
            "insert into backfilld.access_run (job, stage, content_hash, state_hash, system_identifier, timeline)
             values ($1, $2, $3, $4, $5, $6) returning id",
            &[
                &job,
                &stage,
                &basis.content_hash,
                &basis.state_hash,
                &basis.server.system_identifier,
                &basis.server.timeline,
            ],
        )
        .await?;
    Ok(row.get(0))
}

/// Who has been compared in a run: role, who, user.
///
/// # Errors
/// Whatever the server says.
pub async fn done(client: &impl GenericClient, run: i64) -> Result<BTreeSet<(String, String, String)>> {
    let rows =
        client.query("select distinct role, who, user_id from backfilld.access_result where run = $1", &[&run]).await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1), r.get(2))).collect())
}

/// Stores what one user's attempts gave.
///
/// # Errors
/// Whatever the server says.
pub async fn store(client: &impl GenericClient, run: i64, outcomes: &[Outcome]) -> Result<()> {
    let json = serde_json::to_value(outcomes).unwrap_or_default();
    client
        .execute(
            "insert into backfilld.access_result (run, role, who, user_id, command, attempt, before, after, verdict, effect,
                                                  only_before, only_after, cause)
             select $1, o.role, o.who, o.user_id, o.command, o.attempt, o.before, o.after, o.verdict, o.effect,
                    o.only_before, o.only_after, o.cause
             from jsonb_to_recordset($2::jsonb) as o(role text, who text, user_id text, command text, attempt text,
               before text, after text, verdict text, effect text, only_before jsonb, only_after jsonb, cause text)
             on conflict do nothing",
            &[&run, &json],
        )
        .await?;
    Ok(())
}

/// Stores the comparison by sets.
///
/// # Errors
/// Whatever the server says.
pub async fn store_sets(client: &impl GenericClient, run: i64, users: i64, rows: i64, duration_ms: i64) -> Result<()> {
    client
        .execute(
            "update backfilld.access_run set set_users = $2, set_rows = $3, set_ms = $4 where id = $1",
            &[&run, &users, &rows, &duration_ms],
        )
        .await?;
    Ok(())
}

/// Ends a run. It passes if no difference is left that is not accepted. Gives whether it did.
///
/// # Errors
/// Whatever the server says.
pub async fn finish(client: &impl GenericClient, run: i64, complete: bool, notes: &[String]) -> Result<bool> {
    let notes = serde_json::to_value(notes).unwrap_or_default();
    let row = client
        .query_one(
            "update backfilld.access_run r set finished_at = clock_timestamp(), notes = $3,
               passed = $2 and not exists (select from backfilld.access_result x where x.run = r.id and x.verdict = 'different')
             where r.id = $1 returning r.passed",
            &[&run, &complete, &notes],
        )
        .await?;
    Ok(row.get(0))
}

/// How often a run tried what a job accepts as a difference, where it could have differed so, and how often it did.
///
/// # Errors
/// Whatever the server says.
pub async fn accepted(client: &impl GenericClient, run: i64, accept: &Accept) -> Result<(i64, i64)> {
    let role = accept.role.as_ref().map(Ident::as_str);
    let row = client
        .query_one(
            "select count(*), count(*) filter (where verdict = 'accepted' and effect = $5)
             from backfilld.access_result where run = $1 and command = $2 and ($3::text is null or role = $3)
               and ($4::text is null or attempt = $4 or starts_with(attempt, $4 || ', '))
               -- where the old function failed anyway, nothing could become narrower; where it did not, nothing wider
               and ($5 = 'other' or (before like 'error%' or before = 'refused') = ($5 = 'wider'))",
            &[&run, &accept.command.as_str(), &role, &accept.attempt, &accept.effect.as_str()],
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}

/// Whether the newest run of a job is of this stage, passed, and holds on this basis.
///
/// # Errors
/// Whatever the server says.
pub async fn holds(client: &impl GenericClient, job: &str, stage: &str, basis: &Basis) -> Result<bool> {
    let row = client
        .query_opt(
            "select coalesce(passed, false) and stage = $2 and content_hash = $3 and state_hash = $4
                    and system_identifier = $5 and timeline = $6
             from backfilld.access_run where job = $1 order by id desc limit 1",
            &[
                &job,
                &stage,
                &basis.content_hash,
                &basis.state_hash,
                &basis.server.system_identifier,
                &basis.server.timeline,
            ],
        )
        .await?;
    Ok(row.is_some_and(|r| r.get(0)))
}

/// The newest run of a job, of a stage if one is given.
///
/// # Errors
/// Whatever the server says.
pub async fn latest(client: &impl GenericClient, job: &str, stage: Option<&str>) -> Result<Option<Run>> {
    let row = client
        .query_opt(
            "select r.id, r.stage, r.passed, r.set_users, r.set_rows, r.set_ms,
                    count(distinct (x.role, x.who, x.user_id)) filter (where x.run is not null),
                    count(x.run), count(*) filter (where x.verdict = 'different'),
                    count(*) filter (where x.verdict = 'accepted'), r.notes, r.started_at::text,
                    (extract(epoch from coalesce(r.finished_at, clock_timestamp()) - r.started_at) * 1000)::int8
             from backfilld.access_run r left join backfilld.access_result x on x.run = r.id
             where r.job = $1 and ($2::text is null or r.stage = $2)
             group by r.id order by r.id desc limit 1",
            &[&job, &stage],
        )
        .await?;
    Ok(row.map(|r| Run {
        id: r.get(0),
        stage: r.get(1),
        passed: r.get(2),
        set_users: r.get(3),
        set_rows: r.get(4),
        set_ms: r.get(5),
        users: r.get(6),
        attempts: r.get(7),
        differences: r.get(8),
        accepted: r.get(9),
        notes: serde_json::from_value(r.get(10)).unwrap_or_default(),
        started_at: r.get(11),
        duration_ms: r.get(12),
    }))
}

/// What a run's attempts gave; `only_differences` leaves out what is the same.
///
/// # Errors
/// Whatever the server says.
pub async fn outcomes(
    client: &impl GenericClient,
    run: i64,
    only_differences: bool,
    limit: i64,
) -> Result<Vec<Outcome>> {
    let rows = client
        .query(
            "select role, who, user_id, command, attempt, before, after, verdict, effect, only_before, only_after, cause
             from backfilld.access_result where run = $1 and (not $2 or verdict <> 'same')
             order by verdict = 'same', verdict = 'accepted', role, who, user_id, command, attempt limit $3",
            &[&run, &only_differences, &limit],
        )
        .await?;
    Ok(rows.iter().map(outcome).collect())
}

fn outcome(r: &Row) -> Outcome {
    let keys = |i: usize| serde_json::from_value(r.get::<_, Json>(i)).unwrap_or_default();
    Outcome {
        role: r.get(0),
        who: r.get(1),
        user_id: r.get(2),
        command: r.get(3),
        attempt: r.get(4),
        before: r.get(5),
        after: r.get(6),
        verdict: r.get(7),
        effect: r.get(8),
        only_before: keys(9),
        only_after: keys(10),
        cause: r.get(11),
    }
}

impl Outcome {
    /// The role and whom it acts for: `authenticated for user 1234`.
    pub fn actor(&self) -> String {
        match self.who.as_str() {
            "nobody" => format!("{} without a user", self.role),
            "stranger" => format!("{} for a stranger", self.role),
            _ if self.user_id.is_empty() => format!("{} for all users", self.role),
            _ => format!("{} for user {}", self.role, self.user_id),
        }
    }

    /// One line for the log and the terminal.
    pub fn line(&self) -> String {
        let list = |name: &str, keys: &[Vec<String>]| {
            let shown: Vec<String> = keys.iter().take(3).map(|k| k.join(",")).collect();
            if shown.is_empty() { String::new() } else { format!("; only {name}, such as key {}", shown.join(" | ")) }
        };
        format!(
            "{}: {} {}: {} before, {} after{}{}: {}",
            self.actor(),
            self.command,
            self.attempt,
            self.before,
            self.after,
            list("before", &self.only_before),
            list("after", &self.only_after),
            self.cause
        )
    }
}

/// Something that a comparison made and has to drop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Its kind in `backfilld.object`.
    pub kind: &'static str,
    /// Its name.
    pub ident: String,
}

/// Notes what was made, in one round trip: it runs under a strong lock.
///
/// # Errors
/// Whatever the server says.
pub async fn note(client: &impl GenericClient, job: &str, made: &[Made]) -> Result<()> {
    let kinds: Vec<&str> = made.iter().map(|m| m.kind).collect();
    let idents: Vec<&str> = made.iter().map(|m| m.ident.as_str()).collect();
    client
        .execute_typed(
            "insert into backfilld.object (job, kind, ident) select $1, k, i from unnest($2::text[], $3::text[]) as x(k, i)
             on conflict do nothing",
            &[(&job, Type::TEXT), (&kinds, Type::TEXT_ARRAY), (&idents, Type::TEXT_ARRAY)],
        )
        .await?;
    Ok(())
}

/// What is noted, as kind and name.
///
/// # Errors
/// Whatever the server says.
pub async fn made(client: &impl GenericClient, job: &str, kinds: &[&str]) -> Result<Vec<(String, String)>> {
    let rows = client
        .query(
            "select kind, ident from backfilld.object where job = $1 and kind = any ($2) order by 1, 2",
            &[&job, &kinds],
        )
        .await?;
    Ok(rows.iter().map(|r| (r.get(0), r.get(1))).collect())
}
