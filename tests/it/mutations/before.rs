//! Defects that are there before the job starts.

use super::table::{By, Defect, Moment, sql};

const BEFORE: Moment = Moment::Before;

pub const DEFECTS: &[Defect] = &[
    sql("nothing: the sample as it is", BEFORE, By::Harmless, "", ""),
    sql(
        "a leftover permissive policy that the job does not name",
        BEFORE,
        By::Check,
        "policy \"support\" is on the table and not in the job",
        "create policy support on public.messages for select using (role = 'system')",
    ),
    sql(
        "a policy that the job replaces has another name",
        BEFORE,
        By::Check,
        "is in the job and not on the table",
        "alter policy \"Users can delete messages from their conversations\" on public.messages rename to other",
    ),
    sql(
        "row level security is not enabled",
        BEFORE,
        By::Check,
        "row level security is not enabled",
        "alter table public.messages disable row level security",
    ),
    sql(
        "row level security is forced on the owner, as which the sync functions run",
        BEFORE,
        By::Check,
        "policies apply to app_owner",
        "alter table public.messages force row level security",
    ),
    sql(
        "a trigger that sorts behind the sync triggers and overwrites the owner",
        BEFORE,
        By::Check,
        "sort behind ours",
        "create function public.override_owner() returns trigger language plpgsql as 'begin return new; end';
         create trigger zzzz_override before insert or update on public.messages
           for each row execute function public.override_owner()",
    ),
    sql(
        "a view that reads past the policies (no security_invoker)",
        BEFORE,
        By::Remark,
        "view public.all_messages reads the table with its owner's rights",
        "create view public.all_messages as select * from public.messages;
         alter view public.all_messages owner to app_owner; grant select on public.all_messages to anon",
    ),
    sql(
        "a materialized view that keeps rows",
        BEFORE,
        By::Remark,
        "materialized view public.kept_messages holds rows",
        "create materialized view public.kept_messages as select * from public.messages",
    ),
    sql(
        "another SECURITY DEFINER function without search_path",
        BEFORE,
        By::Remark,
        "public.count_messages",
        "create function public.count_messages() returns bigint language sql security definer
           as 'select count(*) from messages'",
    ),
    sql(
        "a conversation that leads to two owners (paths disagree)",
        BEFORE,
        By::Check,
        "conversations.user_id -> users.auth_user_id",
        "update public.conversations set auth_user_id = '{other}'
         where id = (select conversation_id from public.messages m join public.conversations c on c.id = m.conversation_id
                     where c.auth_user_id = '{user}' limit 1)",
    ),
    sql(
        "a conversation with messages and without owner",
        BEFORE,
        By::Check,
        "",
        "update public.conversations set auth_user_id = null
         where id = (select conversation_id from public.messages limit 1)",
    ),
    sql(
        "a message whose conversation is gone (orphan)",
        BEFORE,
        By::Check,
        "orphan",
        "set session_replication_role = replica;
         update public.messages set conversation_id = gen_random_uuid() where id = (select id from public.messages limit 1)",
    ),
    sql(
        "an owner who is no user (the foreign key would not hold)",
        BEFORE,
        By::Check,
        "",
        "set session_replication_role = replica;
         update public.conversations set auth_user_id = gen_random_uuid()
         where id = (select conversation_id from public.messages limit 1)",
    ),
    sql(
        "the column is there already, with wrong values",
        BEFORE,
        By::Check,
        "",
        "alter table public.messages add auth_user_id uuid; update public.messages set auth_user_id = '{user}'",
    ),
    sql(
        "two owners by OR: shared conversations, and the job knows only the owner",
        BEFORE,
        By::Check,
        "",
        "create table public.shares (conversation_id uuid, auth_user_id uuid);
         grant select on public.shares to authenticated, anon;
         insert into public.shares select id, '{other}' from public.conversations where auth_user_id = '{user}';
         drop policy \"Users can view messages from their conversations\" on public.messages;
         create policy \"Users can view messages from their conversations\" on public.messages for select using (
           conversation_id in (select c.id from public.conversations c where c.auth_user_id = auth.uid())
           or conversation_id in (select s.conversation_id from public.shares s where s.auth_user_id = auth.uid()))",
    ),
    sql(
        "a policy that goes by the session's role",
        BEFORE,
        By::Check,
        "looks at current_user",
        "drop policy \"Users can view messages from their conversations\" on public.messages;
         create policy \"Users can view messages from their conversations\" on public.messages for select
           using (current_user = 'authenticated')",
    ),
    sql(
        "a policy that calls a function which goes by the session's role",
        BEFORE,
        By::Remark,
        "public.is_staff()",
        "create function public.is_staff() returns boolean language plpgsql stable
           as 'begin return current_user = ''app_owner''; end';
         alter policy \"Users can view messages from their conversations\" on public.messages
           using (public.is_staff() or conversation_id in (
             select c.id from public.conversations c where c.auth_user_id = auth.uid()))",
    ),
    sql(
        "a policy of another table that reads the target",
        BEFORE,
        By::Remark,
        "reads public.messages",
        "create table public.notes (message_id uuid); alter table public.notes enable row level security;
         create policy seen on public.notes for select using (exists (
           select from public.messages m where m.id = notes.message_id))",
    ),
    sql(
        "a second function of the same name that keeps the hole (overload)",
        BEFORE,
        By::Remark,
        "add_message",
        "create function public.add_message(p_conversation_id uuid, p_content text) returns uuid language sql
           security definer set search_path = pg_catalog, pg_temp
           as 'insert into public.messages (conversation_id, role, content) values (p_conversation_id, ''user'', p_content)
               returning id';
         alter function public.add_message(uuid, text) owner to app_owner",
    ),
];
