//! Nobody's access changes: each way in which it could is caught, explained, and taken back.

use backfilld::demo::sample::AUTHENTICATOR;
use backfilld::phase::Status;

use crate::support::{Cli, JOB, JobDir, Ledger, Template, TestDb, run_once, wait_until};

const ROWS: u32 = 300;

async fn db() -> (TestDb, Ledger) {
    let db = TestDb::new(Template::Rows(ROWS)).await;
    let ledger = Ledger::new(&db).await;
    (db, ledger)
}

/// The shipped job with few users, so that tests are fast.
fn job() -> JobDir {
    JobDir::shipped()
}

/// Roles and policies that a comparison made and left.
async fn leftovers(ledger: &Ledger) -> i64 {
    ledger
        .number(
            "select (select count(*) from pg_roles where rolname like 'backfilld_probe_' || (select oid from pg_database
                       where datname = current_database()) || '%')
                  + (select count(*) from pg_policy where polname like 'backfilld_probe_%')",
        )
        .await
}

async fn column(ledger: &Ledger, sql: &str) -> Vec<String> {
    ledger.client.query(sql, &[]).await.expect(sql).iter().map(|r| r.get(0)).collect()
}

/// Differences of the newest run, each as `role command attempt effect: cause`.
async fn differences(ledger: &Ledger) -> Vec<String> {
    column(
        ledger,
        "select role || ' ' || command || ' ' || attempt || ' ' || effect || ': ' || cause from backfilld.access_result
         where run = (select max(id) from backfilld.access_run) and verdict = 'different' order by 1",
    )
    .await
}

/// Runs the job, which has to fail in `phase`, and gives its differences.
async fn fails(db: &TestDb, ledger: &Ledger, job: &JobDir, phase: &str) -> Vec<String> {
    let failed = run_once(db, job.spec()).await.expect_err("access differs");
    let all = differences(ledger).await;
    assert!(failed.to_string().contains("access would change in"), "{failed}; {all:?}");
    assert_eq!((ledger.status().await.as_str(), ledger.phase().await.as_str()), ("failed", phase));
    assert_eq!(leftovers(ledger).await, 0, "nothing is left");
    let old = "select count(*) from pg_policy where polname like 'Users can % their conversations'";
    assert_eq!(ledger.number(old).await, 4, "the old policies are in force");
    assert!(!all.is_empty(), "{failed}");
    all
}

/// Starts the job, which `check` lets pass, and makes it wrong meanwhile; had it been so before, `check` would have refused.
async fn comes_up_later(db: &TestDb, ledger: &Ledger, job: &JobDir, sql: &str) {
    let cli = Cli::new(db);
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
    ledger.run(sql).await;
    let checked =
        cli.run(&["check", job.path()]).await.expect(3, "").stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(checked.contains("show rows to several users of authenticated"), "{checked}");
    cli.run(&["cutover", JOB]).await.expect(0, "");
}

#[track_caller]
fn has(all: &[String], parts: &[&str]) {
    assert!(all.iter().any(|d| parts.iter().all(|p| d.contains(p))), "no {parts:?} in {all:#?}");
}

#[tokio::test]
async fn the_shipped_job_changes_nobodys_access_and_says_so() {
    let (db, ledger) = db().await;
    assert_eq!(run_once(&db, JobDir::shipped().spec()).await.expect("done"), Status::Done);
    assert_eq!(differences(&ledger).await, Vec::<String>::new());
    assert_eq!(
        column(&ledger, "select stage || ' ' || passed::text from backfilld.access_run order by id").await,
        ["before true", "after true"]
    );
    // Every user by sets, and every command for some as enforced.
    let by_sets = "select set_users = (select count(*) from auth.users) and set_rows = 300 from backfilld.access_run
                   where stage = 'before'";
    assert!(
        ledger.is(by_sets).await,
        "{:?}",
        column(
            &ledger,
            "select set_users || ' ' || set_rows || notes::text from backfilld.access_run where stage = 'before'"
        )
        .await
    );
    let attempts = column(
        &ledger,
        "select distinct command || ' ' || attempt || ': ' || before || ' ' || after from backfilld.access_result
         where role = 'authenticated' and who = 'user' and command not in ('select')
           and user_id = (select auth_user_id::text from public.messages group by 1 order by count(*) desc, 1 limit 1)
         order by 1",
    )
    .await;
    assert_eq!(
        attempts,
        [
            "call add_message, foreign row: ok error 42501",
            "call add_message, own row: ok ok",
            "delete foreign row: 0 rows 0 rows",
            "delete own row: 1 row 1 row",
            "insert foreign parent, no owner: error 42501 error 42501",
            "insert foreign parent, spoofed owner: error 42501 error 42501",
            "insert foreign parent: error 42501 error 42501",
            "insert own parent, foreign owner: 1 row 1 row",
            "insert own parent, no owner: 1 row 1 row",
            "insert own parent: 1 row 1 row",
            "update foreign row, content: 0 rows 0 rows",
            "update foreign row, own owner: 0 rows 0 rows",
            "update foreign row, own parent: 0 rows 0 rows",
            "update own row, content: 1 row 1 row",
            "update own row, foreign owner: 1 row 1 row",
            "update own row, foreign parent: error 42501 error 42501",
        ]
    );
    assert_eq!(
        ledger.number(&format!("select count(*) - {ROWS} from public.messages")).await,
        0,
        "nothing was written"
    );
    assert_eq!(leftovers(&ledger).await, 0);
    let held = "select max((detail ->> 'hold_us')::int8) from backfilld.event where kind = 'ddl'
                and detail ->> 'what' like '%policies %tried%'";
    println!("longest lock for stand-ins: {} us", ledger.number(held).await);
    let shown = Cli::new(&db).run(&["verify", JOB, "--access"]).await;
    assert!(shown.expect(0, "").stdout.contains("accepted: call add_message, foreign row"), "{shown:#?}");
    assert!(Cli::new(&db).run(&["status", JOB]).await.stdout.contains("nobody's changes (after the flip"));
}

#[tokio::test]
async fn new_policies_that_are_not_the_old_ones_are_refused_before_the_flip_with_their_cause() {
    let own = "auth_user_id = (select auth.uid())";
    for (what, from, to, expected) in [
        (
            "too wide",
            format!("command = \"select\"\nroles = [\"authenticated\"]\nusing = \"{own}\""),
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id is not null\"".to_owned(),
            ["authenticated select rows wider", "too wide"],
        ),
        (
            "too narrow",
            format!("command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"{own}\""),
            format!("command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"{own} and role = 'nobody'\""),
            ["authenticated delete own row narrower", "asks for more"],
        ),
        (
            "swapped column",
            format!("command = \"select\"\nroles = [\"authenticated\"]\nusing = \"{own}\""),
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"conversation_id = (select auth.uid())\""
                .to_owned(),
            ["authenticated select rows narrower", "compare another column"],
        ),
        (
            "missing command",
            format!(
                "[[policies.create]]\nname = \"Users can update own messages\"\ncommand = \"update\"\nroles = [\"authenticated\"]\nusing = \"{own}\"\ncheck = \"{own}\""
            ),
            String::new(),
            ["authenticated update own row, content narrower", "missing command"],
        ),
        (
            "missing role",
            format!("command = \"select\"\nroles = [\"authenticated\"]\nusing = \"{own}\""),
            format!("command = \"select\"\nroles = [\"anon\"]\nusing = \"{own}\""),
            ["authenticated select rows narrower", "missing role"],
        ),
        (
            "trusting check",
            format!("command = \"insert\"\nroles = [\"authenticated\"]\ncheck = \"{own}\""),
            "command = \"insert\"\nroles = [\"authenticated\"]\ncheck = \"true\"".to_owned(),
            ["authenticated insert foreign parent wider", "leftover permissive policy"],
        ),
    ] {
        let (db, ledger) = db().await;
        let job = job();
        job.replace(&from, &to);
        let all = fails(&db, &ledger, &job, "verify").await;
        assert!(all.iter().any(|d| expected.iter().all(|p| d.contains(p))), "{what}: no {expected:?} in {all:#?}");
    }
}

#[tokio::test]
async fn a_policy_that_stays_and_lets_others_in_is_found_where_it_matters() {
    let (db, ledger) = db().await;
    let job = job();
    // Restricted to nothing now, wide open once the restrictive one is gone: ORed with the new ones.
    ledger.run("create policy support on public.messages for select to authenticated using (role = 'system')").await;
    job.replace("keep = []", "keep = [\"support\"]");
    ledger.run("update public.messages set role = 'system' where id in (select id from public.messages order by id limit 3)").await;
    // It gives the same before and after, so nothing changes; and public rows that the job forgets do.
    assert_eq!(run_once(&db, job.spec()).await.expect("done"), Status::Done);

    let (db, ledger) = self::db().await;
    let job = self::job();
    ledger.run("create policy support on public.messages for select using (role = 'system')").await;
    job.replace("replace = [", "replace = [\n  \"support\",");
    let public =
        "update public.messages set role = 'system' where id in (select id from public.messages order by id limit 3)";
    comes_up_later(&db, &ledger, &job, public).await;
    let all = fails(&db, &ledger, &job, "verify").await;
    has(&all, &["anon select rows narrower", "missing role"]);
    has(&all, &["authenticated select rows narrower", "public rows", "one column cannot express it"]);
    assert!(Cli::new(&db).run(&["status", JOB]).await.stdout.contains("public rows"));
}

#[tokio::test]
async fn paths_that_disagree_and_rows_of_several_owners_are_told_apart() {
    let two_users = "(select array_agg(u order by u) from (select u.auth_user_id as u from public.users u join
        public.conversations c on c.user_id = u.id group by 1 order by 1 limit 2) x)";
    let (db, ledger) = db().await;
    let job = job();
    // Not declared by the job, so only the comparison can find it.
    job.edit("job.toml", |text| {
        let (from, to) = (text.find("[[agree]]").expect("agree"), text.find("# Under whom").expect("access"));
        text[..from].to_owned() + &text[to..]
    });
    ledger
        .run(&format!(
            "update public.conversations set auth_user_id = ({two_users})[2]
             where id = (select c.id from public.conversations c join public.users u on u.id = c.user_id
                         join public.messages m on m.conversation_id = c.id where u.auth_user_id = ({two_users})[1] limit 1)"
        ))
        .await;
    let all = fails(&db, &ledger, &job, "verify").await;
    // Nobody saw them before: the policy on conversations hid them from the owner by the other path.
    has(&all, &["authenticated select rows wider", "paths disagree: auth_user_id leads from these rows to this user"]);

    let (db, ledger) = self::db().await;
    let job = self::job();
    // Shared conversations: many to many.
    ledger
        .run(
            "create table public.shares (conversation_id uuid, auth_user_id uuid);
             grant select on public.shares to authenticated, anon;
             create policy shared on public.messages for select using (conversation_id in
               (select s.conversation_id from public.shares s where s.auth_user_id = auth.uid()))",
        )
        .await;
    job.replace("replace = [", "replace = [\n  \"shared\",");
    let shares = format!(
        "insert into public.shares select c.id, ({two_users})[2] from public.conversations c
           join public.users u on u.id = c.user_id where u.auth_user_id = ({two_users})[1]"
    );
    comes_up_later(&db, &ledger, &job, &shares).await;
    let all = fails(&db, &ledger, &job, "verify").await;
    has(&all, &["authenticated select rows narrower", "several owners", "one column cannot express it"]);
    let by_sets = "select set_users is not null from backfilld.access_run order by id desc limit 1";
    assert!(ledger.is(by_sets).await, "policies with OR are compared by sets as well");
}

#[tokio::test]
async fn roles_that_no_policy_stops_and_functions_that_open_up_are_differences() {
    let (db, ledger) = db().await;
    let job = job();
    // `check` refuses the wrong roles; here they are changed after the start, as what is meant may be.
    job.edit("add_message.sql", |sql| {
        let sql = sql.replace("v_owner is distinct from auth.uid()", "false");
        sql + "\nrevoke execute on function public.add_message(uuid, text, text, text, jsonb) from public, anon;\n
               grant execute on function public.add_message(uuid, text, text, text, jsonb) to authenticated, service_role;\n"
    });
    job.replace("[target]", "hold_before = [\"backfill\"]\n[target]");
    ledger.run("revoke execute on function public.add_message from public; grant execute on function public.add_message to anon, authenticated").await;
    Cli::new(&db).run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
    Cli::new(&db).run(&["cutover", JOB]).await.expect(0, "");
    job.replace("roles = [\"authenticated\"]\nanonymous", "roles = [\"authenticated\", \"app_owner\"]\nanonymous");
    job.replace("anonymous = [\"anon\"]\nbypass = [\"service_role\"]", "bypass = [\"service_role\", \"anon\"]");
    let all = fails(&db, &ledger, &job, "verify").await;
    has(&all, &["app_owner policies", "bypasses row level security"]);
    has(&all, &["anon policies", "it is not"]);
    has(&all, &["anon execute public.add_message", "narrower"]);
    has(&all, &["service_role execute public.add_message", "wider"]);
    has(&all, &["service_role call add_message, foreign row wider", "does what the old one refused"]);
}

async fn released_before_the_flip() -> (TestDb, Ledger, JobDir, Cli) {
    let (db, ledger) = db().await;
    let (job, cli) = (job(), Cli::new(&db));
    job.replace("[target]", "hold_before = [\"flip\"]\n[target]");
    cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point before flip");
    cli.run(&["cutover", JOB]).await.expect(0, "");
    (db, ledger, job, cli)
}

#[tokio::test]
async fn a_difference_after_the_flip_takes_it_back_and_a_resume_compares_anew() {
    let (db, ledger, job, cli) = released_before_the_flip().await;
    // Killed between the flip and the comparison; meanwhile somebody disables the trigger that derives the owner.
    let killed = cli.clone().env("BACKFILLD_FAULT", "before-confirm").run(&["run", "--once", job.path()]).await;
    assert_eq!(killed.code, None, "{killed:#?}");
    let new = "select count(*) from pg_policy where polname like 'Users can % own messages'";
    assert_eq!(ledger.number(new).await, 4);
    let trigger = "zzz_backfilld_messages_auth_user_id_insert";
    let triggers = column(
        &ledger,
        "select tgname::text from pg_trigger where tgname like 'zzz%' and tgrelid = 'public.messages'::regclass",
    )
    .await;
    for t in &triggers {
        ledger.run(&format!("alter table public.messages disable trigger \"{t}\"")).await;
    }
    let _ = trigger;
    let failed = cli.run(&["run", "--once", job.path()]).await;
    failed.expect(1, "after the flip; the old policies and functions are back");
    let all = differences(&ledger).await;
    has(&all, &["insert foreign parent, spoofed owner wider", "spoofable owner", "not enabled always"]);
    assert_eq!((ledger.status().await, ledger.phase().await), ("failed".into(), "flip".into()));
    assert_eq!((ledger.number(new).await, leftovers(&ledger).await), (0, 0));
    assert!(
        !ledger.is("select pg_get_functiondef('public.add_message'::regproc) like '%belongs to another user%'").await
    );
    // A user cannot write into somebody else's conversation, now that the old policies are back.
    let app = db.client(AUTHENTICATOR).await;
    let planted = app
        .batch_execute(
            "begin; set local role authenticated;
             select set_config('request.jwt.claim.sub', '57a6e200-0000-4000-8000-000000000000', true);
             insert into public.messages (conversation_id, role, content)
               select '57a6e200-0000-4000-8000-000000000000', 'user', 'x'",
        )
        .await;
    assert_eq!(planted.expect_err("is refused").code().map(|c| c.code().to_owned()).as_deref(), Some("42501"));
    for t in &triggers {
        ledger.run(&format!("alter table public.messages enable always trigger \"{t}\"")).await;
    }
    cli.run(&["resume", JOB]).await.expect(0, "");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    assert_eq!(leftovers(&ledger).await, 0);
}

#[tokio::test]
async fn a_daemon_killed_in_the_middle_goes_on_where_it_was_and_leaves_nothing_behind() {
    let (db, ledger) = db().await;
    let job = job();
    let cli = Cli::new(&db);
    for point in ["access-probe", "access-person:3", "before-ddl-commit:2"] {
        let killed = cli.clone().env("BACKFILLD_FAULT", point).run(&["run", "--once", job.path()]).await;
        assert_eq!(killed.code, None, "{point}: {killed:#?}");
        // The last time while they were about to be made.
        assert_eq!(leftovers(&ledger).await > 0, point.starts_with("access"), "{point}");
    }
    let first = ledger.number("select count(distinct (role, who, user_id)) from backfilld.access_result").await;
    assert_eq!(first, 3, "what is done is stored");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    assert_eq!(leftovers(&ledger).await, 0);
    assert_eq!(
        ledger.number("select count(*) from backfilld.access_run where stage = 'before'").await,
        1,
        "the same run"
    );

    // And a rollback cleans up as well.
    let (db, ledger) = self::db().await;
    let cli = Cli::new(&db);
    let killed = cli.clone().env("BACKFILLD_FAULT", "access-person:1").run(&["run", "--once", job.path()]).await;
    assert_eq!(killed.code, None, "{killed:#?}");
    assert!(leftovers(&ledger).await > 0);
    cli.run(&["rollback", JOB, "--yes"]).await.expect(0, "");
    assert_eq!(leftovers(&ledger).await, 0);
}

#[tokio::test]
async fn what_a_killed_comparison_left_goes_also_when_the_job_compares_nothing_any_more() {
    for (point, phase) in [("access-person:1", "verify"), ("access-probe:2", "flip")] {
        let (db, ledger) = db().await;
        let (job, cli) = (job(), Cli::new(&db));
        let killed = cli.clone().env("BACKFILLD_FAULT", point).run(&["run", "--once", job.path()]).await;
        assert_eq!(killed.code, None, "{killed:#?}");
        assert!(leftovers(&ledger).await > 0, "{point}");
        assert_eq!(ledger.phase().await, phase);
        job.without_access();
        cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
        assert_eq!(leftovers(&ledger).await, 0, "{point}");
    }
}

#[tokio::test]
async fn what_cannot_be_tried_is_said_with_what_to_do_about_it() {
    let (db, ledger) = db().await;
    let shipped = JobDir::shipped();
    for (from, to, says) in [
        ("writes_can_be_undone = true\n", "", "writes_can_be_undone"),
        ("\"request.jwt.claim.sub\" = \"{user}\"\n", "bogus = \"{user}\"\n", "\"bogus\" is not a setting"),
        ("bypass = [\"service_role\"]", "bypass = [\"anon\"]", "listed twice"),
    ] {
        let job = JobDir::shipped();
        job.replace(from, to);
        let refused = Cli::new(&db).run(&["check", job.path()]).await;
        refused.expect(2, says);
    }
    let job = JobDir::shipped();
    job.replace("anonymous = [\"anon\"]", "anonymous = [\"nobody_here\"]");
    let refused = Cli::new(&db).run(&["check", job.path()]).await;
    assert!(refused.expect(3, "").stdout.contains("nobody_here"), "{refused:#?}");
    let job = JobDir::shipped();
    job.replace(
        "using = \"auth_user_id = (select auth.uid())\"",
        "using = \"auth_user_id = (select auth.uid()) or current_user = 'x'\"",
    );
    let refused = Cli::new(&db).run(&["check", job.path()]).await;
    assert!(
        refused.expect(3, "").stdout.replace("\n                             ", " ").contains("looks at current_user"),
        "{refused:#?}"
    );
    // Without writes and calls, no consent is needed.
    shipped.edit("job.toml", |t| t.replace("writes_can_be_undone = true", "writes = false"));
    assert_eq!(run_once(&db, shipped.spec()).await.expect("done"), Status::Done);
    assert_eq!(
        ledger.number("select count(*) from backfilld.access_result where command in ('insert', 'call')").await,
        0
    );
    wait_until("nobody is left", async || leftovers(&ledger).await == 0).await;
}

#[tokio::test]
async fn a_job_that_was_stopped_between_the_flip_and_its_confirmation_goes_on() {
    let db = TestDb::new(Template::Rows(ROWS)).await;
    let ledger = Ledger::new(&db).await;
    let job = job();
    let cli = Cli::new(&db);
    let killed = cli.clone().env("BACKFILLD_FAULT", "before-confirm").run(&["run", "--once", job.path()]).await;
    assert_eq!((killed.code, ledger.phase().await), (None, "flip".into()), "{killed:#?}");
    let plans =
        "select count(*) from backfilld.query_plan p where stage = 'before' and p::text like '%auth_user_id = %'";
    assert_eq!(ledger.number(plans).await, 0);
    cli.run(&["pause", JOB]).await.expect(0, "");
    cli.run(&["resume", JOB]).await.expect(0, "");
    assert_eq!(ledger.phase().await, "verify", "nobody knows what happened meanwhile");
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    assert!(ledger.is("select bool_and(passed) from backfilld.access_run where stage = 'after'").await);
    assert_eq!((ledger.number(plans).await, leftovers(&ledger).await), (0, 0));
}

/// Policies can read other tables, and what is in them counts as well.
#[tokio::test]
async fn what_was_compared_before_a_hold_is_compared_again_behind_it() {
    let (_db, ledger, job, cli) = released_before_the_flip().await;
    cli.run(&["run", "--once", job.path()]).await.expect(0, "the job is done");
    assert_eq!(ledger.number("select count(*) from backfilld.access_run where stage = 'before' and passed").await, 2);
    let told = "select bool_and(notes::text like '%sees all rows of public.conversations%') from backfilld.access_run where stage = 'before'";
    assert!(ledger.is(told).await, "the old policies read it, and it has policies of its own");
}
