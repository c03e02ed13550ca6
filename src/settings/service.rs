//! What libpq knows beside the connection string: its environment variables, and service files.

use std::path::{Path, PathBuf};

use super::conninfo::{self, Params};
use crate::error::{Error, Result};

type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Variables and the parameters that they stand for. PostgreSQL documentation, "Environment Variables" of libpq.
const VARIABLES: [(&str, &str); 18] = [
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGDATABASE", "dbname"),
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
    ("PGOPTIONS", "options"),
    ("PGPASSFILE", "passfile"),
    ("PGPASSWORD", "password"),
    ("PGPORT", "port"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLMINPROTOCOLVERSION", "ssl_min_protocol_version"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGUSER", "user"),
];
/// Variables that ask for a protection that we lack: to pass over them would weaken what the operator asked for.
const REFUSED: [(&str, &str); 4] = [
    ("PGREQUIREAUTH", "require_auth"),
    ("PGREQUIREPEER", "requirepeer"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLCRLDIR", "sslcrldir"),
];
/// Where the system's service file is, if `PGSYSCONFDIR` does not say: Debian's place, and that of a build from source.
const SYSTEM_FILES: [&str; 2] = ["/etc/postgresql-common/pg_service.conf", "/usr/local/pgsql/etc/pg_service.conf"];

/// Adds what the service says that a connection string names, where the string itself is silent.
pub(super) fn expand(setting: &str, mut params: Params, env: Lookup<'_>) -> Result<Params> {
    if let Some(name) = params.remove("service") {
        let file = params.remove("servicefile");
        for (key, value) in look_up(&name, file.as_deref(), env).map_err(|e| e.context(format!("`{setting}`")))? {
            params.entry(key).or_insert(value);
        }
    }
    Ok(params)
}

/// What counts where neither connection string nor settings say anything: the service in `PGSERVICE`, then the other
/// variables.
pub(super) fn environment(env: Lookup<'_>) -> Result<Params> {
    let set = |name: &str| env(name).filter(|v| !v.is_empty());
    for (variable, param) in REFUSED {
        if set(variable).is_some() {
            let why = conninfo::refusal(param).unwrap_or("not supported");
            return Err(Error::input(format!("environment variable {variable}: {why}")));
        }
    }
    let mut out = match set("PGSERVICE") {
        Some(name) => look_up(&name, None, env).map_err(|e| e.context("environment variable PGSERVICE"))?,
        None => Params::new(),
    };
    for (variable, param) in VARIABLES {
        if let Some(value) = set(variable) {
            out.entry(param.to_owned()).or_insert(value);
        }
    }
    Ok(out)
}

fn look_up(name: &str, file: Option<&str>, env: Lookup<'_>) -> Result<Params> {
    let set = |name: &str| env(name).filter(|v| !v.is_empty());
    let chosen = file.map(str::to_owned).or_else(|| set("PGSERVICEFILE")).map(PathBuf::from);
    let mut files = Vec::new();
    match &chosen {
        Some(path) => files.push(path.clone()),
        None => files.extend(set("HOME").map(|home| Path::new(&home).join(".pg_service.conf"))),
    }
    match set("PGSYSCONFDIR") {
        Some(dir) => files.push(Path::new(&dir).join("pg_service.conf")),
        None => files.extend(SYSTEM_FILES.map(PathBuf::from)),
    }
    for path in &files {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && chosen.as_ref() != Some(path) => continue,
            Err(e) => return Err(Error::input(format!("service file {}: cannot read", path.display())).with_source(e)),
        };
        let found = section(&text, name)
            .map_err(|(line, what)| Error::input(format!("service file {}:{line}: {what}", path.display())))?;
        if let Some(pairs) = found {
            let bad = |e| Error::input(format!("service file {}: service {name}: {e}", path.display()));
            let mut params = conninfo::accept(pairs).map_err(bad)?;
            if params.remove("service").is_some() || params.remove("servicefile").is_some() {
                return Err(bad("a service cannot name another one".into()));
            }
            return Ok(params);
        }
    }
    let looked: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    Err(Error::input(format!("there is no service {name:?}"))
        .with_hint(format!("looked for [{name}] in {}; PGSERVICEFILE names another file", looked.join(", "))))
}

type Pairs = Vec<(String, String)>;

/// The parameters under `[name]`, if the text has that section. Errors have the line's number and never its text, which
/// can be a password.
fn section(text: &str, name: &str) -> Result<Option<Pairs>, (usize, &'static str)> {
    let (mut found, mut inside) = (None, false);
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            // The first section of that name counts.
            if found.is_some() {
                break;
            }
            inside = header.strip_suffix(']') == Some(name);
            if inside {
                found = Some(Pairs::new());
            }
        } else if inside {
            if line.starts_with("ldap") {
                return Err((i + 1, "services in LDAP are not supported"));
            }
            let (key, value) = line.split_once('=').ok_or((i + 1, "expected a line like host=db.example.com"))?;
            found.get_or_insert_default().push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# ours\n[other]\nhost=no\n\n[app]\nhost = db.example.com\nport=6000\npassword=a=b c\n[app]\nhost=twice\n";

    #[test]
    fn the_first_section_of_that_name_counts() {
        let pairs = section(FILE, "app").unwrap().unwrap();
        let own = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert_eq!(pairs, [own("host", "db.example.com"), own("port", "6000"), own("password", "a=b c")]);
        assert_eq!(section(FILE, "ap"), Ok(None));
        assert_eq!(section("[x]\nhunter2\n", "x"), Err((2, "expected a line like host=db.example.com")));
    }

    #[test]
    fn what_is_said_nearer_wins_and_a_service_that_is_missing_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("services");
        std::fs::write(&file, FILE).unwrap();
        let file = file.display().to_string();
        let env = |name: &str| match name {
            "PGSERVICEFILE" => Some(file.clone()),
            "PGSERVICE" => Some("app".to_owned()),
            "PGPORT" => Some("1".to_owned()),
            "PGUSER" => Some("me".to_owned()),
            "PGSYSCONFDIR" => Some("/nonexistent".to_owned()),
            _ => None,
        };
        let got = environment(&env).unwrap();
        assert_eq!(
            (got["host"].as_str(), got["port"].as_str(), got["user"].as_str()),
            ("db.example.com", "6000", "me")
        );
        let url = |text| expand("database.url", conninfo::parse(text).unwrap(), &env);
        let got = url("postgresql:///app?service=app&host=mine").unwrap();
        assert_eq!((got["host"].as_str(), got["port"].as_str()), ("mine", "6000"));
        let e = url("service=gone").unwrap_err().render();
        assert!(e.contains("`database.url`: there is no service \"gone\"") && e.contains(&file), "{e}");
        let e = expand("database.url", conninfo::parse("service=app servicefile=/gone").unwrap(), &env).unwrap_err();
        assert!(e.to_string().contains("service file /gone: cannot read"), "{e}");
    }

    #[test]
    fn variables_that_ask_for_what_we_lack_are_refused() {
        let e = environment(&|name| (name == "PGSSLCRL").then(|| "/crl".to_owned())).unwrap_err();
        assert!(e.to_string().contains("PGSSLCRL: certificate revocation lists are not supported"), "{e}");
    }
}
