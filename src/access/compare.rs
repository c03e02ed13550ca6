//! One user under one role: every attempt before and after.

use serde_json::{Map, Value as Json, json};
use tokio_postgres::Client;

use super::explain::Explain;
use super::rules::{Kind, Role};
use super::session::{Actor, Attempts, Gave, Seeing};
use super::sets::Differing;
use super::users::TargetRow;
use crate::context::Context;
use crate::error::Result;
use crate::job::access::{Access, AccessCommand, Effect};
use crate::ledger::access::Outcome;
use crate::pg::ident::Ident;
use crate::plan::access_sql;

/// Times that a difference has to show: the application goes on meanwhile, and may change a row between two attempts.
const TIMES: u32 = 3;

/// Whom an attempt is made for.
pub struct Person {
    /// `user`, `stranger` or `nobody`.
    pub who: &'static str,
    /// The user.
    pub user: Option<String>,
    /// A row of theirs.
    pub own: Option<TargetRow>,
    /// A row of somebody else.
    pub foreign: Option<TargetRow>,
}

/// A role with its stand-in for one of the two states.
pub struct Compared<'a> {
    /// The role.
    pub role: &'a Role,
    /// As which role policies are tried before, and after.
    pub roles: [String; 2],
    /// As which role functions are called before, and after.
    pub callers: [String; 2],
    /// Columns that it may insert; none: attempts to insert are left out.
    pub insertable: Vec<Ident>,
    /// A column that it may update without changing anything.
    pub updatable: Option<Ident>,
}

/// What every comparison of a run shares.
pub struct Comparer<'a> {
    /// The run.
    pub ctx: &'a Context,
    /// `[access]`.
    pub access: &'a Access,
    /// The session of the attempts.
    pub client: &'a Client,
    /// Statements that make the old functions, and the new ones, where they are not in force.
    pub functions: [Vec<String>; 2],
    /// Finds causes.
    pub explain: Explain<'a>,
}

/// A write to attempt.
struct Write {
    command: AccessCommand,
    attempt: &'static str,
    sql: String,
    params: Vec<String>,
}

impl Comparer<'_> {
    /// Makes every attempt of a person. A difference counts when it shows [`TIMES`] times.
    ///
    /// # Errors
    /// What says nothing about access; the person can be tried again.
    pub async fn person(&self, c: &Compared<'_>, person: &Person) -> Result<Vec<Outcome>> {
        let mut out = Vec::new();
        let by_policies = !c.role.bypasses && c.role.kind != Kind::Bypass && self.ctx.spec.policies.is_some();
        if by_policies {
            out.push(self.select(c, person).await?);
        }
        if !self.access.writes {
            return Ok(out);
        }
        if by_policies {
            for write in self.writes(c, person).await? {
                let params: Vec<&str> = write.params.iter().map(String::as_str).collect();
                let attempt = Attempt { command: write.command, name: write.attempt, sql: &write.sql, params: &params };
                out.push(self.twice(c, person, &c.roles, &attempt).await?);
            }
        }
        for call in &self.access.calls {
            let sql = access_sql::call(&self.ctx.facts.shape, &call.call);
            for (row, whose) in [(&person.own, "own row"), (&person.foreign, "foreign row")] {
                let Some(row) = row else { continue };
                let name = format!("{}, {whose}", call.name);
                let attempt = Attempt { command: AccessCommand::Call, name: &name, sql: &sql, params: &[&row.json] };
                out.push(self.twice(c, person, &c.callers, &attempt).await?);
            }
        }
        Ok(out)
    }

    fn actor(&self, role: &str, c: &Compared<'_>, person: &Person) -> Actor {
        Actor { role: role.to_owned(), settings: self.access.settings_for(&c.role.name, person.user.as_deref()) }
    }

    async fn select(&self, c: &Compared<'_>, person: &Person) -> Result<Outcome> {
        let shape = &self.ctx.facts.shape;
        let (visible, buckets, keys) =
            (access_sql::visible(shape), access_sql::visible_buckets(shape), access_sql::visible_keys(shape));
        let seeing = Seeing { visible: &visible, buckets: &buckets, keys: &keys };
        let [old, new] = [self.actor(&c.roles[0], c, person), self.actor(&c.roles[1], c, person)];
        let attempts = Attempts::new(self.client, self.access);
        // One snapshot for both, so one look is enough.
        let seen = attempts.see(&old, &new, &seeing, i64::from(self.access.keys)).await?;
        let mut outcome = self.outcome(c, person, AccessCommand::Select, "rows", &seen.before, &seen.after);
        if outcome.verdict == "same" {
            return Ok(outcome);
        }
        let effect = match (seen.only_before.is_empty(), seen.only_after.is_empty()) {
            (false, true) => Effect::Narrower,
            (true, false) => Effect::Wider,
            (false, false) => Effect::Other,
            (true, true) => effect(&seen.before, &seen.after),
        };
        (outcome.only_before, outcome.only_after) = (seen.only_before, seen.only_after);
        self.judge(&c.role.name, &mut outcome, effect);
        if outcome.verdict == "different" {
            outcome.cause = self.explain.select(c.role, &old, person.user.as_deref(), &outcome).await?;
        }
        Ok(outcome)
    }

    async fn twice(&self, c: &Compared<'_>, person: &Person, roles: &[String; 2], a: &Attempt<'_>) -> Result<Outcome> {
        let attempts = Attempts::new(self.client, self.access);
        let call = a.command == AccessCommand::Call;
        let mut outcome = None;
        for _ in 0..TIMES {
            let mut gave = Vec::new();
            for (role, functions) in roles.iter().zip(&self.functions) {
                let actor = self.actor(role, c, person);
                let first: &[String] = if call { functions } else { &[] };
                gave.push(attempts.attempt(&actor, first, a.sql, a.params, call).await?);
            }
            let mut made = self.outcome(c, person, a.command, a.name, &gave[0], &gave[1]);
            if made.verdict == "same" {
                return Ok(made);
            }
            self.judge(&c.role.name, &mut made, effect(&gave[0], &gave[1]));
            if made.verdict == "different" {
                made.cause = self.explain.write(c.role, &made);
            }
            outcome = Some(made);
        }
        outcome.ok_or_else(|| crate::Error::internal("no attempt was made"))
    }

    fn outcome(
        &self,
        c: &Compared<'_>,
        person: &Person,
        command: AccessCommand,
        attempt: &str,
        before: &Gave,
        after: &Gave,
    ) -> Outcome {
        Outcome {
            role: c.role.name.clone(),
            who: person.who.to_owned(),
            user_id: person.user.clone().unwrap_or_default(),
            command: command.as_str().to_owned(),
            attempt: attempt.to_owned(),
            before: before.text(),
            after: after.text(),
            verdict: if before == after { "same" } else { "different" }.to_owned(),
            effect: String::new(),
            only_before: Vec::new(),
            only_after: Vec::new(),
            cause: String::new(),
        }
    }

    /// Whether the job accepts a difference.
    pub fn judge(&self, role: &str, outcome: &mut Outcome, effect: Effect) {
        effect.as_str().clone_into(&mut outcome.effect);
        let accepted = self.access.accept.iter().find(|a| {
            a.command.as_str() == outcome.command
                && a.effect == effect
                && a.role.as_ref().is_none_or(|r| r.as_str() == role)
                && a.attempt.as_ref().is_none_or(|t| {
                    outcome.attempt == *t
                        || outcome.attempt.strip_prefix(t.as_str()).is_some_and(|r| r.starts_with(", "))
                })
        });
        if let Some(accept) = accepted {
            "accepted".clone_into(&mut outcome.verdict);
            outcome.cause.clone_from(&accept.reason);
        }
    }

    /// What policies let through by sets, as an outcome.
    pub fn by_sets(&self, role: &Role, d: &Differing) -> Outcome {
        let rows = d.rows.map(|n| Gave::Seen(n, 0));
        let mut outcome = Outcome {
            role: role.name.clone(),
            who: "user".into(),
            user_id: String::new(),
            command: d.command.to_owned(),
            attempt: if d.written { "rows as written, all users" } else { "rows there, all users" }.to_owned(),
            before: rows[0].text(),
            after: rows[1].text(),
            verdict: "different".to_owned(),
            effect: String::new(),
            only_before: Vec::new(),
            only_after: Vec::new(),
            cause: String::new(),
        };
        self.judge(&role.name, &mut outcome, effect(&rows[0], &rows[1]));
        if outcome.verdict == "different" {
            let some: Vec<&str> = d.users.iter().take(3).map(String::as_str).collect();
            outcome.cause = format!(
                "{}; {} user(s), such as {}",
                self.explain.write(role, &outcome),
                d.users.len(),
                some.join(", ")
            );
        }
        outcome
    }

    /// The writes for a person, from the rows there are.
    async fn writes(&self, c: &Compared<'_>, person: &Person) -> Result<Vec<Write>> {
        let shape = &self.ctx.facts.shape;
        let joins = access_sql::join_columns(shape);
        let Some(owner) = shape.columns.first().map(|c| c.name.clone()) else { return Ok(Vec::new()) };
        let mut out = Vec::new();
        let mut add = |command, attempt, sql: &str, params: Vec<String>| {
            out.push(Write { command, attempt, sql: sql.to_owned(), params });
        };
        let key = |row: &TargetRow| -> Map<String, Json> {
            shape.key.iter().zip(&row.key).map(|(k, v)| (k.name.as_str().to_owned(), json!(v))).collect()
        };
        let of = |row: &TargetRow| -> Vec<(String, Json)> {
            joins.iter().zip(&row.joins).map(|(j, v)| (j.as_str().to_owned(), json!(v))).collect()
        };
        let (own, foreign) = (person.own.as_ref(), person.foreign.as_ref());
        if let Some(new_key) = self.new_key(own.or(foreign)).await?
            && c.insertable.contains(&new_key.0)
        {
            let sql = access_sql::insert(shape, &c.insertable);
            let mut insert = |attempt, row: &TargetRow, owner_is: Json| {
                let mut change = Map::new();
                change.insert(new_key.0.as_str().to_owned(), json!(new_key.1));
                change.insert(owner.as_str().to_owned(), owner_is);
                add(AccessCommand::Insert, attempt, &sql, vec![row.json.clone(), Json::Object(change).to_string()]);
            };
            if let Some(own) = own {
                insert("own parent", own, json!(own.owner));
                insert("own parent, no owner", own, Json::Null);
                if let Some(foreign) = foreign {
                    insert("own parent, foreign owner", own, json!(foreign.owner));
                }
            }
            if let Some(foreign) = foreign {
                insert("foreign parent", foreign, json!(foreign.owner));
                insert("foreign parent, no owner", foreign, Json::Null);
                if let Some(user) = &person.user {
                    insert("foreign parent, spoofed owner", foreign, json!(user));
                }
            }
        }
        let mut update = |attempt, row: &TargetRow, changes: Vec<(String, Json)>| {
            let columns: Vec<Ident> = changes.iter().filter_map(|(n, _)| Ident::new(n.clone()).ok()).collect();
            let mut patch = key(row);
            patch.extend(changes);
            if !columns.is_empty() && !columns.iter().any(|c| shape.key.iter().any(|k| k.name == *c)) {
                let sql = access_sql::update(shape, &columns);
                add(AccessCommand::Update, attempt, &sql, vec![Json::Object(patch).to_string()]);
            }
        };
        if let (Some(own), Some(foreign)) = (own, foreign) {
            update("own row, foreign owner", own, vec![(owner.as_str().to_owned(), json!(foreign.owner))]);
            update("own row, foreign parent", own, of(foreign));
            update("foreign row, own parent", foreign, of(own));
        }
        if let (Some(user), Some(foreign)) = (&person.user, foreign) {
            update("foreign row, own owner", foreign, vec![(owner.as_str().to_owned(), json!(user))]);
        }
        for (row, touch, delete) in
            [(own, "own row, content", "own row"), (foreign, "foreign row, content", "foreign row")]
        {
            let Some(row) = row else { continue };
            let patch = Json::Object(key(row)).to_string();
            if let Some(column) = &c.updatable {
                add(AccessCommand::Update, touch, &access_sql::touch(shape, column), vec![patch.clone()]);
            }
            add(AccessCommand::Delete, delete, &access_sql::delete(shape), vec![patch]);
        }
        Ok(out)
    }

    /// A value for a column of the key that no row has. `None` where there is no such column, or no row to copy.
    async fn new_key(&self, row: Option<&TargetRow>) -> Result<Option<(Ident, String)>> {
        let shape = &self.ctx.facts.shape;
        let joins = access_sql::join_columns(shape);
        if row.is_none() {
            return Ok(None);
        }
        for k in shape.key.iter().filter(|k| !joins.contains(&k.name)) {
            let value = match k.sql_type.as_str() {
                "uuid" => uuid::Uuid::new_v4().to_string(),
                "smallint" | "integer" | "bigint" => {
                    self.client.query_typed_one(&access_sql::below(shape, &k.name), &[]).await?.get(0)
                }
                t if t == "numeric" || t == "text" || t.starts_with("character varying") || t.ends_with("citext") => {
                    // Digits only, so that it fits a number as well.
                    format!("{}", uuid::Uuid::new_v4().as_u128() % 1_000_000_000)
                }
                _ => continue,
            };
            return Ok(Some((k.name.clone(), value)));
        }
        Ok(None)
    }
}

struct Attempt<'a> {
    command: AccessCommand,
    name: &'a str,
    sql: &'a str,
    params: &'a [&'a str],
}

/// The direction of a difference.
fn effect(before: &Gave, after: &Gave) -> Effect {
    match before.amount().cmp(&after.amount()) {
        std::cmp::Ordering::Less => Effect::Wider,
        std::cmp::Ordering::Greater => Effect::Narrower,
        std::cmp::Ordering::Equal => Effect::Other,
    }
}
