#!/usr/bin/env bash
# Installs PostgreSQL's server programs if there are none. Starts nothing, and creates no cluster.
set -euo pipefail

complete() {
  local name
  for name in postgres initdb pg_ctl; do
    [ -x "$1/$name" ] || return 1
  done
}

# The same places in which the program itself looks: a setting, PATH, Debian's directories.
for dir in "${BACKFILLD_TEST_PG_BIN:-}" "${BACKFILLD_PG_BIN:-}"; do
  if [ -n "$dir" ]; then
    complete "$dir" && exit 0
    echo "no PostgreSQL server programs in $dir" >&2
    exit 1
  fi
done
if command -v pg_ctl >/dev/null && complete "$(dirname "$(readlink -f "$(command -v pg_ctl)")")"; then
  exit 0
fi
for dir in /usr/lib/postgresql/*/bin; do
  complete "$dir" && exit 0
done

if ! command -v apt-get >/dev/null; then
  cat >&2 <<'TEXT'
No PostgreSQL server found, and this system has no apt-get to install one.
Install PostgreSQL 14 or newer (macOS: brew install postgresql; Fedora: dnf install postgresql-server;
Arch: pacman -S postgresql), or set BACKFILLD_PG_BIN to the directory that holds postgres, initdb and pg_ctl.
TEXT
  exit 1
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "PostgreSQL is missing; as root: apt-get install postgresql" >&2; exit 1; }
  as_root=(sudo)
fi
echo "installing PostgreSQL with apt-get" >&2
# Debian's package would create and start a cluster; this file, read during the installation only, says not to.
conf=/etc/postgresql-common/createcluster.d/zz-backfilld.conf
"${as_root[@]}" mkdir -p "$(dirname "$conf")"
echo 'create_main_cluster = false' | "${as_root[@]}" tee "$conf" >/dev/null
trap '"${as_root[@]}" rm -f "$conf"' EXIT
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >&2
