//! Roles that stand in for the job's: they have the same rights, and see what other policies allow. Made and dropped
//! through `ddl.rs`; what was made is noted in the same transaction, so that whoever comes next finds and drops it.

use sha2::{Digest, Sha256};
use tokio_postgres::Client;

use crate::context::Context;
use crate::ddl::{self, Change, Strength};
use crate::error::{Error, Result};
use crate::ledger::access::{self as ledger, Made};
use crate::ledger::objects;
use crate::pg::connect::Session;
use crate::plan::access_sql::{self, Rule};
use crate::plan::steps::quote;

/// Kind of our roles in `backfilld.object`.
pub const ROLE: &str = "probe_role";
/// Kind of their policies.
pub const POLICY: &str = "probe_policy";

/// A stand-in to make.
pub struct Wanted<'a> {
    /// For this role.
    pub role: &'a str,
    /// What it shall be allowed.
    pub rules: Vec<&'a Rule>,
}

/// Name of the stand-in number `n` of a job: roles belong to the whole server, so the database is part of it.
///
/// # Errors
/// Database errors.
pub async fn name(client: &Client, job: &str, n: usize) -> Result<String> {
    let oid: u32 =
        client.query_one("select oid from pg_database where datname = current_database()", &[]).await?.get(0);
    let digest = Sha256::digest(job.as_bytes());
    Ok(format!("backfilld_probe_{oid}_{:02x}{:02x}{:02x}{:02x}_{n}", digest[0], digest[1], digest[2], digest[3]))
}

/// Makes a stand-in for each role. A role of that name which is there already, and is no work of ours, is used if it has the
/// rights: an administrator made it for us.
///
/// # Errors
/// Refused, with the statements that an administrator can run, if roles may not be made; DDL errors.
pub async fn create(ctx: &Context, session: &mut Session, wanted: &[Wanted<'_>]) -> Result<Vec<String>> {
    drop_all(ctx, session).await?;
    let target = ctx.spec.target.table.sql();
    let (mut prelude, mut policies, mut made, mut names) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (n, w) in wanted.iter().enumerate() {
        let name = name(&session.client, ctx.job(), n).await?;
        let there = session
            .client
            .query_opt(
                "select pg_has_role(oid, $2, 'USAGE') and pg_has_role(session_user, oid, 'MEMBER') from pg_roles where rolname = $1",
                &[&name, &w.role],
            )
            .await?;
        match there.map(|r| r.get::<_, bool>(0)) {
            Some(true) => {}
            Some(false) => return Err(may_not(&name, w.role, "it is there and lacks a right")),
            None => {
                prelude.push(format!("create role {} nologin inherit", quote(&name)));
                prelude.push(format!("grant {} to {}", quote(w.role), quote(&name)));
                prelude.push(format!("grant {} to session_user", quote(&name)));
                made.push(Made { kind: ROLE, ident: name.clone() });
            }
        }
        for (policy, sql) in access_sql::probe_policies(&target, &name, &w.rules) {
            made.push(Made { kind: POLICY, ident: policy });
            policies.push(sql);
        }
        names.push(name);
    }
    let policies = policies.join(";\n");
    let change = Change {
        what: "make roles on which policies are tried",
        locks: vec![(target, Strength::Everything)],
        prelude,
        ..Default::default()
    };
    let done = ddl::transaction(ctx, session, &change, async |tx| {
        // Sent together: the lock is held for one round trip.
        tokio::try_join!(async { Ok(tx.batch_execute(&policies).await?) }, ledger::note(tx, ctx.job(), &made))?;
        Ok(())
    })
    .await;
    match done {
        Ok(()) => Ok(names),
        Err(e) if e.sqlstate() == Some("42501") => {
            let (name, role) = (names.first().map_or("", String::as_str), wanted.first().map_or("", |w| w.role));
            Err(may_not(name, role, &e.line()))
        }
        Err(e) => Err(e),
    }
}

fn may_not(name: &str, role: &str, why: &str) -> Error {
    Error::refused(format!("access: role {name} cannot be made to try policies on: {why}")).with_hint(format!(
        "let this login make it (alter role ... createrole; grant {role} to ... with admin option), or let an administrator \
         make it for each role of [access]: create role \"{name}\" nologin in role {}; grant \"{name}\" to this login; \
         backfilld check names them",
        quote(role)
    ))
}

/// Whether something is left of a run.
///
/// # Errors
/// Database errors.
pub async fn any_left(ctx: &Context) -> Result<bool> {
    Ok(!ledger::made(&**ctx.client().await?, ctx.job(), &[ROLE, POLICY]).await?.is_empty())
}

/// Drops what a run made, also an earlier one that was killed.
///
/// # Errors
/// DDL errors.
pub async fn drop_all(ctx: &Context, session: &mut Session) -> Result<()> {
    let made = ledger::made(&session.client, ctx.job(), &[ROLE, POLICY]).await?;
    if made.is_empty() {
        return Ok(());
    }
    let target = ctx.spec.target.table.sql();
    let of = |kind: &str| made.iter().filter(|m| m.0 == kind).map(|m| m.1.as_str()).collect::<Vec<_>>();
    let policies: String =
        of(POLICY).iter().map(|p| format!("drop policy if exists {} on {target};", quote(p))).collect();
    let roles: String = of(ROLE).iter().map(|r| format!("drop role if exists {};", quote(r))).collect();
    let change = Change {
        what: "drop the roles on which policies were tried",
        locks: vec![(target, Strength::Everything)],
        ..Default::default()
    };
    let sql = format!("{policies}{roles}");
    ddl::transaction(ctx, session, &change, async |tx| {
        // Sent together: the lock is held for one round trip.
        let dropped = async { Ok(tx.batch_execute(&sql).await?) };
        tokio::try_join!(dropped, objects::all_removed(tx, ctx.job(), &[ROLE, POLICY])).map(|_| ())
    })
    .await
}
