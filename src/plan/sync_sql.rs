//! The sync triggers (I1, I3): SQL for functions and triggers that keep every row version derived, whoever writes.
//!
//! Target: a BEFORE trigger each for INSERT and UPDATE derives the value from a plain read and overrides what the client
//! sent; a deferred constraint trigger locks the source rows at commit, reads again and corrects. Sources: AFTER triggers
//! propagate a change to the target rows. The contract, case by case, is in docs/trigger-contract.md.

use super::shape::{SEARCH_PATH, Shape};
use super::sync_body;
use crate::job::spec::TARGET_ALIAS;
use crate::pg::ident::Ident;

/// A function of ours.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncFunction {
    /// `"schema"."name"`.
    pub name: String,
    /// `create or replace function ...`.
    pub create: String,
}

/// A trigger of ours.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncTrigger {
    /// Name, unquoted.
    pub name: String,
    /// The table it is on, quoted.
    pub table: String,
    /// The function it calls, quoted, without parentheses.
    pub function: String,
    /// `create [constraint] trigger ...`.
    pub create: String,
}

impl SyncTrigger {
    /// `pg_trigger.tgtype`.
    pub fn kind(&self) -> i16 {
        // Names are quoted, so these words are the statement's own.
        let head = self.create.split(" on ").next().unwrap_or_default();
        let bit = |word: &str, bit: i16| if head.split(' ').any(|w| w == word) { bit } else { 0 };
        let row = i16::from(self.create.contains(" for each row "));
        let events = bit("insert", 4) | bit("delete", 8) | bit("update", 16) | bit("truncate", 32);
        row | bit("before", 2) | events
    }

    /// Runs at commit.
    pub fn is_deferred(&self) -> bool {
        self.create.contains(" deferrable initially deferred ")
    }

    /// Has a WHEN.
    pub fn is_conditional(&self) -> bool {
        self.create.contains(" when (")
    }
}

/// All functions, in order of creation.
pub fn functions(shape: &Shape) -> Vec<SyncFunction> {
    let mut out = vec![function(shape, "derive", &sync_body::derive(shape))];
    if !shape.joins.is_empty() {
        out.push(function(shape, "settle", &sync_body::settle(shape)));
    }
    for k in 0..shape.joins.len() {
        out.push(function(shape, &format!("s{}_propagate", k + 1), &sync_body::propagate(shape, k)));
    }
    out
}

/// All triggers, target first. They are created in one transaction with the column.
pub fn triggers(shape: &Shape) -> Vec<SyncTrigger> {
    let target = shape.target.sql();
    let derive = shape.function("derive");
    let settle = shape.function("settle");
    let mut out = Vec::new();
    let mut add = |suffix: &str, kind: &str, event: &str, table: &str, rest: String| {
        let name = shape.trigger(suffix);
        out.push(SyncTrigger {
            create: format!("create {kind}trigger {} {event} on {table} {rest}()", quote(&name)),
            function: rest.rsplit("execute function ").next().unwrap_or_default().to_owned(),
            name,
            table: table.to_owned(),
        });
    };
    add("ins", "", "before insert", &target, format!("for each row execute function {derive}"));
    let when = shape.exemption().map_or(String::new(), |e| format!("when (not ({e})) "));
    add("upd", "", "before update", &target, format!("for each row {when}execute function {derive}"));
    if !shape.joins.is_empty() {
        let row = "deferrable initially deferred for each row";
        add("settle_ins", "constraint ", "after insert", &target, format!("{row} execute function {settle}"));
        let when = settle_update(shape);
        add(
            "settle_upd",
            "constraint ",
            "after update",
            &target,
            format!("{row} when ({when}) execute function {settle}"),
        );
    }
    for (k, join) in shape.joins.iter().enumerate() {
        let call = format!("execute function {}", shape.function(&format!("s{}_propagate", k + 1)));
        let table = join.table.sql();
        let when = changed(shape, join.alias.as_str(), &shape.reads(join.alias.as_str())).join(" or ");
        add(&format!("s{}_upd", k + 1), "", "after update", &table, format!("for each row when ({when}) {call}"));
        if !join.covered {
            let row = format!("for each row {call}");
            add(&format!("s{}_row", k + 1), "", "after insert or delete", &table, row);
            add(&format!("s{}_trn", k + 1), "", "after truncate", &table, format!("for each statement {call}"));
        } else if join.replaceable {
            let row = format!("deferrable initially deferred for each row {call}");
            add(&format!("s{}_del", k + 1), "constraint ", "after delete", &table, row);
        }
    }
    out
}

/// When an updated row has to be settled. Locks only for a key that is new to the row: with the key unchanged,
/// propagation waits for this row anyway. That holds where the value was read after the row was locked; in an older
/// snapshot it may have been read before a change that had nothing to write to this row, so there every change of what
/// matters is settled, which raises 40001 if the source has changed since.
fn settle_update(shape: &Shape) -> String {
    let mut keys: Vec<Ident> = shape.ref_columns(TARGET_ALIAS);
    keys.extend(shape.key.iter().map(|k| k.name.clone()));
    keys.sort();
    keys.dedup();
    let mut any: Vec<Ident> = shape.reads(TARGET_ALIAS).into_iter().filter(|c| !keys.contains(c)).collect();
    any.extend(shape.columns.iter().map(|c| c.name.clone()));
    let mut out = changed(shape, TARGET_ALIAS, &keys);
    out.push(format!("(({}) and {})", changed(shape, TARGET_ALIAS, &any).join(" or "), sync_body::STRICT));
    out.join(" or ")
}

fn changed(shape: &Shape, alias: &str, columns: &[Ident]) -> Vec<String> {
    columns.iter().map(|c| shape.changed(alias, c)).collect()
}

/// The body in a `create` of [`functions`], as `pg_proc.prosrc` has it.
pub fn body(create: &str) -> Option<&str> {
    let (_, rest) = create.split_once("\nas $")?;
    let (tag, rest) = rest.split_once('$')?;
    rest.strip_suffix(&format!("${tag}$"))
}

/// `alter table ... enable always trigger ...`: writers under `session_replication_role = replica` and logical apply
/// skip ordinary triggers (hazard 13).
pub fn enable_always(trigger: &SyncTrigger) -> String {
    format!("alter table {} enable always trigger {}", trigger.table, quote(&trigger.name))
}

/// `drop trigger if exists ...`.
pub fn drop_trigger(trigger: &SyncTrigger) -> String {
    format!("drop trigger if exists {} on {}", quote(&trigger.name), trigger.table)
}

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// What a session may set that changes the text of a value. A conversion to text must give the same in every session, or
/// each writer would store its own idea of the value.
const FORMATS: &str = "\nset timezone = 'UTC' set datestyle = 'ISO, YMD' set intervalstyle = 'postgres'\n\
                       set extra_float_digits = 1 set bytea_output = 'hex'";

/// Every setting that a function of ours may have, in small letters.
pub const SETTINGS: &[&str] =
    &["search_path", "row_security", "timezone", "datestyle", "intervalstyle", "extra_float_digits", "bytea_output"];

fn function(shape: &Shape, suffix: &str, body: &str) -> SyncFunction {
    let name = shape.function(suffix);
    let mut tag = "backfilld".to_owned();
    while body.contains(&format!("${tag}")) {
        tag.push('_');
    }
    let formats = if shape.columns.iter().any(|c| c.may_raise()) { FORMATS } else { "" };
    let create = format!(
        "create or replace function {name}() returns trigger\n\
         language plpgsql security definer\n\
         set search_path = {SEARCH_PATH} set row_security = off{formats}\n\
         as ${tag}$\n#variable_conflict use_column\n{body}\n${tag}$"
    );
    SyncFunction { name, create }
}
