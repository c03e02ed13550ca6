//! The application writes between what the old policies let through and what the new ones do: nobody differs by that.

use backfilld::demo::sample::APP_OWNER;

use crate::support::{Cli, Ended, JOB, JobDir, Ledger, Template, TestDb, wait_until};

/// Whose rows the new policy for DELETE does not let go. No old policy reads this table: who locks it stops the comparison by
/// sets after it has asked for the old ones' rows and before it asks for the new ones'.
const LOCKED_OUT: &str =
    "create table public.locked_out (auth_user_id uuid); grant select on public.locked_out to public;
                          alter table public.locked_out owner to app_owner";

struct Meanwhile {
    db: TestDb,
    ledger: Ledger,
    job: JobDir,
}

impl Meanwhile {
    /// A job with that policy, before its first batch.
    async fn new() -> Self {
        let db = TestDb::new(Template::Rows(300)).await;
        let ledger = Ledger::new(&db).await;
        ledger.run(LOCKED_OUT).await;
        let job = JobDir::with("hold_before = [\"backfill\"]");
        job.replace(
            "command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"\"\"auth_user_id = (select auth.uid())
               and not exists (select 1 from public.locked_out l where l.auth_user_id = messages.auth_user_id)\"\"\"",
        );
        let cli = Cli::new(&db);
        cli.run(&["run", "--once", job.path()]).await.expect(5, "hold point before backfill");
        cli.run(&["cutover", JOB]).await.expect(0, "");
        Self { db, ledger, job }
    }

    /// Two users with rows.
    async fn users(&self) -> [String; 2] {
        let sql =
            "select c.auth_user_id::text from public.messages m join public.conversations c on c.id = m.conversation_id
                   group by 1 order by count(*) desc, 1 limit 2";
        let rows = self.ledger.client.query(sql, &[]).await.expect("owners");
        [rows[0].get(0), rows[1].get(0)]
    }

    /// Goes on with the job. `user` gets a row after the old policies' rows were asked for and before the new ones' are.
    async fn run(&self, user: &str) -> Ended {
        let application = self.db.session("application", APP_OWNER).await;
        let write = format!(
            "begin; lock table public.locked_out in access exclusive mode;
             insert into public.messages (conversation_id, role, content)
               select id, 'user', 'meanwhile' from public.conversations where auth_user_id = '{user}' limit 1"
        );
        application.run(&write).await;
        let daemon = Cli::new(&self.db).start(&["run", "--once", self.job.path()]);
        let waits = "select exists (select from pg_locks l join pg_stat_activity a on a.pid = l.pid where not l.granted
                       and l.relation = 'public.locked_out'::regclass and a.application_name like '%/access')";
        wait_until("the comparison wants the new policies' rows", async || self.ledger.is(waits).await).await;
        application.run("commit").await;
        daemon.ended().await
    }

    /// What differs by sets in the newest run.
    async fn differences(&self) -> Vec<String> {
        let sql = "select command || ' ' || attempt || ': ' || before || ', ' || after || ' ' || cause
                   from backfilld.access_result where run = (select max(id) from backfilld.access_run)
                     and verdict = 'different' and user_id = '' order by 1";
        self.ledger.client.query(sql, &[]).await.expect("results").iter().map(|r| r.get(0)).collect()
    }
}

#[tokio::test]
async fn a_row_that_came_between_old_and_new_policies_is_nobodys_difference() {
    let meanwhile = Meanwhile::new().await;
    let [writer, _] = meanwhile.users().await;
    let ended = meanwhile.run(&writer).await;
    assert_eq!(meanwhile.differences().await, Vec::<String>::new());
    ended.expect(0, "the job is done");
}

#[tokio::test]
async fn who_differs_is_told_from_who_wrote_between_old_and_new_policies() {
    let meanwhile = Meanwhile::new().await;
    let [writer, locked_out] = meanwhile.users().await;
    meanwhile.ledger.run(&format!("insert into public.locked_out values ('{locked_out}')")).await;
    let rows = "select count(*) from public.messages m join public.conversations c on c.id = m.conversation_id
                where c.auth_user_id = ";
    let rows = meanwhile.ledger.number(&format!("{rows}'{locked_out}'")).await;
    meanwhile.run(&writer).await.expect(1, "access would change in");
    let found = meanwhile.differences().await;
    assert_eq!(found.len(), 1, "{found:#?}");
    let expected = format!("delete rows there, all users: {rows} rows, 0 rows ");
    assert!(
        found[0].starts_with(&expected) && found[0].ends_with(&format!("1 user(s), such as {locked_out}")),
        "{found:?}"
    );
}
