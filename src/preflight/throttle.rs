//! Whether the throttle's signals can be measured.

use tokio_postgres::Client;

use super::check::Check;
use super::probe::Probe;
use crate::error::Result;
use crate::job::throttle::Throttle;
use crate::throttle::probe::{Probe as Signals, QUERY_TIMEOUT};
use crate::throttle::signal::{Judge, Reading};
use crate::throttle::{endpoint, operator};

/// `throttle`: measures each signal once.
///
/// # Errors
/// If the connection is lost.
pub async fn throttle(p: &Probe<'_>) -> Result<Check> {
    let name = "throttle";
    let spec = &p.spec.throttle;
    let mut bad = Vec::new();
    let mut readings = Vec::new();
    for query in &spec.queries {
        match question(p.client, operator::ask(p.client, query)).await? {
            Ok(reading) => readings.push(reading),
            Err(e) if e.sqlstate() == Some("57014") => bad.push(format!(
                "throttle query {}: no result within {} s, which is the time it has",
                query.name,
                QUERY_TIMEOUT.as_secs()
            )),
            Err(e) => bad.push(e.line()),
        }
    }
    for answer in futures_util::future::join_all(spec.http.iter().map(endpoint::ask)).await {
        match answer {
            Ok(reading) => readings.push(reading),
            Err(e) => bad.push(e.line()),
        }
    }
    let own = Throttle { queries: Vec::new(), http: Vec::new(), ..spec.clone() };
    let target = p.spec.target.table.sql();
    match question(p.client, Signals::default().measure(p.client, &own, &target)).await? {
        Ok(found) => readings.extend(found),
        Err(e) => bad.push(e.line()),
    }
    let waits = Judge::default().judge(&readings);
    let beyond: Vec<String> = waits.iter().map(Reading::text).collect();
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    if !bad.is_empty() {
        return Ok(Check::fail(name, bad.join("; ")).count(count(bad.len())).hint("correct it in [throttle]"));
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
