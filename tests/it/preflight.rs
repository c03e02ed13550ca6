//! Preflight: each defect is found, with count, keys and advice; and where there is none, nothing is found.

use std::process::Command;
use std::time::Duration;

use backfilld::demo::sample::{APP_OWNER, DAEMON};
use backfilld::job::JobSpec;
use backfilld::job::spec::{PolicyCommand, TriggerMode};
use backfilld::ledger;
use backfilld::preflight::{self, CATALOGUE, Check, PreflightOptions, Report, Status};
use tokio_postgres::Client;

use crate::support::{Template, TestDb, server, wait_until};

fn shipped() -> JobSpec {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs/messages_auth_user_id");
    backfilld::job::load(&dir).expect("loads")
}

fn job(text: &str) -> JobSpec {
    let no_file = |name: &str| Err(backfilld::Error::input(format!("no {name}")));
    backfilld::job::load::parse(text, "job.toml", no_file).unwrap_or_else(|e| panic!("{}", e.render()))
}

/// A database with sample rows in which the shipped job has nothing to complain about.
async fn clean_db() -> TestDb {
    let db = TestDb::new(Template::Rows(200)).await;
    plant(&db, "alter table public.conversations alter column auth_user_id set not null").await;
    db
}

/// Runs statements as superuser, past triggers and foreign keys.
async fn plant(db: &TestDb, sql: &str) {
    let admin = db.admin().await;
    let sql = format!("set application_name = 'psql'; set session_replication_role = replica; {sql}");
    admin.batch_execute(&sql).await.unwrap_or_else(|e| panic!("{sql}: {}", backfilld::Error::from(e)));
}

async fn run_as(client: &Client, spec: &JobSpec) -> Report {
    preflight::run(client, spec, &PreflightOptions::default()).await.expect("preflight never raises")
}

async fn report(db: &TestDb, spec: &JobSpec) -> Report {
    run_as(&db.client(DAEMON).await, spec).await
}

#[track_caller]
fn expect(report: &Report, name: &str, status: Status, part: &str) -> Check {
    let check = report.check(name).unwrap_or_else(|| panic!("no check {name}")).clone();
    assert_eq!(check.status, status, "{check:#?}");
    assert!(check.summary.contains(part), "{part:?} is not in {check:#?}");
    if status != Status::Pass && status != Status::Skip {
        assert!(check.hint.is_some(), "no hint: {check:#?}");
    }
    check
}

/// Slots belong to the whole server, and other tests make some. Before 15 nobody but a superuser may set
/// session_replication_role.
fn beyond_our_power(report: &Report, check: &Check) -> bool {
    check.name == "replication_slots" || check.name == "privilege:replica" && report.server.version_num < 150_000
}

#[track_caller]
fn only(report: &Report, wanted: &[(&str, Status)]) {
    let found: Vec<(&str, Status)> = report
        .checks
        .iter()
        .filter(|c| matches!(c.status, Status::Warn | Status::Fail) && !beyond_our_power(report, c))
        .map(|c| (c.name, c.status))
        .collect();
    assert_eq!(found, wanted, "{}", report.table(100));
}

#[tokio::test]
async fn a_clean_application_has_no_finding_and_every_check_is_made_once() {
    let db = clean_db().await;
    let r = report(&db, &shipped()).await;
    only(&r, &[]);
    let names: Vec<&str> = r.checks.iter().map(|c| c.name).collect();
    assert_eq!(names, CATALOGUE.iter().map(|c| c.0).collect::<Vec<_>>());
    assert_eq!(r.count(Status::Skip), 1, "{}", r.table(80));
    assert_eq!(expect(&r, "total_rows", Status::Pass, "200 rows").count, Some(200));
    assert_eq!(expect(&r, "policies_before", Status::Pass, "exactly the 4").details.len(), 4);
    assert!(r.grants.is_empty(), "{:?}", r.grants);
    let estimate = r.estimate.clone().expect("measured");
    assert!(estimate.rows_counted && estimate.rows == 200 && estimate.seconds_low > 0.0, "{estimate:?}");
    assert!(r.table(80).lines().all(|l| l.chars().count() <= 80), "{}", r.table(80));
    assert_eq!(r.json()["passed"], r.failures().is_empty());
}

#[tokio::test]
async fn a_nullable_source_needs_consent() {
    let db = TestDb::new(Template::Rows(200)).await;
    let mut spec = shipped();
    spec.side_effects.source_may_lack_value = false;
    let check =
        expect(&report(&db, &spec).await, "source_nullable", Status::Fail, "c.auth_user_id may be NULL (23502)");
    assert!(check.hint.expect("hint").contains("alter column \"auth_user_id\" set not null"));
    spec.side_effects.source_may_lack_value = true;
    let r = report(&db, &spec).await;
    only(&r, &[("source_nullable", Status::Warn)]);
    plant(&db, "alter table public.conversations drop constraint conversations_auth_user_id_fkey").await;
    expect(&report(&db, &spec).await, "source_nullable", Status::Warn, "need not exist in auth.users (23503)");
}

#[tokio::test]
async fn rows_that_cannot_be_filled_are_counted_with_their_keys() {
    let db = TestDb::new(Template::Rows(200)).await;
    plant(
        &db,
        "alter table public.messages alter column conversation_id drop not null;
         create temporary table m as select id, row_number() over (order by id) as n from public.messages;
         update public.messages set conversation_id = null where id in (select id from m where n <= 2);
         update public.messages set conversation_id = gen_random_uuid() where id in (select id from m where n in (3, 4, 5));
         -- One conversation without owner that has messages, one that has none.
         update public.conversations set auth_user_id = null
           where id = (select conversation_id from public.messages join m using (id) where n = 6);
         insert into public.conversations (id, user_id) select '00000000-0000-4000-8000-000000000001', id from public.users limit 1;
         update public.conversations set auth_user_id = '00000000-0000-4000-8000-00000000000f'
           where id = (select max(conversation_id::text)::uuid from public.messages where conversation_id in
                       (select id from public.conversations where auth_user_id is not null));",
    )
    .await;
    let r = report(&db, &shipped()).await;
    let null = expect(&r, "reference_null", Status::Fail, "2 rows of public.messages without conversation_id");
    assert_eq!((null.count, null.samples.len()), (Some(2), 2));
    assert!(null.samples.iter().all(|s| uuid::Uuid::parse_str(s).is_ok()), "keys: {:?}", null.samples);
    let orphans = expect(&r, "orphans", Status::Fail, "3 rows");
    assert_eq!((orphans.count, orphans.samples.len()), (Some(3), 3));
    let nulls = expect(&r, "source_nulls", Status::Fail, "2 rows of public.conversations give no value");
    assert!(nulls.summary.contains("target rows hang on them"), "{nulls:?}");
    assert!(nulls.samples.contains(&"00000000-0000-4000-8000-000000000001".to_owned()));
    assert_eq!(expect(&r, "source_references", Status::Fail, "auth.users does not have").count, Some(1));
    let paths = expect(&r, "paths_agree", Status::Fail, "by conversations.user_id -> users.auth_user_id");
    assert!(paths.count > Some(0) && !paths.samples.is_empty());

    // Without messages on it, a conversation without owner is a matter of consent.
    let db = TestDb::new(Template::Rows(200)).await;
    plant(&db, "insert into public.conversations (user_id) select id from public.users limit 1").await;
    let mut spec = shipped();
    spec.side_effects.source_may_lack_value = false;
    expect(&report(&db, &spec).await, "source_nulls", Status::Fail, "none has target rows");
    spec.side_effects.source_may_lack_value = true;
    expect(&report(&db, &spec).await, "source_nulls", Status::Warn, "1 rows");
}

#[tokio::test]
async fn an_empty_or_implausible_table_is_noticed() {
    let db = TestDb::new(Template::Schema).await;
    expect(&report(&db, &shipped()).await, "total_rows", Status::Warn, "is empty");
    let db = clean_db().await;
    plant(&db, "update pg_class set reltuples = 100000 where oid = 'public.messages'::regclass").await;
    expect(&report(&db, &shipped()).await, "total_rows", Status::Warn, "statistics say about 100000");
}

#[tokio::test]
async fn small_chunks_count_every_row_once_and_a_sample_says_that_it_is_one() {
    let db = TestDb::new(Template::Rows(3000)).await;
    let mut spec = shipped();
    spec.verification.chunk_pages = 1;
    let client = db.client(DAEMON).await;
    let r = run_as(&client, &spec).await;
    assert_eq!(r.check("total_rows").and_then(|c| c.count), Some(3000));
    let options = PreflightOptions { deep: false, ..Default::default() };
    let r = preflight::run(&client, &spec, &options).await.expect("runs");
    expect(&r, "orphans", Status::Pass, "% of the table: a sample");
    expect(&r, "total_rows", Status::Pass, "about 3000 rows, not deep");
}

#[tokio::test]
async fn a_column_that_is_there_must_be_fit_to_be_filled() {
    let db = clean_db().await;
    let column = |sql: &str| format!("alter table public.messages drop column if exists auth_user_id; {sql}");
    let add = "alter table public.messages add column auth_user_id";
    plant(&db, &column(&format!("{add} text"))).await;
    expect(&report(&db, &shipped()).await, "existing_column", Status::Fail, "with type text");
    plant(&db, &column(&format!("{add} uuid not null default gen_random_uuid()"))).await;
    expect(&report(&db, &shipped()).await, "existing_column", Status::Fail, "NOT NULL with a default");
    plant(&db, &column(&format!("{add} uuid; update public.messages set auth_user_id = gen_random_uuid()"))).await;
    expect(&report(&db, &shipped()).await, "existing_column", Status::Fail, "200 rows hold another auth_user_id");
    let right = "update public.messages m set auth_user_id = c.auth_user_id from public.conversations c
                 where c.id = m.conversation_id";
    plant(&db, &column(&format!("{add} uuid; {right}"))).await;
    expect(
        &report(&db, &shipped()).await,
        "existing_column",
        Status::Warn,
        "200 rows have a value in auth_user_id already",
    );
    plant(&db, &column(&format!("{add} uuid"))).await;
    expect(&report(&db, &shipped()).await, "existing_column", Status::Pass, "there, empty and nullable");
    plant(&db, &column("create domain public.owner as uuid; create domain public.some_owner as public.owner check (value <> '00000000-0000-0000-0000-000000000000')")).await;
    let of = |name: &str| {
        let mut spec = shipped();
        spec.columns[0].sql_type = Some(name.into());
        spec
    };
    expect(&report(&db, &of("public.owner")).await, "existing_column", Status::Pass, "new");
    let says = "is a domain with constraints, and to add such a column rewrites the table";
    expect(&report(&db, &of("public.some_owner")).await, "existing_column", Status::Fail, says);
}

#[tokio::test]
async fn tables_that_triggers_cannot_guard_are_refused() {
    let db = clean_db().await;
    plant(&db, "create table public.base (); alter table public.messages inherit public.base").await;
    expect(&report(&db, &shipped()).await, "table_kind", Status::Warn, "public.messages inherits from another table");
    plant(&db, "create table public.archive () inherits (public.messages)").await;
    expect(&report(&db, &shipped()).await, "job", Status::Fail, "other tables inherit from public.messages");
}

#[tokio::test]
async fn what_the_job_will_run_is_compiled_now() {
    let db = clean_db().await;
    let mut spec = shipped();
    let policies = spec.policies.as_mut().expect("policies");
    policies.create[0].using = Some("auth_user_id = uid()".into());
    policies.create[1].check = Some("role".into());
    spec.indexes[0].predicate = Some("no_such_column > 1".into());
    spec.indexes[0].columns.push("metadata".parse().unwrap());
    let r = report(&db, &spec).await;
    let check = expect(
        &r,
        "expressions",
        Status::Fail,
        "policies.create[0].using: function uid() does not exist (SQLSTATE 42883)",
    );
    assert!(check.summary.contains("policies.create[1].check is text, not boolean"), "{check:?}");
    assert!(check.summary.contains("indexes[0].where"), "{check:?}");
    assert_eq!(check.count, Some(3));

    let mut spec = shipped();
    spec.foreign_keys[0].referenced_columns = vec!["email".parse().unwrap()];
    spec.indexes[0].method = "gin".parse().unwrap();
    let r = report(&db, &spec).await;
    let check = expect(&r, "constraints", Status::Fail, "(email) is not a unique key of auth.users");
    assert!(check.summary.contains("type uuid has no default operator class for gin"), "{check:?}");
    spec.foreign_keys[0].references = "auth.nobody".parse().unwrap();
    expect(&report(&db, &spec).await, "constraints", Status::Fail, "table auth.nobody does not exist");
    let mut spec = shipped();
    spec.indexes.clear();
    expect(&report(&db, &spec).await, "constraints", Status::Warn, "no index on (auth_user_id)");
}

#[tokio::test]
async fn the_policies_must_be_exactly_those_of_the_job() {
    let db = clean_db().await;
    plant(
        &db,
        "create policy \"support sees all\" on public.messages for select using (true);
         drop policy \"Users can delete messages from their conversations\" on public.messages",
    )
    .await;
    let check =
        expect(&report(&db, &shipped()).await, "policies_before", Status::Fail, "\"support sees all\" is on the table");
    assert!(check.summary.contains("delete messages from their conversations\" is in the job and not on the table"));
    plant(&db, "alter table public.messages disable row level security").await;
    expect(&report(&db, &shipped()).await, "policies_before", Status::Fail, "row level security is not enabled");
}

#[tokio::test]
async fn slow_and_wide_policies_are_remarked() {
    let db = clean_db().await;
    let mut spec = shipped();
    let policies = spec.policies.as_mut().expect("policies");
    policies.create[0].using = Some("auth_user_id = auth.uid()".into());
    policies.create[0].roles = vec!["public".parse().unwrap()];
    policies.create[3].command = PolicyCommand::Select;
    spec.indexes[0].columns = vec!["created_at".parse().unwrap()];
    let check = expect(&report(&db, &spec).await, "policy_lint", Status::Warn, "calls auth.uid() for every row");
    for part in
        ["is for public", "no permissive policy for delete", "are both permissive for select", "no index of the job"]
    {
        assert!(check.summary.contains(part), "{part}: {check:?}");
    }
}

#[tokio::test]
async fn a_function_must_be_there_and_keep_its_signature() {
    let db = clean_db().await;
    let mut spec = shipped();
    spec.functions[0].signature = "public.add_message(uuid, text)".into();
    let check = expect(&report(&db, &spec).await, "functions_before", Status::Fail, "there is no function");
    assert!(check.hint.expect("hint").contains("p_conversation_id uuid, p_role text"));
    let with = |from: &str, to: &str| {
        let mut spec = shipped();
        spec.functions[0].statements[0] = spec.functions[0].statements[0].replacen(from, to, 1);
        spec
    };
    let cases = [
        ("p_role text", "p_kind text", "parameter 2 is named \"p_role\", in add_message.sql \"p_kind\""),
        (" default '{}'", "", "has 2 defaults, in add_message.sql 1"),
        ("returns uuid", "returns text", "returns uuid, in add_message.sql text"),
        ("p_role text", "p_role public.nothing", "unknown type \"public.nothing\""),
        ("p_metadata jsonb", "p_metadata json", "another overload"),
        ("public.add_message(", "public.other(", "also makes public.other"),
    ];
    for (from, to, part) in cases {
        expect(&report(&db, &with(from, to)).await, "functions_before", Status::Fail, part);
    }
    let unfixed = with("set search_path = pg_catalog, pg_temp", "");
    expect(&report(&db, &unfixed).await, "functions_before", Status::Warn, "security definer without set search_path");
    let open = with("pg_catalog, pg_temp", "public");
    expect(&report(&db, &open).await, "functions_before", Status::Warn, "does not end in pg_temp");
}

#[tokio::test]
async fn an_application_past_the_policies_is_named() {
    let db = clean_db().await;
    let api = db.client(APP_OWNER).await;
    api.batch_execute("set application_name = 'api'").await.expect("sets");
    expect(&report(&db, &shipped()).await, "app_bypass", Status::Warn, "app_owner (owner, api)");
    drop(api);
    let client = db.client(DAEMON).await;
    wait_until("the application has left", async || {
        run_as(&client, &shipped()).await.check("app_bypass").is_some_and(|c| c.status == Status::Pass)
    })
    .await;
}

#[tokio::test]
async fn column_grants_and_forced_policies_are_noticed() {
    let db = clean_db().await;
    plant(
        &db,
        "revoke select on public.messages from anon; grant select (id, role) on public.messages to anon;
         alter table public.conversations force row level security",
    )
    .await;
    let r = report(&db, &shipped()).await;
    let check = expect(&r, "column_grants", Status::Warn, "to anon");
    assert!(check.hint.expect("hint").contains("grant select (\"auth_user_id\") on \"public\".\"messages\" to anon"));
    let check = expect(&r, "rls_sync_functions", Status::Fail, "public.conversations (forced)");
    assert_eq!(check.samples, ["public.conversations"]);
    expect(&r, "rls_visibility", Status::Pass, "no policy applies to backfilld");
}

#[tokio::test]
async fn a_login_that_may_only_read_gets_a_report_and_the_grants_that_make_it_pass() {
    let db = clean_db().await;
    let role = format!("reader_{}", db.name());
    let password = server().cluster.password();
    plant(
        &db,
        &format!(
            "create role {role} login password '{password}'; grant usage on schema auth, public to {role};
             grant select on public.messages, public.conversations, public.users, auth.users to {role};
             alter role {role} set default_transaction_read_only = on;
             revoke execute on function auth.uid() from public; revoke create on schema public from public;
             revoke usage on schema auth from app_owner"
        ),
    )
    .await;
    let client = db.client(&role).await;
    let mut last = run_as(&client, &shipped()).await;
    expect(&last, "rls_visibility", Status::Fail, &format!("policies apply to {role}"));
    expect(&last, "privilege:rows", Status::Fail, "no UPDATE on public.messages");
    expect(&last, "read_only", Status::Warn, "default_transaction_read_only is on");
    // Who cannot read does not get to see the rest: that takes a second look, and what a grant uncovers a third one.
    let mut refused: Vec<&str> = Vec::new();
    for _ in 0..3 {
        let bad = last.checks.iter().filter(|c| matches!(c.status, Status::Warn | Status::Fail));
        refused.extend(bad.map(|c| c.name).filter(|n| n.starts_with("privilege:")));
        if last.grants.is_empty() {
            break;
        }
        let script = last.grants.iter().map(|g| format!("{g};\n")).collect::<String>();
        assert!(last.table(80).contains(&script), "{}", last.table(80));
        plant(&db, &script).await;
        last = run_as(&client, &shipped()).await;
    }
    drop(client);
    plant(&db, &format!("reassign owned by {role} to postgres; drop owned by {role}; drop role {role}")).await;
    only(&last, &[("read_only", Status::Warn)]);
    assert!(last.grants.is_empty(), "{:?}", last.grants);
    for name in ["owner", "sources", "rows", "references", "schemas", "index", "functions", "policies", "monitor"] {
        assert!(refused.contains(&format!("privilege:{name}").as_str()), "{name} is not in {refused:?}");
    }
}

#[tokio::test]
async fn names_that_are_taken_are_told_apart_from_leftovers() {
    let db = clean_db().await;
    plant(
        &db,
        "create trigger zzz_backfilld_messages_auth_user_id_ins before insert on public.messages
           for each row execute function public.touch_updated_at();
         create table public.idx_messages_auth_user_id ();
         alter table public.messages add constraint messages_auth_user_id_fkey check (true);
         create policy \"Users can view own messages\" on public.messages for select using (false)",
    )
    .await;
    let check = expect(
        &report(&db, &shipped()).await,
        "names",
        Status::Fail,
        "a trigger zzz_backfilld_messages_auth_user_id_ins that is not ours",
    );
    for part in [
        "idx_messages_auth_user_id is another relation",
        "a constraint of another kind",
        "a policy \"Users can view own messages\"",
    ] {
        assert!(check.summary.contains(part), "{part}: {check:?}");
    }
    let mut spec = shipped();
    spec.name = "a".repeat(40);
    expect(&report(&db, &spec).await, "names", Status::Fail, "has 65 bytes, of which the server keeps 63");
}

#[tokio::test]
async fn invalid_indexes_are_named() {
    let db = clean_db().await;
    plant(
        &db,
        "alter table public.messages add column auth_user_id uuid;
         create index idx_messages_auth_user_id on public.messages (auth_user_id);
         create unique index other on public.messages (id);
         set allow_system_table_mods = on;
         update pg_index set indisvalid = false where indexrelid in ('idx_messages_auth_user_id'::regclass, 'other'::regclass)",
    )
    .await;
    let check = expect(
        &report(&db, &shipped()).await,
        "invalid_indexes",
        Status::Warn,
        "an invalid leftover with a name of this job",
    );
    assert_eq!(check.count, Some(2));
    assert!(check.summary.contains("still rejects duplicates"), "{check:?}");
}

#[tokio::test]
async fn every_side_effect_needs_an_answer() {
    let db = clean_db().await;
    plant(
        &db,
        "create trigger zzzz_last before insert or update on public.messages
           for each row execute function public.touch_updated_at();
         alter table public.messages enable always trigger messages_touch",
    )
    .await;
    let mut spec = shipped();
    let r = report(&db, &spec).await;
    let check = expect(&r, "trigger_order", Status::Fail, "zzzz_last");
    assert!(check.hint.expect("hint").contains("rename to \"a_zzzz_last\""));
    expect(&r, "side_effects", Status::Fail, "messages_touch fire(s) in replica mode");
    spec.side_effects.may_fire = vec!["messages_touch".parse().unwrap()];
    let check = expect(&report(&db, &spec).await, "side_effects", Status::Pass, "batches skip 2 UPDATE trigger(s)");
    assert_eq!(check.details.len(), 3);
    spec.side_effects.triggers = None;
    let check = expect(
        &report(&db, &spec).await,
        "side_effects",
        Status::Fail,
        "messages_broadcast, messages_touch, zzzz_last",
    );
    assert_eq!(check.count, Some(3));
    spec.side_effects.triggers = Some(TriggerMode::Fire);
    let r = report(&db, &spec).await;
    expect(&r, "side_effects", Status::Pass, "lets batches fire");
    expect(&r, "privilege:replica", Status::Skip, "");

    plant(&db, "create rule hush as on update to public.messages do instead nothing").await;
    expect(&report(&db, &spec).await, "rules", Status::Fail, "rule hush on UPDATE, INSTEAD");
}

#[tokio::test]
async fn every_publication_needs_an_answer() {
    let db = clean_db().await;
    plant(&db, "create publication one for table public.messages; create publication everything for all tables").await;
    let mut spec = shipped();
    let check = expect(&report(&db, &spec).await, "publications", Status::Fail, "publication one would carry");
    assert_eq!(check.count, Some(2));
    assert_eq!(check.details, ["everything (all tables)", "one"]);
    spec.side_effects.publications = vec!["one".parse().unwrap(), "everything".parse().unwrap()];
    expect(&report(&db, &spec).await, "publications", Status::Pass, "accepts 2");
    plant(&db, "alter table public.messages replica identity nothing").await;
    expect(&report(&db, &spec).await, "publications", Status::Fail, "no replica identity");
    plant(&db, "drop publication one, everything").await;
    expect(&report(&db, &spec).await, "publications", Status::Warn, "does not publish the target");
}

#[tokio::test]
async fn propagation_without_index_and_a_large_fan_out_are_said() {
    let db = clean_db().await;
    plant(&db, "drop index public.messages_conversation_id_created_at_idx").await;
    let check = expect(
        &report(&db, &shipped()).await,
        "propagation_index",
        Status::Warn,
        "no index of public.messages leads with (conversation_id)",
    );
    assert!(
        check
            .hint
            .expect("hint")
            .contains("create index concurrently on \"public\".\"messages\" (\"conversation_id\")")
    );
    plant(
        &db,
        "insert into public.messages (conversation_id, role, content)
           select (select id from public.conversations limit 1), 'user', 'x' from generate_series(1, 11000);
         analyze public.messages",
    )
    .await;
    let r = report(&db, &shipped()).await;
    expect(&r, "propagation_index", Status::Fail, "scans");
    let check = expect(&r, "largest_fanout", Status::Warn, "one row of public.conversations has 11");
    assert_eq!(check.samples.len(), 1);
    let client = db.client(DAEMON).await;
    let options = PreflightOptions { deep: false, ..Default::default() };
    let r = preflight::run(&client, &shipped(), &options).await.expect("runs");
    expect(&r, "largest_fanout", Status::Warn, "has about 1");
}

#[tokio::test]
async fn stricter_isolation_and_short_timeouts_of_roles_are_noticed() {
    let db = clean_db().await;
    let name = db.name();
    plant(
        &db,
        &format!(
            "alter role authenticator in database {name} set default_transaction_isolation = 'repeatable read';
             alter role anon in database {name} set lock_timeout = '50ms';
             alter database {name} set deadlock_timeout = '20ms'"
        ),
    )
    .await;
    let mut spec = shipped();
    let r = report(&db, &spec).await;
    expect(&r, "isolation", Status::Fail, &format!("role authenticator in {name}: repeatable read"));
    let check = expect(&r, "lock_timeouts", Status::Warn, "lock_timeout = 50ms");
    assert!(check.summary.contains("deadlock_timeout is 20 ms"), "{check:?}");
    spec.side_effects.strict_isolation_raises = true;
    expect(&report(&db, &spec).await, "isolation", Status::Warn, "repeatable read");
}

#[tokio::test]
async fn old_and_prepared_transactions_are_noticed() {
    let db = clean_db().await;
    let idle = db.session("idle", APP_OWNER).await;
    idle.run("set application_name = 'report'; begin; select 1").await;
    let client = db.client(DAEMON).await;
    let options = PreflightOptions { long_transaction: Duration::from_millis(1), ..Default::default() };
    let r = preflight::run(&client, &shipped(), &options).await.expect("runs");
    let check = expect(&r, "long_transactions", Status::Warn, "older than");
    assert!(check.samples.iter().any(|s| s.starts_with(&format!("pid {} app_owner report", idle.pid()))), "{check:?}");
    idle.run("commit").await;

    let gid = format!("gid_{}", db.name());
    plant(&db, &format!("begin; lock table public.messages in share mode; prepare transaction '{gid}'")).await;
    let r = report(&db, &shipped()).await;
    // Before anything can fail: it would outlive the test, and its locks the server.
    db.admin().await.batch_execute(&format!("rollback prepared '{gid}'")).await.expect("rolls back");
    let check = expect(&r, "prepared_transactions", Status::Fail, "holds locks on public.messages");
    assert!(check.samples.contains(&format!("{gid:?}")), "{check:?}");
}

#[tokio::test]
async fn replication_slots_that_lag_are_noticed() {
    let db = clean_db().await;
    let admin = db.admin().await;
    let slot = format!("slot_{}", db.name());
    let create = format!("select pg_create_physical_replication_slot('{slot}')");
    admin.query(&create, &[]).await.expect("slot");
    let r = report(&db, &shipped()).await;
    admin.query(&format!("select pg_drop_replication_slot('{slot}')"), &[]).await.expect("drops");
    expect(&r, "replication_slots", Status::Warn, &format!("slot {slot} is inactive"));
}

#[tokio::test]
async fn two_sessions_tell_a_transaction_pooler_from_a_direct_connection() {
    let db = clean_db().await;
    let (one, two) = (db.client(DAEMON).await, db.client(DAEMON).await);
    let options = PreflightOptions { other: Some(&two), ..Default::default() };
    let r = preflight::run(&one, &shipped(), &options).await.expect("runs");
    assert_eq!(
        expect(&r, "pooler", Status::Pass, "keeps its server process").summary,
        "the session keeps its server process"
    );
    // What a pooler would do: the same server process for both.
    let options = PreflightOptions { other: Some(&one), ..Default::default() };
    let r = preflight::run(&one, &shipped(), &options).await.expect("runs");
    expect(&r, "pooler", Status::Fail, "two sessions share one server process");
}

#[tokio::test]
async fn a_dedicated_login_must_be_used_by_nobody_else() {
    let db = clean_db().await;
    let role = format!("own_{}", db.name());
    let password = server().cluster.password();
    plant(
        &db,
        &format!("create role {role} login bypassrls password '{password}'; grant app_owner, backfilld to {role}"),
    )
    .await;
    let (client, stranger) = (db.client(&role).await, db.client(&role).await);
    let options = PreflightOptions { dedicated_login: true, ..Default::default() };
    stranger.batch_execute("set application_name = 'orm'").await.expect("sets");
    let found = preflight::run(&client, &shipped(), &options).await.expect("runs");
    stranger.batch_execute("set application_name = 'backfilld/other'").await.expect("sets");
    let fine = preflight::run(&client, &shipped(), &options).await.expect("runs");
    drop((client, stranger));
    plant(&db, &format!("drop role {role}")).await;
    let check = expect(&found, "dedicated_login", Status::Fail, "others are logged in");
    assert!(check.samples[0].starts_with("orm (pid "), "{check:?}");
    expect(&fine, "dedicated_login", Status::Pass, "nobody else");
}

#[tokio::test]
async fn a_job_that_does_not_resolve_is_one_failure_and_the_server_is_checked_all_the_same() {
    let db = clean_db().await;
    let mut spec = shipped();
    spec.target.table = "public.no_such_table".parse().unwrap();
    let r = report(&db, &spec).await;
    only(&r, &[("job", Status::Fail)]);
    expect(&r, "job", Status::Fail, "target.table: table public.no_such_table does not exist in database");
    expect(&r, "xid_age", Status::Pass, "");
    expect(&r, "orphans", Status::Skip, "see job");
    assert!(r.table(80).contains("checks need the job's tables"), "{}", r.table(80));
    let mut spec = shipped();
    spec.columns[0].value = "c.nobody".into();
    expect(&report(&db, &spec).await, "job", Status::Fail, "nobody");
}

#[tokio::test]
async fn a_started_job_is_recognised_and_a_changed_one_refused() {
    let db = clean_db().await;
    let mut client = db.client(DAEMON).await;
    let mut spec = shipped();
    ledger::migrate::migrate(&mut client).await.expect("migrates");
    expect(&run_as(&client, &spec).await, "job_state", Status::Pass, "not started yet");
    ledger::job::register(&client, &spec).await.expect("registers");
    expect(&run_as(&client, &spec).await, "job_state", Status::Pass, "is in phase preflight, status running");
    spec.columns[0].not_null = false;
    expect(&run_as(&client, &spec).await, "job_state", Status::Fail, "columns[0].not_null: was true, is false");
    spec.name = "another".into();
    expect(
        &run_as(&client, &spec).await,
        "job_state",
        Status::Warn,
        "other jobs work on this table: messages_auth_user_id",
    );
    client.batch_execute("update backfilld.job set status = 'done', phase = 'done'").await.expect("updates");
    expect(&run_as(&client, &shipped()).await, "job_state", Status::Warn, "done already");
    plant(&db, "drop table backfilld.schema_version cascade").await;
    expect(&run_as(&client, &shipped()).await, "job_state", Status::Fail, "is not ours");
}

#[tokio::test]
async fn a_text_key_whose_collation_has_changed_is_refused() {
    let db = TestDb::new(Template::Empty).await;
    let admin = db.admin().await;
    if admin.batch_execute("create collation public.words (provider = icu, locale = 'und')").await.is_err() {
        return; // a server without ICU
    }
    plant(
        &db,
        "create table public.items (code text collate public.words primary key, owner text);
         alter table public.items owner to app_owner",
    )
    .await;
    let spec =
        job("name = 'copy'\ntarget.table = 'public.items'\n[[columns]]\nname = 'lowered'\nvalue = 'lower(t.owner)'");
    expect(&report(&db, &spec).await, "key_order", Status::Pass, "has its collation's current version");
    plant(
        &db,
        "set allow_system_table_mods = on; update pg_collation set collversion = 'older' where collname = 'words'",
    )
    .await;
    let r = report(&db, &spec).await;
    expect(&r, "key_order", Status::Fail, "key column code: collation words was version older");
    expect(&r, "largest_fanout", Status::Skip, "from the target row itself");
}

/// Mixed case, a composite key, two hops of which one is a LEFT JOIN, an expression over target and sources.
const STRANGE: &str = r#"
    name = "strange"
    [target]
    table = '"App"."Line ""Items"""'
    [[source]]
    alias = "o"
    table = '"App"."Orders"'
    on = { "Id" = 't."OrderId"' }
    [[source]]
    alias = "a"
    table = '"App".accounts'
    on = { id = "o.account" }
    join = "left"
    [[columns]]
    name = "Tenant Id"
    value = 'coalesce(a.tenant, t."Fallback", o.tenant)'
    not_null = true
    [[foreign_keys]]
    name = "Tenant fk"
    columns = ["Tenant Id"]
    references = '"App".tenants'
    referenced_columns = ["id"]
    [[indexes]]
    name = "Tenant idx"
    columns = ["Tenant Id"]
    [[agree]]
    name = "orders' tenant"
    source = [{ alias = "o", table = '"App"."Orders"', on = { "Id" = 't."OrderId"' } }]
    value = "o.tenant"
"#;

const STRANGE_TABLES: &str = r#"
    create schema "App" authorization app_owner; set role app_owner;
    create table "App".tenants (id int primary key);
    create table "App".accounts (id int primary key, tenant int references "App".tenants);
    create table "App"."Orders" ("Id" int primary key, account int, tenant int);
    create table "App"."Line ""Items""" (
      "OrderId" int not null, n int, "Fallback" int, primary key ("OrderId", n));
    create index on "App"."Orders" (account);
    insert into "App".tenants values (1), (2);
    insert into "App".accounts values (1, 1), (2, null);
    insert into "App"."Orders" values (1, 1, 1), (2, 2, 2), (3, null, null);
    insert into "App"."Line ""Items""" values (1, 1, null), (2, 1, null), (3, 1, null), (3, 2, 9), (4, 1, null);
    reset role;
"#;

#[tokio::test]
async fn other_shapes_of_jobs_are_checked_too() {
    let db = TestDb::new(Template::Empty).await;
    plant(&db, STRANGE_TABLES).await;
    let r = report(&db, &job(STRANGE)).await;
    assert_eq!(expect(&r, "orphans", Status::Fail, "1 rows").samples, ["(4, 1)"]);
    assert_eq!(expect(&r, "source_nulls", Status::Fail, "whose value would be NULL").samples, ["(3, 1)"]);
    assert_eq!(expect(&r, "source_references", Status::Fail, "does not have").samples, ["(3, 2)"]);
    assert_eq!(expect(&r, "paths_agree", Status::Fail, "by orders' tenant").samples, ["(3, 2)"]);
    expect(&r, "propagation_index", Status::Pass, "");
    expect(&r, "largest_fanout", Status::Pass, "2 target rows");
    expect(&r, "policies_before", Status::Skip, "replaces no policy");
    expect(&r, "source_nullable", Status::Fail, "may be NULL");
    expect(&r, "rls_visibility", Status::Pass, "");
    let sql = script(&db, &job(STRANGE)).await;
    if let Some(out) = psql(&db, &sql) {
        assert_eq!(out.matches("FAIL").count(), 3, "{out}");
        assert!(out.contains("All checks complete"), "{out}");
    }
}

async fn script(db: &TestDb, spec: &JobSpec) -> String {
    let facts = backfilld::plan::Facts::read(&db.client(DAEMON).await, spec, false).await.expect("resolves");
    preflight::validation_queries(spec, &facts.shape)
}

/// What psql prints; `None` where the server came without it.
fn psql(db: &TestDb, sql: &str) -> Option<String> {
    let program = server().cluster.bin().join("psql");
    if !program.is_file() {
        return None;
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), sql).expect("writes");
    let out = Command::new(program).args(["-X", "-d", &db.url(DAEMON), "-f"]).arg(file.path()).output().expect("runs");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text}\n{}", String::from_utf8_lossy(&out.stderr));
    Some(text)
}

#[tokio::test]
async fn psql_runs_the_shipped_validation_queries() {
    let db = clean_db().await;
    let shipped_file = include_str!("../../deploy/jobs/messages_auth_user_id/validation_queries.sql");
    assert_eq!(script(&db, &shipped()).await, shipped_file, "the catalog gives the shape that the file was made from");
    let Some(out) = psql(&db, shipped_file) else { return };
    assert!(!out.contains("FAIL") && out.matches("| PASS").count() == 11, "{out}");
    plant(&db, "update public.messages set conversation_id = gen_random_uuid() where ctid = '(0,1)'").await;
    let out = psql(&db, shipped_file).expect("psql is there");
    assert!(out.contains("1 | FAIL"), "{out}");
}

#[tokio::test]
async fn of_two_jobs_on_a_table_the_one_that_is_read_from_comes_first() {
    let db = clean_db().await;
    let dir = crate::support::JobDir::with("hold_before = [\"backfill\"]");
    crate::support::Cli::new(&db).run(&["run", "--once", dir.path()]).await.expect(5, "hold point");
    let of = |name: &str, column: &str, value: &str| {
        let mut spec = shipped();
        (spec.name, spec.columns[0].value) = (name.into(), value.into());
        spec.columns[0].name = backfilld::pg::ident::Ident::new(column).expect("a name");
        spec
    };
    let reads = "coalesce(c.auth_user_id, t.auth_user_id)";
    let says = "job messages_auth_user_id fills auth_user_id, which this job reads, and its triggers fire after ours";
    expect(&report(&db, &of("a_reader", "owner", reads)).await, "trigger_order", Status::Fail, says);
    expect(&report(&db, &of("z_reader", "owner", reads)).await, "trigger_order", Status::Pass, "");
    let says =
        "job messages_auth_user_id reads conversation_id, which this job fills, and its triggers fire before ours";
    expect(&report(&db, &of("z_writer", "conversation_id", "c.id")).await, "trigger_order", Status::Fail, says);
    expect(&report(&db, &of("a_writer", "conversation_id", "c.id")).await, "trigger_order", Status::Pass, "");
}

#[tokio::test]
async fn a_role_for_which_other_policies_will_hold_has_to_be_compared() {
    let db = clean_db().await;
    plant(
        &db,
        "drop role if exists partner_api; create role partner_api; grant select on public.messages to partner_api",
    )
    .await;
    let says = "partner_api may use the table, other policies are to hold for it, and [access] does not name it";
    // The old ones are for everybody.
    expect(&report(&db, &shipped()).await, "access", Status::Fail, says);
    plant(&db, "drop owned by partner_api; drop role partner_api").await;
    expect(&report(&db, &shipped()).await, "access", Status::Pass, "");
}
