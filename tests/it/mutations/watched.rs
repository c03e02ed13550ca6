//! Defects that come up after the flip, under the watch.

use super::table::{By, Defect, Moment, sql};

const fn watched(name: &'static str, says: &'static str, planted: &'static str) -> Defect {
    sql(name, Moment::Watched, By::Watch, says, planted)
}

pub const DEFECTS: &[Defect] = &[
    sql("nothing: the watch has no finding", Moment::Watched, By::Harmless, "", ""),
    watched(
        "select: using (true)",
        "policy_drift",
        "alter policy \"Users can view own messages\" on public.messages using (true)",
    ),
    watched(
        "update: another WITH CHECK",
        "policy_drift",
        "alter policy \"Users can update own messages\" on public.messages with check (true)",
    ),
    watched(
        "to public instead of the role",
        "policy_drift",
        "alter policy \"Users can view own messages\" on public.messages to public",
    ),
    watched("a permissive policy more", "policy open on public.messages is new", "create policy open on public.messages using (true)"),
    watched("a policy less", "is gone", "drop policy \"Users can delete own messages\" on public.messages"),
    watched(
        "restrictive instead of permissive",
        "policy_drift",
        "drop policy \"Users can view own messages\" on public.messages;
         create policy \"Users can view own messages\" on public.messages as restrictive for select to authenticated
           using (auth_user_id = (select auth.uid()))",
    ),
    watched(
        "row level security disabled",
        "row level security of public.messages has changed",
        "alter table public.messages disable row level security",
    ),
    watched(
        "row level security forced on the owner",
        "row level security of public.messages has changed",
        "alter table public.messages force row level security",
    ),
    watched(
        "row level security of a source disabled",
        "row level security of public.conversations has changed",
        "alter table public.conversations disable row level security",
    ),
    watched(
        "the old add_message() is put back",
        "policy_drift: function public.add_message",
        "create or replace function public.add_message(p_conversation_id uuid, p_role text, p_content text,
           p_image_url text default null, p_metadata jsonb default '{}') returns uuid language sql security definer
           as 'insert into public.messages (conversation_id, role, content)
             values (p_conversation_id, p_role, p_content) returning id'",
    ),
    watched(
        "add_message() loses its search_path",
        "policy_drift: function public.add_message",
        "alter function public.add_message reset search_path",
    ),
    watched(
        "EXECUTE on add_message() revoked",
        "policy_drift: function public.add_message",
        "revoke execute on function public.add_message from public",
    ),
    watched(
        "an overload of add_message() that asks nobody",
        "add_message",
        "create function public.add_message(p_conversation_id uuid, p_content text) returns uuid language sql
           security definer set search_path = pg_catalog, pg_temp
           as 'insert into public.messages (conversation_id, role, content) values (p_conversation_id, ''user'', p_content)
               returning id';
         alter function public.add_message(uuid, text) owner to app_owner",
    ),
    watched(
        "auth.uid(), which the policies call, says another user",
        "policy_drift: function auth.uid()",
        "create or replace function auth.uid() returns uuid language sql stable as $$ select '{user}'::uuid $$",
    ),
    watched(
        "a view that reads past the policies (no security_invoker)",
        "public.all_messages",
        "create view public.all_messages as select * from public.messages;
         alter view public.all_messages owner to app_owner; grant select on public.all_messages to anon",
    ),
    watched(
        "a SECURITY DEFINER function that reads the table",
        "public.every_message",
        "create function public.every_message() returns setof public.messages language sql security definer
           set search_path = pg_catalog, pg_temp as 'select * from public.messages';
         alter function public.every_message() owner to app_owner",
    ),
    watched(
        "TRUNCATE granted, which no policy stops",
        "public.messages",
        "grant truncate on public.messages to authenticated",
    ),
    watched("SELECT taken from the users", "public.messages", "revoke select on public.messages from authenticated"),
    watched(
        "insert trigger disabled",
        "sync_triggers",
        "alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_ins",
    ),
    watched(
        "insert trigger replaced by one of the same name that does nothing",
        "sync_triggers",
        "create function public.nothing() returns trigger language plpgsql as 'begin return new; end';
         drop trigger zzz_backfilld_messages_auth_user_id_ins on public.messages;
         create trigger zzz_backfilld_messages_auth_user_id_ins before insert on public.messages
           for each row execute function public.nothing();
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins",
    ),
    watched(
        "update trigger made anew with another condition",
        "messages_auth_user_id_upd",
        "drop trigger zzz_backfilld_messages_auth_user_id_upd on public.messages;
         create trigger zzz_backfilld_messages_auth_user_id_upd before update on public.messages
           for each row when (session_user = 'nobody') execute function backfilld_sync.messages_auth_user_id_derive();
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_upd",
    ),
    watched(
        "propagation made anew with another condition",
        "messages_auth_user_id_s1_upd",
        "drop trigger zzz_backfilld_messages_auth_user_id_s1_upd on public.conversations;
         create trigger zzz_backfilld_messages_auth_user_id_s1_upd after update on public.conversations
           for each row when (old.title is distinct from new.title)
           execute function backfilld_sync.messages_auth_user_id_s1_propagate();
         alter table public.conversations enable always trigger zzz_backfilld_messages_auth_user_id_s1_upd",
    ),
    watched(
        "a trigger behind ours that overwrites the owner",
        "zzzz_override",
        "create function public.override_owner() returns trigger language plpgsql as $$
           begin new.auth_user_id = coalesce(auth.uid(), new.auth_user_id); return new; end $$;
         create trigger zzzz_override before insert on public.messages
           for each row execute function public.override_owner()",
    ),
    watched(
        "a rule that rewrites inserts",
        "rule",
        "create rule elsewhere as on insert to public.messages do instead nothing",
    ),
    watched(
        "body of the propagation changed",
        "sync_triggers",
        "create or replace function backfilld_sync.messages_auth_user_id_s1_propagate() returns trigger language plpgsql
           security definer set search_path = pg_catalog, pg_temp set row_security = off as 'begin return null; end'",
    ),
    watched(
        "sync function gets one more setting",
        "sync_triggers",
        "alter function backfilld_sync.messages_auth_user_id_derive() set session_replication_role = replica",
    ),
    watched(
        "the column gets a default",
        "auth_user_id",
        "alter table public.messages alter auth_user_id set default '{user}'",
    ),
    watched("NOT NULL dropped", "constraints", "alter table public.messages alter auth_user_id drop not null"),
    watched("foreign key dropped", "constraints", "alter table public.messages drop constraint messages_auth_user_id_fkey"),
    watched(
        "foreign key made anew, not validated",
        "constraints: foreign key messages_auth_user_id_fkey is not validated",
        "alter table public.messages drop constraint messages_auth_user_id_fkey;
         alter table public.messages add constraint messages_auth_user_id_fkey foreign key (auth_user_id)
           references auth.users (id) on delete cascade not valid",
    ),
    watched(
        "foreign key made anew to another table, without cascade",
        "constraints",
        "alter table public.messages drop constraint messages_auth_user_id_fkey;
         alter table public.messages add constraint messages_auth_user_id_fkey foreign key (auth_user_id)
           references public.users (auth_user_id)",
    ),
    watched("index dropped", "indexes", "drop index public.idx_messages_auth_user_id"),
    watched(
        "index not valid",
        "indexes",
        "update pg_index set indisvalid = false where indexrelid = 'public.idx_messages_auth_user_id'::regclass",
    ),
    watched(
        "index of the same name on another column",
        "indexes",
        "drop index public.idx_messages_auth_user_id; create index idx_messages_auth_user_id on public.messages (created_at)",
    ),
    watched(
        "a row with somebody else's owner",
        "drift: 1 rows",
        "alter table public.messages disable trigger all;
         update public.messages set auth_user_id = '{other}'
           where id = (select id from public.messages where auth_user_id = '{user}' order by id limit 1);
         alter table public.messages enable trigger all;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_upd;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_settle_ins;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_settle_upd",
    ),
    watched(
        "stale owner: a conversation changed hands while propagation was off",
        "drift",
        "alter table public.conversations disable trigger zzz_backfilld_messages_auth_user_id_s1_upd;
         update public.conversations set auth_user_id = '{other}' where auth_user_id = '{user}';
         alter table public.conversations enable always trigger zzz_backfilld_messages_auth_user_id_s1_upd",
    ),
    Defect {
        name: "a role of [access] becomes a member of the table's owner",
        moment: Moment::Watched,
        sql: "create role \"{role}\" in role authenticated; grant app_owner to \"{role}\"",
        job: &[("roles = [\"authenticated\"]\nanonymous", "roles = [\"authenticated\", \"{role}\"]\nanonymous")],
        by: By::Watch,
        says: "mutant_",
    },
    Defect {
        name: "a role of [access] gets BYPASSRLS",
        moment: Moment::Watched,
        sql: "create role \"{role}\" bypassrls in role authenticated",
        job: &[("roles = [\"authenticated\"]\nanonymous", "roles = [\"authenticated\", \"{role}\"]\nanonymous")],
        by: By::Watch,
        says: "mutant_",
    },
];
