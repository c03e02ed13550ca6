//! What the comparison rests on: policies before and after, roles, functions, triggers; and a hash of it all.

use sha2::{Digest, Sha256};
use tokio_postgres::Client;

use super::Stage;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::expand::snapshot::{self, FunctionState, PolicyState, Security};
use crate::job::access::Access;
use crate::job::lex;
use crate::ledger::access::Basis;
use crate::ledger::objects;
use crate::ledger::verdict::ServerIdentity;
use crate::plan::access_sets;
use crate::plan::access_sql::Rule;
use crate::plan::{Shape, sync_sql};

/// In which list of `[access]` a role stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Acts for users.
    User,
    /// Never does.
    Anonymous,
    /// Policies do not apply to it.
    Bypass,
}

/// A role of the job, as the catalog has it.
#[derive(Debug, Clone)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// In which list it is.
    pub kind: Kind,
    /// Policies of the target do not apply to it.
    pub bypasses: bool,
    /// Roles whose rights it has, itself among them.
    pub has: Vec<String>,
}

/// Everything that decides about access, before and after.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Policies before the flip.
    pub before: Vec<Rule>,
    /// Policies after the flip.
    pub after: Vec<Rule>,
    /// Row level security is enabled on the target.
    pub enabled: bool,
    /// The roles.
    pub roles: Vec<Role>,
    /// Functions before the flip; `None`: there was none.
    pub functions_before: Vec<Option<FunctionState>>,
    /// What is wrong with the sync triggers.
    pub trigger_fault: Option<String>,
}

impl From<&PolicyState> for Rule {
    fn from(p: &PolicyState) -> Self {
        Self {
            name: p.name.clone(),
            command: p.command.clone(),
            permissive: p.permissive,
            roles: p.roles.clone(),
            using: p.using.clone(),
            check: p.check.clone(),
        }
    }
}

impl Rules {
    /// Reads them.
    ///
    /// # Errors
    /// Database errors; input errors for roles that do not exist.
    pub async fn read(ctx: &Context, client: &Client, access: &Access, stage: Stage) -> Result<Self> {
        let table = &ctx.spec.target.table;
        let now = snapshot::security(client, table).await?;
        let all = |security: &Security| security.policies.iter().map(Rule::from).collect::<Vec<_>>();
        let (before, after) = match (&ctx.spec.policies, stage) {
            (None, _) => (all(&now), all(&now)),
            (Some(policies), Stage::Before) => {
                let kept = all(&now).into_iter().filter(|r| policies.keep.contains(&r.name));
                (all(&now), kept.chain(policies.create.iter().map(Rule::from)).collect())
            }
            (Some(_), Stage::After) => {
                let then = objects::kept(client, ctx.job(), "policies", &table.to_string()).await?;
                let then: Option<Security> = then.and_then(|v| serde_json::from_value(v).ok());
                let then = then.ok_or_else(|| Error::internal("there is no snapshot of the policies"))?;
                (all(&then), all(&now))
            }
        };
        let mut functions_before = Vec::new();
        for f in &ctx.spec.functions {
            functions_before.push(match stage {
                Stage::Before => snapshot::function(client, &f.signature).await?,
                Stage::After => objects::kept(client, ctx.job(), "function", &f.signature)
                    .await?
                    .and_then(|v| serde_json::from_value(v).ok())
                    .flatten(),
            });
        }
        Ok(Self {
            before,
            after,
            enabled: now.enabled,
            roles: roles(client, ctx, access).await?,
            functions_before,
            trigger_fault: trigger_fault(client, &ctx.facts.shape).await?,
        })
    }

    /// Policies that apply to a role.
    pub fn of<'a>(&self, all: &'a [Rule], role: &Role) -> Vec<&'a Rule> {
        all.iter().filter(|r| r.applies(&role.has)).collect()
    }

    /// Why the policies cannot be tried on a stand-in, if that is so.
    pub fn cannot_stand_in(&self, stage: Stage) -> Option<String> {
        cannot_stand_in(&self.before, &self.after, stage)
    }
}

/// Why policies cannot be tried on a stand-in, if that is so.
pub fn cannot_stand_in(before: &[Rule], after: &[Rule], stage: Stage) -> Option<String> {
    for rule in before.iter().chain(after) {
        for text in [&rule.using, &rule.check].into_iter().flatten() {
            let tokens = lex::tokens(text).unwrap_or_default();
            if let Some(word) = access_sets::names_session_user(tokens.iter()) {
                return Some(format!(
                    "policy {:?} looks at {word}, which is another one for the role on which policies are tried",
                    rule.name
                ));
            }
        }
    }
    // What is in force stays ANDed to the stand-in's own policies. After the flip that is known to be no narrower.
    let gone = before.iter().find(|r| !r.permissive && !after.contains(r)).filter(|_| stage == Stage::Before)?;
    Some(format!(
        "policy {:?} is restrictive and shall go: it would hide from the comparison what it hides now",
        gone.name
    ))
}

/// SQL: whether role `r` is above the policies of table `c`, as check_enable_rls() of the server decides it.
const BYPASSES: &str =
    "(r.rolsuper or r.rolbypassrls or pg_has_role(r.oid, c.relowner, 'USAGE') and not c.relforcerowsecurity)";

async fn roles(client: &Client, ctx: &Context, access: &Access) -> Result<Vec<Role>> {
    let lists = [(&access.roles, Kind::User), (&access.anonymous, Kind::Anonymous), (&access.bypass, Kind::Bypass)];
    let mut out = Vec::new();
    for (name, kind) in lists.into_iter().flat_map(|(list, kind)| list.iter().map(move |r| (r.as_str(), kind))) {
        let sql = format!(
            "select {BYPASSES}, array(select m.rolname::text from pg_roles m where pg_has_role(r.oid, m.oid, 'USAGE') order by 1)
             from pg_roles r, pg_class c where r.rolname = $1 and c.oid = to_regclass($2)"
        );
        let row = client.query_opt(&sql, &[&name, &ctx.spec.target.table.sql()]).await?;
        let row = row.ok_or_else(|| {
            Error::input(format!("access: role {name:?} does not exist on this server"))
                .with_hint("correct its name in [access]")
        })?;
        out.push(Role { name: name.to_owned(), kind, bypasses: row.get(0), has: row.get(1) });
    }
    Ok(out)
}

/// Roles of `[access]` that no policy stops although the job does not say so, each in a sentence.
///
/// # Errors
/// Database errors; input errors for roles that do not exist.
pub async fn above_policies(ctx: &Context, client: &Client, access: &Access) -> Result<Vec<String>> {
    let all = roles(client, ctx, access).await?;
    let above = all.iter().filter(|r| r.bypasses && r.kind != Kind::Bypass);
    Ok(above.map(|r| format!("role {} bypasses row level security", r.name)).collect())
}

async fn trigger_fault(client: &Client, shape: &Shape) -> Result<Option<String>> {
    for trigger in sync_sql::triggers(shape) {
        let enabled: Option<String> = client
            .query_opt(
                "select tgenabled::text from pg_trigger where tgrelid = to_regclass($1) and tgname = $2",
                &[&trigger.table, &trigger.name],
            )
            .await?
            .map(|r| r.get(0));
        match enabled.as_deref() {
            Some("A") => {}
            None => return Ok(Some(format!("sync trigger {} on {} is missing", trigger.name, trigger.table))),
            Some(_) => {
                return Ok(Some(format!("sync trigger {} on {} is not enabled always", trigger.name, trigger.table)));
            }
        }
    }
    Ok(None)
}

/// On what a result holds: the job, the server, and everything in the catalog that decides about access.
///
/// # Errors
/// Database errors.
pub async fn basis(ctx: &Context, client: &Client) -> Result<Basis> {
    let mut state: Vec<serde_json::Value> = Vec::new();
    let mut tables = vec![ctx.spec.target.table.clone()];
    tables.extend(ctx.spec.source.iter().chain(ctx.spec.agree.iter().flat_map(|a| &a.source)).map(|j| j.table.clone()));
    for table in &tables {
        state.push(serde_json::json!([
            snapshot::security(client, table).await?,
            snapshot::triggers(client, table).await?
        ]));
    }
    for f in &ctx.spec.functions {
        state.push(serde_json::json!(snapshot::function(client, &f.signature).await?));
    }
    if let Some(access) = &ctx.spec.access {
        for role in roles(client, ctx, access).await? {
            // Our own stand-ins come and go.
            state.push(serde_json::json!([role.name, role.bypasses, role.has]));
        }
    }
    let text = serde_json::Value::Array(state).to_string();
    let digest = Sha256::digest(text.as_bytes());
    Ok(Basis {
        content_hash: Access::hash(&ctx.spec),
        state_hash: digest.iter().map(|b| format!("{b:02x}")).collect(),
        server: ServerIdentity::read(client).await?,
    })
}

/// Triggers of the application on a table, by name.
///
/// # Errors
/// Database errors.
pub async fn application_triggers(client: &Client, table: &crate::pg::ident::QualifiedName) -> Result<Vec<String>> {
    let ours = format!("{}%", crate::plan::shape::TRIGGER_PREFIX.replace('_', "\\_"));
    let rows = client
        .query(
            "select tgname::text from pg_trigger where tgrelid = to_regclass($1) and not tgisinternal and tgenabled <> 'D'
               and tgname not like $2 order by 1",
            &[&table.sql(), &ours],
        )
        .await?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}
