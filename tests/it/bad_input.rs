//! Everything that can be wrong from the start, through the real binary: exit code, what, where, next, and nothing left
//! behind. And no password anywhere.

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::sample::{AUTHENTICATOR, DAEMON};

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, has_version, schema_dump, server};

async fn refuses(db: &TestDb, job: &JobDir, code: i32, says: &[&str]) {
    let before = schema_dump(db, &[]);
    let ended = Cli::new(db).run(&["run", "--once", job.path()]).await;
    for text in says {
        ended.expect(code, text);
    }
    assert!(ended.stderr.matches("error: ").count() == 1, "one message: {ended:#?}");
    assert!(!ended.stderr.contains("panicked"), "{ended:#?}");
    assert!(Ledger::new(db).await.is("select to_regnamespace('backfilld') is null").await, "{says:?}");
    assert_eq!(schema_dump(db, &[]), before, "{says:?}");
}

#[tokio::test]
async fn a_job_file_that_is_wrong_is_an_input_error_with_its_place() {
    let db = TestDb::new(Template::Schema).await;
    let cases: &[(&str, &str, &[&str])] = &[
        ("[target]", "colour = \"red\"\n[target]", &["job.toml", "colour"]),
        ("not_null = true", "not_null = \"yes\"", &["job.toml", "not_null", "expected a boolean"]),
        ("name = \"messages_auth_user_id\"", "name = \"a; drop table x\"", &["name: expected 1 to"]),
        ("name = \"auth_user_id\"", "name = \"\"", &["job.toml", "name"]),
        ("file = \"add_message.sql\"", "file = \"gone.sql\"", &["functions[0].file", "gone.sql"]),
        ("file = \"add_message.sql\"", "file = \"../../etc/passwd\"", &["must be a file beside job.toml"]),
        ("value = \"c.auth_user_id\"", "value = \"c.auth_user_id) or (true\"", &["columns[0].value"]),
        ("value = \"c.auth_user_id\"", "value = \"c.auth_user_id; drop table x\"", &["columns[0].value"]),
        ("[target]", "[target", &["job.toml"]),
    ];
    for (from, to, says) in cases {
        let job = JobDir::shipped();
        job.replace(from, to);
        refuses(&db, &job, 2, says).await;
    }
    let job = JobDir::shipped();
    job.edit("add_message.sql", |text| text + "; commit; drop table public.messages");
    refuses(&db, &job, 2, &["add_message.sql: statement 3"]).await;
    Cli::new(&db)
        .run(&["run", "--once", "/no/such/job"])
        .await
        .expect(2, "cannot read /no/such/job")
        .expect(2, "hint:");
}

#[tokio::test]
async fn a_job_that_does_not_fit_the_database_is_an_input_error_with_its_key() {
    let db = TestDb::new(Template::Schema).await;
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "table = \"public.messages\"",
            "table = \"public.mesages\"",
            &["target.table", "public.mesages does not exist"],
        ),
        ("table = \"public.messages\"", "table = \"public.\\\"x; drop table y\\\"\"", &["does not exist in database"]),
        ("table = \"public.conversations\"", "table = \"public.nowhere\"", &["source[0].table", "public.nowhere"]),
        ("id = \"t.conversation_id\"", "id = \"t.conversation\"", &["source[0].on", "conversation"]),
        ("id = \"t.conversation_id\"", "user_id = \"t.conversation_id\"", &["source[0]", "unique"]),
        ("value = \"c.auth_user_id\"", "value = \"c.owner_of_it\"", &["columns[0].value", "owner_of_it"]),
        ("value = \"c.auth_user_id\"", "value = \"no_such_function(c.id)\"", &["columns[0].value", "no_such_function"]),
        ("type = \"uuid\"", "type = \"uuidd\"", &["columns[0]", "uuidd"]),
    ];
    for (from, to, says) in cases {
        let job = JobDir::shipped();
        job.replace(from, to);
        refuses(&db, &job, 2, says).await;
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_used_is_named_with_the_reason() {
    let db = TestDb::new(Template::Schema).await;
    let job = JobDir::shipped();
    let run = async |url: &str| Cli::at(url).run(&["run", "--once", job.path()]).await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    run(&format!("postgresql://backfilld:s3cr3t@127.0.0.1:{free}/app")).await.expect(4, &format!("127.0.0.1:{free}"));
    let port = server().cluster.port();
    let wrong = run(&format!("postgresql://backfilld:s3cr3t@127.0.0.1:{port}/{}", db.name())).await;
    wrong.expect(4, "28P01").expect(4, "hint:");
    assert!(!wrong.stderr.contains("s3cr3t"), "{wrong:#?}");
    let missing = db.url(DAEMON).replace(db.name(), "no_such_database");
    run(&missing).await.expect(4, "no_such_database").expect(4, "3D000");
    run("postgresql://host/app?sslmode=maybe").await.expect(2, "database.url");
    let cli = Cli::new(&db).env("BACKFILLD_LEASE__TTL", "soon");
    cli.run(&["run", "--once", job.path()]).await.expect(2, "`lease.ttl`: expected");
    #[cfg(not(feature = "otel"))]
    Cli::new(&db)
        .env("BACKFILLD_TELEMETRY__OTLP_ENDPOINT", "http://127.0.0.1:4318")
        .run(&["run", "--once", job.path()])
        .await
        .expect(2, "`telemetry.otlp_endpoint`: this binary was built without")
        .expect(2, "--features otel");
    let cli = Cli::new(&db).env("BACKFILLD_DATABASE__POOLSIZE", "3");
    cli.run(&["run", "--once", job.path()]).await.expect(2, "BACKFILLD_DATABASE__POOL_SIZE");
}

#[tokio::test]
async fn a_login_that_may_not_do_it_is_told_what_it_lacks() {
    if !has_version(15, "the daemon's login is a superuser there") {
        return;
    }
    let db = TestDb::new(Template::Schema).await;
    let ledger = Ledger::new(&db).await;
    let job = JobDir::shipped();
    let read_only = Cli::at(&format!("{}?options=-c%20default_transaction_read_only%3Don", db.url(DAEMON)));
    read_only.run(&["run", "--once", job.path()]).await.expect(5, "read-only").expect(5, "target_session_attrs");

    ledger.run(&format!("revoke create on database {} from backfilld, public", db.name())).await;
    let ended = Cli::new(&db).run(&["run", "--once", job.path()]).await;
    assert!(matches!(ended.code, Some(1..=5)), "{ended:#?}");
    assert!(ended.stderr.to_lowercase().contains("create"), "{ended:#?}");
    let ended = Cli::at(&db.url(AUTHENTICATOR)).run(&["run", "--once", job.path()]).await;
    assert!(matches!(ended.code, Some(1..=5)), "{ended:#?}");
    assert!(ledger.is("select to_regnamespace('backfilld') is null").await);
}

#[tokio::test]
async fn hostile_names_are_quoted_from_the_beginning_to_the_end() {
    let db = TestDb::new(Template::Rows(200)).await;
    let ledger = Ledger::new(&db).await;
    let column = "own\"er'; drop table public.users; --";
    let long = "x".repeat(63);
    let before = schema_dump(&db, &[]);
    let job = JobDir::shipped();
    job.without_access();
    job.edit("job.toml", |text| {
        let quoted = format!("'''{column}'''");
        text.replace("name = \"auth_user_id\"", &format!("name = {quoted}"))
            .replace("columns = [\"auth_user_id\"]", &format!("columns = [{quoted}]"))
            .replace("\"idx_messages_auth_user_id\"", &format!("\"{long}\""))
            .replace("\"messages_auth_user_id_fkey\"", "\"Fk $1 %s \\\"; select\"")
            .replace("\"Users can view own messages\"", "\"it's \\\"mine\\\"; --\"")
            .replace("= \"auth_user_id = (select", "= \"conversation_id is not null and id = (select")
            .replace("Denormalized", "It's \\\\ \\\"denormalized\\\"")
    });
    job.edit("add_message.sql", |_| {
        "create or replace function public.add_message(p_conversation_id uuid, p_role text, p_content text,
           p_image_url text default null, p_metadata jsonb default '{}') returns uuid language sql as 'select null::uuid'"
            .to_owned()
    });
    let cli = Cli::new(&db);
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    let name = column.replace('"', "\"\"");
    assert_eq!(ledger.number(&format!("select count(*) from public.messages where \"{name}\" is null")).await, 0);
    assert!(ledger.is(&format!("select indisvalid from pg_index where indexrelid = 'public.{long}'::regclass")).await);
    cli.run(&["rollback", JOB, "--yes", "--drop-column"]).await.expect(0, "");
    assert_eq!(schema_dump(&db, &[]), before);
}

#[tokio::test]
async fn the_password_is_nowhere() {
    let db = TestDb::new(Template::Rows(200)).await;
    let password = server().cluster.password().to_owned();
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let cli =
        Cli::new(&db).env("BACKFILLD_LOG__LEVEL", "trace").env("BACKFILLD_HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    let job = JobDir::shipped();
    let daemon = cli.start(&["run", job.path()]);
    Ledger::new(&db).await.wait_status("done").await;
    let arguments = std::fs::read(format!("/proc/{}/cmdline", daemon.pid())).unwrap_or_default();
    let mut seen = vec![("arguments", String::from_utf8_lossy(&arguments).into_owned())];
    for path in ["metrics", "readyz", "healthz"] {
        seen.push((path, http(port, path).await));
    }
    assert!(seen[1].1.contains("backfilld_rows_updated_total"), "{}", seen[1].1);
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    assert!(ended.stderr.contains("DEBUG"), "the log is at its most talkative");
    seen.extend([("stderr", ended.stderr), ("stdout", ended.stdout)]);
    for args in [
        &["config", "show"][..],
        &["status", JOB, "--json", "--history", "100"],
        &["config", "check"],
        &["plan", job.path()],
    ] {
        let ended = cli.run(args).await;
        ended.expect(0, "");
        seen.extend([("a command's stdout", ended.stdout), ("a command's stderr", ended.stderr)]);
    }
    let wrong = Cli::at(&db.url(SUPERUSER).replace(&password, &format!("{password}x"))).run(&["status"]).await;
    seen.push(("a refused login", wrong.stderr));
    let ledger = "select string_agg(j::text || e::text, ' ') from backfilld.job j, backfilld.event e";
    seen.push(("the ledger", db.admin().await.query_one(ledger, &[]).await.expect("readable").get(0)));
    for (place, text) in seen {
        assert!(!text.contains(&password), "the password is in {place}: {text}");
    }
    let argument = format!("database.url={}", db.url(DAEMON));
    cli.run(&["--set", &argument, "config", "show"]).await.expect(2, "a secret on a command line");
}

async fn http(port: u16, path: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    let request = format!("GET /{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut text = String::new();
    socket.read_to_string(&mut text).await.expect("answered");
    text
}
