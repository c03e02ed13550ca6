//! Dashboard, rules and runbook: they speak of metrics that exist, and a real Prometheus gets answers from a real daemon.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, wait_until};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Title and expression of each query of the dashboard.
fn queries() -> Vec<(String, String)> {
    let board: Value = serde_json::from_str(&text("grafana/dashboards/backfilld.json")).expect("the dashboard is JSON");
    let mut out = Vec::new();
    for panel in board["panels"].as_array().expect("panels") {
        if panel["type"] == "row" {
            continue;
        }
        for key in ["title", "description"] {
            assert!(panel[key].as_str().is_some_and(|t| !t.is_empty()), "{key} of {panel}");
        }
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "unit of {panel}");
        for target in panel["targets"].as_array().expect("targets") {
            let expr = target["expr"].as_str().expect("an expression").to_owned();
            out.push((panel["title"].as_str().expect("a title").to_owned(), expr));
        }
    }
    out
}

/// Names in a text that look like metrics of ours.
fn metrics(text: &str) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (at, _) in text.match_indices("backfilld_") {
        let name: String =
            text[at..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '_' || c.is_ascii_digit()).collect();
        out.insert(name);
    }
    out
}

#[test]
fn dashboard_and_rules_speak_of_metrics_that_exist() {
    let known: BTreeSet<&str> = backfilld::metrics::METRICS.iter().map(|m| m.name).collect();
    let mut used = BTreeSet::new();
    for file in ["grafana/dashboards/backfilld.json", "deploy/prometheus/rules.yml", "deploy/prometheus/rules.test.yml"]
    {
        for name in metrics(&text(file)) {
            let base =
                ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(&name).to_owned();
            assert!(known.contains(name.as_str()) || known.contains(base.as_str()), "{file}: {name}");
            used.insert(base);
        }
    }
    assert!(used.len() > 20, "{used:?}");
}

#[test]
fn every_alert_has_a_severity_a_case_in_the_tests_and_a_section_in_the_runbook() {
    let (rules, tests, runbook) =
        (text("deploy/prometheus/rules.yml"), text("deploy/prometheus/rules.test.yml"), text("docs/runbook.md"));
    let alerts: Vec<&str> = rules.lines().filter_map(|l| l.trim().strip_prefix("- alert: ")).collect();
    for alert in &alerts {
        assert!(runbook.contains(&format!("\n## {alert}\n")), "{alert} is not in the runbook");
        let fires =
            tests.split("- eval_time").any(|case| case.contains(&format!("alertname: {alert}\n        exp_alerts")));
        let is_quiet = tests.contains(&format!("alertname: {alert}}}"));
        assert!(fires && is_quiet, "{alert} has no case that fires, or none that does not");
        assert!(rules.contains(&format!("runbook.md#{}", alert.to_lowercase())), "{alert} has no link");
    }
    assert_eq!(rules.matches("severity:").count(), alerts.len());
    assert_eq!(runbook.lines().filter(|l| l.starts_with("## ")).count(), alerts.len());
}

#[test]
fn promtool_accepts_rules_and_configuration_and_their_tests_pass() {
    let dir = root().join("deploy/prometheus");
    for args in
        [["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", "rules.test.yml"]]
    {
        let ran = Command::new("promtool").args(args).current_dir(&dir).output();
        let ran = ran.expect("promtool runs; scripts/ensure.sh installs it");
        assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}

/// A Prometheus that is killed when dropped.
struct Prometheus {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

impl Prometheus {
    fn start(daemon: u16) -> Self {
        let (dir, port) = (tempfile::tempdir().expect("a directory"), free_port());
        let config = text("deploy/prometheus/prometheus.yml")
            .replace("scrape_interval: 10s", "scrape_interval: 500ms")
            .replace("backfilld:9847", &format!("127.0.0.1:{daemon}"));
        std::fs::write(dir.path().join("prometheus.yml"), config).expect("writable");
        let rules = text("deploy/prometheus/rules.yml");
        std::fs::write(dir.path().join("rules.yml"), rules).expect("writable");
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let child = Command::new("prometheus")
            .arg(flag("config.file", &dir.path().join("prometheus.yml")))
            .arg(flag("storage.tsdb.path", &dir.path().join("data")))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus runs; scripts/ensure.sh installs it");
        Self { child, port, _dir: dir }
    }

    /// The answer's `data`; `None` while it does not answer.
    async fn get(&self, path: &str) -> Option<Value> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        assert_ne!(answer["status"], "error", "{path}: {answer}");
        Some(answer["data"].clone())
    }

    async fn has_data(&self, expr: &str) -> bool {
        let encoded: String = expr.bytes().map(|b| format!("%{b:02X}")).collect();
        let found = self.get(&format!("/api/v1/query?query={encoded}")).await;
        found.is_some_and(|data| data["result"].as_array().is_some_and(|r| !r.is_empty()))
    }
}

/// Waits until each query had data at least once.
async fn answered(prometheus: &Prometheus, mut open: Vec<(String, String)>) {
    assert!(!open.is_empty());
    let began = std::time::Instant::now();
    while !open.is_empty() && began.elapsed() < std::time::Duration::from_secs(60) {
        let mut left = Vec::new();
        for query in open {
            if !prometheus.has_data(&query.1).await {
                left.push(query);
            }
        }
        open = left;
    }
    assert!(open.is_empty(), "no answer to {open:#?}");
}

#[tokio::test]
async fn every_query_of_the_dashboard_gets_an_answer_from_a_real_prometheus() {
    let (job, db) = (JobDir::shipped(), TestDb::new(Template::Rows(3000)).await);
    // It waits first, works slowly then, stands before the flip, and watches in the end: every panel has something to show.
    job.replace("[target]", "hold_before = [\"flip\"]\n[target]");
    job.replace("target_duration = \"2s\"", "target_duration = \"2s\"\npause = \"150ms\"");
    job.append("[throttle]\nevery = \"100ms\"\nwal_mb_per_second = 100000\ndead_rows_percent = 100000\n[[throttle.queries]]\nname = \"gate\"\nsql = \"select public.gate()\"\n[watch]\nfor = \"1h\"\nevery = \"500ms\"");
    let ledger = Ledger::new(&db).await;
    ledger.run("create function public.gate() returns boolean language sql as 'select false'").await;
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let daemon = Cli::new(&db).env("BACKFILLD_HTTP__LISTEN", &listen).start(&["run", job.path()]);
    let prometheus = Prometheus::start(port);
    let expressions: Vec<(String, String)> = queries()
        .into_iter()
        .map(|(title, expr)| {
            let expr = expr.replace("$__rate_interval", "1m").replace("$job", JOB).replace("$instance", ".*");
            (title, expr)
        })
        .collect();
    let (first, others): (Vec<_>, Vec<_>) = expressions.into_iter().partition(|(title, _)| title == "Waiting for");
    let (last, open): (Vec<_>, Vec<_>) = others.into_iter().partition(|(title, _)| title.starts_with("Watch"));
    wait_until("a signal that waits is shown", async || prometheus.has_data(&first[0].1).await).await;
    ledger.run("create or replace function public.gate() returns boolean language sql as 'select true'").await;
    answered(&prometheus, open).await;
    wait_until("it stands before the flip", async || ledger.status().await == "held").await;
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    answered(&prometheus, last).await;
    let series = prometheus.get(&format!("/api/v1/series?match[]={{job=\"{JOB}\"}}")).await.expect("it answers");
    let series = series.as_array().expect("a list").len();
    assert!((50..300).contains(&series), "{series} series of one job");
    let rules = prometheus.get("/api/v1/rules").await.expect("it answers");
    let groups = rules["groups"].as_array().expect("groups");
    let rules: Vec<&Value> = groups.iter().flat_map(|g| g["rules"].as_array().expect("rules")).collect();
    assert!(rules.len() > 10 && rules.iter().all(|r| r["health"] != "err"), "{rules:#?}");
    daemon.signal("TERM");
    daemon.ended().await;
}
