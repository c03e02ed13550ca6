use super::*;

fn url(text: &str) -> DatabaseSettings {
    DatabaseSettings { url: Some(SecretString::from(text)), ..DatabaseSettings::default() }
}

fn with_env<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
    move |name| pairs.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned())
}

fn password(target: &Target) -> Option<&str> {
    target.hosts[0].password.as_ref().map(|p| p.expose_secret())
}

#[test]
fn the_connection_string_wins_over_parts_and_those_over_the_environment() {
    let env = with_env(&[("PGHOST", "envhost"), ("PGPORT", "7"), ("PGUSER", "envuser"), ("PGPASSWORD", "envpw")]);
    let mut settings = url("postgresql://urlhost/app");
    settings.host = Some("parthost".into());
    settings.user = Some("partuser".into());
    let t = settings.target_from(&env).unwrap();
    assert_eq!(t.to_string(), "partuser@urlhost:7/app");
    assert_eq!(password(&t), Some("envpw"));
    assert_eq!(DatabaseSettings::default().target_from(&env).unwrap().to_string(), "envuser@envhost:7/envuser");
}

#[test]
fn several_hosts_have_their_own_ports() {
    let t = url("postgresql://u@a:1,b:2/d?target_session_attrs=read-write&load_balance_hosts=random");
    let t = t.target_from(&with_env(&[])).unwrap();
    assert_eq!(t.to_string(), "u@a:1,b:2/d");
    assert_eq!((t.session_attrs, t.shuffle), (TargetSessionAttrs::ReadWrite, true));
    let e = url("postgresql://u@/d?host=a,b,c&port=1,2").target_from(&with_env(&[])).unwrap_err();
    assert!(e.to_string().contains("one per host"), "{e}");
}

#[test]
fn tls_settings_follow_libpq() {
    let tls = |text: &str, env: &[(&str, &str)]| url(text).target_from(&with_env(env)).map(|t| t.tls);
    assert_eq!(tls("postgresql://u@h/d", &[]).unwrap().mode, SslMode::Prefer);
    assert_eq!(tls("postgresql://u@h/d", &[("PGSSLMODE", "require")]).unwrap().mode, SslMode::Require);
    let system = tls("postgresql://u@h/d?sslrootcert=system", &[]).unwrap();
    assert_eq!((system.mode, system.roots), (SslMode::VerifyFull, Roots::System));
    let e = tls("postgresql://u@h/d?sslrootcert=system&sslmode=require", &[]).unwrap_err();
    assert!(e.to_string().contains("verify-full"), "{e}");
    assert!(tls("postgresql://u@h/d?sslcert=/c", &[]).unwrap_err().to_string().contains("sslkey"));
    assert!(tls("postgresql://u@h/d?sslmode=verify_full", &[]).unwrap_err().to_string().contains("sslmode"));
}

#[test]
fn libpq_counts_tcp_user_timeout_in_milliseconds() {
    let t = url("postgresql://u@h/d?tcp_user_timeout=2500&connect_timeout=3&keepalives=0&pgbouncer=true");
    let t = t.target_from(&with_env(&[])).unwrap();
    assert_eq!(t.tcp_user_timeout, Duration::from_millis(2500));
    assert_eq!((t.connect_timeout, t.keepalives, t.pgbouncer), (Duration::from_secs(3), false, true));
}

#[test]
fn the_password_file_of_libpq_is_the_last_resort() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(".pgpass");
    std::fs::write(&file, "h:5432:d:u:fromfile\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let home = dir.path().display().to_string();
    let env = [("HOME", home.as_str())];
    assert_eq!(password(&url("postgresql://u@h/d").target_from(&with_env(&env)).unwrap()), Some("fromfile"));
    assert_eq!(password(&url("postgresql://u:x@h/d").target_from(&with_env(&env)).unwrap()), Some("x"));
}

#[test]
fn the_ddl_connection_takes_what_it_leaves_out_from_the_main_one() {
    let mut settings = url("postgresql://u:pw@pooler:6543/d?sslmode=require&pgbouncer=true");
    settings.ddl_url = Some(SecretString::from("postgresql://direct"));
    let t = settings.ddl_target().unwrap().unwrap();
    assert_eq!(t.to_string(), "u@direct:5432/d");
    assert_eq!((t.tls.mode, t.pgbouncer, password(&t)), (SslMode::Require, false, Some("pw")));
}

#[test]
fn debug_prints_no_password() {
    let settings = url("postgresql://u:hunter2@h/d");
    let t = settings.target_from(&with_env(&[])).unwrap();
    assert!(!format!("{settings:?} {t:?}").contains("hunter2"));
}

#[test]
fn variables_of_libpq_count_where_nothing_nearer_speaks() {
    let env = with_env(&[
        ("PGCONNECT_TIMEOUT", "7"),
        ("PGTARGETSESSIONATTRS", "read-write"),
        ("PGCHANNELBINDING", "require"),
        ("PGSSLNEGOTIATION", "postgres"),
    ]);
    let t = url("postgresql://u@h/d").target_from(&env).unwrap();
    assert_eq!((t.connect_timeout, t.session_attrs), (Duration::from_secs(7), TargetSessionAttrs::ReadWrite));
    assert_eq!(t.channel_binding, ChannelBinding::Require);
    let mut settings = url("postgresql://u@h/d?target_session_attrs=any");
    settings.connect_timeout = Duration::from_secs(3);
    let t = settings.target_from(&env).unwrap();
    assert_eq!((t.connect_timeout, t.session_attrs), (Duration::from_secs(3), TargetSessionAttrs::Any));
    let e = url("postgresql://u@h/d").target_from(&with_env(&[("PGTARGETSESSIONATTRS", "primari")])).unwrap_err();
    assert!(e.to_string().contains("target_session_attrs"), "{e}");
}

#[test]
fn a_service_stands_between_the_settings_and_the_variables() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(".pg_service.conf"), "[s]\nhost=filehost\nuser=fileuser\nsslmode=require\n")
        .unwrap();
    let home = dir.path().display().to_string();
    let env = [("HOME", home.as_str()), ("PGSERVICE", "s"), ("PGHOST", "envhost"), ("PGDATABASE", "envdb")];
    let mut settings = DatabaseSettings { user: Some("partuser".into()), ..DatabaseSettings::default() };
    let t = settings.target_from(&with_env(&env)).unwrap();
    assert_eq!((t.to_string().as_str(), t.tls.mode), ("partuser@filehost:5432/envdb", SslMode::Require));
    settings.url = Some(SecretString::from("service=s"));
    let t = settings.target_from(&with_env(&env[..1])).unwrap();
    assert_eq!(t.to_string(), "fileuser@filehost:5432/fileuser");
}
