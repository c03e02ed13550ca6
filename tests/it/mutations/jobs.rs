//! Defects in the job: new policies and functions that are not the old ones in another form.

use super::table::{By, Defect, Moment, job};

pub const DEFECTS: &[Defect] = &[
    job("nothing: the shipped job", By::Harmless, "", &[]),
    job(
        "select: using (true)",
        By::Comparison,
        "leftover permissive policy",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"true\"",
        )],
    ),
    job(
        "select: any owner will do (is not null)",
        By::Comparison,
        "too wide",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id is not null\"",
        )],
    ),
    job(
        "select: everybody's but the own rows (<>)",
        By::Comparison,
        "select rows",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id <> (select auth.uid())\"",
        )],
    ),
    job(
        "select: swapped column",
        By::Comparison,
        "compare another column",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"conversation_id = (select auth.uid())\"",
        )],
    ),
    job(
        "select: wrong role",
        By::Comparison,
        "missing role",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"anon\"]\nusing = \"auth_user_id = (select auth.uid())\"",
        )],
    ),
    job(
        "select: to public instead of the role",
        By::Remark,
        "is for public",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"public\"]\nusing = \"auth_user_id = (select auth.uid())\"",
        )],
    ),
    job(
        "select: anonymous users may see rows without a user (is not distinct from)",
        By::Comparison,
        "anon without a user: select rows",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\nroles = [\"authenticated\", \"anon\"]\nusing = \"auth_user_id = coalesce((select auth.uid()), auth_user_id)\"",
        )],
    ),
    job(
        "select: restrictive instead of permissive",
        By::Comparison,
        "missing command: no new policy is for select",
        &[(
            "command = \"select\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"select\"\npermissive = false\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
        )],
    ),
    job(
        "no policy for update (missing command)",
        By::Comparison,
        "missing command",
        &[(
            "[[policies.create]]\nname = \"Users can update own messages\"\ncommand = \"update\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"\ncheck = \"auth_user_id = (select auth.uid())\"",
            "",
        )],
    ),
    job(
        "no policy for insert (missing command)",
        By::Comparison,
        "missing command",
        &[(
            "[[policies.create]]\nname = \"Users can insert own messages\"\ncommand = \"insert\"\nroles = [\"authenticated\"]\ncheck = \"auth_user_id = (select auth.uid())\"",
            "",
        )],
    ),
    job(
        "insert: with check (true)",
        By::Comparison,
        "foreign parent",
        &[(
            "command = \"insert\"\nroles = [\"authenticated\"]\ncheck = \"auth_user_id = (select auth.uid())\"",
            "command = \"insert\"\nroles = [\"authenticated\"]\ncheck = \"true\"",
        )],
    ),
    job(
        "insert: no WITH CHECK at all",
        By::Load,
        "check",
        &[(
            "command = \"insert\"\nroles = [\"authenticated\"]\ncheck = \"auth_user_id = (select auth.uid())\"",
            "command = \"insert\"\nroles = [\"authenticated\"]",
        )],
    ),
    job(
        "update: WITH CHECK (true), so rows can be given away",
        By::Comparison,
        "update rows as written, all users",
        &[(
            "check = \"auth_user_id = (select auth.uid())\"\n\n[[policies.create]]\nname = \"Users can delete",
            "check = \"true\"\n\n[[policies.create]]\nname = \"Users can delete",
        )],
    ),
    job(
        "update: USING (true), so foreign rows can be taken",
        By::Comparison,
        "update rows there, all users",
        &[(
            "command = \"update\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"update\"\nroles = [\"authenticated\"]\nusing = \"true\"",
        )],
    ),
    job(
        "delete: using (true)",
        By::Comparison,
        "delete rows there, all users",
        &[(
            "command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"true\"",
        )],
    ),
    job(
        "delete: one condition more",
        By::Comparison,
        "delete own row",
        &[(
            "command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid())\"",
            "command = \"delete\"\nroles = [\"authenticated\"]\nusing = \"auth_user_id = (select auth.uid()) and role = 'nobody'\"",
        )],
    ),
    job(
        "a policy for all commands with using (true) besides the right ones",
        By::Comparison,
        "leftover permissive policy",
        &[(
            "[[policies.create]]\nname = \"Users can view own messages\"",
            "[[policies.create]]\nname = \"Debug\"\ncommand = \"all\"\nroles = [\"authenticated\"]\nusing = \"true\"\ncheck = \"true\"\n\n[[policies.create]]\nname = \"Users can view own messages\"",
        )],
    ),
    job(
        "a role of [access] owns the table, so no policy stops it",
        By::Check,
        "app_owner bypasses row level security",
        &[("roles = [\"authenticated\"]\nanonymous", "roles = [\"authenticated\", \"app_owner\"]\nanonymous")],
    ),
    Defect {
        name: "a role of [access] has BYPASSRLS",
        moment: Moment::Job,
        sql: "create role \"{role}\" bypassrls in role authenticated; grant \"{role}\" to backfilld with admin option",
        job: &[("roles = [\"authenticated\"]\nanonymous", "roles = [\"authenticated\", \"{role}\"]\nanonymous")],
        by: By::Check,
        says: "bypasses row level security",
    },
    job(
        "add_message() writes into everybody's conversation, as the old one did",
        By::Comparison,
        "was to become narrower",
        &[("-- v_owner is distinct from auth.uid()", "false")],
    ),
    job(
        "add_message() compares with !=, so a caller without user passes",
        By::Nobody("the old function let such a caller write as well, so nobody's access changes"),
        "",
        &[("-- v_owner is distinct from auth.uid()", "v_owner != auth.uid()")],
    ),
    job(
        "add_message() refuses the owner as well",
        By::Comparison,
        "call add_message, own row",
        &[("-- v_owner is distinct from auth.uid()", "true")],
    ),
    job(
        "add_message() without search_path",
        By::Remark,
        "search_path",
        &[("-- set search_path = pg_catalog, pg_temp\n", "")],
    ),
    job(
        "add_message() runs as its caller (SECURITY INVOKER)",
        By::Remark,
        "add_message",
        &[("-- security definer\n", "security invoker\n")],
    ),
    job(
        "add_message() is taken from the users (EXECUTE revoked)",
        By::Comparison,
        "execute public.add_message",
        &[(
            "-- comment on function",
            "revoke execute on function public.add_message(uuid, text, text, text, jsonb) from public;\ngrant execute on function public.add_message(uuid, text, text, text, jsonb) to service_role;\ncomment on function",
        )],
    ),
    Defect {
        name: "add_message() is given to anonymous callers (EXECUTE granted)",
        moment: Moment::Job,
        sql: "revoke execute on function public.add_message from public; grant execute on function public.add_message to authenticated, service_role",
        job: &[(
            "-- comment on function",
            "grant execute on function public.add_message(uuid, text, text, text, jsonb) to anon;\ncomment on function",
        )],
        by: By::Comparison,
        says: "anon without a user: execute public.add_message",
    },
    Defect {
        name: "a policy stays that is ORed with the new ones and shows what the old ones' restrictive policy hid",
        moment: Moment::Job,
        sql: "create policy support on public.messages for select to authenticated using (role <> 'nobody');
              create policy mine on public.messages as restrictive for select to authenticated using (
                conversation_id in (select c.id from public.conversations c where c.auth_user_id = auth.uid()))",
        job: &[("replace = [", "replace = [\n  \"mine\","), ("keep = []", "keep = [\"support\"]")],
        by: By::Check,
        says: "is restrictive and shall go",
    },
    job(
        "the value of the column comes from another column of the source",
        By::Check,
        "conversations.user_id -> users.auth_user_id",
        &[("value = \"c.auth_user_id\"", "value = \"c.user_id\"")],
    ),
    job(
        "the source is joined by the wrong column",
        By::Check,
        "",
        &[(
            "alias = \"c\"\ntable = \"public.conversations\"\non = { id = \"t.conversation_id\" }\n\n[[columns]]",
            "alias = \"c\"\ntable = \"public.conversations\"\non = { id = \"t.id\" }\n\n[[columns]]",
        )],
    ),
];
