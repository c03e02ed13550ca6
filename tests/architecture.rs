//! Who may know whom: the directions of ARCHITECTURE.md, held by reading `use` lines.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file before its tests.
const MAX_LINES: usize = 500;

/// Path below `src` (`plan/shape.rs`) to its text without its tests.
fn sources() -> BTreeMap<String, String> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("src is readable") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { walk(&path, out) } else { out.push(path) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let rust = files.into_iter().filter(|f| f.extension().is_some_and(|e| e == "rs"));
    rust.map(|file| {
        let name = file.strip_prefix(&root).expect("below src").to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).expect("readable");
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned();
        (name, code)
    })
    .collect()
}

/// Top-level modules of ours that a text names, in `use` lines or in paths.
fn names(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            let list = rest.strip_prefix('{').map_or(rest, |inner| inner.split('}').next().unwrap_or_default());
            let items = if rest.starts_with('{') { list.split(',').collect() } else { vec![list] };
            for item in items {
                let name: String = item.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                out.push(name);
            }
        }
    }
    out.retain(|name| !name.is_empty());
    out
}

fn module(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap_or_default()
}

fn offenders(files: impl Fn(&str) -> bool, wrong: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let mut out = Vec::new();
    for (file, text) in sources().iter().filter(|(f, _)| files(f)) {
        out.extend(names(text).iter().filter(|n| wrong(file, n)).map(|n| format!("{file} names crate::{n}")));
    }
    out
}

#[test]
fn nobody_but_the_command_line_knows_the_daemon_and_nobody_but_main_the_command_line() {
    let wrong = |file: &str, name: &str| match name {
        "daemon" => !matches!(module(file), "cli" | "daemon"),
        "cli" => !matches!(module(file), "main" | "cli"),
        _ => false,
    };
    assert_eq!(offenders(|_| true, wrong), Vec::<String>::new());
}

#[test]
fn leaves_know_nobody() {
    let leaves = ["error", "metrics", "progress", "phase", "fault", "terminal"];
    assert_eq!(offenders(|f| leaves.contains(&module(f)), |f, n| n != module(f)), Vec::<String>::new());
}

#[test]
fn lower_layers_do_not_know_higher_ones() {
    let below: [(&str, &[&str]); 10] = [
        ("pg", &["error", "pem", "settings", "pg"]),
        ("settings", &["error", "settings"]),
        ("ledger", &["error", "job", "phase", "ledger", "pg"]),
        ("job", &["error", "job", "pg"]),
        ("plan", &["error", "job", "pg", "phase", "plan"]),
        ("http", &["error", "http", "metrics", "pem", "progress"]),
        ("telemetry", &["error", "post", "progress", "settings", "telemetry", "terminal"]),
        ("post", &["error"]),
        ("eta", &["eta", "progress"]),
        ("pem", &["error", "pem"]),
    ];
    for (layer, known) in below {
        assert_eq!(offenders(|f| module(f) == layer, |_, n| !known.contains(&n)), Vec::<String>::new(), "{layer}");
    }
    // Phases know the ledger, the executor and each other's data, not those who drive them.
    let phases = [
        "access", "expand", "backfill", "throttle", "verify", "cutover", "rollback", "ddl", "context", "hooks", "live",
    ];
    let drivers = ["daemon", "cli", "demo", "http", "telemetry", "preflight"];
    assert_eq!(offenders(|f| phases.contains(&module(f)), |_, n| drivers.contains(&n)), Vec::<String>::new());
}

#[test]
fn what_is_pure_has_no_client_and_no_runtime() {
    let pure = |file: &str| {
        matches!(module(file), "eta" | "job" | "phase")
            || matches!(file, "backfill/sizer.rs" | "throttle/pacing.rs" | "throttle/signal.rs")
            || ["shape", "sync_sql", "batch_sql", "verify_sql", "steps", "contract"]
                .iter()
                .any(|m| file == format!("plan/{m}.rs"))
    };
    for (file, text) in sources().iter().filter(|(f, _)| pure(f)) {
        let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
        for line in code {
            assert!(!line.contains("tokio"), "{file}: {line}");
        }
    }
}

#[test]
fn no_file_is_longer_than_one_can_read() {
    let long: Vec<String> = sources()
        .iter()
        .filter(|(_, text)| text.lines().count() > MAX_LINES)
        .map(|(file, text)| format!("{file}: {} lines", text.lines().count()))
        .collect();
    assert_eq!(long, Vec::<String>::new());
}

#[test]
fn the_tables_of_an_application_are_known_to_the_demo_alone() {
    for (file, text) in sources().iter().filter(|(f, _)| module(f) != "demo" && *f != "cli/demo.rs") {
        for word in ["public.conversations", "add_message", "auth.users"] {
            let told = text.lines().filter(|l| !l.trim_start().starts_with("//")).find(|l| l.contains(word));
            assert_eq!(told, None, "{file}");
        }
    }
}
