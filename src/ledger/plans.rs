//! Plans of the application's queries, before and after the flip.

use serde::Serialize;
use tokio_postgres::GenericClient;

use crate::error::Result;

/// On which side of the flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Under the old policies.
    Before,
    /// Under the new ones.
    After,
}

impl Stage {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
        }
    }
}

/// One query, for one owner, on one side of the flip.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryPlan {
    /// Which side.
    pub stage: Stage,
    /// Name of the query in the job.
    pub query: String,
    /// Role as which it ran.
    pub role: String,
    /// `small`, `median` or `large`.
    pub owner: String,
    /// The owner's value of the job's first column.
    pub owner_key: String,
    /// Target rows with that value.
    pub owner_rows: i64,
    /// Planning and execution, milliseconds, median.
    pub time_ms: Option<f64>,
    /// Blocks touched.
    pub buffers: Option<i64>,
    /// Nodes, outermost first, indented by depth.
    pub nodes: Vec<String>,
    /// Why it could not be measured; empty: it could.
    pub error: String,
}

/// Stores one, in place of an earlier one.
///
/// # Errors
/// Whatever the server says.
pub async fn put(client: &impl GenericClient, job: &str, p: &QueryPlan) -> Result<()> {
    let nodes = serde_json::to_value(&p.nodes).unwrap_or_default();
    client
        .execute(
            "insert into backfilld.query_plan (job, stage, query, role, owner, owner_key, owner_rows, time_ms, buffers, nodes, error)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
             on conflict (job, stage, query, owner) do update set role = excluded.role, owner_key = excluded.owner_key,
               owner_rows = excluded.owner_rows, time_ms = excluded.time_ms, buffers = excluded.buffers,
               nodes = excluded.nodes, error = excluded.error, at = clock_timestamp()",
            &[
                &job,
                &p.stage.as_str(),
                &p.query,
                &p.role,
                &p.owner,
                &p.owner_key,
                &p.owner_rows,
                &p.time_ms,
                &p.buffers,
                &nodes,
                &p.error,
            ],
        )
        .await?;
    Ok(())
}

/// All of a job's: by query, owner (small first) and stage.
///
/// # Errors
/// Whatever the server says.
pub async fn all(client: &impl GenericClient, job: &str) -> Result<Vec<QueryPlan>> {
    let rows = client
        .query(
            "select stage = 'before', query, role, owner, owner_key, owner_rows, time_ms, buffers, nodes, error
             from backfilld.query_plan where job = $1
             order by query, array_position(array['small', 'median', 'large'], owner), stage desc",
            &[&job],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|r| QueryPlan {
            stage: if r.get(0) { Stage::Before } else { Stage::After },
            query: r.get(1),
            role: r.get(2),
            owner: r.get(3),
            owner_key: r.get(4),
            owner_rows: r.get(5),
            time_ms: r.get(6),
            buffers: r.get(7),
            nodes: serde_json::from_value(r.get(8)).unwrap_or_default(),
            error: r.get(9),
        })
        .collect())
}
