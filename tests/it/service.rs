//! Under a service manager: what systemd hears, and what a signal does to process 1 of a container.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, wait_until};

#[tokio::test]
async fn the_service_manager_hears_ready_status_signs_of_life_and_the_end() {
    let db = TestDb::new(Template::Rows(200)).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::with("hold_before = [\"backfill\"]");
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("ours");
    let path = dir.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).expect("a socket");
    let cli = Cli::new(&db).env("NOTIFY_SOCKET", path.to_str().expect("UTF-8")).env("WATCHDOG_USEC", "300000");
    let daemon = cli.start(&["run", job.path()]);
    let mut heard: Vec<String> = Vec::new();
    let hear_until = async |heard: &mut Vec<String>, text: &str| {
        let mut buffer = [0; 4096];
        let listen = async {
            while !heard.iter().any(|h| h == text) {
                let n = socket.recv(&mut buffer).await.expect("a datagram");
                heard.push(String::from_utf8_lossy(&buffer[..n]).into_owned());
            }
        };
        let heard_it = tokio::time::timeout(std::time::Duration::from_secs(30), listen).await.is_ok();
        assert!(heard_it, "{text} is not among {heard:?}");
    };
    hear_until(&mut heard, "READY=1").await;
    assert!(ledger.is("select count(*) = 1 from backfilld.job").await, "ready means that the job is entered");
    ledger.wait_status("held").await;
    heard.clear();
    hear_until(&mut heard, "WATCHDOG=1").await;
    daemon.signal("TERM");
    hear_until(&mut heard, "STOPPING=1").await;
    daemon.ended().await.expect(0, "stopped on request");
}

#[tokio::test]
async fn a_daemon_that_cannot_start_is_never_ready() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path).expect("a socket");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let cli = Cli::at(&format!("postgresql://nobody@127.0.0.1:{free}/none"));
    let cli = cli.env("NOTIFY_SOCKET", path.to_str().expect("UTF-8"));
    cli.run(&["run", JobDir::shipped().path()]).await.expect(4, "connection refused");
    let mut buffer = [0; 4096];
    while let Ok(n) = socket.try_recv(&mut buffer) {
        assert!(!String::from_utf8_lossy(&buffer[..n]).contains("READY"));
    }
}

/// In a container the daemon is process 1: signals without a handler would do nothing to it, and nobody else reaps or
/// forwards.
#[tokio::test]
async fn as_process_one_it_leaves_on_sigterm_and_a_standby_has_the_lease_at_once() {
    if !can_unshare() {
        eprintln!("process namespaces cannot be made here: not tried as process 1");
        return;
    }
    let db = TestDb::new(Template::Rows(600)).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::with("hold_before = [\"backfill\"]");
    let holder = "select count(*) from backfilld.lease where expires_at > clock_timestamp() and instance = ";
    let first = Cli::new(&db).in_pid_namespace().start(&["run", job.path()]);
    ledger.wait_status("held").await;
    let second = Cli::new(&db).env("BACKFILLD_INSTANCE", "there").start(&["run", job.path()]);
    let waiting = "select count(*) from pg_stat_activity where datname = current_database()
        and application_name like 'backfilld/%/heartbeat'";
    wait_until("both are there", async || ledger.number(waiting).await == 2).await;
    assert_eq!(ledger.number(&format!("{holder} 'here'")).await, 1);
    first.signal_child("TERM");
    first.ended().await.expect(0, "stopped on request");
    wait_until("the standby has it", async || ledger.number(&format!("{holder} 'there'")).await == 1).await;
    second.signal("TERM");
    second.ended().await.expect(0, "stopped on request");
}

fn can_unshare() -> bool {
    let tried = std::process::Command::new("unshare").args(["--pid", "--fork", "true"]).output();
    tried.is_ok_and(|ran| ran.status.success())
}

/// What an application was told is done.
#[derive(Default)]
struct Told {
    inserted: Vec<(uuid::Uuid, String)>,
    errors: Vec<String>,
}

/// Writes until told to stop: messages, and conversations that change hands.
async fn write(db: &TestDb, writer: usize, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<Told> {
    let client = db.client(backfilld::demo::sample::APP_OWNER).await;
    tokio::spawn(async move {
        let mut told = Told::default();
        // As fast as it goes it would write more than the batches, which have their pauses, can walk through in time.
        let mut pace = tokio::time::interval(std::time::Duration::from_millis(10));
        for n in 0.. {
            pace.tick().await;
            // One that lost its connection would fail for ever without waiting once, and the runtime could not end.
            if stop.load(Ordering::Relaxed) || client.is_closed() {
                break;
            }
            let content = format!("{writer}-{n}");
            let insert = "insert into public.messages (conversation_id, role, content)
                select id, 'user', $1 from public.conversations offset ($2::int8 * 37) % 60 limit 1 returning id";
            match client.query_opt(insert, &[&content, &(n as i64)]).await {
                Ok(Some(row)) => told.inserted.push((row.get(0), content)),
                Ok(None) => {}
                Err(e) => told.errors.push(backfilld::Error::from(e).line()),
            }
            let transfer = "update public.conversations c set user_id = u.id, auth_user_id = u.auth_user_id
                from (select id, auth_user_id from public.users where auth_user_id is not null offset $1::int8 % 20 limit 1) u
                where c.id = (select id from public.conversations offset ($1::int8 * 7) % 60 limit 1)";
            if n % 5 == 0
                && let Err(e) = client.execute(transfer, &[&(n as i64)]).await
            {
                told.errors.push(backfilld::Error::from(e).line());
            }
        }
        told
    })
}

/// What an update of a deployment does: a new daemon comes as standby, the old one is asked to leave; again and again,
/// while the application writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_nothing() {
    let db = TestDb::new(Template::Rows(6000)).await;
    let ledger = Ledger::new(&db).await;
    let before = ledger.number("select count(*) from public.messages").await;
    let job = JobDir::shipped();
    // Comparing everybody's access beside three writers is most of the time otherwise, and others test it.
    job.without_access();
    job.replace("initial_rows = 100", "pause = \"100ms\"\ninitial_rows = 100");
    // Closed while a standby starts, however long that takes, so that some rows are left for it.
    job.append("[throttle]\nevery = \"100ms\"\n[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"");
    let gate = async |open: bool| {
        let sql = format!("create or replace function public.gate() returns boolean language sql as 'select {open}'");
        ledger.run(&sql).await;
    };
    gate(true).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for writer in 0..3 {
        writers.push(write(&db, writer, Arc::clone(&stop)).await);
    }
    let start = |n: usize| Cli::new(&db).env("BACKFILLD_INSTANCE", &format!("i{n}")).start(&["run", job.path()]);
    let holds = async |n: usize| {
        let sql = format!(
            "select count(*) = 1 from backfilld.lease where expires_at > clock_timestamp() and instance = 'i{n}'"
        );
        ledger.is(&sql).await
    };
    let scanned = async || {
        let there = ledger.is("select to_regclass('backfilld.checkpoint') is not null").await;
        if there { ledger.number("select coalesce(sum(rows_scanned), 0) from backfilld.checkpoint").await } else { 0 }
    };
    let waiting = "select count(*) from pg_stat_activity where datname = current_database()
        and application_name like 'backfilld/%/heartbeat'";
    let mut leader = start(0);
    for n in 1..=3 {
        let from = scanned().await;
        wait_until("batches are through", async || scanned().await > from + 300).await;
        gate(false).await;
        let standby = start(n);
        wait_until("both are there", async || ledger.number(waiting).await == 2).await;
        gate(true).await;
        let from = scanned().await;
        wait_until("batches go on", async || scanned().await > from).await;
        assert_eq!(ledger.phase().await, "backfill", "there is something left to do");
        leader.signal("TERM");
        leader.ended().await.expect(0, "stopped on request");
        wait_until("the standby has it", async || holds(n).await).await;
        leader = standby;
    }
    // The pause was for the handovers.
    Cli::new(&db).run(&["tune", JOB, "batching.pause=0s"]).await.expect(0, "");
    ledger.wait_status("done").await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = 0;
    for writer in writers {
        let told = writer.await.expect("the writer does not panic");
        assert_eq!(told.errors, Vec::<String>::new());
        acknowledged += told.inserted.len() as i64;
        let (ids, contents): (Vec<_>, Vec<_>) = told.inserted.into_iter().unzip();
        let found = "select count(*) from unnest($1::uuid[], $2::text[]) w(id, content) join public.messages m using (id, content)";
        let found: i64 = ledger.client.query_one(found, &[&ids, &contents]).await.expect("readable").get(0);
        assert_eq!(found, ids.len() as i64, "every acknowledged message is there as it was written");
    }
    assert_eq!(ledger.number("select count(*) from public.messages").await, before + acknowledged);
    assert_eq!((ledger.unfilled().await, ledger.drift().await), (0, 0));
    assert!(acknowledged > 100, "{acknowledged} writes");
    leader.signal("TERM");
    leader.ended().await.expect(0, "stopped on request");
}
