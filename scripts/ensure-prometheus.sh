#!/usr/bin/env bash
# Installs Prometheus (with promtool) if it is not there: the tests run a real one. Starts nothing.
set -euo pipefail
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "Prometheus is missing, and this system has no apt-get to install it: put prometheus and promtool into PATH" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "Prometheus is missing; as root: apt-get install prometheus" >&2; exit 1; }
  as_root=(sudo)
fi
echo "installing Prometheus with apt-get" >&2
"${as_root[@]}" apt-get update -qq
# RUNLEVEL=1: Debian's package would start a service of its own.
"${as_root[@]}" env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >&2
