#!/usr/bin/env bash
# Stops and deletes the servers that integration tests leave running under target/test-pg.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${CARGO_TARGET_DIR:-target}/test-pg

for place in "$root"/*/; do
  [ -f "$place/cluster.json" ] || continue
  # Where the server's account cannot get into target, this is a link to a directory under /tmp.
  dir=$(readlink -f "$place")
  pid=$(head -n 1 "$dir/data/postmaster.pid" 2>/dev/null || true)
  if [ -n "$pid" ] && [ "$(ps -o comm= -p "$pid" 2>/dev/null)" = postgres ]; then
    kill -INT "$pid"
    for _ in $(seq 1 200); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  fi
  rm -rf "$dir"
done
rm -rf "$root"
