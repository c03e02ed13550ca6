//! How long ACCESS EXCLUSIVE is held: by the flip, many times, and by the other steps, once.

use backfilld::Result;
use serde_json::json;

use crate::report::{Report, Table, max, median};
use crate::world::{World, say};

pub async fn run(world: &World, ready: &str, flips: u32, report: &mut Report) -> Result<()> {
    let mut holds = Vec::new();
    let mut others: Vec<(String, f64)> = Vec::new();
    for i in 0..flips {
        if i % 5 == 0 {
            say(&format!("flip {} of {flips}", i + 1));
        }
        let db = world.copy(ready).await?;
        world.flip(&db).await?;
        let sql = "select detail ->> 'what', (detail ->> 'hold_us')::float8 / 1000 from backfilld.event
                   where kind = 'ddl' and detail ->> 'lock' = 'AccessExclusiveLock' order by id";
        let mut all: Vec<(String, f64)> =
            db.admin.query(sql, &[]).await?.iter().map(|r| (r.get(0), r.get(1))).collect();
        holds.extend(all.pop().map(|flip| flip.1));
        others = all;
        world.discard(db).await?;
    }
    let mut rows =
        vec![(format!("flip, {flips} times"), vec![format!("{:.1}", median(&holds)), format!("{:.1}", max(&holds))])];
    rows.extend(others.iter().map(|(what, ms)| {
        let short: String = what.chars().take(28).collect();
        (short, vec![format!("{ms:.1}")])
    }));
    let others: Vec<_> = others.iter().map(|(what, ms)| json!({ "what": what, "ms": ms })).collect();
    let data = json!({ "flip_ms": holds, "others": others });
    report.add("flip", Table { title: "ACCESS EXCLUSIVE held, ms", head: vec!["median", "max"], rows }, data);
    Ok(())
}
