//! What is shipped for service managers and containers names flags, settings and files that exist.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn config(env: &[(&str, &str)]) -> (bool, String) {
    let ran =
        Command::new(env!("CARGO_BIN_EXE_backfilld")).args(["config", "check"]).envs(env.iter().copied()).output();
    let ran = ran.expect("the binary runs");
    (ran.status.success(), String::from_utf8_lossy(&ran.stderr).into_owned())
}

/// Names of the settings that a file gives as environment variables.
fn variables(file: &str) -> Vec<String> {
    let text = text(file);
    let mut out: Vec<String> = text
        .match_indices("BACKFILLD_")
        .map(|(at, _)| text[at..].chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect())
        .collect();
    // The chart's own prefix for settings that its user names.
    out.retain(|name| name != "BACKFILLD_");
    out.sort();
    out.dedup();
    out
}

#[test]
fn every_setting_of_the_unit_and_of_compose_exists() {
    let secret = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(secret.path(), "secret\n").expect("writable");
    for file in [
        "deploy/systemd/backfilld@.service",
        "deploy/container/compose.yaml",
        "deploy/helm/backfilld/templates/_helpers.tpl",
        "deploy/kubernetes/deployment.yaml",
    ] {
        let names = variables(file);
        assert!(!names.is_empty(), "{file}");
        for name in &names {
            let url = ("BACKFILLD_DATABASE__URL", "postgresql://u@127.0.0.1/d");
            let value = match name.rsplit('_').next() {
                Some("LISTEN") => "127.0.0.1:1",
                Some("FILE" | "SSLROOTCERT") => secret.path().to_str().expect("UTF-8"),
                Some("LOGIN") => "true",
                Some("URL") => url.1,
                _ => "x",
            };
            let (fine, said) = config(&[url, (name, value)]);
            assert!(fine, "{file}: {name}: {said}");
        }
    }
    let (fine, said) = config(&[("BACKFILLD_DATABASE__PASSWORD_FIL", "x")]);
    assert!(!fine && said.contains("PASSWORD_FIL"), "an unknown one is refused: {said}");
}

#[test]
fn the_unit_verifies_and_is_hardened() {
    let unit = text("deploy/systemd/backfilld@.service");
    let flags = ["--config", "run"];
    let help = Command::new(env!("CARGO_BIN_EXE_backfilld")).arg("--help").output().expect("the binary runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for flag in flags {
        assert!(unit.contains(flag) && help.contains(flag), "{flag}");
    }
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("systemd-analyze is not there: the unit was read, not verified");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("backfilld@job.service");
    std::fs::write(&path, unit.replace("/usr/bin/backfilld", env!("CARGO_BIN_EXE_backfilld"))).expect("writable");
    let analyze = |args: &[&str], path: &Path| {
        let ran = Command::new("systemd-analyze").args(args).arg(path).output().expect("it runs");
        (
            ran.status.success(),
            format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr)),
        )
    };
    let (fine, said) = analyze(&["verify"], &path);
    assert!(fine && !said.contains("backfilld@job.service:"), "{said}");
    // In tenths: 20 is 2.0.
    let (fine, said) = analyze(&["security", "--offline=true", "--threshold=20"], &path);
    assert!(fine, "{said}");
}

#[test]
fn files_that_container_and_compose_copy_or_mount_are_there() {
    for line in text("deploy/container/Dockerfile").lines() {
        if let Some(rest) = line.strip_prefix("COPY ").filter(|rest| !rest.starts_with("--from")) {
            let mut paths: Vec<&str> = rest.split_whitespace().collect();
            paths.pop();
            for path in paths {
                assert!(root().join(path).exists(), "{line}");
            }
        }
    }
    for line in text("deploy/container/compose.yaml").lines() {
        if let Some(mount) = line.trim().strip_prefix("- ../") {
            let from = mount.split(':').next().unwrap_or_default();
            assert!(root().join("deploy/container/..").join(from).exists(), "{line}");
        }
    }
}

/// Each directory of secrets and settings that the unit promises is one that the daemon reads, and the start is the kind
/// that the daemon speaks.
#[test]
fn the_unit_waits_for_what_the_daemon_says() {
    let unit = text("deploy/systemd/backfilld@.service");
    for line in
        ["Type=notify", "NotifyAccess=main", "WatchdogSec=30", "LoadCredential=password:/etc/backfilld/password"]
    {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
}

/// Kubernetes mounts the files of a ConfigMap as links into a directory that it swaps.
#[test]
fn a_job_in_a_config_map_is_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let version = dir.path().join("..2026_01_01");
    std::fs::create_dir(&version).expect("writable");
    std::os::unix::fs::symlink("..2026_01_01", dir.path().join("..data")).expect("a link");
    for file in ["job.toml", "add_message.sql"] {
        std::fs::write(version.join(file), text(&format!("deploy/jobs/messages_auth_user_id/{file}")))
            .expect("writable");
        std::os::unix::fs::symlink(format!("..data/{file}"), dir.path().join(file)).expect("a link");
    }
    backfilld::job::load(dir.path()).unwrap_or_else(|e| panic!("{}", e.render()));
}

/// With Helm itself, the API's schemas and hadolint, once `make check-deploy` has installed them.
#[test]
fn the_chart_renders_to_what_kubernetes_takes() {
    if !root().join("target/deploy-tools/installed").exists() {
        eprintln!("the tools are not there (make check-deploy installs them): the chart was not rendered");
        return;
    }
    let ran = Command::new(root().join("scripts/check-deploy.sh")).output().expect("it runs");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// With a stand-in for the release binary: this is about the package.
#[test]
fn the_debian_package_installs_and_leaves_nothing_but_settings() {
    if Command::new("dpkg-deb").arg("--version").output().is_err() {
        eprintln!("dpkg-deb is not there: no package was built");
        return;
    }
    let target = tempfile::tempdir().expect("a directory");
    let run = |command: &mut Command| {
        let ran = command.output().expect("it runs");
        assert!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).into_owned()
    };
    let mut build = Command::new(root().join("scripts/build-deb.sh"));
    let package = run(build
        .arg(env!("CARGO_BIN_EXE_backfilld"))
        .env("CARGO_TARGET_DIR", target.path())
        .env("DEB_COMPRESSION", "none"));
    let package = package.trim();
    let list = run(Command::new("dpkg-deb").args(["-c", package]));
    for path in [
        "usr/bin/backfilld",
        "usr/lib/systemd/system/backfilld@.service",
        "etc/backfilld/backfilld.toml",
        "usr/share/man/man1/backfilld-status.1.gz",
        "usr/share/bash-completion/completions/backfilld",
        "usr/share/zsh/vendor-completions/_backfilld",
        "usr/share/fish/vendor_completions.d/backfilld.fish",
    ] {
        assert!(list.contains(&format!("./{path}")), "{path}: {list}");
    }
    assert!(!list.lines().any(|l| !l.contains("root/root")), "{list}");
    let place = target.path().join("root");
    run(Command::new("dpkg-deb").args(["-x", package]).arg(&place));
    let version = run(Command::new(place.join("usr/bin/backfilld")).arg("--version"));
    assert_eq!(version.trim(), concat!("backfilld ", env!("CARGO_PKG_VERSION")));
    let settings = place.join("etc/backfilld/backfilld.toml");
    run(Command::new(place.join("usr/bin/backfilld")).arg("--config").arg(settings).args(["config", "check"]));
}

/// What the sample of compose.yaml loads is what the demo loads.
#[test]
fn the_sample_of_compose_loads_files_that_exist() {
    let script = text("deploy/container/sample.sh");
    let files: Vec<&str> = script.split("$sql/").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        assert!(root().join("src/demo/sql").join(file).exists(), "{file}");
    }
}
