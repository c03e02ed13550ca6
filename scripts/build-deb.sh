#!/usr/bin/env bash
# Builds target/backfilld_<version>_<architecture>.deb from the release binary: binary, unit, example settings, shipped job,
# documentation, man pages, completions. Needs dpkg-deb, and a binary that runs here. Installing it starts nothing: a unit
# is enabled per job.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
binary=${1:-$target/release/backfilld}
[ -x "$binary" ] || { echo "no $binary: cargo build --release --locked first, or name a binary" >&2; exit 1; }
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
architecture=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"

install -D -m 0755 "$binary" "$root/usr/bin/backfilld"
strip --strip-unneeded "$root/usr/bin/backfilld" 2>/dev/null || true
install -d -m 0755 "$root/usr/share/man/man1"
"$binary" man --dir "$root/usr/share/man/man1"
chmod 0644 "$root"/usr/share/man/man1/*
gzip -9n "$root"/usr/share/man/man1/*
for shell in bash:bash-completion/completions/backfilld zsh:zsh/vendor-completions/_backfilld \
  fish:fish/vendor_completions.d/backfilld.fish; do
  "$binary" completions "${shell%%:*}" | install -D -m 0644 /dev/stdin "$root/usr/share/${shell#*:}"
done
install -D -m 0644 "deploy/systemd/backfilld@.service" "$root/usr/lib/systemd/system/backfilld@.service"
# Readable: the unit runs as a user without a name. The password has a file of its own.
install -D -m 0644 deploy/backfilld.toml "$root/etc/backfilld/backfilld.toml"
install -d -m 0755 "$root/etc/backfilld/jobs"
doc=$root/usr/share/doc/backfilld
install -d -m 0755 "$doc/examples"
for job in deploy/jobs/*/; do
  install -d -m 0755 "$doc/examples/$(basename "$job")"
  install -m 0644 "$job"* "$doc/examples/$(basename "$job")"
done
install -d -m 0755 "$doc/docs"
install -m 0644 README.md ARCHITECTURE.md CHANGELOG.md "$doc"
install -m 0644 docs/*.md docs/job.schema.json "$doc/docs"
cat >"$doc/copyright" <<COPYRIGHT
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: backfilld

Files: *
Copyright: 2026 the backfilld developers
License: Apache-2.0
 The text is in /usr/share/common-licenses/Apache-2.0.
COPYRIGHT
gzip -9n >"$doc/changelog.gz" <<CHANGELOG
backfilld ($version) unstable; urgency=medium

  * See CHANGELOG.md beside this file.

 -- backfilld developers <backfilld@example.com>  $(date -R -d "@${SOURCE_DATE_EPOCH:-$(stat -c %Y CHANGELOG.md)}")
CHANGELOG
chmod 0644 "$doc/copyright" "$doc/changelog.gz"

size=$(du -sk --exclude=DEBIAN "$root" | cut -f 1)
# What the binary is linked with; everything else is in it.
glibc=$(objdump -T "$root/usr/bin/backfilld" 2>/dev/null | grep -oE 'GLIBC_[0-9.]+' | sed 's/GLIBC_//' | sort -Vu | tail -n 1 || true)
mkdir "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<CONTROL
Package: backfilld
Version: $version
Architecture: $architecture
Maintainer: backfilld developers <backfilld@example.com>
Installed-Size: $size
Depends: libc6${glibc:+ (>= $glibc)}, libgcc-s1
Recommends: ca-certificates
Section: database
Priority: optional
Description: batched online backfills for live PostgreSQL tables
 Fills a new column of a live table in small batches, proves row by row that the
 result is right, then switches constraints, functions and row level security
 policies over to it. Goes on after kill -9, failover or restart, and can undo
 everything it did.
CONTROL
echo /etc/backfilld/backfilld.toml >"$root/DEBIAN/conffiles"
cat >"$root/DEBIAN/postinst" <<'SCRIPT'
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
SCRIPT
cat >"$root/DEBIAN/postrm" <<'SCRIPT'
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload || true; fi
SCRIPT
chmod 0755 "$root/DEBIAN/postinst" "$root/DEBIAN/postrm"
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum >DEBIAN/md5sums)

out=$target/backfilld_${version}_${architecture}.deb
dpkg-deb -Z"${DEB_COMPRESSION:-xz}" --root-owner-group --build "$root" "$out" >/dev/null
echo "$out"
