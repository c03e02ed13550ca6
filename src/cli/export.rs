//! `backfilld export`: the job's final schema as an ordinary migration, so that the next fresh development or CI database
//! has it too, with its way back.

use std::path::PathBuf;

use super::Global;
use crate::error::{Error, Result};
use crate::expand::snapshot::{FunctionState, Security};
use crate::job::JobSpec;
use crate::ledger::{self, job as jobs, objects};
use crate::pg::ident::literal;
use crate::plan::shape::SYNC_SCHEMA;
use crate::plan::steps::{self, quote};
use crate::plan::{Facts, Shape, batch_sql, sync_sql};

/// Options.
#[derive(clap::Args)]
pub struct ExportArgs {
    /// The job, by name or directory; it must have been started, since the way back comes from its snapshots
    job: String,
    /// Write <job>.up.sql and <job>.down.sql into this directory, rather than the first to stdout
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub async fn run(global: &Global, args: ExportArgs) -> Result<()> {
    let settings = global.settings(true)?;
    let session = super::connect(&settings, "export").await?;
    let client = &session.client;
    ledger::migrate::require(client).await?;
    let row = jobs::get(client, &super::job_name(&args.job)?).await?;
    let spec = super::started_spec(&row)?;
    let facts = Facts::read(client, &spec, false).await?;
    let policies = objects::kept(client, &row.name, "policies", &spec.target.table.to_string()).await?;
    let mut functions = Vec::new();
    for function in &spec.functions {
        let kept = objects::kept(client, &row.name, "function", &function.signature).await?;
        functions.push((function.signature.clone(), parse::<Option<FunctionState>>(kept)?.flatten()));
    }
    let (up, down) = (up(&spec, &facts.shape), down(&spec, &facts.shape, parse(policies)?, &functions));
    let Some(dir) = args.out else { return super::print(&up) };
    for (kind, text) in [("up", &up), ("down", &down)] {
        let file = dir.join(format!("{}.{kind}.sql", row.name));
        std::fs::write(&file, format!("{text}\n"))
            .map_err(|e| Error::input(format!("cannot write {}", file.display())).with_source(e))?;
        super::print(&file.display().to_string())?;
    }
    Ok(())
}

fn parse<T: serde::de::DeserializeOwned>(kept: Option<serde_json::Value>) -> Result<Option<T>> {
    kept.map(|v| serde_json::from_value(v).map_err(|e| Error::internal("snapshot").with_source(e))).transpose()
}

fn script(title: &str, statements: Vec<String>) -> String {
    let mut out = format!("-- {title}\n-- written by backfilld export; for databases without live traffic\nbegin;\n");
    for statement in statements {
        out.push_str(&statement);
        out.push_str(";\n");
    }
    out.push_str("commit;");
    out
}

fn up(spec: &JobSpec, shape: &Shape) -> String {
    let target = shape.target.sql();
    // The same names mean the same here as when the daemon ran them.
    let mut sql = vec![
        "set local search_path = pg_catalog, pg_temp".to_owned(),
        format!("create schema if not exists \"{SYNC_SCHEMA}\""),
    ];
    for (column, wanted) in shape.columns.iter().zip(&spec.columns) {
        sql.push(format!("alter table {target} add column {} {}", column.name.sql(), column.sql_type));
        if let Some(comment) = &wanted.comment {
            sql.push(format!("comment on column {target}.{} is {}", column.name.sql(), literal(comment)));
        }
    }
    for function in sync_sql::functions(shape) {
        sql.push(function.create);
        sql.push(format!("revoke all on function {}() from public", function.name));
    }
    for trigger in sync_sql::triggers(shape) {
        sql.push(trigger.create.clone());
        sql.push(sync_sql::enable_always(&trigger));
    }
    sql.push(batch_sql::fill(shape, "true"));
    // A foreign key or check on a table with pending trigger events is refused.
    sql.push("set constraints all immediate".to_owned());
    for step in steps::constrain(spec, shape, "") {
        sql.extend(step.sql.iter().map(|s| s.replace(" concurrently ", " ")));
    }
    if let Some(step) = steps::flip(spec, "") {
        sql.extend(step.sql);
    }
    script(&format!("{}: {}", spec.name, spec.description), sql)
}

fn down(
    spec: &JobSpec,
    shape: &Shape,
    policies: Option<Security>,
    functions: &[(String, Option<FunctionState>)],
) -> String {
    let target = shape.target.sql();
    let mut sql = vec!["set local search_path = pg_catalog, pg_temp".to_owned()];
    if let Some(wanted) = &spec.policies {
        sql.extend(wanted.create.iter().map(|p| format!("drop policy {} on {target}", p.name.sql())));
        for policy in policies.iter().flat_map(|s| &s.policies).filter(|p| wanted.replace.contains(&p.name)) {
            sql.extend(policy.create(&target));
        }
    }
    for (signature, state) in functions {
        match state {
            Some(state) => {
                sql.push(state.definition.trim_end().to_owned());
                let comment = state.comment.as_ref().map_or("null".to_owned(), |c| literal(c));
                sql.push(format!("comment on {} {signature} is {comment}", state.kind));
            }
            None => sql.push(format!("drop function {signature}")),
        }
    }
    sql.extend(spec.foreign_keys.iter().map(|k| format!("alter table {target} drop constraint {}", k.name.sql())));
    let schema = spec.target.table.schema.sql();
    sql.extend(spec.indexes.iter().map(|i| format!("drop index {schema}.{}", i.name.sql())));
    sql.extend(sync_sql::triggers(shape).iter().map(sync_sql::drop_trigger));
    sql.extend(sync_sql::functions(shape).iter().map(|f| format!("drop function {}()", f.name)));
    sql.extend(spec.columns.iter().map(|c| format!("alter table {target} drop column {}", quote(c.name.as_str()))));
    sql.push(format!(
        "do $$\nbegin\n  if not exists (select from pg_catalog.pg_proc where pronamespace = '{SYNC_SCHEMA}'::regnamespace) then\n    \
         drop schema \"{SYNC_SCHEMA}\";\n  end if;\nend\n$$"
    ));
    script(&format!("undo {}", spec.name), sql)
}
