//! Whether the sync triggers are what Expand made: the proof rests on them (I1).

use tokio_postgres::GenericClient;

use crate::error::Result;
use crate::plan::shape::SEARCH_PATH;
use crate::plan::{Shape, sync_sql};

/// What is wrong with them, a trigger a line; empty: all are there, always enabled, and do what the plan says.
///
/// # Errors
/// Whatever the server says.
pub async fn broken(client: &impl GenericClient, shape: &Shape) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for trigger in sync_sql::triggers(shape) {
        let name = &trigger.name;
        // In partitions of a partitioned source there is a copy of each row trigger.
        let rows = client
            .query(
                "select c.relname::text, t.tgenabled::text, t.tgtype & 1 = 1,
                        t.tgfoid = to_regprocedure($3) and t.tgtype = $4 and (t.tgdeferrable and t.tginitdeferred) = $5
                          and (t.tgqual is not null) = $6 and cardinality(t.tgattr::int2[]) = 0
                 from (select to_regclass($1)::oid as oid
                       union select relid from pg_partition_tree(to_regclass($1)) where isleaf) r
                 join pg_class c on c.oid = r.oid
                 left join pg_trigger t on t.tgrelid = r.oid and t.tgname = $2 order by r.oid <> to_regclass($1)::oid",
                &[
                    &trigger.table,
                    &name,
                    &format!("{}()", trigger.function),
                    &trigger.kind(),
                    &trigger.is_deferred(),
                    &trigger.is_conditional(),
                ],
            )
            .await?;
        let row_trigger = rows.first().and_then(|r| r.get::<_, Option<bool>>(2)).unwrap_or(true);
        for (i, row) in rows.iter().enumerate().filter(|(i, _)| *i == 0 || row_trigger) {
            let table = if i == 0 { trigger.table.replace('"', "") } else { row.get(0) };
            match row.get::<_, Option<String>>(1).as_deref() {
                Some("A") if row.get::<_, Option<bool>>(3) == Some(true) => {}
                Some("A") => out.push(format!("trigger {name} on {table} is another than the plan's")),
                None => out.push(format!("trigger {name} on {table} is missing")),
                Some("D") => out.push(format!("trigger {name} on {table} is disabled")),
                Some(_) => out.push(format!("trigger {name} on {table} is not ENABLE ALWAYS")),
            }
        }
    }
    for function in sync_sql::functions(shape) {
        let row = client
            .query_opt(
                // A setting that no function of ours has is somebody's.
                "select p.prosrc, p.prosecdef and p.proowner = c.relowner
                        and p.proconfig @> array['search_path=' || $2, 'row_security=off']
                        and not exists (select from unnest(p.proconfig) as s
                                        where lower(split_part(s, '=', 1)) <> all ($3))
                 from pg_proc p, pg_class c where p.oid = to_regprocedure($1) and c.oid = to_regclass($4)",
                &[&format!("{}()", function.name), &SEARCH_PATH, &sync_sql::SETTINGS, &shape.target.sql()],
            )
            .await?;
        let name = function.name.replace('"', "");
        let Some(row) = row else {
            out.push(format!("function {name} is missing"));
            continue;
        };
        let same = sync_sql::body(&function.create) == Some(row.get(0));
        if !(same && row.get::<_, Option<bool>>(1) == Some(true)) {
            out.push(format!("function {name} is another than the plan's"));
        }
    }
    Ok(out)
}
