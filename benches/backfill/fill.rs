//! Rows per second, WAL and growth: the same column filled in several ways, in turn, each on a fresh copy.

use std::time::Instant;

use backfilld::backfill::session::BATCH_SETTINGS;
use backfilld::demo::sample;
use backfilld::ledger::{checkpoint, lease};
use backfilld::pg::connect::SESSION_SETTINGS;
use backfilld::plan::{Facts, batch_sql};
use backfilld::{Error, Result, job};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::chart::{self, Bars};
use crate::foreground::{Foreground, Latency};
use crate::report::{Report, Table, median};
use crate::world::{Database, JOB, Job, World, connect, say};

/// Rows of a batch where it is fixed.
const ROWS: i64 = 1000;

const KEYSET: &str = "strategy = \"keyset\"";

/// One way to fill the column.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Way {
    /// The reference: one UPDATE
    OneUpdate,
    /// A loop in PL/pgSQL that commits every 1000 rows, by key
    Loop,
    /// Every statement of the daemon's batches by key, 1000 rows, with nothing around them
    Bare,
    /// The daemon by key, 1000 rows a batch, without compressing its WAL
    Keyset,
    /// The daemon by key, batches as it sizes them
    KeysetSized,
    /// The daemon in heap order
    Heap,
    /// The daemon in heap order, two lanes
    Lanes,
    /// The daemon in heap order, a vacuum beside it; only by name
    Budget,
}

pub const WAYS: [Way; 7] = [Way::OneUpdate, Way::Loop, Way::Bare, Way::Keyset, Way::KeysetSized, Way::Heap, Way::Lanes];

impl Way {
    fn label(self) -> &'static str {
        match self {
            Self::OneUpdate => "one UPDATE",
            Self::Loop => "PL/pgSQL loop, 1000 rows",
            Self::Bare => "bare loop, keyset, 1000 rows",
            Self::Keyset => "daemon, keyset, 1000 rows",
            Self::KeysetSized => "daemon, keyset, sized",
            Self::Heap => "daemon, heap order",
            Self::Lanes => "daemon, heap order, 2 lanes",
            Self::Budget => "daemon, heap order, growth_percent = 5",
        }
    }
}

struct Run {
    /// Rows per second.
    rate: f64,
    /// Bytes of WAL in MB, and full-page images in it.
    wal: f64,
    images: f64,
    /// Growth of heap and indexes in percent.
    heap: f64,
    indexes: f64,
    /// Share of HOT updates in percent.
    hot: f64,
    latency: Option<Latency>,
    /// Of the daemon's process: peak memory in MB, CPU in percent of the time; NaN where there is none.
    memory: f64,
    cpu: f64,
    /// WAL as a multiple of one image of each page of the heap and 100 bytes per row.
    floor: f64,
}

/// What a way came to.
struct Filled {
    seconds: f64,
    after: [f64; 6],
    /// Peak memory in MB and CPU seconds of the daemon's process.
    process: Option<(f64, f64)>,
}

impl Filled {
    async fn of(seconds: f64, db: &Database) -> Result<Self> {
        Ok(Self { seconds, after: sizes(&db.admin).await?, process: None })
    }
}

/// WAL position in bytes, heap, indexes, full-page images, updates, HOT updates.
async fn sizes(client: &Client) -> Result<[f64; 6]> {
    let row = client
        .query_one(
            "select (pg_current_wal_lsn() - '0/0')::float8, pg_relation_size('public.messages')::float8,
                    pg_indexes_size('public.messages')::float8, (select wal_fpi::float8 from pg_stat_wal),
                    n_tup_upd::float8, n_tup_hot_upd::float8
             from pg_stat_user_tables where relid = 'public.messages'::regclass",
            &[],
        )
        .await?;
    Ok(std::array::from_fn(|i| row.get(i)))
}

pub async fn run(world: &World, runs: u32, ways: &[Way], foreground: Option<u32>, report: &mut Report) -> Result<()> {
    world.expand("plain", "keyset", KEYSET).await?;
    let mut results: Vec<(Way, Run)> = Vec::new();
    let mut quiet = Vec::new();
    for turn in 0..runs as usize {
        if let Some(rate) = foreground {
            say(&format!("foreground alone {} of {runs}", turn + 1));
            let db = world.copy("expanded").await?;
            let traffic = Foreground::start(world, &db, rate)?;
            tokio::time::sleep(std::time::Duration::from_secs(10)).await;
            quiet.push(traffic.stop().await?);
            world.discard(db).await?;
        }
        for i in 0..ways.len() {
            // Rotated, so that no way always comes after the same other one.
            let way = ways[(i + turn) % ways.len()];
            say(&format!("fill {} of {runs}: {}", turn + 1, way.label()));
            results.push((way, one(world, way, foreground).await?));
        }
    }
    let values = |way: Way, get: fn(&Run) -> f64| -> Vec<f64> {
        results.iter().filter(|r| r.0 == way).map(|r| get(&r.1)).collect()
    };
    let middle = |way: Way, get: fn(&Run) -> f64| median(&values(way, get));
    let (mut rows, mut ratios, mut floors, mut data) = (Vec::new(), Vec::new(), Vec::new(), serde_json::Map::new());
    for &way in ways {
        rows.push((
            way.label().to_owned(),
            vec![
                format!("{:.0}", middle(way, |r| r.rate)),
                format!("{:.0}", middle(way, |r| r.wal)),
                format!("{:.0}", middle(way, |r| r.images)),
                format!("{:+.0}%", middle(way, |r| r.heap)),
                format!("{:+.0}%", middle(way, |r| r.indexes)),
            ],
        ));
        let ratio = |other: Way, get: fn(&Run) -> f64| match ways.contains(&other) {
            true => format!("{:.2}", middle(way, get) / middle(other, get)),
            false => "-".to_owned(),
        };
        ratios.push((
            way.label().to_owned(),
            vec![
                ratio(Way::Keyset, |r| r.rate),
                ratio(Way::OneUpdate, |r| r.rate),
                ratio(Way::Keyset, |r| r.wal),
                ratio(Way::OneUpdate, |r| r.wal),
                format!("{:.0}%", middle(way, |r| r.hot)),
            ],
        ));
        let process = [middle(way, |r| r.memory), middle(way, |r| r.cpu)];
        let cell = |value: f64, unit: &str| if value.is_nan() { "-".into() } else { format!("{value:.1}{unit}") };
        floors.push((
            way.label().to_owned(),
            vec![format!("{:.2}", middle(way, |r| r.floor)), cell(process[0], ""), cell(process[1], "%")],
        ));
        let latencies: Vec<_> = results.iter().filter(|r| r.0 == way).filter_map(|r| r.1.latency.as_ref()).collect();
        let values = json!({
            "rows_per_second": values(way, |r| r.rate), "wal_mb": values(way, |r| r.wal),
            "full_page_images": values(way, |r| r.images), "heap_growth_percent": values(way, |r| r.heap),
            "index_growth_percent": values(way, |r| r.indexes), "hot_percent": values(way, |r| r.hot),
            "daemon_peak_mb": values(way, |r| r.memory), "daemon_cpu_percent": values(way, |r| r.cpu),
            "wal_of_floor": values(way, |r| r.floor),
            "foreground_ms": latencies.iter().map(|l| l.json()).collect::<Vec<_>>(),
        });
        data.insert(way.label().to_owned(), values);
    }
    let of = |title: &str, get: fn(&Run) -> f64| Bars {
        title: title.to_owned(),
        values: ways.iter().map(|&way| (way.label().to_owned(), middle(way, get))).collect(),
    };
    let millions = world.rows as f64 / 1e6;
    let rates = of(&format!("Rows per second, {millions} million rows (more is better)"), |r| r.rate);
    let growth = of("Growth of the table in percent (less is better)", |r| r.heap);
    report.chart("fill", chart::bars(&[rates, of("WAL in MB (less is better)", |r| r.wal), growth]));
    data.insert("foreground alone".to_owned(), quiet.iter().map(Latency::json).collect());
    let head = vec!["rows/s", "WAL MB", "images", "heap", "indexes"];
    report.add("fill", Table { title: "Fill", head, rows }, data.into());
    let head = vec!["/keyset", "/UPDATE", "WAL/keys", "WAL/UPD", "HOT"];
    report.add("ratios", Table { title: "Ratios of rows/s and WAL", head, rows: ratios }, json!({}));
    let head = vec!["of floor", "peak MB", "CPU"];
    report.add("process", Table { title: "WAL; the daemon's process", head, rows: floors }, json!({}));
    if foreground.is_some() {
        let mut rows = vec![("alone".to_owned(), Latency::cells(&quiet.iter().collect::<Vec<_>>()))];
        for &way in ways {
            let of: Vec<_> = results.iter().filter(|r| r.0 == way).filter_map(|r| r.1.latency.as_ref()).collect();
            rows.push((way.label().to_owned(), Latency::cells(&of)));
        }
        let head = vec!["p50", "p95", "p99", "max", "count"];
        report.add("foreground", Table { title: "Foreground, ms", head, rows }, json!({}));
    }
    Ok(())
}

async fn one(world: &World, way: Way, foreground: Option<u32>) -> Result<Run> {
    let template = match way {
        Way::OneUpdate | Way::Loop => "plain",
        Way::Bare | Way::Keyset | Way::KeysetSized => "keyset",
        Way::Heap | Way::Lanes | Way::Budget => "expanded",
    };
    let db = world.copy(template).await?;
    if template == "plain" {
        db.admin.batch_execute("alter table public.messages add column auth_user_id uuid").await?;
    } else {
        world.command(&db.name, &["cutover", JOB])?;
    }
    let traffic = match foreground {
        Some(rate) => Some(Foreground::start(world, &db, rate)?),
        None => None,
    };
    let before = sizes(&db.admin).await?;
    // As the field does it, so without compressed images; `KeysetSized` is this program's best by key.
    let server = "wal_compression = \"server\"";
    let fixed = format!("{KEYSET}\ninitial_rows = {ROWS}\nmin_rows = {ROWS}\nmax_rows = {ROWS}\n{server}");
    let Filled { seconds, after, process } = match way {
        Way::OneUpdate => one_update(world, &db).await?,
        Way::Loop => sql_loop(world, &db).await?,
        Way::Bare => bare_loop(world, &db).await?,
        Way::Keyset => daemon(world, &db, &fixed).await?,
        Way::KeysetSized => daemon(world, &db, KEYSET).await?,
        Way::Heap => daemon(world, &db, "lanes = 1").await?,
        Way::Lanes => daemon(world, &db, "lanes = 2").await?,
        Way::Budget => daemon(world, &db, "lanes = 1\ngrowth_percent = 5").await?,
    };
    let latency = match traffic {
        Some(traffic) => Some(traffic.stop().await?),
        None => None,
    };
    // Statistics arrive when their backends report them.
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    let counted = sizes(&db.admin).await?;
    let left: i64 = db
        .admin
        .query_one(
            "select count(*) from public.messages m join public.conversations c on c.id = m.conversation_id
             where m.auth_user_id is distinct from c.auth_user_id and (m.auth_user_id is null or $1)",
            // Foreground updates beside plain ways have no triggers that would keep the value right.
            &[&foreground.is_none()],
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
        images: after[3] - before[3],
        hot: 100.0 * (counted[5] - before[5]) / (counted[4] - before[4]).max(1.0),
        latency,
        memory: process.map_or(f64::NAN, |p| p.0),
        cpu: process.map_or(f64::NAN, |p| 100.0 * p.1 / seconds),
        floor: (after[0] - before[0]) / (before[1] + 100.0 * world.rows as f64),
    })
}

/// The reference's statement, in one transaction. The application's triggers are skipped here as well, or it would send a
/// notification per row.
async fn one_update(world: &World, db: &Database) -> Result<Filled> {
    if !world.fires() {
        db.admin.batch_execute("set session_replication_role = replica").await?;
    }
    let began = Instant::now();
    db.admin
        .batch_execute(
            "UPDATE public.messages m SET auth_user_id = c.auth_user_id FROM public.conversations c
             WHERE m.conversation_id = c.id AND m.auth_user_id IS NULL",
        )
        .await?;
    Filled::of(began.elapsed().as_secs_f64(), db).await
}

/// What many write by hand: keys in order, a thousand at a time, a commit after each.
async fn sql_loop(world: &World, db: &Database) -> Result<Filled> {
    if !world.fires() {
        db.admin.batch_execute("set session_replication_role = replica").await?;
    }
    let key: String = db
        .admin
        .query_one("select format_type(atttypid, -1) from pg_attribute where attrelid = 'public.messages'::regclass and attname = 'id'", &[])
        .await?
        .get(0);
    let sql = format!(
        "do $$ declare last {key}; top {key};
         begin
           loop
             select s.id into top from (
               select id, row_number() over (order by id) as n from public.messages
               where last is null or id > last order by id limit {ROWS}) s order by s.n desc limit 1;
             exit when top is null;
             update public.messages m set auth_user_id = c.auth_user_id from public.conversations c
             where c.id = m.conversation_id and m.auth_user_id is null and (last is null or m.id > last) and m.id <= top;
             commit;
             last := top;
           end loop;
         end $$"
    );
    let began = Instant::now();
    db.admin.batch_execute(&sql).await?;
    Filled::of(began.elapsed().as_secs_f64(), db).await
}

/// Every statement of the daemon's batches in the same order, with a constant size, and nothing around them.
async fn bare_loop(world: &World, db: &Database) -> Result<Filled> {
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
    Filled::of(began.elapsed().as_secs_f64(), db).await
}

async fn daemon(world: &World, db: &Database, batching: &str) -> Result<Filled> {
    // As fast as it goes, whoever is beside it: the pace has a section of its own.
    let batching = &format!("{batching}\n[throttle]\npace = \"constant\"");
    let job = Job { hold_before: "\"constrain\"", batching };
    let mut daemon = world.daemon(&db.name, "bench", &job, &[], &[])?;
    db.until(&mut daemon, |phase, _, _| phase != "backfill").await?;
    let after = sizes(&db.admin).await?;
    let process = crate::resources::usage(daemon.child.id())?;
    daemon.terminate().await?;
    let seconds = "select (detail ->> 'duration_ms')::float8 / 1000 from backfilld.event
                   where kind = 'phase' and detail ->> 'phase' = 'backfill'";
    Ok(Filled { seconds: db.admin.query_one(seconds, &[]).await?.get(0), after, process: Some(process) })
}
