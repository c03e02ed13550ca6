//! The operator's own queries.

use tokio_postgres::Client;

use super::signal::Reading;
use crate::error::{Error, Result};
use crate::job::throttle::Query;

/// Runs one.
///
/// # Errors
/// What the server says; input if it gives something else than one number or boolean.
pub async fn ask(client: &Client, query: &Query) -> Result<Reading> {
    let signal = format!("query_{}", query.name);
    let bad = |what: String| Error::input(format!("throttle query {}: {what}", query.name));
    let sql = format!("select q.v::text, pg_typeof(q.v)::text from (\n{}\n) as q(v) limit 2", query.sql);
    let rows =
        client.query(&sql, &[]).await.map_err(|e| Error::from(e).context(format!("throttle query {}", query.name)))?;
    let [row] = rows.as_slice() else {
        return Err(bad(format!("expected one row, found {}", if rows.is_empty() { "none" } else { "several" })));
    };
    let (value, kind): (Option<String>, String) = (row.get(0), row.get(1));
    let value = value.ok_or_else(|| bad("expected a value, found NULL".into()))?;
    match (kind.as_str(), query.max) {
        ("boolean", None) if value == "true" => Ok(Reading::at_most(&signal, 0.0, 1.0, "")),
        ("boolean", None) => Ok(Reading::no(&signal, "the query says no")),
        ("boolean", Some(_)) => Err(bad("it gives a boolean, which has no max".into())),
        ("smallint" | "integer" | "bigint" | "real" | "double precision" | "numeric", Some(max)) => {
            let number: f64 = value.parse().map_err(|_| bad("expected a finite number".into()))?;
            match number.is_finite() {
                true => Ok(Reading::at_most(&signal, number, max, "")),
                false => Err(bad("expected a finite number".into())),
            }
        }
        ("smallint" | "integer" | "bigint" | "real" | "double precision" | "numeric", None) => {
            Err(bad("it gives a number: say with max where batches have to wait".into()))
        }
        (other, _) => Err(bad(format!("expected a number or a boolean, found {other}"))),
    }
}
