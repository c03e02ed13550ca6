//! What the triggers cost per row, for docs/trigger-contract.md. Run by hand, on an idle machine:
//! `cargo test --test it sync_cost -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use backfilld::plan::sync_sql;

use crate::sync_fixture::{Case, Fixture, LOOSE, OWNED};

const ROWS: u32 = 20_000;
const RUNS: usize = 7;

/// Each prepares, and then measures one transaction that writes [`ROWS`] rows.
const OPERATIONS: &[(&str, &str, &str)] = &[
    (
        "insert",
        "truncate public.kids",
        "insert into public.kids (id, parent_id) select n, n % 100 from generate_series(1, 20000) n",
    ),
    (
        "insert, repeatable read",
        "truncate public.kids",
        "set transaction isolation level repeatable read; insert into public.kids (id, parent_id) select n, n % 100 from generate_series(1, 20000) n",
    ),
    ("update of other columns", "vacuum public.kids", "update public.kids set body = 'y'"),
    (
        "update of other columns, repeatable read",
        "vacuum public.kids",
        "set transaction isolation level repeatable read; update public.kids set body = 'z'",
    ),
    ("re-parenting", "vacuum public.kids", "update public.kids set parent_id = (parent_id + 1) % 100"),
    ("source: update without effect on the value", "vacuum public.many", "update public.many set note = 'n'"),
    (
        "source: insert",
        "truncate public.many",
        "insert into public.many select n, 'o' from generate_series(1, 20000) n",
    ),
    ("source: delete without rows", "select", "delete from public.many"),
];

async fn measure(f: &Fixture, prepare: &str, sql: &str) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..RUNS {
        f.sql(prepare).await;
        let began = Instant::now();
        f.sql(&format!("begin; {sql}; commit")).await;
        best = best.min(began.elapsed());
    }
    best
}

async fn table(case: Case) {
    let f = Fixture::new(case).await;
    f.sql("truncate public.kids; insert into public.parents select n, 'o' from generate_series(0, 100) n on conflict do nothing").await;
    // A source with as many rows as are measured, and with the same triggers, but without target rows.
    let source = f.facts.shape.joins[0].table.sql();
    let mut many = String::from("create table public.many (id bigint primary key, owner text, note text);");
    for trigger in sync_sql::triggers(&f.facts.shape).iter().filter(|t| t.table == source) {
        many.push_str(&trigger.create.replace(&source, "public.many"));
        many.push_str(&format!("; alter table public.many enable always trigger \"{}\";", trigger.name));
    }
    f.sql(&many).await;
    let mut with = Vec::new();
    for (_, prepare, sql) in OPERATIONS {
        with.push(measure(&f, prepare, sql).await);
    }
    let (owner, fan_out) = ("update public.parents set owner = owner || 'x'", "vacuum public.kids");
    let propagated = measure(&f, fan_out, owner).await;
    for trigger in sync_sql::triggers(&f.facts.shape) {
        f.sql(&sync_sql::drop_trigger(&trigger)).await;
        if trigger.table == source {
            f.sql(&sync_sql::drop_trigger(&trigger).replace(&source, "public.many")).await;
        }
    }
    let micros = |d: Duration| d.as_secs_f64() * 1e6 / f64::from(ROWS);
    for ((what, prepare, sql), with) in OPERATIONS.iter().zip(with) {
        let bare = measure(&f, prepare, sql).await;
        println!("{:>6}: {what}: {:.1} us bare, {:+.1} us", f.spec.name, micros(bare), micros(with) - micros(bare));
    }
    let by_hand = "update public.parents set owner = owner || 'x'; update public.kids t set owner = p.owner from public.parents p where p.id = t.parent_id";
    let by_hand = measure(&f, fan_out, by_hand).await;
    println!(
        "{:>6}: source: change of the value, per target row: {:.1} us by hand, {:+.1} us",
        f.spec.name,
        micros(by_hand),
        micros(propagated) - micros(by_hand)
    );
}

#[tokio::test]
#[ignore = "measures"]
async fn the_triggers_cost() {
    table(OWNED).await;
    table(LOOSE).await;
}

#[tokio::test]
#[ignore = "measures"]
async fn the_guard_of_the_dedicated_login_costs() {
    for dedicated in [true, false] {
        let f = Fixture::with(OWNED, dedicated).await;
        f.sql("insert into public.kids (id, parent_id) select n, 1 from generate_series(100, 20099) n").await;
        let mut best = Duration::MAX;
        for _ in 0..RUNS {
            f.unfill().await;
            f.sql("vacuum public.kids").await;
            let mut batch = f.batch("batch").await;
            assert!(batch.begin(ROWS + 100).await);
            let fill = batch.fill();
            let began = Instant::now();
            batch.session.run(&fill).await;
            best = best.min(began.elapsed());
            batch.finish().await;
        }
        println!("fill, dedicated {dedicated}: {:.1} us per row", best.as_secs_f64() * 1e6 / f64::from(ROWS));
    }
}
