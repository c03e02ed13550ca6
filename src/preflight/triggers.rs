//! What an UPDATE of the target sets off: triggers, rules, publications. Each must have an answer in the job (I12).

use super::check::{Check, Tally};
use super::probe::{Probe, text};
use crate::error::Result;
use crate::job::spec::{TARGET_ALIAS, TriggerMode};
use crate::job::{JobSpec, lex};
use crate::ledger::job as jobs;
use crate::phase::Status as JobStatus;
use crate::plan::shape::SYNC_SCHEMA;
use crate::plan::{Facts, Shape};

/// `tgtype` bits (src/include/catalog/pg_trigger.h).
const ROW: i16 = 1;
const BEFORE: i16 = 2;
const INSERT: i16 = 4;
const UPDATE: i16 = 16;

/// An application's trigger on the target.
struct Trigger {
    name: String,
    /// `tgtype`.
    kind: i16,
    /// `tgenabled`: O origin, A always, R replica, D disabled.
    enabled: String,
    function: String,
    /// Columns of UPDATE OF; empty for any.
    columns: Vec<String>,
}

/// The checks of this file.
///
/// # Errors
/// The connection is gone.
pub async fn checks(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Check>> {
    let found = triggers(p, facts).await;
    let jobs = other_jobs(p, facts).await;
    let both = found.and_then(|t| Ok(vec![trigger_order(facts, &t, &jobs?), side_effects(p, facts, &t)]));
    let mut out = p.settle_all(&["trigger_order", "side_effects"], both)?;
    out.push(p.settle("rules", rules(p, facts).await)?);
    out.push(p.settle("publications", publications(p, facts).await)?);
    Ok(out)
}

/// All but internal ones and those of backfilld, of this job or another.
async fn triggers(p: &Probe<'_>, facts: &Facts) -> Result<Vec<Trigger>> {
    let rows = p
        .rows(
            "select t.tgname::text, t.tgtype, t.tgenabled::text, format('%I.%I', n.nspname, f.proname),
                    array(select a.attname::text from unnest(t.tgattr::int2[]) as k(attnum)
                          join pg_attribute a on a.attrelid = t.tgrelid and a.attnum = k.attnum)
             from pg_trigger t join pg_proc f on f.oid = t.tgfoid join pg_namespace n on n.oid = f.pronamespace
             where t.tgrelid = $1::text::oid and not t.tgisinternal and n.nspname <> $2
             order by t.tgname collate \"C\"",
            &[text(&facts.target.oid.to_string()), text(&SYNC_SCHEMA)],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|r| Trigger { name: r.get(0), kind: r.get(1), enabled: r.get(2), function: r.get(3), columns: r.get(4) })
        .collect())
}

impl Trigger {
    fn line(&self) -> String {
        let state = match self.enabled.as_str() {
            "A" => ", always",
            "R" => ", in replica mode only",
            "D" => ", disabled",
            _ => "",
        };
        let level = if self.kind & ROW != 0 { "row" } else { "statement" };
        let of = if self.columns.is_empty() { String::new() } else { format!(" of {}", self.columns.join(", ")) };
        format!("{} ({level} trigger on update{of}{state}) calls {}()", self.name, self.function)
    }
}

/// Other jobs on this target that would derive in the wrong order: one has to fill a column before the other reads it, and their triggers
/// fire in the order of the jobs' names.
async fn other_jobs(p: &Probe<'_>, facts: &Facts) -> Result<Vec<String>> {
    let there = "select to_regclass('backfilld.job') is not null";
    if !p.one(there, &[]).await?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let ours = facts.shape.trigger("upd");
    let fills: Vec<&str> = facts.shape.columns.iter().map(|c| c.name.as_str()).collect();
    let reads = facts.shape.reads(TARGET_ALIAS);
    let mut out = Vec::new();
    for row in jobs::all(p.client).await?.into_iter().filter(|j| j.status != JobStatus::RolledBack) {
        let Ok(spec) = serde_json::from_value::<JobSpec>(row.spec) else { continue };
        if spec.name == p.spec.name || spec.target.table != p.spec.target.table {
            continue;
        }
        let theirs = Shape { job: spec.name.clone(), ..facts.shape.clone() }.trigger("upd");
        for column in spec.columns.iter().filter(|c| reads.contains(&c.name) && theirs > ours) {
            out.push(format!(
                "job {} fills {}, which this job reads, and its triggers fire after ours",
                spec.name, column.name
            ));
        }
        let values = spec.columns.iter().flat_map(|c| lex::references(&c.value, &[TARGET_ALIAS]).unwrap_or_default());
        let joined = spec.source.iter().flat_map(|s| s.on.values()).filter(|r| r.alias.as_str() == TARGET_ALIAS);
        let read: Vec<String> = values.map(|r| r.column).chain(joined.map(|r| r.column.as_str().to_owned())).collect();
        for column in fills.iter().filter(|c| read.iter().any(|r| r == *c) && ours > theirs) {
            out.push(format!(
                "job {} reads {column}, which this job fills, and its triggers fire before ours",
                spec.name
            ));
        }
    }
    Ok(out)
}

/// BEFORE triggers fire in the order of their names; one behind ours could change what ours derived from (hazard 12).
fn trigger_order(facts: &Facts, triggers: &[Trigger], jobs: &[String]) -> Check {
    if let Some(first) = jobs.first() {
        return Check::fail("trigger_order", first.clone())
            .count(jobs.len() as i64)
            .hint("give this job another name: triggers fire in the order of the jobs' names, and what is read has to be filled first");
    }
    let late: Vec<String> = triggers
        .iter()
        .filter(|t| t.kind & ROW != 0 && t.kind & BEFORE != 0 && t.kind & (INSERT | UPDATE) != 0 && t.enabled != "D")
        .filter(|t| {
            let ours = if t.kind & UPDATE != 0 { facts.shape.trigger("upd") } else { facts.shape.trigger("ins") };
            t.name > ours || t.kind & INSERT != 0 && t.name > facts.shape.trigger("ins")
        })
        .map(|t| t.name.clone())
        .collect();
    if late.is_empty() {
        return Check::pass("trigger_order", "no BEFORE trigger of the target sorts behind ours");
    }
    let renames: Vec<String> = late
        .iter()
        .map(|t| {
            let new = format!("a_{t}");
            format!(
                "alter trigger {} on {} rename to {}",
                super::privileges::quote(t),
                facts.target.name.sql(),
                super::privileges::quote(new.get(..63).unwrap_or(&new))
            )
        })
        .collect();
    Check::fail("trigger_order", format!("BEFORE triggers that sort behind ours: {}", late.join(", ")))
        .count(late.len() as i64)
        .samples(late)
        .hint(format!("they could change a row after its value was derived: {}", renames.join("; ")))
}

/// Every UPDATE trigger, and whether the job says what becomes of it in batches.
fn side_effects(p: &Probe<'_>, facts: &Facts, triggers: &[Trigger]) -> Check {
    let name = "side_effects";
    let update: Vec<&Trigger> = triggers.iter().filter(|t| t.kind & UPDATE != 0).collect();
    let lines: Vec<String> = update.iter().map(|t| t.line()).collect();
    if update.is_empty() {
        return Check::pass(name, "the target has no UPDATE trigger");
    }
    // UPDATE OF goes by the SET list, which holds nothing but our columns.
    let concerns = |t: &&&Trigger| {
        t.columns.is_empty() || t.columns.iter().any(|c| facts.shape.columns.iter().any(|own| own.name.as_str() == c))
    };
    let live: Vec<&&Trigger> = update.iter().filter(concerns).filter(|t| t.enabled != "D").collect();
    let names = |list: &[&&Trigger]| list.iter().map(|t| t.name.as_str()).collect::<Vec<_>>().join(", ");
    let propagate = "; they do fire when a change of a source row reaches its target rows";
    let check = match p.spec.side_effects.triggers {
        None if live.is_empty() => Check::pass(name, "no UPDATE trigger that batches would fire"),
        None => Check::fail(name, format!("batches would fire {} for every row", names(&live)))
            .count(live.len() as i64)
            .samples(live.iter().map(|t| t.name.clone()).collect())
            .hint(
                "say in the job what is to happen: side_effects.triggers = \"skip\" (they do not fire in batches) or \
                 \"fire\" (once per row: updated_at moves, broadcasts go out)",
            ),
        Some(TriggerMode::Fire) => Check::pass(
            name,
            format!("the job lets batches fire {}", if live.is_empty() { "none".into() } else { names(&live) }),
        ),
        Some(TriggerMode::Skip) => {
            let stubborn: Vec<&&Trigger> = live
                .iter()
                .filter(|t| matches!(t.enabled.as_str(), "A" | "R"))
                .filter(|t| !p.spec.side_effects.may_fire.iter().any(|m| m.as_str() == t.name))
                .copied()
                .collect();
            if stubborn.is_empty() {
                let skipped = live.iter().filter(|t| t.enabled == "O").count();
                let tail = if facts.shape.joins.is_empty() || skipped == 0 { "" } else { propagate };
                Check::pass(name, format!("batches skip {skipped} UPDATE trigger(s){tail}"))
            } else {
                Check::fail(
                    name,
                    format!("{} fire(s) in replica mode, too, so batches cannot skip it", names(&stubborn)),
                )
                .count(stubborn.len() as i64)
                .samples(stubborn.iter().map(|t| t.name.clone()).collect())
                .hint(format!(
                    "accept that in side_effects.may_fire, or make it ordinary: alter table {} enable trigger ...",
                    facts.target.name.sql()
                ))
            }
        }
    };
    check.details(lines)
}

/// A rule rewrites our statement: with INSTEAD it swallows the update and reports 0 rows (hazard 18).
async fn rules(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let rows = p
        .rows(
            "select rulename::text, ev_type::text, is_instead from pg_rewrite
             where ev_class = $1::text::oid and ev_enabled <> 'D' and rulename <> '_RETURN' order by 1",
            &[text(&facts.target.oid.to_string())],
        )
        .await?;
    let mut tally = Tally::default();
    let mut names = Vec::new();
    for row in &rows {
        let (name, event, instead): (String, String, bool) = (row.get(0), row.get(1), row.get(2));
        let event = match event.as_str() {
            "2" => "UPDATE",
            "3" => "INSERT",
            _ => "DELETE",
        };
        let kind = if instead { "INSTEAD" } else { "ALSO" };
        let what = format!("rule {name} on {event}, {kind}");
        if event == "UPDATE" {
            tally.fail(
                what,
                "rules rewrite the batches' statements; this is not supported: turn the rule into a trigger",
            );
        } else {
            tally.warn(
                what,
                "batches are not concerned; but what the rule redirects, our triggers on the target do not see",
            );
        }
        names.push(name);
    }
    Ok(tally.check("rules", "the target has no rules").samples(names))
}

/// Every updated row is sent to every subscriber (hazards 26, 28, 29).
async fn publications(p: &Probe<'_>, facts: &Facts) -> Result<Check> {
    let name = "publications";
    let oid = facts.target.oid.to_string();
    // Row filters and column lists are from 15; read by key, so that 14 has none.
    let rows = p
        .rows(
            "select p.pubname::text, p.puballtables, to_jsonb(r) ->> 'prqual' is not null,
                    to_jsonb(r) ->> 'prattrs' is not null, p.pubupdate
             from pg_publication p left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = $1::text::oid
             where p.pubname in (select t.pubname from pg_publication_tables t where t.schemaname = $2 and t.tablename = $3)
             order by 1",
            &[text(&oid), text(&facts.target.name.schema.as_str()), text(&facts.target.name.name.as_str())],
        )
        .await?;
    let mut tally = Tally::default();
    let mut lines = Vec::new();
    for row in &rows {
        let (publication, all, filter, list, update): (String, bool, bool, bool, bool) =
            (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
        let mut notes = Vec::new();
        notes.extend(all.then_some("all tables"));
        notes.extend(filter.then_some("row filter"));
        notes.extend(list.then_some("column list"));
        notes.extend((!update).then_some("no updates"));
        lines.push(format!(
            "{publication}{}",
            if notes.is_empty() { String::new() } else { format!(" ({})", notes.join(", ")) }
        ));
        let accepted = p.spec.side_effects.publications.iter().any(|a| a.as_str() == publication);
        if update && !accepted {
            let column = if list { "" } else { "; subscribers need the new column first, or they stop (hazard 28)" };
            tally.fail(
                format!("publication {publication} would carry every updated row to its subscribers"),
                format!(
                    "accept it with side_effects.publications = [\"{publication}\"], or take the table out{column}"
                ),
            );
        }
    }
    for accepted in &p.spec.side_effects.publications {
        if !rows.iter().any(|r| r.get::<_, String>(0) == accepted.as_str()) {
            tally.warn(
                format!("publication {accepted} of the job does not publish the target"),
                "remove it from side_effects.publications",
            );
        }
    }
    if rows.iter().any(|r| r.get::<_, bool>(4)) && !replica_identity(p, &oid).await? {
        tally.fail(
            format!("{} is published and has no replica identity", facts.target.name),
            "every UPDATE fails with 55000: alter table ... replica identity, or add a primary key",
        );
    }
    let ok = match rows.len() {
        0 => "the target is in no publication".to_owned(),
        n => format!("the job accepts {n} publication(s)"),
    };
    Ok(tally.check(name, ok).details(lines))
}

async fn replica_identity(p: &Probe<'_>, oid: &String) -> Result<bool> {
    let sql = "select case c.relreplident when 'f' then true
                 when 'd' then exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary and i.indimmediate)
                 when 'i' then exists (select from pg_index i where i.indrelid = c.oid and i.indisreplident)
                 else false end
               from pg_class c where c.oid = $1::text::oid";
    Ok(p.one(sql, &[text(oid)]).await?.get(0))
}
