#!/usr/bin/env bash
# Installs Chromium and its WebDriver if they are not there: a test looks at the status page with them. Starts nothing.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "Chromium is missing, and this system has no apt-get to install it: put chromium and chromedriver into PATH" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "Chromium is missing; as root: apt-get install chromium chromium-driver" >&2; exit 1; }
  as_root=(sudo)
fi
echo "installing Chromium with apt-get" >&2
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >&2
