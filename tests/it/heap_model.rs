//! The model of a walk in heap order: after any schedule of batches, kills, the application's writes, vacuum, rewrites and
//! owner changes, the data is what one UPDATE at the end would have made of the same writes.

use std::collections::BTreeSet;

use backfilld::demo::cluster::SUPERUSER;
use futures_util::StreamExt as _;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::support::{Cli, Ended, JOB, JobDir, Ledger, Template, TestDb, wait_until};

/// Schedules of the long test; a longer run sets it higher.
const SEEDS_ENV: &str = "BACKFILLD_TEST_SEEDS";
const STEPS: u32 = 14;

/// What the table is like when the walk begins.
struct Form {
    name: &'static str,
    /// Rows of the template, and what is made of them.
    rows: u32,
    setup: &'static [&'static str],
    /// Most rows of a batch.
    batch: u32,
    lanes: u32,
}

const FULL: &str = "vacuum full public.messages";
const FORMS: [Form; 5] = [
    Form { name: "empty", rows: 600, setup: &["truncate public.messages"], batch: 20, lanes: 1 },
    Form {
        name: "one page",
        rows: 600,
        setup: &[
            "delete from public.messages where id not in (select id from public.messages order by id limit 15)",
            FULL,
        ],
        batch: 20,
        lanes: 1,
    },
    // Twenty rounds of two batches.
    Form { name: "one window", rows: 600, setup: &[], batch: 20, lanes: 1 },
    Form {
        name: "three lanes",
        rows: 600,
        setup: &["alter table public.messages set (fillfactor = 25)", FULL],
        batch: 10,
        lanes: 3,
    },
    // So few rows on a page that there are more pages than a window has; a batch is a quarter of one.
    Form {
        name: "two windows",
        rows: 2800,
        setup: &["alter table public.messages set (fillfactor = 10)", FULL],
        batch: 300,
        lanes: 1,
    },
];

/// A statement of the application or of a database administrator.
struct Write {
    sql: String,
    /// What is done to the reference instead, where there are no sync triggers.
    reference: Option<String>,
    /// Not within a transaction.
    alone: bool,
}

/// A few rows of a table.
fn pick(rng: &mut StdRng, table: &str, n: u32) -> String {
    let offset = rng.random_range(0..500);
    // Where the table has fewer rows, the first ones.
    let rows = format!("select count(*) from public.{table}");
    format!("(select id from public.{table} order by id offset {offset} % greatest(({rows}), 1) limit {n})")
}

fn write(rng: &mut StdRng, step: u32) -> Write {
    let rows = rng.random_range(1..60);
    let messages = pick(rng, "messages", rows);
    let conversation = pick(rng, "conversations", 1);
    let insert = |rows: u32| {
        format!(
            "insert into public.messages (id, conversation_id, role, content)
             select md5('{step}-' || n)::uuid, c.id, 'user', repeat('y', n * 7)
             from generate_series(1, {rows}) n, {conversation} c"
        )
    };
    let within = |sql| Write { sql, reference: None, alone: false };
    let alone = |sql: &str| Write { sql: sql.into(), reference: None, alone: true };
    match rng.random_range(0..15) {
        0 | 1 => within(insert(rows)),
        // It grows by more pages than a batch takes.
        2 => within(insert(400)),
        3 | 4 => {
            within(format!("update public.messages set content = content || repeat('z', 40) where id in {messages}"))
        }
        5 => within(format!("delete from public.messages where id in {messages}")),
        6 => within(format!(
            "update public.messages set conversation_id = c.id from {conversation} c where messages.id in {messages}"
        )),
        7 | 8 => owner_change(rng),
        9 => within(format!("delete from public.conversations where id in {conversation}")),
        10 | 11 => alone("vacuum public.messages"),
        12 => alone(FULL),
        _ if !step.is_multiple_of(3) => within(insert(rows)),
        13 => alone("truncate public.messages"),
        // With the next vacuum it shrinks and stays in its file, until nothing is left where the walk is.
        _ => within("delete from public.messages".into()),
    }
}

/// Some conversations are somebody else's. The sync trigger writes their messages, which the application's own triggers see.
fn owner_change(rng: &mut StdRng) -> Write {
    let change = format!(
        "update public.conversations c set user_id = u.id, auth_user_id = u.auth_user_id
         from (select id, auth_user_id from public.users order by id offset {} limit 1) u
         where c.id in {} and c.auth_user_id is distinct from u.auth_user_id",
        rng.random_range(0..15),
        pick(rng, "conversations", 5)
    );
    let reference = format!(
        "with changed as ({change} returning c.id)
         update public.messages set role = role where conversation_id in (select id from changed)"
    );
    Write { sql: change, reference: Some(reference), alone: false }
}

struct Model {
    db: TestDb,
    _reference: TestDb,
    ours: Ledger,
    theirs: Ledger,
    job: JobDir,
    rng: StdRng,
    log: Vec<String>,
    /// Where the walk was when the daemon was killed.
    places: BTreeSet<String>,
}

impl Model {
    async fn new(seed: u64, form: &Form) -> Self {
        let (db, reference) =
            (TestDb::new(Template::Rows(form.rows)).await, TestDb::new(Template::Rows(form.rows)).await);
        let (ours, theirs) = (Ledger::new(&db).await, Ledger::new(&reference).await);
        for sql in form.setup {
            ours.run(sql).await;
            theirs.run(sql).await;
        }
        let job = JobDir::heap();
        job.without_access();
        job.replace("max_rows = 100", &format!("max_rows = {}", form.batch));
        job.replace("initial_rows = 100", &format!("initial_rows = {}\nlanes = {}", form.batch, form.lanes));
        // What follows the proof of the data is no part of the model.
        job.replace("[target]", "hold_before = [\"constrain\"]\n[target]");
        let log = vec![format!("seed {seed}, {}", form.name)];
        Self {
            db,
            _reference: reference,
            ours,
            theirs,
            job,
            rng: StdRng::seed_from_u64(seed),
            log,
            places: BTreeSet::new(),
        }
    }

    fn fault(&mut self) -> String {
        let point = ["after-commit", "before-commit"][self.rng.random_range(0..2)];
        format!("{point}:{}", self.rng.random_range(1..10))
    }

    fn start(&self, fault: &str) -> tokio::task::JoinHandle<Ended> {
        let daemon = Cli::new(&self.db).env("BACKFILLD_FAULT", fault).start(&["run", "--once", self.job.path()]);
        tokio::spawn(daemon.ended())
    }

    async fn ended(&mut self, fault: &str, daemon: tokio::task::JoinHandle<Ended>) {
        let ended = daemon.await.expect("no panic");
        let place = self.place().await;
        self.log.push(format!("run until {fault}: {:?}, {place}", ended.code));
        assert!(matches!(ended.code, None | Some(5)), "{:#?} {ended:#?}", self.log);
        if ended.code.is_none() {
            self.places.insert(place);
        }
    }

    async fn run(&mut self, fault: &str) {
        let daemon = self.start(fault);
        self.ended(fault, daemon).await;
    }

    async fn place(&self) -> String {
        let sql = "select case when count(*) > 1 then 'several lanes'
              when bool_or(finished) then 'behind the end'
              when bool_or(heap_window > heap_start) then 'in a later window'
              when bool_or(heap_block <> heap_window) then 'within a round'
              when bool_or(heap_round > 0) then 'between rounds'
              else 'at the beginning' end
            from backfilld.checkpoint where filenode is not null";
        text(&self.db, sql).await
    }

    async fn between(&mut self, write: &Write) {
        self.ours.run(&write.sql).await;
        self.theirs.run(write.reference.as_ref().unwrap_or(&write.sql)).await;
        self.log.push(write.sql.clone());
    }

    /// While a batch waits for the application, which has a row, or just while batches run.
    async fn beside(&mut self, write: &Write) {
        let (fault, row) = (self.fault(), pick(&mut self.rng, "messages", 1));
        let app = self.db.session("app", SUPERUSER).await;
        let batches = "select coalesce(sum(batches), 0) from backfilld.checkpoint";
        let before = self.ours.number(batches).await;
        if !write.alone {
            app.run(&format!("begin; select from public.messages where id in {row} for update")).await;
        }
        let daemon = self.start(&fault);
        let waits = format!(
            "select exists (select from pg_stat_activity where application_name like 'backfilld/%'
               and {} = any (pg_blocking_pids(pid)))",
            app.pid()
        );
        wait_until("a batch waits or has been, or there is none any more", async || {
            daemon.is_finished()
                || match write.alone {
                    true => self.ours.number(batches).await > before,
                    false => self.ours.is(&waits).await,
                }
        })
        .await;
        self.log.push(format!("beside the following: {}", write.sql));
        app.run(&write.sql).await;
        if !write.alone {
            app.run("commit").await;
        }
        self.theirs.run(write.reference.as_ref().unwrap_or(&write.sql)).await;
        self.ended(&fault, daemon).await;
    }

    /// The walk goes on to its end, and the data is as one UPDATE makes it.
    async fn finish(&self) {
        let cli = Cli::new(&self.db);
        cli.run(&["run", "--once", self.job.path()]).await.expect(5, "hold point");
        // Or the verification has found rows that the walk had left out, and the second sweep has mended it.
        let sweeps = self.ours.number("select max(sweep) from backfilld.checkpoint").await;
        assert_eq!(sweeps, 1, "{:#?}", self.log);
        cli.run(&["cutover", JOB]).await.expect(0, "");
        cli.run(&["run", "--once", self.job.path()]).await.expect(0, "done");
        self.theirs
            .run(
                "set session_replication_role = replica;
                 alter table public.messages add column auth_user_id uuid;
                 update public.messages m set auth_user_id = c.auth_user_id
                 from public.conversations c where m.conversation_id = c.id and m.auth_user_id is null",
            )
            .await;
        let (ours, theirs) = (rows(&self.ours).await, rows(&self.theirs).await);
        let different: Vec<_> = ours.symmetric_difference(&theirs).take(9).collect();
        assert!(different.is_empty(), "{:#?} {different:#?}", self.log);
        assert_eq!(self.ours.status().await, "done");
    }
}

async fn rows(ledger: &Ledger) -> BTreeSet<String> {
    let sql =
        "select concat_ws('|', id, conversation_id, role, md5(content), image_url, metadata, created_at = updated_at,
                 auth_user_id) from public.messages";
    ledger.client.query(sql, &[]).await.expect("rows").iter().map(|r| r.get(0)).collect()
}

async fn text(db: &TestDb, sql: &str) -> String {
    db.admin().await.query_one(sql, &[]).await.expect("a value").get(0)
}

/// Gives where the walk was when the daemon was killed.
async fn schedule(seed: u64) -> BTreeSet<String> {
    let form = &FORMS[(seed % FORMS.len() as u64) as usize];
    let mut model = Model::new(seed, form).await;
    model.run("after-commit:1").await;
    if form.name == "two windows" {
        // Every second batch is its daemon's last, until the first window is done.
        while !model.places.contains("in a later window") && model.place().await != "behind the end" {
            model.run("after-commit:2").await;
        }
    }
    for step in 0..STEPS {
        match model.rng.random_range(0..10) {
            0..2 => {
                let fault = model.fault();
                model.run(&fault).await;
            }
            2..5 => {
                let write = write(&mut model.rng, step);
                model.beside(&write).await;
            }
            _ => {
                let write = write(&mut model.rng, step);
                model.between(&write).await;
            }
        }
    }
    model.finish().await;
    if std::env::var_os("BACKFILLD_TEST_LOG").is_some() {
        eprintln!("{:#?}", model.log);
    }
    model.places
}

/// Two at a time, each with a runtime of its own: a database that is dropped blocks its thread, and a connection of the
/// other that is just being made there would block the drop, until the server gives that connection up.
async fn schedules(seeds: impl Iterator<Item = u64>) -> BTreeSet<String> {
    let run = |seed| async move {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let ended = tokio::task::spawn_blocking(move || runtime.block_on(schedule(seed))).await;
        ended.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    };
    let places: Vec<_> = futures_util::stream::iter(seeds.map(run)).buffer_unordered(2).collect().await;
    places.into_iter().flatten().collect()
}

#[tokio::test]
async fn random_schedules_of_a_walk_in_heap_order_end_as_one_update_would() {
    let places = schedules(0..FORMS.len() as u64).await;
    for place in ["within a round", "between rounds", "in a later window", "several lanes"] {
        assert!(places.contains(place), "no kill {place}: {places:?}");
    }
}

#[tokio::test]
#[ignore = "takes minutes"]
async fn many_random_schedules_of_a_walk_in_heap_order_end_as_one_update_would() {
    let seeds = std::env::var(SEEDS_ENV).ok().and_then(|n| n.parse().ok()).unwrap_or(50);
    schedules(FORMS.len() as u64..seeds).await;
}
