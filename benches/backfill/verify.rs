//! The chunked verification against one query that looks for the same kind of row in one snapshot.

use std::time::Instant;

use backfilld::demo::cluster::SUPERUSER;
use backfilld::{Error, Result};
use serde_json::json;

use crate::report::{Report, Table, median};
use crate::world::{JOB, World, connect, say};

const COUNT: &str = "select count(*) from public.messages m join public.conversations c on c.id = m.conversation_id
                     where m.auth_user_id is distinct from c.auth_user_id";

pub async fn run(world: &World, ready: &str, runs: u32, report: &mut Report) -> Result<()> {
    let client = connect(&world.cluster.url(SUPERUSER, ready)).await?;
    client.batch_execute("set max_parallel_workers_per_gather = 0; set jit = off").await?;
    let (mut chunked, mut whole) = (Vec::new(), Vec::new());
    // The first round warms the cache and is not counted.
    for i in 0..=runs {
        say(&format!("verify {i} of {runs}"));
        let printed = world.command(ready, &["verify", JOB, "--json"])?;
        let verdict: serde_json::Value =
            serde_json::from_str(&printed).map_err(|e| Error::internal("verify --json").with_source(e))?;
        let took = verdict["duration_ms"].as_f64().unwrap_or(f64::NAN) / 1000.0;
        let began = Instant::now();
        client.query_one(COUNT, &[]).await?;
        if i > 0 {
            chunked.push(took);
            whole.push(began.elapsed().as_secs_f64());
        }
    }
    let line = |label: &str, seconds: &[f64]| {
        let s = median(seconds);
        (label.to_owned(), vec![format!("{s:.2}"), format!("{:.0}", world.rows as f64 / s)])
    };
    let rows = vec![line("verify, everything", &chunked), line("count(*) of drift, one query", &whole)];
    let data = json!({ "verify_s": chunked, "count_s": whole });
    report.add("verify", Table { title: "Verify", head: vec!["seconds", "rows/s"], rows }, data);
    Ok(())
}
