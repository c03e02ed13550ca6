//! The schema as text, to compare how it was with how it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use backfilld::demo::cluster::{self, SUPERUSER};

use super::{TestDb, block_on, server};

/// For servers that no `pg_dump` at hand can read.
const CATALOG: &str = include_str!("dump.sql");

/// The schema without what changes from call to call and without our ledger: as `pg_dump` writes it where there is one that
/// can read this server (it reads no newer one), else from the catalog. `options` are those of `pg_dump`; of these the
/// catalog knows `--table=` alone.
pub fn schema_dump(db: &TestDb, options: &[&str]) -> String {
    match pg_dump() {
        Some(program) => by_pg_dump(&program, db, options),
        None => by_catalog(db, options),
    }
}

fn pg_dump() -> Option<PathBuf> {
    let major = |bin: &Path| {
        let version = cluster::server_version(bin).expect("the server has a version");
        version.split('.').next().and_then(|major| major.parse::<u32>().ok()).expect("a version")
    };
    let server = server().cluster.bin();
    let places = [Some(server.to_owned()), cluster::find_binaries(None).ok()];
    places
        .into_iter()
        .flatten()
        .find(|bin| bin.join("pg_dump").is_file() && major(bin) >= major(server))
        .map(|bin| bin.join("pg_dump"))
}

fn by_pg_dump(program: &Path, db: &TestDb, options: &[&str]) -> String {
    let out = Command::new(program)
        .args(["--schema-only", "--exclude-schema=backfilld"])
        .args(options)
        .env("PGPASSWORD", server().cluster.password())
        .arg(format!("--dbname={}", db.url(SUPERUSER)))
        .output()
        .expect("pg_dump runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    text.lines().filter(|l| !l.contains("restrict ")).collect::<Vec<_>>().join("\n")
}

fn by_catalog(db: &TestDb, options: &[&str]) -> String {
    let table = options.iter().map(|o| o.strip_prefix("--table=").expect("no other option is known here")).next();
    block_on(async move {
        let client = db.admin().await;
        // Under this path every name outside of pg_catalog comes out qualified.
        client.batch_execute("set search_path = pg_catalog").await.expect("a setting");
        client.query_one(CATALOG, &[&table]).await.expect("the catalog is readable").get(0)
    })
}
