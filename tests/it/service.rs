//! Under a service manager: what systemd hears, and what a signal does to process 1 of a container.

use std::os::unix::fs::PermissionsExt as _;

use crate::support::{Cli, JobDir, Ledger, Template, TestDb, wait_until};

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
