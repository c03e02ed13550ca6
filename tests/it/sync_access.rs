//! Who writes: roles and policies, functions of the application, and the daemon's own login.

use backfilld::demo::cluster::SUPERUSER;
use backfilld::demo::sample::{AUTHENTICATOR, DAEMON};
use backfilld::job::load;
use backfilld::plan::steps;

use crate::support::{Session, Template, TestDb};
use crate::sync_fixture::{Case, Fixture, OWNED, values};

/// The shipped job on the sample application, filled and flipped.
async fn flipped() -> Fixture {
    let db = TestDb::new(Template::Rows(200)).await;
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/jobs/messages_auth_user_id");
    let spec = load::load(&dir).expect("the shipped job loads");
    let oracle = "(select c.auth_user_id from public.conversations c where c.id = t.conversation_id)";
    let f = Fixture::on(db, spec, oracle, true).await;
    f.assert_no_drift("filled").await;
    let flip = steps::flip(&f.spec, "2s").expect("the job has a flip");
    f.sql(&format!("begin; {}; commit", flip.sql.join(";\n"))).await;
    f
}

/// A session of a signed-in user.
async fn signed_in(f: &Fixture, user: &str) -> Session {
    let session = f.db.session("user", AUTHENTICATOR).await;
    session.run(&format!("set role authenticated; select set_config('request.jwt.claim.sub', '{user}', false)")).await;
    session
}

#[tokio::test]
async fn nobody_plants_a_message_in_somebody_elses_conversation() {
    let f = flipped().await;
    let own = f.text("select id from public.conversations order by id limit 1").await.expect("a conversation");
    let user =
        f.text(&format!("select auth_user_id from public.conversations where id = '{own}'")).await.expect("an owner");
    let other = f
        .text(&format!("select id from public.conversations where auth_user_id <> '{user}' order by id limit 1"))
        .await
        .expect("another conversation");
    let owner =
        f.text(&format!("select auth_user_id from public.conversations where id = '{other}'")).await.expect("an owner");
    let mut session = signed_in(&f, &user).await;
    let insert = |conversation: &str, owner: &str| {
        format!(
            "insert into public.messages (conversation_id, role, content, auth_user_id)
                 values ('{conversation}', 'user', 'x', {owner}) returning auth_user_id"
        )
    };
    // Into a foreign conversation: as its owner, as oneself, as nobody.
    for claimed in [format!("'{user}'"), format!("'{owner}'"), "null".to_owned()] {
        session.send(&insert(&other, &claimed));
        assert_eq!(session.finish_err().await, "42501", "{claimed}");
    }
    // Into one's own: whatever is claimed, the derived owner is stored.
    for claimed in [format!("'{user}'"), format!("'{owner}'"), "null".to_owned()] {
        session.send(&insert(&own, &claimed));
        assert_eq!(values(&session.finish_ok().await), [Some(user.clone())], "{claimed}");
    }
    session.send(&format!("update public.messages set conversation_id = '{other}' where conversation_id = '{own}'"));
    assert_eq!(session.finish_err().await, "42501");
    session.send(&format!(
        "update public.messages set auth_user_id = '{owner}' where conversation_id = '{own}' returning auth_user_id"
    ));
    assert!(values(&session.finish_ok().await).iter().all(|v| v.as_deref() == Some(user.as_str())));
    f.assert_no_drift("policies").await;
}

#[tokio::test]
async fn a_writer_without_any_right_on_the_source_gets_the_value_all_the_same() {
    let f = Fixture::new(OWNED).await;
    f.sql(
        "revoke all on public.parents from public;
        alter table public.parents enable row level security;
        grant select, insert, update on public.kids to authenticated;
        create function public.save(k bigint, p bigint) returns void language sql security definer as
          'insert into public.kids (id, parent_id, owner) values (k, p, ''spoofed'')
           on conflict (id) do update set parent_id = p, owner = ''spoofed''';
        alter function public.save owner to app_owner",
    )
    .await;
    let mut session = signed_in(&f, "nobody").await;
    session.send("select from public.parents");
    assert_eq!(session.finish_err().await, "42501");
    session.run("insert into public.kids (id, parent_id) values (10, 1); update public.kids set parent_id = 2 where id = 10").await;
    session
        .run("begin; insert into public.kids (id, parent_id) values (11, 1); set constraints all immediate; commit")
        .await;
    session.run("select public.save(12, 1); select public.save(1, 2)").await;
    f.assert_no_drift("no rights").await;
}

/// What the batch's statement fires, as EXPLAIN ANALYZE counts it.
async fn fires(f: &Fixture) -> bool {
    let mut batch = f.batch("batch").await;
    assert!(batch.begin(100).await);
    let plan =
        batch.session.client().simple_query(&format!("explain (analyze) {}", batch.fill())).await.expect("a plan");
    batch.finish().await;
    let trigger = f.facts.shape.trigger("upd");
    values(&plan).iter().flatten().any(|line| line.contains(&trigger))
}

#[tokio::test]
async fn batches_of_the_dedicated_login_do_not_fire_the_trigger_and_those_of_a_shared_one_do() {
    for dedicated in [true, false] {
        let f = Fixture::with(OWNED, dedicated).await;
        f.unfill().await;
        assert_eq!(fires(&f).await, !dedicated);
        f.assert_no_drift("filled").await;
    }
}

#[tokio::test]
async fn only_null_to_value_by_the_dedicated_login_with_nothing_else_changed_is_exempt() {
    for (role, prelude, sql, exempt) in [
        (DAEMON, "select", "update public.kids set owner = 'wrong' where id = 1", true),
        (DAEMON, "select", "update public.kids set owner = 'wrong', body = 'z' where id = 1", true),
        (DAEMON, "select", "update public.kids set owner = 'wrong', parent_id = 2 where id = 1", false),
        (DAEMON, "select", "update public.kids set owner = 'wrong', id = 100 where id = 1", false),
        (DAEMON, "select", "update public.kids set owner = 'wrong' where id = 2", false),
        (DAEMON, "select", "update public.kids set owner = null where id = 2", false),
        (DAEMON, "select", "insert into public.kids (id, parent_id, owner) values (10, 1, 'wrong')", false),
        (SUPERUSER, "select", "update public.kids set owner = 'wrong' where id = 1", false),
        // Neither the current role nor what a session may set makes a session ours.
        (
            SUPERUSER,
            "set role backfilld; set session_replication_role = local",
            "update public.kids set owner = 'wrong' where id = 1",
            false,
        ),
        (
            SUPERUSER,
            "set session_replication_role = replica",
            "update public.kids set owner = 'wrong' where id = 1",
            false,
        ),
    ] {
        let f = Fixture::new(OWNED).await;
        f.unfill().await;
        f.sql("update public.kids set body = body where id = 2").await;
        let client = f.db.client(role).await;
        let sql = format!("{prelude}; {sql}");
        // A refusal to set the parameter is as good.
        let _ = client.batch_execute(&sql).await;
        let wrong = f.text("select count(*) from public.kids where owner = 'wrong'").await.expect("a count");
        assert_eq!(wrong, if exempt { "1" } else { "0" }, "{role}: {sql}");
    }
}

#[tokio::test]
async fn a_login_that_is_not_dedicated_has_no_exemption() {
    let f = Fixture::with(OWNED, false).await;
    f.unfill().await;
    f.db.client(DAEMON).await.batch_execute("update public.kids set owner = 'wrong'").await.expect("allowed");
    f.assert_no_drift("shared login").await;
}

#[tokio::test]
async fn the_applications_own_before_triggers_come_first_so_that_policies_see_the_final_value() {
    let f = Fixture::new(OWNED).await;
    f.sql(
        "create function public.route() returns trigger language plpgsql as $$ begin
             new.parent_id := 2; new.owner := 'spoofed'; return new; end $$;
           create trigger zz_route before insert or update on public.kids for each row execute function public.route()",
    )
    .await;
    let mut writer = f.app("writer").await;
    for sql in
        ["insert into public.kids (id, parent_id) values (10, 1)", "update public.kids set body = 'y' where id = 1"]
    {
        writer.send(&format!("{sql} returning owner"));
        assert_eq!(values(&writer.finish_ok().await), [Some("b".to_owned())], "{sql}");
    }
}

#[tokio::test]
async fn policies_that_would_hide_the_source_from_the_owner_raise_instead_of_storing_null() {
    let f = Fixture::new(OWNED).await;
    f.sql("alter table public.parents enable row level security, force row level security").await;
    let mut writer = f.app("writer").await;
    for sql in
        ["insert into public.kids (id, parent_id) values (10, 1)", "update public.kids set body = 'y' where id = 1"]
    {
        writer.send(sql);
        assert_eq!(writer.finish_err().await, "42501", "{sql}");
    }
}

#[tokio::test]
async fn a_writers_search_path_and_temporary_objects_do_not_reach_the_functions() {
    let job = OWNED.job.replace("\"p.owner\"", "\"upper(p.owner)\"");
    let oracle = "(select upper(p.owner) from public.parents p where p.id = t.parent_id)";
    let f = Fixture::new(Case { job: Box::leak(job.into_boxed_str()), oracle, ..OWNED }).await;
    let writer = f.app("writer").await;
    writer
        .run(
            "create schema evil; create function evil.upper(text) returns text language sql as $$ select 'evil' $$;
        create function evil.eq(bigint, bigint) returns bool language sql as $$ select true $$;
        create operator evil.= (leftarg = bigint, rightarg = bigint, function = evil.eq);
        create temporary table parents (id bigint, owner text); insert into parents values (1, 'evil');
        set search_path = evil, pg_temp, pg_catalog",
        )
        .await;
    writer
        .run(
            "insert into public.kids (id, parent_id, owner) values (10, 1, 'x'); update public.kids set owner = null;
        update public.parents set owner = 'new' where id operator(pg_catalog.=) 1",
        )
        .await;
    f.assert_no_drift("search_path").await;
}
