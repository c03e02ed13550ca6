#!/usr/bin/env bash
# Installs with apt-get what is missing of: compiler, postgres, prometheus, pgbouncer, chromium, tmux. Starts nothing,
# and creates no cluster. Usage: ensure.sh WHAT...
set -euo pipefail

# has_WHAT: is it there?  packages_WHAT: Debian's packages.  else_WHAT: what to do where there is no apt-get.

has_compiler() { command -v "${CC:-cc}" >/dev/null; }
packages_compiler="gcc libc6-dev"
else_compiler="put a C compiler into PATH as cc: Rust links with it (macOS: xcode-select --install)"

server_in() {
  local name
  for name in postgres initdb pg_ctl; do
    [ -x "$1/$name" ] || return 1
  done
}
# The same places in which the program itself looks: a setting, PATH, Debian's directories.
has_postgres() {
  local dir
  for dir in "${BACKFILLD_TEST_PG_BIN:-}" "${BACKFILLD_PG_BIN:-}"; do
    [ -n "$dir" ] || continue
    server_in "$dir" || { echo "no PostgreSQL server programs in $dir" >&2; exit 1; }
    return 0
  done
  if command -v pg_ctl >/dev/null && server_in "$(dirname "$(readlink -f "$(command -v pg_ctl)")")"; then
    return 0
  fi
  for dir in /usr/lib/postgresql/*/bin; do
    server_in "$dir" && return 0
  done
  return 1
}
packages_postgres="postgresql"
else_postgres="install PostgreSQL 14 or newer (macOS: brew install postgresql; Fedora: dnf install postgresql-server;
Arch: pacman -S postgresql), or set BACKFILLD_PG_BIN to the directory that holds postgres, initdb and pg_ctl"

has_prometheus() { command -v prometheus >/dev/null && command -v promtool >/dev/null; }
packages_prometheus="prometheus"
else_prometheus="put prometheus and promtool into PATH: the tests run a real one"

has_pgbouncer() { [ -x /usr/sbin/pgbouncer ] || command -v pgbouncer >/dev/null; }
packages_pgbouncer="pgbouncer"
else_pgbouncer="put pgbouncer into PATH, or the tests behind a pooler are left out"

has_chromium() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }
packages_chromium="chromium chromium-driver"
else_chromium="put chromium and chromedriver into PATH: a test looks at the status page with them"

has_tmux() { command -v tmux >/dev/null; }
packages_tmux="tmux"
else_tmux="put tmux into PATH, or the tests of the live view are left out"

packages=() missing=()
for what in "$@"; do
  "has_$what" && continue
  missing+=("$what")
  name=packages_$what
  read -r -a more <<<"${!name}"
  packages+=("${more[@]}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
if ! command -v apt-get >/dev/null; then
  status=0
  for what in "${missing[@]}"; do
    name=else_$what
    echo "$what is missing, and this system has no apt-get to install it: ${!name}" >&2
    [ "$what" = pgbouncer ] || [ "$what" = tmux ] || status=1
  done
  exit $status
elif [ ${#as_root[@]} -gt 0 ] && ! command -v sudo >/dev/null; then
  echo "missing: ${missing[*]}; as root: apt-get install ${packages[*]}" >&2
  exit 1
fi
echo "installing with apt-get: ${packages[*]}" >&2
# Debian's package of PostgreSQL would create and start a cluster; this file, read during the installation only, says not
# to. RUNLEVEL=1 keeps the services of the others down.
conf=/etc/postgresql-common/createcluster.d/zz-backfilld.conf
"${as_root[@]}" mkdir -p "$(dirname "$conf")"
echo 'create_main_cluster = false' | "${as_root[@]}" tee "$conf" >/dev/null
trap '"${as_root[@]}" rm -f "$conf"' EXIT
log=$(mktemp)
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >"$log" 2>&1 </dev/null || { cat "$log" >&2; rm "$log"; exit 1; }
rm "$log"
