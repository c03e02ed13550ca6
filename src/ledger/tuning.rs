//! What operators set while a job runs, over the job file.

use std::time::Duration;

use tokio_postgres::GenericClient;

use crate::error::{Error, Kind, Result};

/// The stored values that are in force.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// Counts changes.
    pub version: i64,
    /// Keys with their values as text.
    pub values: Vec<(String, String)>,
    /// Time until the first of them is over, by the server's clock.
    pub next_end: Option<Duration>,
}

/// A stored value, for people.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Setting {
    /// The key.
    pub key: String,
    /// The value as text.
    pub value: String,
    /// When it is over, by the server's clock.
    pub until: Option<String>,
    /// Who set it: the database login.
    pub set_by: String,
    /// When.
    pub set_at: String,
}

/// The version of a job's tuning.
///
/// # Errors
/// Whatever the server says.
pub async fn version(client: &impl GenericClient, job: &str) -> Result<i64> {
    let row = client.query_opt("select tuning_version from backfilld.job where name = $1", &[&job]).await?;
    Ok(row.map_or(-1, |r| r.get(0)))
}

/// The values in force, with their version, from one snapshot.
///
/// # Errors
/// Whatever the server says.
pub async fn load(client: &impl GenericClient, job: &str) -> Result<Tuned> {
    let rows = client
        .query(
            "select j.tuning_version, t.key, t.value,
                    extract(epoch from t.until - clock_timestamp())::float8
             from backfilld.job j left join backfilld.tuning t
               on t.job = j.name and (t.until is null or t.until > clock_timestamp())
             where j.name = $1 order by t.key",
            &[&job],
        )
        .await?;
    let mut out = Tuned { version: rows.first().map_or(-1, |r| r.get(0)), values: Vec::new(), next_end: None };
    for row in &rows {
        let Some(key) = row.get::<_, Option<String>>(1) else { continue };
        out.values.push((key, row.get(2)));
        if let Some(left) = row.get::<_, Option<f64>>(3) {
            let left = Duration::from_secs_f64(left.clamp(0.0, 1e9));
            out.next_end = Some(out.next_end.map_or(left, |other| other.min(left)));
        }
    }
    Ok(out)
}

/// The values in force, for people.
///
/// # Errors
/// Whatever the server says.
pub async fn list(client: &impl GenericClient, job: &str) -> Result<Vec<Setting>> {
    let rows = client
        .query(
            "select key, value, date_trunc('second', until)::text, set_by, date_trunc('second', set_at)::text
             from backfilld.tuning where job = $1 and (until is null or until > clock_timestamp()) order by key",
            &[&job],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|r| Setting { key: r.get(0), value: r.get(1), until: r.get(2), set_by: r.get(3), set_at: r.get(4) })
        .collect())
}

/// Sets a value. `until`: as [`end`] gives it.
///
/// # Errors
/// Whatever the server says.
pub async fn put(client: &impl GenericClient, job: &str, key: &str, value: &str, until: Option<&str>) -> Result<()> {
    client
        .execute(
            "insert into backfilld.tuning (job, key, value, until) values ($1, $2, $3, $4::text::timestamptz)
             on conflict (job, key) do update set value = excluded.value, until = excluded.until",
            &[&job, &key, &value, &until],
        )
        .await?;
    Ok(())
}

/// Takes a value back. Gives whether there was one.
///
/// # Errors
/// Whatever the server says.
pub async fn reset(client: &impl GenericClient, job: &str, key: &str) -> Result<bool> {
    Ok(client.execute("delete from backfilld.tuning where job = $1 and key = $2", &[&job, &key]).await? == 1)
}

/// The end of a time that begins now, by the server's clock, as text that [`put`] takes.
///
/// # Errors
/// Whatever the server says.
pub async fn end_of(client: &impl GenericClient, time: Duration) -> Result<String> {
    let sql = "select (clock_timestamp() + make_interval(secs => $1))::text";
    Ok(client.query_one(sql, &[&time.as_secs_f64()]).await?.get(0))
}

/// A moment in the words of the server (`2026-11-25 18:00+01`, `tomorrow`), as text that [`put`] takes.
///
/// # Errors
/// Input if it is none, or is over.
pub async fn end(client: &impl GenericClient, text: &str) -> Result<String> {
    let expected = |found: String| {
        Error::input(format!(
            "--until: expected a time such as 2h, or a moment to come such as 2026-11-25T18:00Z; {found}"
        ))
    };
    let sql = "select $1::text::timestamptz::text, isfinite($1::text::timestamptz) and $1::text::timestamptz > clock_timestamp()";
    let row = match client.query_one(sql, &[&text]).await.map_err(Error::from) {
        Err(e) if e.kind() == Kind::Database && e.sqlstate().is_some_and(|s| s.starts_with("22")) => {
            return Err(expected(format!("found {text:?}")));
        }
        other => other?,
    };
    match row.get::<_, bool>(1) {
        true => Ok(row.get(0)),
        false => Err(expected(format!("{} is over", row.get::<_, String>(0)))),
    }
}
