#!/usr/bin/env bash
# Installs PgBouncer if it is not there: the tests put a real one in front of the server. Starts nothing.
set -euo pipefail
if [ -x /usr/sbin/pgbouncer ] || command -v pgbouncer >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "PgBouncer is missing, and this system has no apt-get to install it; the tests behind a pooler are left out" >&2
  exit 0
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "PgBouncer is missing; as root: apt-get install pgbouncer" >&2; exit 1; }
  as_root=(sudo)
fi
echo "installing PgBouncer with apt-get" >&2
"${as_root[@]}" apt-get update -qq
# RUNLEVEL=1: Debian's package would start a service of its own.
"${as_root[@]}" env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends pgbouncer >&2
