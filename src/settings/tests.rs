use super::*;

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn load(file: &str, vars: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Settings> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("backfilld.toml");
    std::fs::write(&path, file).unwrap();
    let flags = flags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Settings::load_from(Some(&path), &env(vars), flags)
}

fn error(file: &str, vars: &[(&str, &str)], flags: &[(&str, &str)]) -> String {
    load(file, vars, flags).unwrap_err().render()
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let file = "[database]\npool_size = 5\nport = 1\n[lease]\nttl = '20s'\n";
    let vars = [("BACKFILLD_DATABASE__POOL_SIZE", "6"), ("BACKFILLD_LEASE__TTL", "30s")];
    let s = load(file, &vars, &[("database.pool_size", "7")]).unwrap();
    assert_eq!((s.database.pool_size, s.database.port), (7, Some(1)));
    assert_eq!(s.lease.heartbeat(), Duration::from_secs(10));
    assert_eq!(s.ddl.lock_timeout, DEFAULT_LOCK_TIMEOUT);
}

#[test]
fn passwords_keep_their_zeros_and_booleans_are_read() {
    let vars = [("BACKFILLD_DATABASE__PASSWORD", "0123"), ("BACKFILLD_DATABASE__DEDICATED_LOGIN", "true")];
    let s = load("", &vars, &[]).unwrap();
    use secrecy::ExposeSecret as _;
    assert_eq!(s.database.password.unwrap().expose_secret(), "0123");
    assert!(s.database.dedicated_login);
}

#[test]
fn wrong_types_name_the_path_the_source_and_what_was_expected() {
    let e = error("[database]\npool_size = 'many'\n", &[], &[]);
    assert!(
        e.contains("backfilld.toml: `database.pool_size`: expected an integer from 2 to 64, found \"many\""),
        "{e}"
    );
    let e = error("[database]\npool_size = 4.7\n", &[], &[]);
    assert!(e.contains("found the number 4.7"), "{e}");
    let e = error("[database]\ndedicated_login = 1\n", &[], &[]);
    assert!(e.contains("`database.dedicated_login`: expected true or false, found the number 1"), "{e}");
    let e = error("", &[("BACKFILLD_LEASE__TTL", "15")], &[]);
    assert!(e.contains("BACKFILLD_LEASE__TTL: `lease.ttl`: expected a duration"), "{e}");
    let e = error("[database]\nsslmode = 'verify_full'\n", &[], &[]);
    assert!(e.contains("expected one of disable, allow, prefer, require, verify-ca, verify-full"), "{e}");
    let e = error("[database]\nport = 70000\n", &[], &[]);
    assert!(e.contains("`database.port`: expected an integer from 1 to 65535"), "{e}");
    assert!(error("database = 5", &[], &[]).contains("expected a table `[database]`"));
}

#[test]
fn unknown_keys_are_named_with_the_nearest_known_one() {
    let e = error("[database]\npoolsize = 4\n", &[], &[]);
    assert!(e.contains("unknown setting `database.poolsize`") && e.contains("`database.pool_size`"), "{e}");
    let e = error("[databse]\nurl = 'x'\n", &[], &[]);
    assert!(e.contains("unknown setting `databse`"), "{e}");
    let e = error("", &[("BACKFILLD_DATABASE_URL", "x")], &[]);
    assert!(e.contains("BACKFILLD_DATABASE_URL") && e.contains("BACKFILLD_DATABASE__URL"), "{e}");
    assert!(error("", &[("BACKFILLD_LOGS__LEVEL", "x")], &[]).contains("unknown environment variable"));
    assert!(error("", &[], &[("log.levels", "x")]).contains("unknown setting `log.levels`"));
}

#[test]
fn variables_that_are_no_settings_are_left_alone() {
    let vars = [
        ("BACKFILLD_CONFIG", "/x"),
        ("BACKFILLD_TEST_X__Y", "1"),
        ("BACKFILLD_PORT", "tcp://10.0.0.1:9847"),
        ("BACKFILLD_SERVICE_HOST", "10.0.0.1"),
        ("BACKFILLD_PORT_9847_TCP", "tcp://10.0.0.1:9847"),
    ];
    load("", &vars, &[]).unwrap();
}

#[test]
fn rules_name_their_key() {
    for (key, value) in [
        ("lease.ttl", "1s"),
        ("ddl.lock_timeout", "5s"),
        ("database.pool_size", "1"),
        ("database.url", "mysql://h"),
        ("http.listen", "9847"),
        ("log.level", "info,a=loud"),
        ("instance", ""),
    ] {
        let e = error("", &[], &[(key, value)]);
        assert!(e.contains(&format!("`{key}`")), "{key}: {e}");
    }
}

#[test]
fn http_can_be_switched_off() {
    for off in ["", "off"] {
        assert_eq!(load("", &[], &[("http.listen", off)]).unwrap().http.address().unwrap(), None);
    }
}

#[test]
fn a_broken_file_is_located_but_never_quoted() {
    let e = error("[database]\npassword = hunter2\n", &[], &[]);
    assert!(e.contains("backfilld.toml:2:") && !e.contains("hunter2"), "{e}");
    let e = error("[database]\npassword = ['hunter2']\n", &[], &[]);
    assert!(e.contains("`database.password`: expected a string") && !e.contains("hunter2"), "{e}");
}

#[test]
fn show_and_debug_hold_no_secret_and_say_where_values_come_from() {
    let file = "[database]\nurl = 'postgresql://u:hunter2@h/d?sslmode=require'\npool_size = 5\n";
    let vars = [("BACKFILLD_DATABASE__DDL_URL", "host=x password=hunter2"), ("BACKFILLD_LOG__FORMAT", "json")];
    let s = load(file, &vars, &[("lease.ttl", "20s"), ("database.password", "hunter2")]).unwrap();
    let shown = s.show();
    assert!(!shown.contains("hunter2") && !format!("{s:?}").contains("hunter2"), "{shown}");
    assert!(shown.contains("url = \"postgresql://u:***@h/d?sslmode=require\"  # /"), "{shown}");
    assert!(shown.contains("format = \"json\"  # BACKFILLD_LOG__FORMAT"), "{shown}");
    assert!(shown.contains("ttl = \"20s\"  # command line"), "{shown}");
    assert!(shown.contains("lock_timeout = \"150ms\"  # default"), "{shown}");
    toml::from_str::<toml::Table>(&shown).unwrap();
}

#[test]
fn the_reference_and_the_example_are_up_to_date() {
    for (path, made) in [("docs/settings.md", reference_markdown()), ("deploy/backfilld.toml", example())] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        if std::env::var_os("BACKFILLD_TEST_BLESS").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == made, "{} is stale; run the test with BACKFILLD_TEST_BLESS=1", path.display());
    }
    assert!(reference().iter().all(|k| !k.description.is_empty()));
}

#[test]
fn every_line_of_the_example_can_be_used() {
    let text: String = example()
        .lines()
        .map(|l| l.strip_prefix('#').filter(|l| !l.starts_with(' ')).unwrap_or(l))
        .map(|l| format!("{l}\n"))
        .collect();
    let text = text.replace("#instance = \"\"", "instance = \"a\"").replace("instance = \"\"", "instance = \"a\"");
    load(&text, &[], &[]).unwrap();
}
