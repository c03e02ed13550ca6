//! Defects that come up while the job is held before the flip, and between the flip and the comparison after it.

use super::table::{By, Defect, Moment, sql};

const HELD: Moment = Moment::Held;
const FLIPPED: Moment = Moment::Flipped;

pub const DEFECTS: &[Defect] = &[
    sql("nothing: held and released", HELD, By::Harmless, "", ""),
    sql(
        "insert trigger disabled",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_ins",
    ),
    sql(
        "update trigger not for replication (enabled, not always)",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "alter table public.messages enable trigger zzz_backfilld_messages_auth_user_id_upd",
    ),
    sql(
        "settling trigger in replica mode only",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "alter table public.messages enable replica trigger zzz_backfilld_messages_auth_user_id_settle_ins",
    ),
    sql(
        "propagation from conversations dropped",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "drop trigger zzz_backfilld_messages_auth_user_id_s1_upd on public.conversations",
    ),
    sql(
        "insert trigger replaced by one of the same name that does nothing",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "create function public.nothing() returns trigger language plpgsql as 'begin return new; end';
         drop trigger zzz_backfilld_messages_auth_user_id_ins on public.messages;
         create trigger zzz_backfilld_messages_auth_user_id_ins before insert on public.messages
           for each row execute function public.nothing();
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins",
    ),
    sql(
        "insert trigger made anew with a condition: it believes an owner that is sent (spoofable)",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "drop trigger zzz_backfilld_messages_auth_user_id_ins on public.messages;
         create trigger zzz_backfilld_messages_auth_user_id_ins before insert on public.messages
           for each row when (new.auth_user_id is null) execute function backfilld_sync.messages_auth_user_id_derive();
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins",
    ),
    sql(
        "insert trigger made anew for update only",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "drop trigger zzz_backfilld_messages_auth_user_id_ins on public.messages;
         create trigger zzz_backfilld_messages_auth_user_id_ins before update on public.messages
           for each row execute function backfilld_sync.messages_auth_user_id_derive();
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins",
    ),
    sql(
        "body of a sync function changed",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "create or replace function backfilld_sync.messages_auth_user_id_derive() returns trigger language plpgsql
           security definer set search_path = pg_catalog, pg_temp set row_security = off as 'begin return new; end'",
    ),
    sql(
        "search_path of a sync function changed",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "alter function backfilld_sync.messages_auth_user_id_derive() set search_path = public",
    ),
    sql(
        "sync function runs as its caller (SECURITY INVOKER)",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "alter function backfilld_sync.messages_auth_user_id_derive() security invoker",
    ),
    sql(
        "sync function owned by a role to which policies apply",
        HELD,
        By::Verification,
        "sync_triggers 1",
        "create role \"{role}\"; grant usage, create on schema backfilld_sync to \"{role}\";
         alter function backfilld_sync.messages_auth_user_id_derive() owner to \"{role}\"",
    ),
    sql(
        "a trigger behind ours, by its name, that believes the owner that is sent",
        HELD,
        By::Comparison,
        "insert foreign parent",
        "create function public.override_owner() returns trigger language plpgsql as $$
           begin new.auth_user_id = coalesce(auth.uid(), new.auth_user_id); return new; end $$;
         create trigger zzzz_override before insert on public.messages
           for each row execute function public.override_owner()",
    ),
    sql(
        "a row without owner (NULL)",
        HELD,
        By::Verification,
        "unfilled 1",
        "set session_replication_role = replica; alter table public.messages disable trigger all;
         alter table public.messages alter auth_user_id drop not null;
         update public.messages set auth_user_id = null where id = (select id from public.messages order by id limit 1)",
    ),
    sql(
        "a row with somebody else's owner; triggers as they were",
        HELD,
        By::Verification,
        "drift 1",
        "alter table public.messages disable trigger all;
         update public.messages set auth_user_id = '{other}'
           where id = (select id from public.messages where auth_user_id = '{user}' order by id limit 1);
         alter table public.messages enable trigger all;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_ins;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_upd;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_settle_ins;
         alter table public.messages enable always trigger zzz_backfilld_messages_auth_user_id_settle_upd",
    ),
    sql(
        "stale owner: a conversation changed hands while propagation was off",
        HELD,
        By::Verification,
        "drift",
        "alter table public.conversations disable trigger zzz_backfilld_messages_auth_user_id_s1_upd;
         update public.conversations set auth_user_id = '{other}' where auth_user_id = '{user}';
         alter table public.conversations enable always trigger zzz_backfilld_messages_auth_user_id_s1_upd",
    ),
    sql(
        "two rows with each other's owner",
        HELD,
        By::Verification,
        "drift 2",
        "alter table public.messages disable trigger all;
         update public.messages m set auth_user_id = case auth_user_id when '{user}' then '{other}' else '{user}' end::uuid
           where id in ((select id from public.messages where auth_user_id = '{user}' order by id limit 1),
                        (select id from public.messages where auth_user_id = '{other}' order by id limit 1))",
    ),
    sql(
        "an owner who is nobody",
        HELD,
        By::Verification,
        "references:messages_auth_user_id_fkey 1",
        "alter table public.messages disable trigger all;
         update public.messages set auth_user_id = gen_random_uuid() where id = (select id from public.messages limit 1)",
    ),
    sql(
        "an orphan: its conversation is gone",
        HELD,
        By::Verification,
        "orphans 1",
        "alter table public.messages disable trigger all;
         update public.messages set conversation_id = gen_random_uuid() where id = (select id from public.messages limit 1)",
    ),
    sql(
        "a conversation that leads to two owners (paths disagree)",
        HELD,
        By::Verification,
        "conversations.user_id -> users.auth_user_id",
        "update public.conversations set auth_user_id = '{other}' where auth_user_id = '{user}'",
    ),
    sql(
        "a writer under session_replication_role = replica that sends a wrong owner",
        HELD,
        By::Harmless,
        "",
        "set session_replication_role = replica;
         insert into public.messages (conversation_id, role, content, auth_user_id)
           select id, 'user', 'x', '{other}' from public.conversations where auth_user_id = '{user}' limit 1",
    ),
    sql(
        "a conversation changes hands under session_replication_role = replica",
        HELD,
        By::Harmless,
        "",
        "set session_replication_role = replica;
         update public.conversations c set auth_user_id = u.auth_user_id, user_id = u.id from public.users u
           where u.auth_user_id = '{other}' and c.auth_user_id = '{user}'",
    ),
    sql(
        "an old policy is changed by hand",
        HELD,
        By::Flip,
        "is another",
        "alter policy \"Users can view messages from their conversations\" on public.messages using (true)",
    ),
    sql(
        "a permissive policy is added by hand, to be ORed with the new ones",
        HELD,
        By::Flip,
        "\"open\" is new",
        "create policy open on public.messages using (true)",
    ),
    sql(
        "an old policy is dropped by hand",
        HELD,
        By::Flip,
        "is gone",
        "drop policy \"Users can delete messages from their conversations\" on public.messages",
    ),
    sql(
        "row level security is disabled",
        HELD,
        By::Flip,
        "row level security was enabled",
        "alter table public.messages disable row level security",
    ),
    sql(
        "the index is not valid",
        HELD,
        By::Nobody("an index decides about speed, not about access; the watch shows it after the flip"),
        "",
        "update pg_index set indisvalid = false where indexrelid = 'public.idx_messages_auth_user_id'::regclass",
    ),
    Defect {
        name: "a role of [access] becomes a member of the table's owner",
        moment: HELD,
        sql: "create role \"{role}\" in role authenticated; grant app_owner to \"{role}\";
              grant \"{role}\" to backfilld with admin option",
        job: &[("roles = [\"authenticated\"]\nanonymous", "roles = [\"authenticated\", \"{role}\"]\nanonymous")],
        by: By::Comparison,
        says: "bypasses row level security",
    },
    sql("nothing: confirmed after the flip", FLIPPED, By::Harmless, "", ""),
    sql(
        "every sync trigger of the target disabled: the owner on insert is what the client sends (spoofable)",
        FLIPPED,
        By::ComparisonAfter,
        "spoofable owner",
        "alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_ins;
         alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_upd;
         alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_settle_ins;
         alter table public.messages disable trigger zzz_backfilld_messages_auth_user_id_settle_upd",
    ),
    sql(
        "a new policy is opened by hand (using (true))",
        FLIPPED,
        By::ComparisonAfter,
        "leftover permissive policy",
        "alter policy \"Users can view own messages\" on public.messages using (true)",
    ),
    sql(
        "a new policy is given to another role",
        FLIPPED,
        By::ComparisonAfter,
        "missing role",
        "alter policy \"Users can view own messages\" on public.messages to anon",
    ),
    sql(
        "a new policy is dropped",
        FLIPPED,
        By::ComparisonAfter,
        "missing command",
        "drop policy \"Users can update own messages\" on public.messages",
    ),
    sql(
        "the old add_message() is put back",
        FLIPPED,
        By::Flip,
        "have changed since the flip: function public.add_message",
        "create or replace function public.add_message(p_conversation_id uuid, p_role text, p_content text,
           p_image_url text default null, p_metadata jsonb default '{}') returns uuid language sql security definer
           set search_path = pg_catalog, pg_temp as 'insert into public.messages (conversation_id, role, content)
             values (p_conversation_id, p_role, p_content) returning id'",
    ),
    sql(
        "row level security is disabled",
        FLIPPED,
        By::ComparisonAfter,
        "row level security is not enabled",
        "alter table public.messages disable row level security",
    ),
];
