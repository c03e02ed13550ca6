//! The log of a whole run, as a log collector reads it.

use serde_json::Value;

use crate::support::{Cli, JOB, JobDir, Template, TestDb};

#[tokio::test]
async fn every_line_of_a_run_is_a_json_object_that_names_the_job_and_phases_have_durations() {
    let (db, job) = (TestDb::new(Template::Rows(500)).await, JobDir::shipped());
    job.append("[watch]\nfor = \"1s\"\nevery = \"200ms\"");
    let ended = Cli::new(&db)
        .env("BACKFILLD_HTTP__LISTEN", "127.0.0.1:0")
        .run(&["run", "--once", "--log-format", "json", job.path()])
        .await;
    ended.expect(0, "");
    let lines: Vec<Value> = ended
        .stderr
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON ({e}): {line}")))
        .collect();
    for line in &lines {
        for key in ["timestamp", "level", "target", "message"] {
            assert!(line[key].as_str().is_some_and(|v| !v.is_empty()), "{key}: {line}");
        }
        assert_eq!(line["job"], JOB, "{line}");
    }
    let within: Vec<&str> = lines.iter().filter_map(|l| l["span"]["phase"].as_str()).collect();
    assert!(within.contains(&"backfill") && within.contains(&"verify"), "{lines:#?}");
    let phases: Vec<&str> = lines
        .iter()
        .filter(|l| l["message"] == "phase complete")
        .inspect(|l| assert!(l["duration_ms"].is_u64(), "{l}"))
        .map(|l| l["phase"].as_str().expect("a phase"))
        .collect();
    assert_eq!(phases, ["preflight", "expand", "backfill", "verify", "constrain", "flip", "watch"]);
    assert!(lines.iter().any(|l| l["message"] == "the job is done"), "{lines:#?}");
}
