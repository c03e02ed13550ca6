//! Every statement that changes something, in order, with its lock and its reason. `backfilld plan` prints them, and the
//! phases run the same ones.

use serde::Serialize;

use super::facts::Facts;
use super::rounds::initial_rounds;
use super::shape::{SYNC_SCHEMA, Shape};
use super::{batch_sql, heap_sql, sync_sql};
use crate::job::JobSpec;
use crate::job::spec::{Action, ForeignKey, Index, Policy, Strategy, TriggerMode};
use crate::pg::ident::{Ident, literal};
use crate::phase::Phase;

/// One transaction, or one statement that cannot be in one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// The phase it belongs to.
    #[serde(serialize_with = "phase_name")]
    pub phase: Phase,
    /// What it does, in a few words.
    pub what: String,
    /// The statements, without semicolons.
    pub sql: Vec<String>,
    /// Whether they run in one transaction. `false`: the statement runs by itself, outside any.
    pub transaction: bool,
    /// The strongest lock, and on what.
    pub lock: String,
    /// Whom that keeps waiting.
    pub blocks: String,
    /// For how long at most.
    pub bound: String,
    /// Why it is done, and why in this way.
    pub why: String,
}

fn phase_name<S: serde::Serializer>(phase: &Phase, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(phase.as_str())
}

/// The whole plan, in order.
pub fn all(spec: &JobSpec, facts: &Facts, lock_timeout: &str) -> Vec<Step> {
    let mut out = vec![expand(spec, facts, lock_timeout), backfill(spec, facts)];
    out.extend(constrain(spec, &facts.shape, lock_timeout));
    out.extend(flip(spec, lock_timeout));
    out
}

/// Column and sync triggers, in one transaction (I1).
pub fn expand(spec: &JobSpec, facts: &Facts, lock_timeout: &str) -> Step {
    let shape = &facts.shape;
    let target = shape.target.sql();
    let owner = quote(&facts.target.owner);
    let mut sql = Vec::new();
    let mut sources: Vec<String> = shape.joins.iter().map(|j| j.table.sql()).collect();
    sources.dedup();
    for source in &sources {
        sql.push(format!("lock table {source} in share row exclusive mode"));
    }
    sql.push(format!("lock table {target} in access exclusive mode"));
    sql.push(format!("create schema if not exists \"{SYNC_SCHEMA}\" authorization {owner}"));
    for function in sync_sql::functions(shape) {
        sql.push(function.create);
        sql.push(format!("alter function {}() owner to {owner}", function.name));
        sql.push(format!("revoke all on function {}() from public", function.name));
    }
    for ((column, wanted), existing) in shape.columns.iter().zip(&spec.columns).zip(&facts.existing) {
        if existing.is_none() {
            sql.push(format!("alter table {target} add column {} {}", column.name.sql(), column.sql_type));
        }
        if let Some(comment) = &wanted.comment {
            sql.push(format!("comment on column {target}.{} is {}", column.name.sql(), literal(comment)));
        }
    }
    for trigger in sync_sql::triggers(shape) {
        sql.push(trigger.create.clone());
        sql.push(sync_sql::enable_always(&trigger));
    }
    Step {
        phase: Phase::Expand,
        what: "add the column and the sync triggers".into(),
        sql,
        transaction: true,
        lock: format!("ACCESS EXCLUSIVE on {}, SHARE ROW EXCLUSIVE on {}", shape.target, sources.join(", ")),
        blocks: "everything on the target, writes on the sources".into(),
        bound: format!("a few milliseconds; each lock is waited for at most {lock_timeout}, then retried later"),
        why:
            "one transaction: with the column and some triggers only, a write in between would leave a stale value; a \
              nullable column without default rewrites nothing"
                .into(),
    }
}

/// The batch, as one representative step.
pub fn backfill(spec: &JobSpec, facts: &Facts) -> Step {
    let shape = &facts.shape;
    let sql: Vec<String> = match walk(spec, facts).0 {
        Walk::Keyset => {
            let range = batch_sql::key_range(shape, true);
            let recheck = batch_sql::recheck(shape, &range);
            let mut sql = vec![batch_sql::bound(shape, true, true), batch_sql::fill(shape, &range)];
            sql.extend(recheck);
            sql
        }
        Walk::Heap => vec![heap_sql::fill(shape)],
    };
    let replica = if spec.side_effects.triggers == Some(TriggerMode::Skip) {
        "; session_replication_role = replica, so that the application's triggers do not fire"
    } else {
        ""
    };
    let strategy = walk(spec, facts).1;
    Step {
        phase: Phase::Backfill,
        what: "fill the column, batch by batch".into(),
        sql,
        transaction: true,
        lock: format!("ROW EXCLUSIVE on {}, row locks on the batch's rows", shape.target),
        blocks: "updates and deletes of the same rows".into(),
        bound: format!(
            "about {} per batch; a batch is cancelled after twice that",
            humantime::format_duration(spec.batching.target_duration)
        ),
        why: format!("{strategy}{replica}"),
    }
}

/// How the rows are walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// In the order of the heap.
    Heap,
    /// By key.
    Keyset,
}

/// Chooses the walk, and says why. docs/benchmarks.md has what each costs on which tables: heap order grew none of them more
/// than the walk by key, and wrote less WAL on all.
pub fn walk(spec: &JobSpec, facts: &Facts) -> (Walk, String) {
    let is_heap = facts.target.kind == 'r' && facts.target.access_method == "heap";
    match spec.batching.strategy {
        Strategy::Keyset => (Walk::Keyset, "keyset: by key, as the job wants it".into()),
        Strategy::Heap | Strategy::Auto if is_heap => (Walk::Heap, format!("heap: {}", in_rounds(facts))),
        _ => (Walk::Keyset, "keyset: by key, since the target is not an ordinary heap table".into()),
    }
}

fn in_rounds(facts: &Facts) -> String {
    const FEWER: &str =
        "Where they have room anyway (fillfactor), in fewer rounds; while an old snapshot keeps dead rows, in one";
    if facts.target.rows_estimate <= 0.0 || facts.target.pages_estimate <= 0 {
        return format!(
            "page ranges in several committed rounds, so that most updates are HOT; least WAL and growth. {FEWER}"
        );
    }
    let rows_per_page = f64::from(facts.target.rows_estimate) / f64::from(facts.target.pages_estimate);
    match initial_rounds(rows_per_page) {
        1 => format!(
            "page ranges in one round. About {rows_per_page:.1} rows to a page: each moves to another page however they are \
             taken; so the table grows as much as by key, with less WAL"
        ),
        rounds => format!(
            "page ranges in {rounds} committed rounds to begin with, at about {rows_per_page:.0} rows to a page: a round's \
             rows leave room for the next one's, so that most updates are HOT; least WAL and growth. {FEWER}"
        ),
    }
}

/// Index, foreign keys, NOT NULL: each the online way.
pub fn constrain(spec: &JobSpec, shape: &Shape, lock_timeout: &str) -> Vec<Step> {
    let target = shape.target.sql();
    let short = format!("milliseconds; the lock is waited for at most {lock_timeout}, then retried later");
    let step = |what: String, sql: Vec<String>, lock: &str, blocks: &str, bound: &str, why: &str| Step {
        phase: Phase::Constrain,
        what,
        transaction: !sql.iter().any(|s| s.contains(" concurrently ")),
        sql,
        lock: lock.replace("{}", &shape.target.to_string()),
        blocks: blocks.into(),
        bound: bound.into(),
        why: why.into(),
    };
    let mut out = Vec::new();
    let scan = "one scan of the table; nobody waits for it";
    for index in &spec.indexes {
        out.push(step(
            format!("build index {}", index.name),
            vec![create_index(shape, index)],
            "SHARE UPDATE EXCLUSIVE on {}",
            "other DDL and VACUUM on the table",
            "two scans of the table, and every transaction older than it",
            "before the foreign key, so that deleting a referenced row does not scan the table",
        ));
    }
    for key in &spec.foreign_keys {
        out.push(step(
            format!("add foreign key {} without checking", key.name),
            vec![add_foreign_key(shape, key)],
            &format!("SHARE ROW EXCLUSIVE on {{}} and {}", key.references),
            "writes on both tables",
            &short,
            "NOT VALID: new rows are checked, old ones later",
        ));
        out.push(step(
            format!("validate foreign key {}", key.name),
            vec![format!("alter table {target} validate constraint {}", key.name.sql())],
            "SHARE UPDATE EXCLUSIVE on {}",
            "other DDL and VACUUM on the table",
            scan,
            "checks the old rows without blocking writes",
        ));
    }
    for (i, column) in shape.columns.iter().enumerate().filter(|(_, c)| c.not_null) {
        let check = not_null_check(shape, i);
        let name = column.name.sql();
        out.push(step(
            format!("add check that {} is not null, without checking", column.name),
            vec![format!("alter table {target} add constraint {} check ({name} is not null) not valid", check.sql())],
            "ACCESS EXCLUSIVE on {}",
            "everything on the table",
            &short,
            "NOT VALID: no scan under the lock",
        ));
        out.push(step(
            format!("validate that {} is not null", column.name),
            vec![format!("alter table {target} validate constraint {}", check.sql())],
            "SHARE UPDATE EXCLUSIVE on {}",
            "other DDL and VACUUM on the table",
            scan,
            "the scan that SET NOT NULL would do under ACCESS EXCLUSIVE",
        ));
        out.push(step(
            format!("set {} not null", column.name),
            vec![
                format!("alter table {target} alter column {name} set not null"),
                format!("alter table {target} drop constraint {}", check.sql()),
            ],
            "ACCESS EXCLUSIVE on {}",
            "everything on the table",
            &short,
            "skips its scan because of the validated check, which is not needed any more",
        ));
    }
    let columns: Vec<String> = shape.columns.iter().map(|c| c.name.sql()).collect();
    out.push(step(
        "analyze the new columns".into(),
        vec![format!("analyze {target} ({})", columns.join(", "))],
        "SHARE UPDATE EXCLUSIVE on {}",
        "other DDL and VACUUM on the table",
        "a sample of the table",
        "with statistics that still say \"all NULL\", the new policies would get bad plans",
    ));
    out
}

/// Policies and functions, in one transaction (I7).
pub fn flip(spec: &JobSpec, lock_timeout: &str) -> Option<Step> {
    let target = spec.target.table.sql();
    let mut sql: Vec<String> = spec.functions.iter().flat_map(|f| f.statements.iter().cloned()).collect();
    if let Some(policies) = &spec.policies {
        sql.push(format!("lock table {target} in access exclusive mode"));
        for name in &policies.replace {
            sql.push(format!("drop policy {} on {target}", quote(name)));
        }
        for policy in &policies.create {
            sql.push(create_policy(&target, policy));
        }
    }
    if sql.is_empty() {
        return None;
    }
    Some(Step {
        phase: Phase::Flip,
        what: "replace functions and policies".into(),
        sql,
        transaction: true,
        lock: format!("ACCESS EXCLUSIVE on {}", spec.target.table),
        blocks: "everything on the table".into(),
        bound: format!("a few milliseconds; the lock is waited for at most {lock_timeout}, then retried later"),
        why: "one transaction: there is no moment without policies, and none with both sets".into(),
    })
}

/// `create index concurrently ...`.
pub fn create_index(shape: &Shape, index: &Index) -> String {
    let columns: Vec<String> = index.columns.iter().map(Ident::sql).collect();
    let unique = if index.unique { "unique " } else { "" };
    let predicate = index.predicate.as_ref().map_or(String::new(), |p| format!(" where ({p})"));
    format!(
        "create {unique}index concurrently {} on {} using {} ({}){predicate}",
        index.name.sql(),
        shape.target.sql(),
        index.method.sql(),
        columns.join(", ")
    )
}

fn add_foreign_key(shape: &Shape, key: &ForeignKey) -> String {
    let list = |names: &[Ident]| names.iter().map(Ident::sql).collect::<Vec<_>>().join(", ");
    let action = |a: Action| match a {
        Action::NoAction => "no action",
        Action::Restrict => "restrict",
        Action::Cascade => "cascade",
        Action::SetNull => "set null",
    };
    format!(
        "alter table {} add constraint {} foreign key ({}) references {} ({}) on update {} on delete {} not valid",
        shape.target.sql(),
        key.name.sql(),
        list(&key.columns),
        key.references.sql(),
        list(&key.referenced_columns),
        action(key.on_update),
        action(key.on_delete)
    )
}

/// Name of the helper check for the column with this number.
pub fn not_null_check(shape: &Shape, i: usize) -> Ident {
    // Job names are short enough for this to fit; the expectation is in job::validate.
    Ident::new(format!("backfilld_{}_nn{i}", shape.job)).unwrap_or_else(|e| unreachable!("{e}"))
}

/// `create policy ...`.
pub fn create_policy(target: &str, policy: &Policy) -> String {
    let roles: Vec<String> =
        policy.roles.iter().map(|r| if r.as_str() == "public" { "public".to_owned() } else { r.sql() }).collect();
    let clause =
        |keyword: &str, text: &Option<String>| text.as_ref().map_or(String::new(), |t| format!(" {keyword} ({t})"));
    format!(
        "create policy {} on {target} as {} for {} to {}{}{}",
        policy.name.sql(),
        if policy.permissive { "permissive" } else { "restrictive" },
        policy.command.sql(),
        roles.join(", "),
        clause("using", &policy.using),
        clause("with check", &policy.check)
    )
}

/// Quotes a name of any length, as the catalog has it.
pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
