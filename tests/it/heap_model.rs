//! The model of a walk in heap order: after any schedule of batches, kills, the application's writes, vacuum, rewrites and
//! owner changes, the data is what one UPDATE at the end would have made of the same writes.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::support::{Cli, JobDir, Ledger, Template, TestDb};

const ROWS: u32 = 600;
/// Schedules per test; a long run sets it higher.
const SEEDS_ENV: &str = "BACKFILLD_TEST_SEEDS";

/// A statement of the application or of a database administrator, the same in both databases.
fn write(rng: &mut StdRng, step: u32) -> String {
    let pick = |rng: &mut StdRng, table: &str, n: u32| {
        let offset = rng.random_range(0..500);
        format!("(select id from public.{table} order by id offset {offset} limit {n})")
    };
    let rows = rng.random_range(1..60);
    let messages = pick(rng, "messages", rows);
    let conversation = pick(rng, "conversations", 1);
    match rng.random_range(0..12) {
        0 | 1 => format!(
            "insert into public.messages (id, conversation_id, role, content)
             select md5('{step}-' || n)::uuid, c.id, 'user', repeat('y', n * 7)
             from generate_series(1, {rows}) n, {conversation} c"
        ),
        2 | 3 => format!("update public.messages set content = content || repeat('z', 40) where id in {messages}"),
        4 => format!("delete from public.messages where id in {messages}"),
        5 => format!(
            "update public.messages set conversation_id = c.id from {conversation} c where messages.id in {messages}"
        ),
        6 | 7 => format!(
            "update public.conversations c set user_id = u.id, auth_user_id = u.auth_user_id
             from (select id, auth_user_id from public.users order by id offset {} limit 1) u
             where c.id in {}",
            rng.random_range(0..15),
            pick(rng, "conversations", 5)
        ),
        8 | 9 => "vacuum public.messages".into(),
        10 => "vacuum full public.messages".into(),
        _ if step.is_multiple_of(5) => "truncate public.messages".into(),
        _ => format!("delete from public.conversations where id in {conversation}"),
    }
}

async fn run(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (db, reference) = (TestDb::new(Template::Rows(ROWS)).await, TestDb::new(Template::Rows(ROWS)).await);
    let (ours, theirs) = (Ledger::new(&db).await, Ledger::new(&reference).await);
    let job = JobDir::heap();
    job.replace("max_rows = 100", "max_rows = 40");
    job.replace("initial_rows = 100", &format!("initial_rows = 40\nlanes = {}", rng.random_range(1..4)));
    let mut log = Vec::new();
    for step in 0..14 {
        if rng.random_bool(0.4) {
            let point = ["after-commit", "before-commit"][rng.random_range(0..2)];
            let fault = format!("{point}:{}", rng.random_range(1..12));
            let ended = Cli::new(&db).env("BACKFILLD_FAULT", &fault).run(&["run", "--once", job.path()]).await;
            log.push(format!("run until {fault}: {:?}", ended.code));
            assert!(matches!(ended.code, None | Some(0)), "seed {seed}: {log:#?} {ended:#?}");
        } else {
            let sql = write(&mut rng, step);
            ours.run(&sql).await;
            theirs.run(&sql).await;
            log.push(sql);
        }
    }
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(0, "done");
    theirs
        .run(
            "set session_replication_role = replica;
             alter table public.messages add column auth_user_id uuid;
             update public.messages m set auth_user_id = c.auth_user_id
             from public.conversations c where m.conversation_id = c.id and m.auth_user_id is null",
        )
        .await;
    let sum = "select coalesce(sum(hashtextextended(concat_ws('|', id, conversation_id, role, content, image_url, metadata,
                 created_at = updated_at, auth_user_id), 0)::numeric), 0)::text || ' ' || count(*) from public.messages";
    let (a, b) = (text(&db, sum).await, text(&reference, sum).await);
    assert_eq!(a, b, "seed {seed}: {log:#?}");
    assert_eq!(ours.status().await, "done");
}

async fn text(db: &TestDb, sql: &str) -> String {
    db.admin().await.query_one(sql, &[]).await.expect("a value").get(0)
}

#[tokio::test]
async fn random_schedules_of_a_walk_in_heap_order_end_as_one_update_would() {
    let seeds: u64 = std::env::var(SEEDS_ENV).ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    for seed in 0..seeds {
        run(seed).await;
    }
}
