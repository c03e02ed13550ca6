//! The lint of policies, views and functions: each planted fault is found and told with SQL that mends it, and what the
//! job mends anyway is no warning.

use backfilld::demo::sample::DAEMON;
use backfilld::job::JobSpec;
use backfilld::preflight::{self, Check, PreflightOptions, Status};

use crate::support::{Template, TestDb};

const NEW: [&str; 6] =
    ["policy_lint", "policies_elsewhere", "views", "definer_functions", "column_lists", "unindexed_keys"];

fn shipped() -> JobSpec {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs/messages_auth_user_id");
    backfilld::job::load(&dir).expect("loads")
}

async fn db() -> TestDb {
    TestDb::new(Template::Rows(200)).await
}

async fn plant(db: &TestDb, sql: &str) {
    let done = db.admin().await.batch_execute(sql).await;
    done.unwrap_or_else(|e| panic!("{sql}: {}", backfilld::Error::from(e)));
}

async fn check(db: &TestDb, spec: &JobSpec, name: &str) -> Check {
    let options = PreflightOptions { deep: false, ..Default::default() };
    let report = preflight::run(&db.client(DAEMON).await, spec, &options).await.expect("preflight never raises");
    report.check(name).unwrap_or_else(|| panic!("no check {name}")).clone()
}

#[track_caller]
fn warns(check: &Check, parts: &[&str], fixes: &[&str]) {
    assert_eq!(check.status, Status::Warn, "{check:#?}");
    let hint = check.hint.as_deref().unwrap_or_default();
    for part in parts {
        assert!(check.summary.contains(part), "{part:?} is not in {check:#?}");
    }
    for fix in fixes {
        assert!(hint.contains(fix), "{fix:?} is not in {check:#?}");
    }
}

#[tokio::test]
async fn a_clean_application_has_no_remark_and_what_the_job_mends_is_only_listed() {
    let db = db().await;
    for name in NEW {
        let found = check(&db, &shipped(), name).await;
        assert_eq!(found.status, Status::Pass, "{found:#?}");
    }
    let policies = check(&db, &shipped(), "policy_lint").await;
    assert_eq!(policies.details.len(), 4, "{policies:#?}");
    let line = "\"Users can view messages from their conversations\" calls auth.uid() for every row and is for public; \
                the job replaces it";
    assert!(policies.details.iter().any(|l| l == line), "{policies:#?}");
    let definer = check(&db, &shipped(), "definer_functions").await;
    assert!(definer.details[0].contains("public.add_message") && definer.details[0].ends_with("the job replaces it"));
}

#[tokio::test]
async fn policies_that_stay_are_looked_at_like_new_ones() {
    let db = db().await;
    plant(
        &db,
        "create function public.is_member(uuid) returns boolean language sql stable as 'select true';
         create function public.is_odd(uuid) returns boolean language sql immutable as 'select true';
         create policy slow on public.messages for select using (auth.uid() is not null and public.is_odd(id));
         create policy per_row on public.messages for select to authenticated using (public.is_member(conversation_id));
         create policy fine on public.messages as restrictive for select to public
           using ((select current_setting('app.open', true)) is distinct from 'no')",
    )
    .await;
    let mut spec = shipped();
    spec.policies.as_mut().expect("policies").keep = vec!["slow".into(), "per_row".into(), "fine".into()];
    let found = check(&db, &spec, "policy_lint").await;
    warns(
        &found,
        &[
            "\"slow\" calls auth.uid() for every row",
            "\"slow\" is for public",
            "\"per_row\" calls public.is_member() for every row",
            "\"per_row\" and \"slow\" are both permissive for select",
        ],
        &[
            "alter policy \"slow\" on \"public\".\"messages\" using (",
            "alter policy \"slow\" on \"public\".\"messages\" to anon, authenticated",
            "column in (select it())",
        ],
    );
    assert!(!found.summary.contains("is_odd") && !found.summary.contains("fine"), "{found:#?}");
    // The statement does what it says.
    let hint = found.hint.expect("a hint");
    let fix = hint
        .split("; ")
        .find_map(|h| h.strip_prefix("in (select ...) it is called once per statement: "))
        .expect("SQL");
    plant(&db, fix).await;
    let again = check(&db, &spec, "policy_lint").await;
    assert!(!again.summary.contains("auth.uid()"), "{again:#?}");
}

#[tokio::test]
async fn a_table_without_any_policy_and_policies_without_effect_are_told() {
    let db = db().await;
    let mut spec = shipped();
    spec.policies = None;
    spec.functions.clear();
    assert_eq!(check(&db, &spec, "policy_lint").await.status, Status::Warn, "the old ones stay then");
    plant(&db, "alter table public.messages disable row level security").await;
    warns(
        &check(&db, &spec, "policy_lint").await,
        &["row level security is not enabled"],
        &["alter table \"public\".\"messages\" enable row level security"],
    );
    plant(
        &db,
        "alter table public.messages enable row level security;
         do $$ declare n text; begin
           for n in select polname from pg_policy where polrelid = 'public.messages'::regclass loop
             execute format('drop policy %I on public.messages', n);
           end loop; end $$",
    )
    .await;
    warns(&check(&db, &spec, "policy_lint").await, &["without any policy"], &["disable row level security"]);
}

#[tokio::test]
async fn policies_elsewhere_that_read_the_target_are_told_and_a_circle_is_refused() {
    let db = db().await;
    plant(
        &db,
        "create policy \"seen in \"\"messages\"\"\" on public.users for select to authenticated
           using (exists (select from public.messages m where m.role = display_name))",
    )
    .await;
    let mut spec = shipped();
    warns(
        &check(&db, &spec, "policies_elsewhere").await,
        &["of public.users reads public.messages"],
        &["alter policy \"seen in \"\"messages\"\"\" on \"public\".\"users\""],
    );
    spec.policies.as_mut().expect("policies").create[0].using =
        Some("exists (select from public.users u where u.auth_user_id = messages.auth_user_id)".into());
    let found = check(&db, &spec, "policies_elsewhere").await;
    assert_eq!(found.status, Status::Fail, "{found:#?}");
    assert!(found.hint.expect("a hint").contains("42P17"));
}

#[tokio::test]
async fn views_that_read_past_the_policies_or_would_be_empty_are_told() {
    let db = db().await;
    plant(
        &db,
        "create view public.all_messages as select * from public.messages;
         create view public.newest as select id from public.all_messages;
         create materialized view public.counted as select count(*) from public.messages;
         create view public.poor as select id from public.messages; alter view public.poor owner to anon;
         create view public.rich as select id from public.messages; alter view public.rich owner to authenticated;",
    )
    .await;
    let found = check(&db, &shipped(), "views").await;
    let modern = found.hint.as_deref().is_some_and(|h| h.contains("security_invoker = true"));
    warns(
        &found,
        &[
            "view public.all_messages reads the table with its owner's rights",
            "view public.newest reads",
            "materialized view public.counted holds rows",
            "view public.poor reads as its owner anon, to whom none of the new policies applies",
        ],
        &[],
    );
    assert!(!found.summary.contains("rich"), "{found:#?}");
    if modern {
        plant(
            &db,
            "alter view public.all_messages set (security_invoker = true);
             alter view public.newest set (security_invoker = true);
             alter view public.poor set (security_invoker = true); drop materialized view public.counted",
        )
        .await;
        assert_eq!(check(&db, &shipped(), "views").await.status, Status::Pass);
    }
}

#[tokio::test]
async fn functions_that_are_not_ready_for_a_new_column_or_can_be_hijacked_are_told() {
    let db = db().await;
    plant(
        &db,
        "create function public.purge(uuid) returns void language plpgsql security definer set search_path = public as
           $$ begin delete from messages where id = $1; end $$;
         create function public.dynamic() returns void language plpgsql security definer as
           $$ begin execute 'delete from public.messages'; end $$;
         create function public.other() returns bigint language sql security definer as 'select count(*) from pg_class';
         create function public.listed() returns table (id uuid) language plpgsql as
           $$ begin return query select m.* from public.messages m; end $$;
         create function public.whole() returns setof public.messages language sql as 'select * from public.messages';
         create function public.copied() returns void language sql as 'insert into public.messages select * from public.messages where false'",
    )
    .await;
    let definer = check(&db, &shipped(), "definer_functions").await;
    warns(
        &definer,
        &[
            "public.purge(uuid) is security definer and has a search_path that does not end in pg_temp",
            "public.dynamic()",
        ],
        &[
            "alter routine public.purge(uuid) set search_path = public, pg_temp",
            "alter routine public.dynamic() set search_path = pg_catalog, \"public\", pg_temp",
        ],
    );
    assert!(!definer.summary.contains("other"), "{definer:#?}");
    let lists = check(&db, &shipped(), "column_lists").await;
    warns(
        &lists,
        &["public.listed() selects *", "public.copied() selects *", "public.copied() inserts without a column list"],
        &["(\"id\", \"conversation_id\", "],
    );
    assert!(!lists.summary.contains("whole"), "{lists:#?}");
    plant(
        &db,
        "alter routine public.purge(uuid) set search_path = public, pg_temp;
         alter routine public.dynamic() set search_path = pg_catalog, \"public\", pg_temp",
    )
    .await;
    assert_eq!(check(&db, &shipped(), "definer_functions").await.status, Status::Pass);
}

#[tokio::test]
async fn a_foreign_key_without_index_is_told_unless_the_job_builds_one() {
    let db = db().await;
    plant(
        &db,
        "alter table public.messages add column reply_to uuid references public.messages (id), add column sent_by uuid
           constraint by references auth.users (id)",
    )
    .await;
    let mut spec = shipped();
    spec.indexes[0].columns = vec!["sent_by".parse().expect("a name")];
    let found = check(&db, &spec, "unindexed_keys").await;
    warns(
        &found,
        &["no index of public.messages leads with (reply_to), foreign key messages_reply_to_fkey"],
        &["create index concurrently on \"public\".\"messages\" (\"reply_to\")"],
    );
    assert!(found.details[0].ends_with("the job builds one") && !found.summary.contains("sent_by"), "{found:#?}");
    plant(&db, "create index on public.messages (reply_to)").await;
    assert_eq!(check(&db, &spec, "unindexed_keys").await.status, Status::Pass);
}
