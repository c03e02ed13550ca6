//! The trigger contract, row by row: writer's operation x isolation level x state of the parent.

use backfilld::demo::sample::APP_OWNER;

use crate::support::Session;
use crate::sync_fixture::{CHAIN, Fixture, LEVELS, LOOSE, OWNED};

/// What the parent does while the writer is at work.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Parent {
    /// Nothing.
    Still,
    /// It changed and committed after the writer's snapshot.
    ChangedSince,
    /// It was changed by a transaction that commits when the writer waits for it, or after the writer's statement.
    Changing,
}

const STATES: [Parent; 3] = [Parent::Still, Parent::ChangedSince, Parent::Changing];

/// Writers of the target. Kid 1 belongs to parent 1, kid 2 to parent 2; all of them leave a row with parent 1.
const WRITES: &[(&str, &str)] = &[
    ("insert", "insert into public.kids (id, parent_id, owner) values (10, 1, 'spoofed')"),
    ("insert without column list", "insert into public.kids values (10, 1, 'body')"),
    ("insert select", "insert into public.kids (id, parent_id) select 10, 1"),
    (
        "on conflict do update",
        "insert into public.kids (id, parent_id) values (1, 1) on conflict (id) do update set body = 'y', owner = null",
    ),
    (
        "on conflict do nothing",
        "insert into public.kids (id, parent_id, owner) values (10, 1, 'spoofed') on conflict (id) do nothing",
    ),
    ("whole-row save of NULL", "update public.kids set parent_id = 1, body = 'y', owner = null where id = 1"),
    (
        "whole-row save of another value",
        "update public.kids set parent_id = 1, body = 'y', owner = 'spoofed' where id = 1",
    ),
    ("content update", "update public.kids set body = 'y' where id = 1"),
    ("re-parenting", "update public.kids set parent_id = 1 where id = 2"),
    ("update of the key", "update public.kids set id = 10 where id = 1"),
    ("delete", "delete from public.kids where id = 1"),
];

const MERGE: (&str, &str) = (
    "merge",
    "merge into public.kids t using (values (1, 1), (10, 1)) s (id, parent_id) on t.id = s.id
     when matched then update set owner = 'spoofed'
     when not matched then insert (id, parent_id, owner) values (s.id, s.parent_id, 'spoofed')",
);

#[tokio::test]
async fn every_write_of_a_target_row_leaves_the_derived_value_or_a_documented_error() {
    for case in [OWNED, LOOSE, CHAIN] {
        let f = Fixture::new(case).await;
        let (mut writer, changer) = (f.app("writer").await, f.app("changer").await);
        let mut writes = WRITES.to_vec();
        if f.facts.server_version >= 150_000 {
            writes.push(MERGE);
        }
        for (what, sql) in writes {
            for level in LEVELS {
                for state in STATES {
                    f.reset().await;
                    let what = format!("{}: {what}, {level}, {state:?}", f.spec.name);
                    let result = interleave(&f, &mut writer, &changer, level, state, sql).await;
                    let strict = level != "read committed";
                    let expected = match state {
                        Parent::ChangedSince if strict => Err("40001"),
                        // A delete in a snapshot that does not see the change conflicts with it just the same.
                        Parent::Changing if strict => Err("40001"),
                        _ => Ok(()),
                    };
                    assert_eq!(result.as_ref().map_err(|e| e.as_str()).copied(), expected, "{what}");
                    f.assert_no_drift(&what).await;
                }
            }
        }
    }
}

/// Runs the writer's transaction in the given state; its SQLSTATE if it failed.
async fn interleave(
    f: &Fixture,
    writer: &mut Session,
    changer: &Session,
    level: &str,
    state: Parent,
    sql: &str,
) -> Result<(), String> {
    let change = match f.spec.name.as_str() {
        "chain" => "update public.accounts set name = 'changed' where id = 1",
        _ => "update public.parents set owner = 'changed' where id = 1",
    };
    writer.run(&format!("begin isolation level {level}; select 1 from public.kids limit 1")).await;
    match state {
        Parent::Still => {}
        Parent::ChangedSince => changer.run(change).await,
        Parent::Changing => changer.run(&format!("begin; {change}")).await,
    }
    let mut result = None;
    for sql in [sql, "commit"] {
        writer.send(sql);
        if state == Parent::Changing {
            f.db.wait_blocked_or_finished(writer).await;
            if !writer.is_finished() {
                changer.run("commit").await;
            }
        }
        if let Err(e) = writer.finish().await {
            result.get_or_insert(e.code().map(|c| c.code().to_owned()).unwrap_or_default());
        }
    }
    changer.run("commit").await;
    writer.run("rollback").await;
    result.map_or(Ok(()), Err)
}

#[tokio::test]
async fn copied_rows_have_the_derived_value() {
    for level in LEVELS {
        let f = Fixture::new(OWNED).await;
        let client = f.db.client(APP_OWNER).await;
        client.batch_execute(&format!("begin isolation level {level}")).await.expect("begins");
        let sink = client.copy_in("copy public.kids (id, parent_id, owner) from stdin").await.expect("copies");
        let mut sink = std::pin::pin!(sink);
        let rows = &b"10\t1\tspoofed\n11\t2\t\\N\n12\t3\tspoofed\n"[..];
        futures_util::SinkExt::send(&mut sink, rows).await.expect("is sent");
        assert_eq!(sink.finish().await.expect("is taken"), 3);
        client.batch_execute("commit").await.expect("commits");
        f.assert_no_drift(level).await;
    }
}
