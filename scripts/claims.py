#!/usr/bin/env python3
"""Measures what the switch of row level security gives readers: `make claims`, or scripts/claims.py --help.

Runs the demo, which migrates its table, and keeps its server; measures; adds an index on (owner, time); measures; drops it,
rolls the job back, and measures the old policies on the same rows. Needs psql and pgbench of the server's version.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIST = "select id, conversation_id, role, content, created_at from public.messages order by created_at desc limit 50"
JOB = "deploy/jobs/messages_auth_user_id"
INDEX = "create index messages_owner_newest on public.messages (auth_user_id, created_at)"


def psql(url, sql):
    done = subprocess.run(["psql", "-XqAt", "-v", "ON_ERROR_STOP=1", url], input=sql, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"psql: {done.stderr.strip()}")
    return done.stdout


def as_user(claims, sql):
    return f"begin; set local role authenticated; select set_config('request.jwt.claims', '{claims}', true); {sql}; commit;\n"


def explain(api, claims):
    """Median time of three runs with warm caches, pages, and nodes of the list."""
    sql = "".join(as_user(claims, f"explain (analyze, buffers, format json) {LIST}") for _ in range(4))
    found = [json.loads(t)[0] for t in re.findall(r"^\[\n.*?^\]$", psql(api, sql), re.S | re.M)]
    found = sorted(found[1:], key=lambda r: r["Planning Time"] + r["Execution Time"])
    run = found[len(found) // 2]
    plan = run["Plan"]
    nodes = []

    def walk(node):
        nodes.append(node["Node Type"] + (f" on {node['Relation Name']}" if "Relation Name" in node else ""))
        for child in node.get("Plans", []):
            walk(child)

    walk(plan)
    return run["Planning Time"] + run["Execution Time"], plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], nodes


def pgbench(api, script, seconds, owners):
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        args = ["pgbench", "-n", "-c", "4", "-j", "1", "-T", str(seconds), "-D", f"owners={owners}", "-f", file.name, api]
        done = subprocess.run(args, capture_output=True, text=True)
    rate = re.search(r"tps = ([0-9.]+)", done.stdout)
    if done.returncode != 0 or not rate:
        sys.exit(f"pgbench: {done.stderr.strip()}")
    return float(rate[1])


def measure(label, urls, owners, seconds):
    psql(urls["superuser"], "vacuum analyze public.messages; checkpoint")
    lists = [explain(urls["API"], claims) for claims in owners]
    pick = "\\set n random(1, :owners)\nselect claims, conversation from bench.owner where n = :n \\gset\n"
    enter = "begin; set local role authenticated; select set_config('request.jwt.claims', :'claims', true);\n"
    newest = f"{LIST};\n"
    thread = "select * from public.get_conversation_messages(:'conversation');\n"
    count = int(psql(urls["superuser"], "select count(*) from bench.owner"))
    out = {
        "label": label,
        "lists": lists,
        "list_tps": pgbench(urls["API"], pick + enter + newest + "end;\n", seconds, count),
        "mix_tps": pgbench(urls["API"], pick + enter + newest + thread + "end;\n", seconds, count),
    }
    times = [t for t, _, _ in lists]
    print(
        f"{label:<34}{statistics.median(times):>9.2f}{times[0]:>9.2f}{times[-1]:>9.2f}"
        f"{statistics.median([b for _, b, _ in lists]):>10.0f}{lists[-1][1]:>9}{out['list_tps']:>10.0f}{out['mix_tps']:>9.0f}",
        flush=True,
    )
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=15, help="of each pgbench run")
    parser.add_argument("--owners", type=int, default=21, help="whose lists are explained, evenly by number of rows")
    parser.add_argument("--binary", default="target/release/backfilld")
    args = parser.parse_args()
    files = Path(tempfile.mkdtemp())
    out, err = files / "out", files / "err"
    demo = subprocess.Popen(
        [args.binary, "demo", "--keep", "--rows", str(args.rows), "--requests", "20", "--report", str(files / "report.html")],
        stdout=out.open("w"), stderr=err.open("w"),
    )
    try:
        while "Ctrl-C stops" not in err.read_text():
            if demo.poll() is not None:
                sys.exit(f"the demo ended: {err.read_text()} {out.read_text()}")
            time.sleep(0.5)
        urls = {w: u for w, u in re.findall(r"as (?:the )?(\w+):\s+psql '([^']+)'", err.read_text())}
        run(args, urls)
    finally:
        demo.terminate()
        demo.wait()


def run(args, urls):
    admin = urls["superuser"]
    psql(
        admin,
        """create schema bench; grant usage on schema bench to authenticator;
        create table bench.owner as
          select row_number() over (order by count(*), c.auth_user_id) as n, count(*) as messages,
                 json_build_object('sub', c.auth_user_id, 'role', 'authenticated')::text as claims,
                 (array_agg(c.id))[1] as conversation
          from public.messages m join public.conversations c on c.id = m.conversation_id
          where c.auth_user_id is not null group by c.auth_user_id;
        create unique index on bench.owner (n); analyze bench.owner; grant select on bench.owner to authenticator""",
    )
    total = int(psql(admin, "select count(*) from bench.owner"))
    ranks = [1 + round(i * (total - 1) / (args.owners - 1)) for i in range(args.owners)]
    owners = psql(admin, f"select claims from bench.owner where n in ({','.join(map(str, ranks))}) order by n").splitlines()
    print(f"{args.rows} rows, {total} owners, {len(owners)} of them explained; pgbench: 4 clients, {args.seconds} s each")
    print(f"{'':<34}{'list, ms':>9}{'smallest':>9}{'largest':>9}{'pages':>10}{'largest':>9}{'lists/s':>10}{'mix/s':>9}")
    after = measure("new policies", urls, owners, args.seconds)
    began = time.monotonic()
    psql(admin, INDEX)
    took = time.monotonic() - began
    size = psql(admin, "select pg_size_pretty(pg_relation_size('public.messages_owner_newest'))").strip()
    indexed = measure("new policies, (owner, created_at)", urls, owners, args.seconds)
    psql(admin, "drop index public.messages_owner_newest")
    done = subprocess.run(
        [args.binary, "rollback", JOB, "--yes"], capture_output=True, text=True,
        env={"BACKFILLD_DATABASE__URL": urls["daemon"], "BACKFILLD_DATABASE__DEDICATED_LOGIN": "true"},
    )
    if done.returncode != 0:
        sys.exit(f"rollback: {done.stderr}")
    before = measure("old policies", urls, owners, args.seconds)
    print(f"index (auth_user_id, created_at): {size}, built in {took:.1f} s\n")
    for way in (after, indexed):
        ratios = [b[0] / a[0] for b, a in zip(before["lists"], way["lists"])]
        print(
            f"{way['label']}: list {statistics.median(ratios):.0f} x faster (median of owners; worst {min(ratios):.2f}, best "
            f"{max(ratios):.0f}), {way['list_tps'] / before['list_tps']:.1f} x lists/s, {way['mix_tps'] / before['mix_tps']:.1f} x mix/s"
        )
    for way in (before, after, indexed):
        for name, i in (("median", len(owners) // 2), ("largest", -1)):
            print(f"{way['label']}, {name} owner: {' < '.join(way['lists'][i][2])}")


if __name__ == "__main__":
    main()
