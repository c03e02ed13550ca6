//! Rows per second, WAL and growth: the same column filled in five ways, in turn, each on a fresh copy.

use std::time::Instant;

use backfilld::backfill::BATCH_SETTINGS;
use backfilld::demo::sample;
use backfilld::ledger::{checkpoint, lease};
use backfilld::pg::connect::SESSION_SETTINGS;
use backfilld::plan::{Facts, batch_sql};
use backfilld::{Error, Result, job};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::report::{Report, Table, median};
use crate::world::{Database, JOB, Job, World, connect, say};

/// Rows of a batch where it is fixed: about what the default target of 100 ms leads to on two cores.
const ROWS: i64 = 2000;

const KEYSET: &str = "strategy = \"keyset\"";

#[derive(Clone, Copy, PartialEq)]
enum Way {
    OneUpdate,
    BareLoop,
    KeysetFixed,
    Keyset,
    Heap,
}

const WAYS: [Way; 5] = [Way::OneUpdate, Way::BareLoop, Way::KeysetFixed, Way::Keyset, Way::Heap];

impl Way {
    fn label(self) -> &'static str {
        match self {
            Self::OneUpdate => "one UPDATE",
            Self::BareLoop => "bare loop, keyset, 2000 rows",
            Self::KeysetFixed => "daemon, keyset, 2000 rows",
            Self::Keyset => "daemon, keyset",
            Self::Heap => "daemon, heap order (default)",
        }
    }
}

/// Rows per second, WAL in MB, growth of heap and indexes in percent.
struct Run {
    rate: f64,
    wal: f64,
    heap: f64,
    indexes: f64,
}

/// WAL position in bytes, heap, indexes.
async fn sizes(client: &Client) -> Result<[f64; 3]> {
    let row = client
        .query_one(
            "select (pg_current_wal_lsn() - '0/0')::float8, pg_relation_size('public.messages')::float8,
                    pg_indexes_size('public.messages')::float8",
            &[],
        )
        .await?;
    Ok([row.get(0), row.get(1), row.get(2)])
}

pub async fn run(world: &World, runs: u32, report: &mut Report) -> Result<()> {
    world.expand("plain", "keyset", KEYSET).await?;
    let mut results: Vec<(Way, Run)> = Vec::new();
    for turn in 0..runs as usize {
        for i in 0..WAYS.len() {
            // Rotated, so that no way always comes after the same other one.
            let way = WAYS[(i + turn) % WAYS.len()];
            say(&format!("fill {} of {runs}: {}", turn + 1, way.label()));
            results.push((way, one(world, way).await?));
        }
    }
    let values = |way: Way, get: fn(&Run) -> f64| -> Vec<f64> {
        results.iter().filter(|r| r.0 == way).map(|r| get(&r.1)).collect()
    };
    let bare = median(&values(Way::BareLoop, |r| r.rate));
    let mut rows = Vec::new();
    let mut data = serde_json::Map::new();
    for way in WAYS {
        let (rate, wal) = (values(way, |r| r.rate), values(way, |r| r.wal));
        let (heap, indexes) = (values(way, |r| r.heap), values(way, |r| r.indexes));
        rows.push((
            way.label().to_owned(),
            vec![
                format!("{:.0}", median(&rate)),
                format!("{:.2}", median(&rate) / bare),
                format!("{:.0}", median(&wal)),
                format!("{:+.0}%", median(&heap)),
                format!("{:+.0}%", median(&indexes)),
            ],
        ));
        let values = json!({ "rows_per_second": rate, "wal_mb": wal, "heap_growth_percent": heap, "index_growth_percent": indexes });
        data.insert(way.label().to_owned(), values);
    }
    let head = vec!["rows/s", "ratio", "WAL MB", "heap", "indexes"];
    report.add("fill", Table { title: "Fill", head, rows }, data.into());
    Ok(())
}

async fn one(world: &World, way: Way) -> Result<Run> {
    let template = match way {
        Way::OneUpdate => "plain",
        Way::BareLoop | Way::KeysetFixed | Way::Keyset => "keyset",
        Way::Heap => "expanded",
    };
    let db = world.copy(template).await?;
    if way == Way::OneUpdate {
        db.admin.batch_execute("alter table public.messages add column auth_user_id uuid").await?;
    } else {
        world.command(&db.name, &["cutover", JOB])?;
    }
    let before = sizes(&db.admin).await?;
    let (seconds, after) = match way {
        Way::OneUpdate => one_update(&db).await?,
        Way::BareLoop => bare_loop(world, &db).await?,
        Way::KeysetFixed => {
            let size = format!(
                "{KEYSET}
initial_rows = {ROWS}
min_rows = {ROWS}
max_rows = {ROWS}"
            );
            daemon(world, &db, &size).await?
        }
        Way::Keyset => daemon(world, &db, KEYSET).await?,
        Way::Heap => daemon(world, &db, "").await?,
    };
    let left: i64 = db
        .admin
        .query_one(
            "select count(*) from public.messages m join public.conversations c on c.id = m.conversation_id
             where m.auth_user_id is distinct from c.auth_user_id",
            &[],
        )
        .await?
        .get(0);
    if left > 0 {
        return Err(Error::failed(format!("{}: {left} rows are not filled", way.label())));
    }
    world.discard(db).await?;
    let growth = |i: usize| (after[i] / before[i] - 1.0) * 100.0;
    Ok(Run {
        rate: world.rows as f64 / seconds,
        wal: (after[0] - before[0]) / 1e6,
        heap: growth(1),
        indexes: growth(2),
    })
}

/// The reference's statement, in one transaction. The application's triggers are skipped here as well, or it would send a
/// notification per row.
async fn one_update(db: &Database) -> Result<(f64, [f64; 3])> {
    db.admin.batch_execute("set session_replication_role = replica").await?;
    let began = Instant::now();
    db.admin
        .batch_execute(
            "UPDATE public.messages m SET auth_user_id = c.auth_user_id FROM public.conversations c
             WHERE m.conversation_id = c.id AND m.auth_user_id IS NULL",
        )
        .await?;
    Ok((began.elapsed().as_secs_f64(), sizes(&db.admin).await?))
}

/// Every statement of the daemon's batches in the same order, with a constant size, and nothing around them.
async fn bare_loop(world: &World, db: &Database) -> Result<(f64, [f64; 3])> {
    let mut client = connect(&world.cluster.url(sample::DAEMON, &db.name)).await?;
    client.batch_execute(SESSION_SETTINGS).await?;
    client.batch_execute(BATCH_SETTINGS).await?;
    client.batch_execute("set session_replication_role = replica").await?;
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs").join(JOB);
    let shape = Facts::read(&client, &job::load(&dir)?, true).await?.shape;
    db.admin
        .batch_execute(
            "insert into backfilld.checkpoint (job, strategy, batch_rows) select name, 'keyset', 1 from backfilld.job",
        )
        .await?;
    let lease = match lease::acquire(&client, JOB, "bare", uuid::Uuid::new_v4(), std::time::Duration::from_secs(3600))
        .await?
    {
        lease::Acquired::Yes(lease) => lease,
        lease::Acquired::HeldBy { instance, .. } => return Err(Error::failed(format!("{instance} holds the lease"))),
    };
    let range = [batch_sql::key_range(&shape, false), batch_sql::key_range(&shape, true)];
    let fence = client.prepare(lease::FENCE).await?;
    let advance = client.prepare(checkpoint::ADVANCE).await?;
    let bound = [
        client.prepare(&batch_sql::bound(&shape, false, true)).await?,
        client.prepare(&batch_sql::bound(&shape, true, true)).await?,
    ];
    let fill = [
        client.prepare(&batch_sql::fill(&shape, &range[0])).await?,
        client.prepare(&batch_sql::fill(&shape, &range[1])).await?,
    ];
    let recheck = match (batch_sql::recheck(&shape, &range[0]), batch_sql::recheck(&shape, &range[1])) {
        (Some(first), Some(next)) => Some([client.prepare(&first).await?, client.prepare(&next).await?]),
        _ => None,
    };
    let mut cursor: Vec<String> = Vec::new();
    let began = Instant::now();
    let upper: String = client.query_one(&batch_sql::last_key(&shape), &[]).await?.get(0);
    loop {
        let tx = client.transaction().await?;
        let after = usize::from(!cursor.is_empty());
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![&ROWS];
        params.extend(cursor.iter().map(|c| c as &(dyn ToSql + Sync)));
        params.push(&upper);
        let held: [&(dyn ToSql + Sync); 3] = [&JOB, &lease.epoch, &lease.holder];
        let (held, end) = tokio::join!(tx.query_opt(&fence, &held), tx.query_opt(&bound[after], &params));
        held?.ok_or_else(|| Error::failed("the lease is gone"))?;
        let Some(end) = end? else { break };
        let (scanned, last): (i64, String) = (end.get(0), end.get(1));
        let mut params: Vec<&(dyn ToSql + Sync)> = cursor.iter().map(|c| c as &(dyn ToSql + Sync)).collect();
        params.push(&last);
        let updated = tx.execute(&fill[after], &params).await? as i64;
        if let Some(recheck) = &recheck {
            tx.execute(&recheck[after], &params).await?;
        }
        let key = vec![last.clone()];
        let done: [&(dyn ToSql + Sync); 7] = [&JOB, &0i32, &key, &scanned, &updated, &(ROWS as i32), &false];
        tx.execute(&advance, &done).await?;
        tx.commit().await?;
        cursor = key;
    }
    Ok((began.elapsed().as_secs_f64(), sizes(&db.admin).await?))
}

async fn daemon(world: &World, db: &Database, batching: &str) -> Result<(f64, [f64; 3])> {
    let job = Job { hold_before: "\"constrain\"", batching };
    let mut daemon = world.daemon(&db.name, "bench", &job, &[], &[])?;
    db.until(&mut daemon, |phase, _, _| phase != "backfill").await?;
    let after = sizes(&db.admin).await?;
    daemon.terminate().await?;
    let seconds = "select (detail ->> 'duration_ms')::float8 / 1000 from backfilld.event
                   where kind = 'phase' and detail ->> 'phase' = 'backfill'";
    Ok((db.admin.query_one(seconds, &[]).await?.get(0), after))
}
