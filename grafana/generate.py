#!/usr/bin/env python3
"""Writes grafana/dashboards/backfilld.json: run it after a change, and commit both."""

import json
import pathlib

SELECT = 'job=~"$job",instance=~"$instance"'
panels = []
place = {"x": 0, "y": 0}


def row(title):
    place["x"] = 0
    place["y"] += 8
    panels.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                   "gridPos": {"x": 0, "y": place["y"], "w": 24, "h": 1}})
    place["y"] += 1


def panel(kind, title, description, unit, queries, width=8, height=8, **more):
    if place["x"] + width > 24:
        place["x"] = 0
        place["y"] += height
    targets = [{"refId": chr(65 + i), "expr": expr.replace("$S", SELECT), "legendFormat": legend,
                "datasource": {"type": "prometheus", "uid": "${datasource}"}}
               for i, (expr, legend) in enumerate(queries)]
    panels.append({
        "type": kind, "title": title, "description": description, "targets": targets,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": place["x"], "y": place["y"], "w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit, **more.pop("defaults", {})}, "overrides": []},
        "options": more,
    })
    place["x"] += width


PHASES = "backfilld_job_phase{$S} == 1"
panel("stat", "Phase", "Where the job is. Failed and paused wait for an operator.", "none",
      [(f"max by (job, phase) ({PHASES})", "{{job}}: {{phase}}")], 5, 5, textMode="name")
panel("stat", "Status", "Whether it moves: running and done are fine, failed needs somebody, held and paused wait for a command.", "none",
      [("max by (job, status) (backfilld_job_status{$S}) == 1", "{{job}}: {{status}}")], 4, 5, textMode="name")
panel("gauge", "Progress", "Done part of the present phase.", "percentunit",
      [("max by (job) (backfilld_progress_ratio{$S})", "{{job}}")], 5, 5, defaults={"min": 0, "max": 1})
panel("stat", "Time left", "Estimated time to the end of the present phase; nothing while unknown.", "s",
      [("clamp_min((max by (job) (backfilld_eta_timestamp_seconds{$S}) > 0) - time(), 0)", "{{job}}")], 5, 5)
panel("stat", "Waiting for", "The signals that hold batches back now; nothing: none does.", "none",
      [("max by (job, signal) (backfilld_throttled{$S}) == 1", "{{job}}: {{signal}}")], 5, 5, textMode="name")

row("Throughput")
panel("timeseries", "Rows filled per second", "Rows that committed batches filled.", "rowsps",
      [("sum by (job) (rate(backfilld_rows_updated_total{$S}[$__rate_interval]))", "{{job}}")])
panel("timeseries", "Batch duration", "From begin to commit; the target is 100 ms unless the job says otherwise.", "s",
      [(f"histogram_quantile({q}, sum by (job, le) (rate(backfilld_batch_duration_seconds_bucket{{$S}}[$__rate_interval])))",
        f"{{{{job}}}} p{int(q * 100)}") for q in (0.5, 0.95)])
panel("timeseries", "Batch size", "What the next batch asks for: rows by key, pages in heap order.", "none",
      [("max by (job) (backfilld_batch_size_target_rows{$S})", "{{job}}")])
panel("timeseries", "Retries per second", "Batches and statements that failed and were tried again, by SQLSTATE.", "ops",
      [("sum by (job, sqlstate) (rate(backfilld_retries_total{$S}[$__rate_interval]))", "{{job}} {{sqlstate}}")])
panel("timeseries", "Rows in quarantine", "Rows that cannot be updated; they block the flip.", "none",
      [("max by (job) (backfilld_rows_quarantined{$S})", "{{job}}")])
panel("timeseries", "Rows left alone per second", "Filled already, by a trigger or an earlier run.", "rowsps",
      [("sum by (job) (rate(backfilld_rows_skipped_total{$S}[$__rate_interval]))", "{{job}}")])

panel("timeseries", "Pace", "Share of time that each lane works; with pace = \"auto\" it follows what batches cost others.", "percentunit",
      [("max by (job) (backfilld_pace_ratio{$S})", "{{job}}")], defaults={"min": 0, "max": 1})
panel("timeseries", "HOT share", "Part of the filled rows that needed no new entry in any index; only walks in heap order count it.", "percentunit",
      [("sum by (job) (rate(backfilld_rows_hot_total{$S}[$__rate_interval])) / "
        "(sum by (job) (rate(backfilld_rows_updated_total{$S}[$__rate_interval])) > 0)", "{{job}}")],
      defaults={"min": 0, "max": 1})

row("Throttle")
panel("timeseries", "Share of its limit", "1 is where a signal holds batches back (for floors: the other way round).", "percentunit",
      [("max by (job, signal) (backfilld_throttle_signal_value{$S} / (backfilld_throttle_signal_threshold{$S} > 0))",
        "{{job}} {{signal}}")], 12)
panel("timeseries", "Time held back", "Share of time in which a signal held batches back.", "percentunit",
      [("sum by (job, signal) (rate(backfilld_throttled_seconds_total{$S}[$__rate_interval]))", "{{job}} {{signal}}")], 12)

row("Database")
panel("timeseries", "Replica lag", "Replay lag of the worst replica in time; 0 where there is none.", "s",
      [("max by (job) (backfilld_replica_lag_seconds{$S})", "{{job}}")])
panel("timeseries", "WAL not replayed, WAL retained", "What the worst replica has not replayed, and what the worst slot keeps.", "bytes",
      [("max by (job) (backfilld_replica_lag_bytes{$S})", "{{job}} replica"),
       ("max by (job) (backfilld_slot_retained_bytes{$S})", "{{job}} slot")])
panel("timeseries", "WAL written", "By the whole server; shown where throttle.wal_mb_per_second is set.", "Bps",
      [("max by (job) (backfilld_wal_bytes_per_second{$S})", "{{job}}")])
panel("timeseries", "Dead rows", "Dead part of the target's rows; shown where throttle.dead_rows_percent is set.", "percentunit",
      [("max by (job) (backfilld_target_dead_rows_ratio{$S})", "{{job}}")])
panel("timeseries", "Signals not readable", "Measurements that failed; batches wait meanwhile.", "none",
      [("sum by (job) (increase(backfilld_probe_errors_total{$S}[$__rate_interval]))", "{{job}}")])
panel("timeseries", "Database answers within", "Time that the server takes for the daemon's own measurements.", "s",
      [('max by (job) (backfilld_throttle_signal_value{$S,signal="probe_latency"})', "{{job}}")])

row("DDL")
panel("timeseries", "Attempts", "Statements that take strong locks, by outcome.", "none",
      [("sum by (job, outcome) (increase(backfilld_ddl_attempts_total{$S}[$__rate_interval]))", "{{job}} {{outcome}}")])
panel("timeseries", "Lock held, longest", "Upper bound of the bucket with the longest hold.", "s",
      [("histogram_quantile(1, sum by (job, mode, le) (backfilld_ddl_lock_hold_seconds_bucket{$S}))", "{{job}} {{mode}}")])
panel("timeseries", "Lock waited for, longest", "Upper bound of the bucket with the longest wait.", "s",
      [("histogram_quantile(1, sum by (job, le) (backfilld_ddl_lock_wait_seconds_bucket{$S}))", "{{job}}")])

panel("timeseries", "Invalid indexes", "Left behind by a build that failed; the next attempt removes them.", "none",
      [("max by (job) (backfilld_invalid_indexes{$S})", "{{job}}")])

row("Proof and lease")
panel("timeseries", "Rows found wrong", "By kind, as the last verification found them.", "none",
      [("max by (job, kind) (backfilld_verify_findings{$S})", "{{job}} {{kind}}")])
panel("timeseries", "Rows verified", "Rows compared with their source.", "none",
      [("max by (job) (backfilld_verify_checked_rows_total{$S})", "{{job}}")])
panel("timeseries", "Lease", "Who holds it (1); the epoch grows with every takeover.", "none",
      [("max by (job, instance) (backfilld_lease_held{$S})", "{{job}} {{instance}}"),
       ("max by (job) (backfilld_lease_epoch{$S})", "{{job}} epoch")])
panel("timeseries", "Connections", "The daemon's pool.", "none",
      [('sum by (state) (backfilld_pool_connections{instance=~"$instance"})', "{{state}}")])
panel("timeseries", "Errors", "Failures that are not tried again, by SQLSTATE.", "none",
      [("sum by (job, sqlstate) (backfilld_errors_total{$S})", "{{job}} {{sqlstate}}")])
panel("timeseries", "Memory of the daemon", "Resident memory.", "bytes",
      [('process_resident_memory_bytes{instance=~"$instance"} * on (instance) group_left () max by (instance) (backfilld_build_info)', "{{instance}}")])
panel("timeseries", "CPU of the daemon", "Cores in use.", "none",
      [('rate(process_cpu_seconds_total{instance=~"$instance"}[$__rate_interval]) * on (instance) group_left () max by (instance) (backfilld_build_info)', "{{instance}}")])
panel("stat", "Daemon", "Which daemon has which job.", "none",
      [("max by (job, daemon) (backfilld_job_info{$S})", "{{job}}: {{daemon}}")], textMode="name")
panel("stat", "Version", "The daemons' versions.", "none",
      [('max by (version) (backfilld_build_info{instance=~"$instance"})', "{{version}}")], textMode="name")

row("Watch after the flip")
panel("timeseries", "Watch findings", "What is wrong now, by kind; everything at 0 is as it should be.", "none",
      [("max by (job, kind) (backfilld_watch_findings{$S})", "{{job}} {{kind}}")])
panel("stat", "Watch: policy drift", "Policies, functions and row level security flags that are not what the flip made.", "none",
      [("max by (job) (backfilld_policy_drift{$S})", "{{job}}")],
      defaults={"thresholds": {"mode": "absolute", "steps": [{"color": "green", "value": None}, {"color": "red", "value": 1}]}})
panel("stat", "Watch: last look", "How long ago the watch looked at everything.", "s",
      [("time() - max by (job) (backfilld_watch_checked_timestamp_seconds{$S})", "{{job}}")])


def variable(name, label, query):
    return {"type": "query", "name": name, "label": label, "query": {"query": query, "refId": name}, "refresh": 2,
            "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
            "datasource": {"type": "prometheus", "uid": "${datasource}"}}


board = {
    "uid": "backfilld", "title": "backfilld", "tags": ["backfilld", "postgresql"], "schemaVersion": 39, "editable": True,
    "description": "Is it fine, how far is it, how long will it take, and why does it wait?",
    "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "timezone": "browser",
    "templating": {"list": [
        {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
        variable("job", "Job", "label_values(backfilld_job_phase, job)"),
        variable("instance", "Instance", "label_values(backfilld_build_info, instance)"),
    ]},
    "panels": [{"id": i + 1, **p} for i, p in enumerate(panels)],
}
out = pathlib.Path(__file__).parent / "dashboards" / "backfilld.json"
out.write_text(json.dumps(board, indent=2) + "\n")
