//! What the application's list costs under row level security, and whether the column is right.

use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::error::{Error, Result};

/// The newest messages of whoever asks: nothing but the policies restricts it.
pub const LIST_SQL: &str = "select id, conversation_id, role, content, created_at \
     from public.messages order by created_at desc limit 50";

/// An odd number, so that the median is one of them; the first run fills caches and is not counted.
const RUNS: usize = 5;

/// A user whose list is measured.
#[derive(Debug, Clone)]
pub struct Owner {
    /// `few`, `some` or `most` messages.
    pub label: &'static str,
    /// `auth.users.id`.
    pub auth_user_id: Uuid,
}

/// What one owner's list took.
#[derive(Debug, Clone, Serialize)]
pub struct ListTiming {
    /// `few`, `some` or `most` messages.
    pub owner: &'static str,
    /// The owner's messages.
    pub messages: u64,
    /// Planning and execution, milliseconds, median.
    pub time_ms: f64,
    /// Pages of 8 kB touched.
    pub buffers: u64,
    /// Plan nodes, outermost first.
    pub plan: Vec<String>,
}

/// Owners with few (first decile), a median number of, and the most messages, among those who do not leave.
///
/// # Errors
/// What the server says; no owner with messages.
pub async fn owners(admin: &Client) -> Result<Vec<Owner>> {
    let sql = "with owned as (
          select c.auth_user_id as id, count(*) as messages
          from public.messages m
          join public.conversations c on c.id = m.conversation_id
          join auth.users u on u.id = c.auth_user_id and u.email not like 'leaving-%'
          group by c.auth_user_id
        ),
        ranked as (select id, row_number() over (order by messages, id) as n, count(*) over () as total from owned)
        select id from ranked where n in (1 + total / 10, 1 + total / 2, total) order by n";
    let rows = admin.query(sql, &[]).await?;
    if rows.is_empty() {
        return Err(Error::refused("nobody owns a message, so there is no list to measure"));
    }
    ["few", "some", "most"]
        .into_iter()
        .zip(&rows)
        .map(|(label, row)| Ok(Owner { label, auth_user_id: row.try_get(0)? }))
        .collect()
}

/// Runs [`LIST_SQL`] as each of the owners. `app` logs in as [`crate::demo::sample::AUTHENTICATOR`].
///
/// # Errors
/// What the server says.
pub async fn list_times(app: &Client, owners: &[Owner]) -> Result<Vec<ListTiming>> {
    let mut out = Vec::new();
    for owner in owners {
        app.batch_execute(&format!(
            "begin; set local role authenticated; set local statement_timeout = '60s'; \
             select set_config('request.jwt.claims', '{{\"sub\":\"{}\",\"role\":\"authenticated\"}}', true)",
            owner.auth_user_id
        ))
        .await?;
        let messages: i64 = app.query_one("select count(*) from public.messages", &[]).await?.try_get(0)?;
        let explain = format!("explain (analyze, buffers, format json) {LIST_SQL}");
        let mut runs = Vec::new();
        for _ in 0..=RUNS {
            runs.push(app.query_one(&explain, &[]).await?.try_get::<_, Value>(0)?);
        }
        app.batch_execute("commit").await?;
        runs.remove(0);
        let time = |run: &Value| number(&run[0]["Planning Time"]) + number(&run[0]["Execution Time"]);
        runs.sort_by(|a, b| time(a).total_cmp(&time(b)));
        let median = &runs[RUNS / 2];
        let plan = &median[0]["Plan"];
        let mut nodes = Vec::new();
        collect_nodes(plan, &mut nodes);
        out.push(ListTiming {
            owner: owner.label,
            messages: messages.unsigned_abs(),
            time_ms: time(median),
            buffers: (number(&plan["Shared Hit Blocks"]) + number(&plan["Shared Read Blocks"])) as u64,
            plan: nodes,
        });
    }
    Ok(out)
}

/// Rows without a value, and rows whose value is not their conversation's; `None` if there is no such column.
///
/// # Errors
/// What the server says.
pub async fn nulls_and_drift(admin: &Client) -> Result<Option<(u64, u64)>> {
    let sql = "select exists (select from pg_attribute where attrelid = 'public.messages'::regclass \
               and attname = 'auth_user_id' and not attisdropped)";
    if !admin.query_one(sql, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(None);
    }
    let sql = "select count(*) filter (where m.auth_user_id is null), \
                 count(*) filter (where m.auth_user_id is distinct from c.auth_user_id) \
               from public.messages m left join public.conversations c on c.id = m.conversation_id";
    let row = admin.query_one(sql, &[]).await?;
    Ok(Some((row.try_get::<_, i64>(0)?.unsigned_abs(), row.try_get::<_, i64>(1)?.unsigned_abs())))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn collect_nodes(plan: &Value, nodes: &mut Vec<String>) {
    if let Some(kind) = plan["Node Type"].as_str() {
        nodes.push(match plan["Index Name"].as_str().or(plan["Relation Name"].as_str()) {
            Some(on) => format!("{kind} on {on}"),
            None => kind.to_owned(),
        });
    }
    plan["Plans"].as_array().into_iter().flatten().for_each(|child| collect_nodes(child, nodes));
}
