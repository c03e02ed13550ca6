//! Mutation check: defects planted in policies, triggers, functions and rows, each in a database of its own, and who catches
//! them. The tables are the data of docs/mutations.md.

mod before;
mod document;
mod held;
mod jobs;
mod table;
mod watched;

use std::sync::Mutex;

use self::table::{By, Defect, Moment};
use crate::support::{Cli, Ended, JOB, JobDir, Ledger, Local, Template, TestDb, wait_until};

const ROWS: u32 = 300;
/// Defects tried at the same time.
const AT_ONCE: usize = 3;
/// Looks of the watch after which a defect counts as not caught.
const LOOKS: i64 = 3;

/// Every defect, by moment.
fn all() -> impl Iterator<Item = &'static Defect> {
    [before::DEFECTS, jobs::DEFECTS, held::DEFECTS, watched::DEFECTS].into_iter().flatten()
}

/// The shipped job as it is used at a moment.
fn job_at(moment: Moment) -> JobDir {
    let job = match moment {
        Moment::Held | Moment::Flipped | Moment::Watched => JobDir::with("hold_before = [\"flip\"]"),
        Moment::Before | Moment::Job => JobDir::shipped(),
    };
    if moment == Moment::Watched {
        job.append("[watch]\nfor = \"24h\"\nevery = \"100ms\"");
    }
    job
}

/// A database as it is at a moment, to be copied; one that is held is copied from `held`.
async fn database(moment: Moment, held: Option<&TestDb>) -> TestDb {
    let (job, db) = match (moment, held) {
        (Moment::Before | Moment::Job, _) => return TestDb::new(Template::Rows(ROWS)).await,
        (_, Some(held)) => (job_at(moment), TestDb::copy(held).await),
        (_, None) => (job_at(moment), TestDb::new(Template::Rows(ROWS)).await),
    };
    let cli = Cli::new(&db);
    if held.is_none() {
        cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point before flip");
    }
    if moment == Moment::Held {
        return db;
    }
    cli.run(&["cutover", JOB]).await.expect(0, "");
    if moment == Moment::Flipped {
        let killed = cli.clone().env("BACKFILLD_FAULT", "before-confirm").run(&["run", "--once", job.path()]).await;
        assert_eq!(killed.code, None, "{killed:#?}");
        return db;
    }
    let mut daemon = Local::start(&db, job.spec(), false, &[]);
    let ledger = Ledger::new(&db).await;
    let looked = "select exists (select from backfilld.watch where passes > 0)";
    wait_until("it has looked", async || ledger.phase().await == "watch" && ledger.is(looked).await).await;
    daemon.stop().await;
    db
}

/// A defect in a database of its own.
struct Planted {
    db: TestDb,
    ledger: Ledger,
    job: JobDir,
    role: String,
}

impl Planted {
    async fn new(defect: &Defect, from: &TestDb) -> Self {
        let db = TestDb::copy(from).await;
        let (ledger, job, role) = (Ledger::new(&db).await, job_at(defect.moment), format!("mutant_{}", db.name()));
        for (old, new) in defect.job {
            let (file, old) = old.strip_prefix("-- ").map_or(("job.toml", *old), |old| ("add_message.sql", old));
            job.edit(file, |text| {
                assert!(text.contains(old), "{}: {old:?} is not in {file}", defect.name);
                text.replace(old, &new.replace("{role}", &role))
            });
        }
        let owners = ledger
            .client
            .query(
                "select auth_user_id::text from public.conversations c where exists (select from public.messages m
                    where m.conversation_id = c.id) group by 1 order by count(*) desc, 1 limit 2",
                &[],
            )
            .await
            .expect("owners");
        let sql = defect
            .sql
            .replace("{role}", &role)
            .replace("{user}", owners[0].get(0))
            .replace("{other}", owners[1].get(0));
        ledger.run(&sql).await;
        Self { db, ledger, job, role }
    }

    /// What everybody who looks at this moment says; the catcher among them.
    async fn caught(&self, defect: &Defect) -> Vec<(By, String)> {
        let cli = Cli::new(&self.db);
        match defect.moment {
            Moment::Before => self.checked(&cli).await,
            Moment::Job => match self.checked(&cli).await {
                mut seen if seen.iter().all(|s| s.0 != By::Check && s.0 != By::Load) => {
                    seen.extend(self.ran(&cli).await);
                    seen
                }
                seen => seen,
            },
            Moment::Held => {
                let verified = cli.run(&["verify", JOB]).await;
                let mut out = match verified.code {
                    Some(0) => Vec::new(),
                    _ => vec![(By::Verification, text(&verified))],
                };
                cli.run(&["cutover", JOB]).await.expect(0, "");
                out.extend(self.ran(&cli).await);
                out
            }
            Moment::Flipped => self.ran(&cli).await,
            Moment::Watched => self.watched().await,
        }
    }

    async fn checked(&self, cli: &Cli) -> Vec<(By, String)> {
        let checked = cli.run(&["check", self.job.path()]).await;
        let said = text(&checked);
        match checked.code {
            Some(2) => vec![(By::Load, said)],
            Some(3) => vec![(By::Check, said)],
            Some(0) => vec![(By::Remark, said)],
            other => vec![(By::Nobody("check broke"), format!("{other:?} {said}"))],
        }
    }

    async fn ran(&self, cli: &Cli) -> Vec<(By, String)> {
        let ran = cli.run(&["run", "--once", self.job.path()]).await;
        let said = text(&ran);
        let by = match () {
            () if ran.code == Some(0) => return Vec::new(),
            () if said.contains("after the flip; the old policies and functions are back") => By::ComparisonAfter,
            () if said.contains("verify: access") => By::Comparison,
            () if said.contains("verify: the verification found") => By::Verification,
            () => By::Flip,
        };
        vec![(by, said)]
    }

    async fn watched(&self) -> Vec<(By, String)> {
        let mut daemon = Local::start(&self.db, self.job.spec(), false, &[]);
        let passes = "coalesce((select passes from backfilld.watch), 0)";
        let until = self.ledger.number(passes).await + LOOKS;
        wait_until("the watch sees it or has looked often enough", async || {
            !self.ledger.reason().await.is_empty() || self.ledger.number(passes).await >= until
        })
        .await;
        let reason = self.ledger.reason().await;
        daemon.stop().await;
        if reason.is_empty() { Vec::new() } else { vec![(By::Watch, reason)] }
    }

    async fn clean(self) {
        let role = &self.role;
        let there = format!("select exists (select from pg_roles where rolname = '{role}')");
        if self.ledger.is(&there).await {
            self.ledger.run(&format!("drop owned by \"{role}\" cascade; drop role \"{role}\"")).await;
        }
    }
}

/// Everything that was printed but what a log says beside errors and warnings, in one line.
fn text(ended: &Ended) -> String {
    let lines = ended.stdout.lines().chain(ended.stderr.lines().filter(|l| !l.contains("\"level\":\"INFO\"")));
    lines.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

/// Plants a defect; gives what is wrong if it is not caught by whom the table says.
async fn plant(defect: &Defect, from: &TestDb) -> Option<String> {
    let planted = Planted::new(defect, from).await;
    let seen = planted.caught(defect).await;
    planted.clean().await;
    let fine = match defect.by {
        By::Harmless | By::Nobody(_) => seen.iter().all(|(by, _)| *by == By::Remark),
        by => seen.iter().any(|(b, said)| *b == by && said.contains(defect.says)),
    };
    (!fine).then(|| format!("{}: not caught by {:?} with {:?}; seen: {seen:#?}", defect.name, defect.by, defect.says))
}

/// On this thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(future)
}

/// Plants `defects`, which are of one moment, a few at a time: each worker with a runtime of its own, since dropping a database
/// blocks.
fn plant_all(defects: Vec<&Defect>, from: &TestDb) {
    let (next, missed) = (Mutex::new(defects.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(defect) = next.lock().expect("nobody panics").next() else { return };
                    let wrong = block_on(plant(defect, from));
                    missed.lock().expect("nobody panics").extend(wrong);
                }
            });
        }
    });
    let missed = missed.into_inner().expect("nobody panics");
    assert!(missed.is_empty(), "{} defects:\n{}", missed.len(), missed.join("\n"));
}

fn every(moment: Moment) {
    let from = block_on(database(moment, None));
    plant_all(all().filter(|d| d.moment == moment).collect(), &from);
}

/// Which defects are planted with all other tests: something of each moment, and of what was once not caught.
const SLICE: &[(Moment, &str)] = &[
    (Moment::Before, "two owners by OR: shared conversations, and the job knows only the owner"),
    (Moment::Job, "delete: using (true)"),
    (Moment::Job, "add_message() writes into everybody's conversation, as the old one did"),
    (Moment::Held, "insert trigger replaced by one of the same name that does nothing"),
    (Moment::Held, "stale owner: a conversation changed hands while propagation was off"),
    (Moment::Flipped, "the old add_message() is put back"),
    (Moment::Watched, "nothing: the watch has no finding"),
    (Moment::Watched, "a view that reads past the policies (no security_invoker)"),
    (Moment::Watched, "propagation made anew with another condition"),
];

#[test]
fn some_defects_of_each_moment_are_caught() {
    let held = block_on(database(Moment::Held, None));
    for moment in Moment::ALL {
        let from = block_on(database(moment, Some(&held)));
        let chosen: Vec<&Defect> =
            all().filter(|d| SLICE.contains(&(d.moment, d.name)) && d.moment == moment).collect();
        assert_eq!(chosen.len(), SLICE.iter().filter(|s| s.0 == moment).count(), "{moment:?}: names have changed");
        plant_all(chosen, &from);
    }
}

#[test]
#[ignore = "long: make mutations"]
fn every_defect_before_the_job_is_caught() {
    every(Moment::Before);
}

#[test]
#[ignore = "long: make mutations"]
fn every_defect_in_the_job_is_caught() {
    every(Moment::Job);
}

#[test]
#[ignore = "long: make mutations"]
fn every_defect_while_held_is_caught() {
    every(Moment::Held);
}

#[test]
#[ignore = "long: make mutations"]
fn every_defect_right_after_the_flip_is_caught() {
    every(Moment::Flipped);
}

#[test]
#[ignore = "long: make mutations"]
fn every_defect_under_the_watch_is_caught() {
    every(Moment::Watched);
}
