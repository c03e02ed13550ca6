//! Whether the throttle's signals can be measured.

use tokio_postgres::Client;

use super::check::Check;
use super::probe::Probe;
use crate::error::Result;
use crate::job::throttle::Throttle;
use crate::throttle::probe::{QUERY_TIMEOUT, measure, operator};
use crate::throttle::signal::Reading;

/// `throttle`: measures each signal once.
///
/// # Errors
/// If the connection is lost.
pub async fn throttle(p: &Probe<'_>) -> Result<Check> {
    let name = "throttle";
    let spec = &p.spec.throttle;
    let mut bad = Vec::new();
    let mut beyond = Vec::new();
    for query in &spec.queries {
        match question(p.client, operator(p.client, query)).await? {
            Ok(reading) if reading.refuses || reading.observed > reading.threshold => beyond.push(reading.text()),
            Ok(_) => {}
            Err(e) => bad.push(e.line()),
        }
    }
    let own = Throttle { queries: Vec::new(), ..spec.clone() };
    match question(p.client, measure(p.client, &own)).await? {
        Ok(readings) => {
            let waits = |r: &&Reading| r.refuses || (r.observed > r.threshold) != r.is_floor;
            beyond.extend(readings.iter().filter(waits).map(Reading::text));
        }
        Err(e) => bad.push(e.line()),
    }
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    if !bad.is_empty() {
        return Ok(Check::fail(name, bad.join("; ")).count(count(bad.len())).hint("correct the query in [throttle]"));
    }
    if !beyond.is_empty() {
        return Ok(Check::warn(name, format!("batches would wait now: {}", beyond.join("; ")))
            .count(count(beyond.len()))
            .hint("they go on by themselves when that is over; docs/throttle.md explains each signal and its limit"));
    }
    Ok(Check::pass(name, "every signal can be read, and none is beyond its limit"))
}

/// Asks in a read-only transaction of its own that ends in any case.
async fn question<T>(client: &Client, ask: impl Future<Output = Result<T>>) -> Result<Result<T>> {
    let begin = format!("begin read only; set local statement_timeout = {}", QUERY_TIMEOUT.as_millis());
    client.batch_execute(&begin).await?;
    let answer = ask.await;
    client.batch_execute("rollback").await?;
    Ok(answer)
}
