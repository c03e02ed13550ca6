//! One comparison under way: who is tried, on which stand-ins, and what is stored of it.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tracing::info;

use super::compare::{Compared, Comparer, Person};
use super::explain::Explain;
use super::probe_role::{self, Wanted};
use super::rules::{self, Kind, Role, Rules};
use super::sets::{self, Sets};
use super::users::{self, People, people_of};
use super::{Stage, session};
use crate::context::Context;
use crate::error::{Error, Result, Retry};
use crate::fault;
use crate::job::access::{Access, AccessCommand, Effect};
use crate::ledger::access::{self as ledger, Outcome};
use crate::ledger::lease;
use crate::pg::connect::Session;
use crate::pg::ident::Ident;
use crate::plan::access_sql;
use crate::throttle::Throttle;

/// Times that a user is tried again when a lock or a timeout got in the way.
const RETRIES: u32 = 8;

/// A run under way.
pub(super) struct Running<'a> {
    pub(super) ctx: &'a Context,
    pub(super) access: &'a Access,
    pub(super) session: &'a Session,
    pub(super) stage: Stage,
    pub(super) run: i64,
}

impl Running<'_> {
    /// Compares everything that has no result yet. Gives whether everything could be, and notes.
    ///
    /// # Errors
    /// As [`super::compare`]; what differs is none.
    pub(super) async fn work(&self, ddl: &mut Session) -> Result<(bool, Vec<String>)> {
        let (ctx, client) = (self.ctx, &self.session.client);
        let rules = Rules::read(ctx, client, self.access, self.stage).await?;
        if let Some(why) = rules.cannot_stand_in(self.stage) {
            return Err(Error::refused(format!("access: {why}")).with_hint(
                "write the policy by a setting or claim instead, or leave [access] out: then nothing is compared",
            ));
        }
        self.may_write(client).await?;
        ctx.progress.update(|p| p.note = "comparing access, reading users".into());
        let people = self.stoppable(People::read(ctx, client, self.access)).await?;
        let mut notes = Vec::new();
        let mut complete = true;
        if people.cut {
            notes.push(format!("only the first {} users were read", users::MOST_USERS));
        }
        let sets = self.sets(&rules, &people, &mut notes).await?;
        if sets.differing.len() > users::MOST_TOUCHED {
            complete = false;
            notes.push(format!(
                "{} users see other rows by sets; {} of them were tried",
                sets.differing.len(),
                users::MOST_TOUCHED
            ));
        }
        for why in &sets.undecided {
            complete = false;
            notes.push(format!("not decided by sets: {why}; access.statement_timeout may be too short"));
        }
        let functions = self.functions(&rules);
        let stranger = users::stranger(ctx, client, &people).await?;
        let explain = Explain { ctx, access: self.access, client, rules: &rules, stranger: stranger.clone() };
        let comparer = Comparer { ctx, access: self.access, client, functions, explain };
        let by_sets = sets
            .writes
            .iter()
            .filter_map(|d| Some(comparer.by_sets(rules.roles.iter().find(|r| r.name == d.role)?, d)));
        self.store(&by_sets.collect::<Vec<_>>()).await?;
        let sample = people.sample(&sets.differing, self.access.sample as usize);
        if people.owners.is_empty() && self.access.writes {
            notes.push("the target has no rows, so no write could be tried".into());
        }
        let done = ledger::done(client, self.run).await?;
        let left = |role: &Role, (who, user): &(&str, Option<String>)| {
            !done.contains(&(role.name.clone(), (*who).to_owned(), user.clone().unwrap_or_default()))
        };
        let any_left = |r: &Role| people_of(r, &sample, stranger.as_ref()).iter().any(|p| left(r, p));
        if !rules.roles.iter().any(any_left) {
            return Ok((complete, notes));
        }
        let compared = self.cast(ddl, &rules).await?;
        let throttle = Throttle::start(ctx, std::iter::once(self.session));
        for c in &compared {
            for (who, user) in people_of(c.role, &sample, stranger.as_ref()).into_iter().filter(|p| left(c.role, p)) {
                throttle.clear(ctx, false).await?;
                ctx.may_go_on(ctx.status().await?.as_str())?;
                ctx.progress.update(|p| p.note = format!("comparing access as {}", c.role.name));
                let began = Instant::now();
                let mut outcomes = Vec::new();
                if who == "nobody" {
                    outcomes.extend(self.of_role(&comparer, &rules, c).await?);
                }
                let person = Person {
                    who,
                    own: match &user {
                        Some(user) => people.own_row(ctx, client, user).await?,
                        None => None,
                    },
                    foreign: people.foreign_row(ctx, client, user.as_deref()).await?,
                    user,
                };
                outcomes.extend(self.patiently(&comparer, c, &person).await?);
                self.store(&outcomes).await?;
                fault::point("access-person");
                let duty = ctx.live.now().throttle.duty;
                ctx.pause(began.elapsed().mul_f64((1.0 - duty) / duty)).await?;
            }
        }
        Ok((complete, notes))
    }

    /// Waits for work that takes long, unless it is told to stop.
    async fn stoppable<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let work = std::pin::pin!(work);
        tokio::select! {
            done = work => done,
            why = self.ctx.told_to_stop() => {
                self.session.cancel().await?;
                Err(why)
            }
        }
    }

    async fn sets(&self, rules: &Rules, people: &People, notes: &mut Vec<String>) -> Result<Sets> {
        // After the flip only what is in force counts, and time does.
        if self.stage == Stage::After || self.ctx.spec.policies.is_none() {
            return Ok(Sets::default());
        }
        self.ctx.progress.update(|p| p.note = "comparing access, all users by sets".into());
        let sets = self.stoppable(sets::compare(self.ctx, &self.session.client, self.access, rules, people)).await?;
        match &sets.not_made {
            Some(why) => notes.push(format!("not compared by sets: {why}")),
            None => {
                let hidden = sets::hidden(self.ctx, &self.session.client).await?;
                if !hidden.is_empty() {
                    notes.push(format!(
                        "by sets, whoever asks sees all rows of {}, though policies of theirs hide some: what that changes shows only \
                         for those who were tried as enforced",
                        hidden.join(", ")
                    ));
                }
                let mut client = self.ctx.client().await?;
                let tx = client.transaction().await?;
                lease::fence(&*tx, &self.ctx.lease).await?;
                ledger::store_sets(&*tx, self.run, sets.users, sets.rows, sets.duration_ms).await?;
                tx.commit().await?;
                info!(
                    job = self.ctx.job(),
                    users = sets.users,
                    rows = sets.rows,
                    differing = sets.differing.len(),
                    duration_ms = sets.duration_ms,
                    "access compared by sets"
                );
            }
        }
        Ok(sets)
    }

    /// The roles with their stand-ins.
    async fn cast<'r>(&self, ddl: &mut Session, rules: &'r Rules) -> Result<Vec<Compared<'r>>> {
        let (ctx, client) = (self.ctx, &self.session.client);
        let tried = |r: &Role| r.kind != Kind::Bypass && !r.bypasses && ctx.spec.policies.is_some();
        let stand_in_for = match self.stage {
            Stage::Before => &rules.after,
            Stage::After => &rules.before,
        };
        let roles: Vec<&Role> = rules.roles.iter().filter(|r| tried(r)).collect();
        let wanted: Vec<Wanted<'_>> =
            roles.iter().map(|r| Wanted { role: &r.name, rules: rules.of(stand_in_for, r) }).collect();
        let names = if wanted.is_empty() { Vec::new() } else { probe_role::create(ctx, ddl, &wanted).await? };
        fault::point("access-probe");
        let definer = self.all_definer(client, rules).await?;
        let mut out = Vec::new();
        for role in &rules.roles {
            let own = role.name.clone();
            let stand_in = roles.iter().position(|r| r.name == role.name).and_then(|i| names.get(i)).cloned();
            let pair = match (stand_in, self.stage) {
                (Some(stand_in), Stage::Before) => [own.clone(), stand_in],
                (Some(stand_in), Stage::After) => [stand_in, own.clone()],
                (None, _) => [own.clone(), own.clone()],
            };
            // A function that runs as its owner does not care about policies, but may look at the role's name.
            let callers = if definer { [own.clone(), own] } else { pair.clone() };
            let (insertable, updatable) = self.columns(client, role).await?;
            out.push(Compared { role, roles: pair, callers, insertable, updatable });
        }
        Ok(out)
    }

    async fn all_definer(&self, client: &Client, rules: &Rules) -> Result<bool> {
        let [_, new] = self.functions(rules);
        let signatures: Vec<&str> = self.ctx.spec.functions.iter().map(|f| f.signature.as_str()).collect();
        session::Attempts::new(client, self.access)
            .rehearse(&new, async |client| {
                let sql = "select coalesce(bool_and(p.prosecdef), true) from unnest($1::text[]) s(f)
                           join pg_proc p on p.oid = to_regprocedure(s.f)";
                Ok(client.query_one(sql, &[&signatures]).await?.get(0))
            })
            .await
    }

    /// Statements that bring the old functions, and the new ones, where the others are in force.
    fn functions(&self, rules: &Rules) -> [Vec<String>; 2] {
        match self.stage {
            Stage::Before => {
                [Vec::new(), self.ctx.spec.functions.iter().flat_map(|f| f.statements.iter().cloned()).collect()]
            }
            Stage::After => {
                [rules.functions_before.iter().flatten().map(|f| f.definition.clone()).collect(), Vec::new()]
            }
        }
    }

    /// Columns that a role may insert, and one that it may update without changing anything.
    async fn columns(&self, client: &Client, role: &Role) -> Result<(Vec<Ident>, Option<Ident>)> {
        let shape = &self.ctx.facts.shape;
        let rows = client
            .query(
                "select a.attname::text, has_column_privilege($1, a.attrelid, a.attnum, 'INSERT'),
                        has_column_privilege($1, a.attrelid, a.attnum, 'UPDATE')
                 from pg_attribute a where a.attrelid = to_regclass($2) and a.attnum > 0 and not a.attisdropped
                   and a.attgenerated = '' order by a.attnum",
                &[&role.name, &shape.target.sql()],
            )
            .await?;
        let named = |n: usize| -> Result<Vec<Ident>> {
            let names = rows.iter().filter(|r| r.get::<_, bool>(n)).map(|r| Ident::new(r.get::<_, String>(0)));
            names.collect::<Result<_, String>>().map_err(Error::internal)
        };
        let special = |c: &Ident| {
            shape.key.iter().any(|k| k.name == *c)
                || shape.columns.iter().any(|x| x.name == *c)
                || access_sql::join_columns(shape).contains(c)
        };
        Ok((named(1)?, named(2)?.into_iter().find(|c| !special(c))))
    }

    /// What a role may do at all: whether policies apply to it, and whether it may call the functions.
    async fn of_role(&self, comparer: &Comparer<'_>, rules: &Rules, c: &Compared<'_>) -> Result<Vec<Outcome>> {
        let (role, client) = (c.role, &self.session.client);
        let plain = |command: &str, attempt: &str, before: &str, after: &str| Outcome {
            role: role.name.clone(),
            who: "nobody".into(),
            user_id: String::new(),
            command: command.to_owned(),
            attempt: attempt.to_owned(),
            before: before.to_owned(),
            after: after.to_owned(),
            verdict: if before == after { "same" } else { "different" }.to_owned(),
            effect: String::new(),
            only_before: Vec::new(),
            only_after: Vec::new(),
            cause: String::new(),
        };
        let mut out = Vec::new();
        if self.ctx.spec.policies.is_some() {
            let say = |applies: bool| if applies { "apply" } else { "do not apply" };
            let meant = role.kind != Kind::Bypass;
            let is = rules.enabled && !role.bypasses;
            let mut outcome = plain("policies", "apply to the role", say(meant), say(is));
            if meant != is {
                "other".clone_into(&mut outcome.effect);
                outcome.cause = match (meant, rules.enabled) {
                    (_, false) => "row level security is not enabled on the target".into(),
                    (true, _) => format!(
                        "{} bypasses row level security (superuser, BYPASSRLS, or owner without FORCE): no policy protects \
                         anything from it; name it in access.bypass if that is meant",
                        role.name
                    ),
                    (false, _) => format!("access.bypass says that {} is above policies, and it is not", role.name),
                };
            }
            out.push(outcome);
        }
        let [_, new] = self.functions(rules);
        for (f, old) in self.ctx.spec.functions.iter().zip(&rules.functions_before) {
            let Some(old) = old else { continue };
            let may_now = "select coalesce(has_function_privilege($1, to_regprocedure($2), 'EXECUTE'), false)";
            let say = |may: bool| if may { "allowed" } else { "refused" };
            let before = match self.stage {
                Stage::Before => client.query_one(may_now, &[&role.name, &f.signature]).await?.get(0),
                Stage::After => {
                    let granted = old.acl.iter().any(|(to, _)| to == "public" || role.has.contains(to));
                    granted || role.has.contains(&old.owner)
                }
            };
            let after: bool = session::Attempts::new(client, self.access)
                .rehearse(&new, async |client| Ok(client.query_one(may_now, &[&role.name, &f.signature]).await?.get(0)))
                .await?;
            let mut outcome = plain(AccessCommand::Execute.as_str(), &f.signature, say(before), say(after));
            if before != after {
                let effect = if after { Effect::Wider } else { Effect::Narrower };
                outcome.cause = format!("{} grants or revokes EXECUTE", f.file);
                comparer.judge(&role.name, &mut outcome, effect);
            }
            out.push(outcome);
        }
        Ok(out)
    }

    /// Tries a person again when a lock or a timeout got in the way: that says nothing about access.
    async fn patiently(&self, comparer: &Comparer<'_>, c: &Compared<'_>, person: &Person) -> Result<Vec<Outcome>> {
        for tried in 1.. {
            match self.stoppable(comparer.person(c, person)).await {
                Err(e) if e.retry() == Retry::Smaller && self.ctx.check().is_ok() => {
                    self.ctx.may_go_on(self.ctx.status().await?.as_str())?;
                    if tried == RETRIES {
                        return Err(e.context(format!("access: as {}, tried {RETRIES} times", c.role.name)).with_hint(
                            "raise access.statement_timeout if statements take longer, or end what holds the locks; then: \
                             backfilld resume",
                        ));
                    }
                    info!(job = self.ctx.job(), sqlstate = e.sqlstate(), "trying a user again: {e}");
                    self.ctx.pause(Duration::from_millis(200) * tried).await?;
                }
                other => return other,
            }
        }
        Err(Error::internal("no try was made"))
    }

    async fn store(&self, outcomes: &[Outcome]) -> Result<()> {
        let mut client = self.ctx.client().await?;
        let tx = client.transaction().await?;
        lease::fence(&*tx, &self.ctx.lease).await?;
        ledger::store(&*tx, self.run, outcomes).await?;
        Ok(tx.commit().await?)
    }

    /// A rollback undoes neither sequences nor calls to the outside (hazard 72): where something of the application's runs,
    /// the operator has to say that this does not matter.
    async fn may_write(&self, client: &Client) -> Result<()> {
        if !self.access.writes || self.access.writes_can_be_undone || self.ctx.spec.policies.is_none() {
            return Ok(());
        }
        let triggers = rules::application_triggers(client, &self.ctx.spec.target.table).await?;
        if triggers.is_empty() {
            return Ok(());
        }
        Err(Error::input(format!(
            "access.writes_can_be_undone: expected an answer, since trying writes fires triggers of the application: {}",
            triggers.join(", ")
        ))
        .with_hint(
            "true if a rollback undoes what they do (no calls to the outside; gaps in sequences do not matter), else set \
             access.writes = false",
        ))
    }
}
