//! The application's list under row level security, before and after the flip: pgbench as random owners, as fast as it goes.

use std::process::{Command, Stdio};

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::measure::LIST_SQL;
use backfilld::{Error, Result};
use serde_json::json;

use crate::report::{Report, Table, median};
use crate::world::{Database, World, say};

/// As many as there are cores: it is the server that is measured.
const CLIENTS: &str = "2";
/// Long enough for a hundred of the slow ones.
const SECONDS: &str = "15";

pub async fn run(world: &World, ready: &str, runs: u32, report: &mut Report) -> Result<()> {
    let old = world.copy(ready).await?;
    let new = world.copy(ready).await?;
    world.flip(&new).await?;
    let owners = prepare(&old).await?.min(prepare(&new).await?);
    let mut tps = [Vec::new(), Vec::new()];
    for run in 0..runs {
        for (i, db) in [&old, &new].into_iter().enumerate() {
            say(&format!("reads {} of {runs}: {}", run + 1, ["before", "after"][i]));
            tps[i].push(pgbench(world, db, owners)?);
        }
    }
    let [before, after] = [median(&tps[0]), median(&tps[1])];
    let rows = vec![
        ("before the flip".to_owned(), vec![format!("{before:.1}"), String::new()]),
        ("after it".to_owned(), vec![format!("{after:.1}"), format!("{:.1} x", after / before)]),
    ];
    let data = json!({ "before_tps": tps[0], "after_tps": tps[1], "owners": owners });
    let title = "The list under RLS, random owners";
    report.add("reads", Table { title, head: vec!["tps", "faster"], rows }, data);
    world.discard(old).await?;
    world.discard(new).await
}

/// Numbers all owners of a message, with their claims. Gives how many there are.
async fn prepare(db: &Database) -> Result<i64> {
    db.admin
        .batch_execute(
            "create table public.bench_owners as
               select row_number() over (order by o.id) as n,
                 json_build_object('sub', o.id, 'role', 'authenticated')::text as claims
               from (select distinct c.auth_user_id as id from public.conversations c
                     join public.messages m on m.conversation_id = c.id where c.auth_user_id is not null) o;
             alter table public.bench_owners add primary key (n)",
        )
        .await?;
    db.admin.batch_execute("vacuum analyze").await?;
    Ok(db.admin.query_one("select count(*) from public.bench_owners", &[]).await?.get(0))
}

/// Transactions per second.
fn pgbench(world: &World, db: &Database, owners: i64) -> Result<f64> {
    let failed = |e: std::io::Error| Error::internal("cannot run pgbench").with_source(e);
    let script = tempfile::NamedTempFile::new().map_err(failed)?;
    let text = format!(
        "\\set n random(1, {owners})\nbegin;\nselect set_config('request.jwt.claims', claims, true) \
         from public.bench_owners where n = :n;\nset local role authenticated;\n{LIST_SQL};\nend;\n"
    );
    std::fs::write(script.path(), text).map_err(failed)?;
    let output = Command::new(world.cluster.bin().join("pgbench"))
        .args(["-n", "-c", CLIENTS, "-j", "1", "-T", SECONDS, "-f"])
        .arg(script.path())
        .arg(world.cluster.url(SUPERUSER, &db.name))
        .stdin(Stdio::null())
        .output()
        .map_err(failed)?;
    let said = String::from_utf8_lossy(&output.stdout);
    let tps = said.lines().find_map(|l| l.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    let why = || String::from_utf8_lossy(&output.stderr).into_owned();
    tps.filter(|_| output.status.success())
        .ok_or_else(|| Error::failed("pgbench did not run to the end").with_hint(why()))
}
