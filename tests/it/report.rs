//! The report: it has the ledger's numbers, stands by itself, and lets nothing out of its text.

use backfilld::phase::Status;

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, has_version, run_once};

/// Void elements of HTML.
const VOID: [&str; 6] = ["meta", "br", "hr", "img", "link", "input"];

/// Fails unless every element that is opened is closed, in order, and no attribute or text holds a bare `<`.
fn well_formed(html: &str) {
    let mut open: Vec<String> = Vec::new();
    let body = html.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    for piece in body.split('<').skip(1) {
        let (tag, text) = piece.split_once('>').unwrap_or_else(|| panic!("a tag without end: {piece:.80}"));
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes of {tag}");
        assert!(!text.contains('"') || open.last().is_some_and(|t| t == "style"), "a bare quote in {text:.80}");
        let name: String = tag.trim_start_matches('/').chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_deref(), Some(name.as_str()), "before {text:.80}");
        } else if !tag.ends_with('/') && !VOID.contains(&name.as_str()) {
            assert!(!name.is_empty(), "{tag:.80}");
            open.push(name);
        }
    }
    assert_eq!(open, Vec::<String>::new());
}

fn thousands(n: i64) -> String {
    let text = n.to_string();
    if text.len() > 3 { format!("{},{}", &text[..text.len() - 3], &text[text.len() - 3..]) } else { text }
}

#[tokio::test]
async fn a_report_has_the_numbers_of_the_ledger_and_stands_by_itself() {
    let db = TestDb::new(Template::Rows(3000)).await;
    let (ledger, job) = (Ledger::new(&db).await, JobDir::shipped());
    let hostile = "</style><script src=\"https://evil.test/x\">alert('1')</script>";
    job.edit("job.toml", |t| {
        t.replacen("description = \"", &format!("description = \"{} ", hostile.replace('"', "\\\"")), 1).replacen(
            "name = \"all messages\"",
            "name = \"all <b>messages</b> & 'more'\"",
            1,
        )
    });
    assert_eq!(run_once(&db, job.spec()).await.expect("done"), Status::Done);

    let cli = Cli::new(&db);
    let html = cli.run(&["report", JOB]).await;
    let html = &html.expect(0, "").stdout;
    well_formed(html);
    for part in ["http://", "https://", "<script", "<link", "url(", "@import", " src=\"", " href=", "<b>"] {
        let found = html.replace("https://evil.test", "").matches(part).count();
        assert_eq!(found, 0, "{part} in the report");
    }
    assert!(html.contains("&lt;/style&gt;&lt;script src=&quot;"), "the description is shown as it is written");
    let text = async |sql: &str| ledger.number(sql).await;
    let filled = text("select sum(rows_updated) from backfilld.checkpoint").await;
    let checked = text("select rows_checked from backfilld.verdict order by id desc limit 1").await;
    let batches = text("select sum(batches) from backfilld.checkpoint").await;
    assert!(filled > 0 && html.contains(&format!("<dt>Rows filled</dt><dd>{}</dd>", thousands(filled))));
    assert!(html.contains(&format!("<dt>Batches</dt><dd>{}</dd>", thousands(batches))));
    assert!(html.contains(&format!("passed, {} rows", thousands(checked))));
    for part in
        ["AccessExclusiveLock", "backfilld rollback messages_auth_user_id", "<svg", "zzz_backfilld_", "Index Scan"]
    {
        assert!(html.contains(part), "no {part}");
    }
    assert!(!html.contains(&db.url("backfilld")) && !html.contains("password"));

    let json: serde_json::Value =
        serde_json::from_str(&cli.run(&["report", JOB, "--format", "json"]).await.stdout).expect("JSON");
    assert_eq!(json["rows_updated"], filled);
    assert_eq!(json["phases"].as_array().map(Vec::len), Some(7));
    let plans = json["plans"].as_array().expect("plans");
    // Two queries, three owners, before and after; none failed, and none tells whose rows it read.
    assert_eq!(plans.len(), 12);
    for plan in plans {
        assert!(plan["error"] == "" && plan["time_ms"].as_f64() > Some(0.0) && plan["owner_key"].is_null(), "{plan}");
        let joins = plan["nodes"].to_string().contains("conversations");
        assert_eq!(joins, plan["stage"] == "before", "the old policies join, the new ones do not: {plan}");
    }
    let samples = json["samples"].as_array().expect("samples");
    assert!(samples.len() >= 3, "{samples:?}");
    assert_eq!(samples.last().expect("one")["rows_updated"], filled);
    assert!(samples.iter().any(|s| s["batch_p99_ms"].as_f64() > Some(0.0)), "{samples:?}");

    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("report.md");
    let path = path.to_str().expect("UTF-8");
    cli.run(&["report", JOB, "--format", "md", "-o", path]).await.expect(0, "");
    let markdown = std::fs::read_to_string(path).expect("written");
    assert!(markdown.contains(&format!("Rows filled: {}", thousands(filled))) && !markdown.contains("<script"));
    cli.run(&["report", JOB, "-o", "/nowhere/at/all.html"]).await.expect(2, "name a file in a directory that exists");
    cli.run(&["report", "nothing"]).await.expect(5, "no job \"nothing\"");
}

#[tokio::test]
async fn before_the_flip_the_plans_of_before_are_there_and_a_slow_query_does_not_stop_the_job() {
    let db = TestDb::new(Template::Rows(1000)).await;
    let (ledger, job) = (Ledger::new(&db).await, JobDir::with("hold_before = [\"flip\"]"));
    job.replace("[report]", "[report]\nstatement_timeout = \"100ms\"");
    job.replace("select m.* from public.messages m", "select pg_catalog.pg_sleep(60)");
    let held = run_once(&db, job.spec()).await.expect_err("it is held");
    assert!(held.to_string().contains("hold point"), "{held}");
    let n = |filter: &str| format!("select count(*) from backfilld.query_plan where stage = 'before' and {filter}");
    assert_eq!(ledger.number(&n("error = '' and buffers > 0")).await, 3);
    assert_eq!(ledger.number(&n("error = 'cancelled after 100ms'")).await, 3);
    assert_eq!(ledger.number("select count(*) from backfilld.query_plan where stage = 'after'").await, 0);
    let html = Cli::new(&db).run(&["report", JOB]).await;
    assert!(html.stdout.contains("cancelled after 100ms"), "{html:?}");
}

#[tokio::test]
async fn queries_that_cannot_run_are_refused_before_anything_is_done() {
    if !has_version(15, "the daemon's login is a superuser there") {
        return;
    }
    let db = TestDb::new(Template::Rows(100)).await;
    for (from, to, says) in [
        ("from public.messages m\"", "from public.mesages m\"", "42P01"),
        (
            "role = \"authenticated\"\n\n[[report",
            "role = \"supabase_auth_admin\"\n\n[[report",
            "may not run as supabase_auth_admin",
        ),
        ("select m.* from public.messages m", "delete from public.messages", "expected one SELECT"),
    ] {
        let job = JobDir::shipped();
        job.replace(from, to);
        let ended = Cli::new(&db).run(&["check", job.path()]).await;
        assert!(matches!(ended.code, Some(2 | 3)), "{ended:?}");
        let said = format!("{} {}", ended.stdout, ended.stderr);
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains(says), "{says}: {said}");
    }
}

#[tokio::test]
async fn samples_are_thinned_and_keep_the_ends_and_the_worst() {
    let db = TestDb::new(Template::Rows(100)).await;
    let (ledger, job) = (Ledger::new(&db).await, JobDir::shipped());
    run_once(&db, job.spec()).await.expect("done");
    let client = db.client(backfilld::demo::sample::DAEMON).await;
    ledger
        .client
        .batch_execute(
            "delete from backfilld.sample;
             insert into backfilld.sample (job, at, phase, rows_scanned, rows_updated, batches, wal_bytes, table_bytes,
               index_bytes, batch_p99_ms)
             select 'messages_auth_user_id', timestamptz '2026-01-01' + n * interval '10 s', 'backfill', n, n, n, n, n, n,
                    case when n = 501 then 777 else 1 end
             from generate_series(1, 1000) n",
        )
        .await
        .expect("planted");
    backfilld::ledger::sample::thin(&client, JOB).await.expect("thins");
    let all = backfilld::ledger::sample::all(&client, JOB).await.expect("reads");
    assert_eq!((all.len(), all[0].rows_scanned, all[500].rows_scanned), (501, 1, 1000));
    assert!(all.iter().any(|s| s.batch_p99_ms == Some(777.0)), "the worst batch stays");
    backfilld::ledger::sample::thin(&client, JOB).await.expect("thins");
    assert_eq!(backfilld::ledger::sample::all(&client, JOB).await.expect("reads").len(), 501, "there is room again");
}
