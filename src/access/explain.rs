//! Why access differs, as far as policies, triggers and rows tell.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient};

use super::Stage;
use super::rules::{Role, Rules};
use super::session::{Actor, Attempts};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::job::access::{Accept, Access, AccessCommand};
use crate::ledger::access::{self as ledger, Outcome};
use crate::plan::access_sql::{self, COMMANDS, Rule};

/// How every cause begins that no policy over the new column could remove.
pub const INEXPRESSIBLE: &str = "one column cannot express it";

/// Keys of a difference that are looked at.
const LOOK_AT: usize = 5;

/// What causes are found from.
pub struct Explain<'a> {
    /// The run.
    pub ctx: &'a Context,
    /// `[access]`.
    pub access: &'a Access,
    /// A session that sees every row, and makes attempts.
    pub client: &'a Client,
    /// Policies, roles, triggers.
    pub rules: &'a Rules,
    /// `old` and `new` actor roles for looking as somebody else.
    pub stranger: Option<String>,
}

fn names(rules: &[&Rule]) -> String {
    let names: Vec<String> = rules.iter().map(|r| format!("{:?}", r.name)).collect();
    names.join(", ")
}

impl Explain<'_> {
    fn column(&self) -> String {
        self.ctx.facts.shape.columns.first().map_or_else(String::new, |c| c.name.as_str().to_owned())
    }

    /// The policies alone: no new one for this command, or none for this role.
    fn uncovered(&self, role: &Role, command: &str) -> Option<String> {
        let (code, keyword) = COMMANDS.iter().find(|c| c.1 == command)?;
        let covering: Vec<&Rule> = self.rules.after.iter().filter(|r| r.permissive && r.covers(code)).collect();
        if covering.iter().any(|r| r.applies(&role.has)) {
            return None;
        }
        Some(if covering.is_empty() {
            format!("missing command: no new policy is for {keyword}")
        } else {
            format!("missing role: the new policies for {keyword} ({}) are not for {}", names(&covering), role.name)
        })
    }

    /// Permissive policies for a command that do not look at the new column: ORed with the others, they widen them.
    fn unrelated(&self, role: &Role, code: &str) -> Vec<&Rule> {
        let column = self.column();
        let looks = |text: &Option<String>| text.as_ref().is_some_and(|t| t.contains(&column));
        let kept = |r: &Rule| self.ctx.spec.policies.as_ref().is_some_and(|p| p.keep.contains(&r.name));
        self.rules
            .of(&self.rules.after, role)
            .into_iter()
            .filter(|r| r.permissive && r.covers(code) && (kept(r) || !(looks(&r.using) || looks(&r.check))))
            .collect()
    }

    fn leftover(&self, role: &Role, code: &str) -> Option<String> {
        let found = self.unrelated(role, code);
        (!found.is_empty()).then(|| {
            format!(
                "leftover permissive policy: {} is ORed with the others and does not go by {}",
                names(&found),
                self.column()
            )
        })
    }

    /// A difference in what is visible.
    ///
    /// # Errors
    /// Database errors.
    pub async fn select(&self, role: &Role, old: &Actor, user: Option<&str>, o: &Outcome) -> Result<String> {
        let mut causes: Vec<String> = Vec::new();
        let mut say = |cause: String| {
            if !causes.contains(&cause) {
                causes.push(cause);
            }
        };
        if !o.only_before.is_empty() || (o.only_after.is_empty() && o.effect == "narrower") {
            match self.uncovered(role, "select") {
                Some(cause) => say(cause),
                None => {
                    for key in o.only_before.iter().take(LOOK_AT) {
                        say(self.hidden(role, old, user, key).await?);
                    }
                }
            }
        }
        if !o.only_after.is_empty() {
            for key in o.only_after.iter().take(LOOK_AT) {
                say(self.shown(role, user, key).await?);
            }
        }
        if causes.is_empty() {
            causes.push(match (&*o.before, &*o.after) {
                (b, _) if b.starts_with("error") => "the old policies raise an error for this role".to_owned(),
                (_, a) if a.starts_with("error") => {
                    "the new policies raise an error for this role: look whether it may call their functions".to_owned()
                }
                _ => "the new policies let other rows through".to_owned(),
            });
        }
        Ok(causes.join("; "))
    }

    /// A row that was visible and is not any more.
    async fn hidden(&self, role: &Role, old: &Actor, user: Option<&str>, key: &[String]) -> Result<String> {
        let column = self.column();
        let (owner, paths) = self.owner(key).await?;
        let Some(owner) = owner else { return Ok(format!("NULL owner: {column} is NULL in these rows")) };
        let patch = self.patch(key);
        let attempts = Attempts::new(self.client, self.access);
        let as_user =
            |user: Option<&str>| Actor { role: old.role.clone(), settings: self.access.settings_for(&role.name, user) };
        let sql = access_sql::is_visible(&self.ctx.facts.shape);
        let stranger = self.stranger.as_deref();
        if user.is_none() || attempts.count(&as_user(stranger), &sql, &patch).await? > 0 {
            return Ok(format!(
                "public rows: the old policies show these rows to everybody, by OR with the owner; {INEXPRESSIBLE}: let a new \
                 policy show them as well"
            ));
        }
        if user == Some(owner.as_str()) {
            return Ok(format!(
                "the new policies hide a row whose {column} is this user's: they compare another column or value"
            ));
        }
        if attempts.count(&as_user(Some(&owner)), &sql, &patch).await? > 0 {
            return Ok(format!(
                "several owners: the old policies show these rows to this user and to {owner}, whom {column} names; \
                 {INEXPRESSIBLE}: these policies cannot be replaced by an owner column"
            ));
        }
        let path =
            if paths.iter().flatten().any(|p| Some(p.as_str()) == user) { ", as a path of `agree` does" } else { "" };
        Ok(format!("paths disagree: the old policies lead from these rows to this user{path}, {column} to {owner}"))
    }

    /// A row that was not visible and is now.
    async fn shown(&self, role: &Role, user: Option<&str>, key: &[String]) -> Result<String> {
        let column = self.column();
        let (owner, _) = self.owner(key).await?;
        Ok(match (owner, user) {
            (Some(owner), Some(user)) if owner == user => {
                format!("paths disagree: {column} leads from these rows to this user, the old policies do not")
            }
            (owner, _) => self.leftover(role, "r").unwrap_or_else(|| {
                let whose = owner.map_or_else(|| "nobody's".to_owned(), |o| format!("{o}'s"));
                format!("too wide: a new policy for select shows rows that are {whose} by {column}")
            }),
        })
    }

    /// Owner of a row, and what the other paths say.
    async fn owner(&self, key: &[String]) -> Result<(Option<String>, Vec<Option<String>>)> {
        let others: Vec<String> = self
            .ctx
            .spec
            .agree
            .iter()
            .zip(&self.ctx.facts.agree)
            .map(|(a, shape)| crate::plan::verify_sql::agree_shape(a, shape).select)
            .collect();
        let sql = access_sql::owner_of_key(&self.ctx.facts.shape, &others);
        let rows = self.client.query_typed(&sql, &[(&self.patch(key), Type::TEXT)]).await?;
        Ok(rows.first().map_or((None, Vec::new()), |r| (r.get(0), (1..r.len()).map(|i| r.get(i)).collect())))
    }

    fn patch(&self, key: &[String]) -> String {
        let columns = &self.ctx.facts.shape.key;
        let map: serde_json::Map<String, serde_json::Value> =
            columns.iter().zip(key).map(|(k, v)| (k.name.as_str().to_owned(), serde_json::json!(v))).collect();
        serde_json::Value::Object(map).to_string()
    }

    /// A difference in what may be written or called.
    pub fn write(&self, role: &Role, o: &Outcome) -> String {
        if o.command == "call" {
            return match o.effect.as_str() {
                "narrower" => {
                    "the new function refuses what the old one did; if that is meant, accept it with a reason".into()
                }
                "wider" => "the new function does what the old one refused".into(),
                _ => "the new function fails in another way than the old one".into(),
            };
        }
        let code = COMMANDS.iter().find(|c| c.1 == o.command).map_or("", |c| c.0);
        if o.effect == "narrower"
            && let Some(cause) = self.uncovered(role, &o.command)
        {
            return cause;
        }
        if let Some(fault) = &self.rules.trigger_fault {
            return format!(
                "spoofable owner: {fault}, so {} is what the client sends, and the new policies trust it",
                self.column()
            );
        }
        if o.effect == "wider" {
            return self
                .leftover(role, code)
                .unwrap_or_else(|| format!("too wide: a new policy for {} allows what no old one did", o.command));
        }
        format!("a new policy for {} asks for more than the old ones", o.command)
    }
}

/// Differences that the job accepts and that were tried in vain: functions do not go by the data, so the new one does not do
/// what it is there for. After the flip nothing is asked of it any more.
///
/// # Errors
/// Database errors.
pub async fn unmet(ctx: &Context, client: &impl GenericClient, stage: Stage, run: i64) -> Result<Vec<String>> {
    let mut out = Vec::new();
    let Some(access) = ctx.spec.access.as_ref().filter(|_| stage == Stage::Before) else { return Ok(out) };
    let by_function = |a: &&Accept| matches!(a.command, AccessCommand::Call | AccessCommand::Execute);
    for accept in access.accept.iter().filter(by_function) {
        let (tried, differed) = ledger::accepted(client, run, accept).await?;
        if tried > 0 && differed == 0 {
            out.push(format!(
                "access.accept: {} {} was to become {}, and in {tried} attempts it did not: the new function does not do what \
                 it is there for, or the acceptance is not needed",
                accept.command.as_str(),
                accept.attempt.as_deref().unwrap_or("of any function"),
                accept.effect.as_str()
            ));
        }
    }
    Ok(out)
}

/// The error of a run in which access differs in `n` ways.
pub fn failure(ctx: &Context, n: i64, different: &[&Outcome], notes: &[String]) -> Error {
    if n == 0 {
        return Error::failed(format!("access: {}", notes.join("; "))).with_hint(
            "correct the job's functions in a new job, or change [[access.accept]]; then: backfilld resume",
        );
    }
    let first = different.first().map_or_else(|| notes.join("; "), |o| o.line());
    let many =
        if n == 1 { "access would change in 1 way".to_owned() } else { format!("access would change in {n} ways") };
    let mut hint = format!("backfilld verify {} --access lists every difference with its cause", ctx.job());
    if different.iter().any(|o| o.cause.contains(INEXPRESSIBLE)) {
        hint.push_str(
            "; what one column cannot express, new policies have to say besides it, or the job is not for this table",
        );
    } else {
        hint.push_str(
            "; correct the data, or the job's policies in a new job; what is meant goes into [[access.accept]]",
        );
    }
    Error::failed(format!("{many}; {first}")).with_hint(hint)
}
