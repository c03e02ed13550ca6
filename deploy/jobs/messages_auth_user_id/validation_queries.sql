-- Validation queries of job messages_auth_user_id; made from job.toml by backfilld, do not edit.
-- psql -X -d <database> -f validation_queries.sql
-- Reads only. Each query reads whole tables: on large ones run it against a standby, or use backfilld check,
-- which reads in chunks.
\set ON_ERROR_STOP on
begin transaction read only;
-- A role to which policies apply gets an error instead of too small a count.
set local row_security = off;
set local search_path = pg_catalog, pg_temp;

\echo ''
\echo '=== public.messages: rows ==='
\echo 'Check 1: rows with NULL conversation_id'
select count(*) as null_reference_count,
  case when count(*) = 0 then 'PASS' else 'FAIL' end as status
from "public"."messages" as t
where (t."conversation_id" is null);
\echo 'Check 2: orphaned rows (source row deleted)'
select count(*) as orphaned_count,
  case when count(*) = 0 then 'PASS' else 'FAIL' end as status
from "public"."messages" as t
  left join "public"."conversations" as "c" on "c"."id" operator(pg_catalog.=) "t"."conversation_id"
where ("c"."id" is null)
  and not (t."conversation_id" is null);
\echo 'Check 3: rows to backfill'
with began as materialized (select clock_timestamp() as at),
sample as materialized (
  select count(*) as n, count((c.auth_user_id))
  from began cross join lateral (
    select x.* from "public"."messages" as x where began.at is not null order by x."id" limit 5000
  ) as t
    left join "public"."conversations" as "c" on "c"."id" operator(pg_catalog.=) "t"."conversation_id"
),
timed as materialized (
  select extract(epoch from clock_timestamp() - began.at) / greatest(sample.n, 1) as row_s
  from sample cross join began
),
cost as materialized (
  select row_s * (1.0 + 0.2 * count(*)) as row_s
  from timed, pg_index where indrelid = '"public"."messages"'::regclass group by row_s
),
total as (select count(*) as n from "public"."messages")
select total.n as total_rows,
  format('estimated %s to %s seconds (measured on 5000 rows)',
    round(total.n * cost.row_s, 2), round(total.n * cost.row_s * 4.0, 2)) as estimate
from total cross join cost;

\echo ''
\echo '=== public.conversations: values ==='
\echo 'Check 4: source rows that give no value'
select count(*) as null_value_count,
  case when count(*) = 0 then 'PASS' else 'FAIL' end as status
from "public"."conversations" as "c"
where ((c.auth_user_id) is null);
\echo 'Check 5: values that the foreign key would refuse'
select count(*) as invalid_references,
  case when count(*) = 0 then 'PASS' else 'FAIL' end as status
from "public"."conversations" as "c"
  left join "auth"."users" as "FK0" on "FK0"."id" = (c.auth_user_id)
where (((c.auth_user_id) is not null and "FK0"."id" is null));

\echo ''
\echo '=== public.messages: row level security ==='
\echo 'Check 6: policies now'
select policyname, cmd, qual is not null as has_using, with_check is not null as has_check,
  case when policyname = any (array['Users can view messages from their conversations', 'Users can insert messages to their conversations', 'Users can update messages in their conversations', 'Users can delete messages from their conversations']::text[]) then 'PASS' else 'FAIL: not in the job' end as status
from pg_policies
where schemaname = 'public' and tablename = 'messages'
order by policyname;
select count(*) as missing_policies,
  case when count(*) = 0 then 'PASS' else 'FAIL' end as status
from unnest(array['Users can view messages from their conversations', 'Users can insert messages to their conversations', 'Users can update messages in their conversations', 'Users can delete messages from their conversations']::text[]) as wanted(name)
where not exists (select from pg_policies where schemaname = 'public' and tablename = 'messages' and policyname = wanted.name);

\echo ''
\echo '=== functions ==='
\echo 'Check 7: functions to replace, with their signatures'
select wanted.signature, p.proname as function_name,
  pg_get_function_identity_arguments(p.oid) as parameters,
  case when p.oid is not null then 'PASS' else 'FAIL' end as status
from (values ('public.add_message(uuid, text, text, text, jsonb)')) as wanted(signature)
left join pg_proc as p on p.oid = to_regprocedure(wanted.signature);

\echo ''
\echo '=== other paths to the value ==='
\echo 'Check 8: rows whose value differs by conversations.user_id -> users.auth_user_id'
select count(*) as disagreeing_rows,
  case when count(*) = 0 then 'PASS' else 'FAIL' end as status
from "public"."messages" as t
  left join "public"."conversations" as "c" on "c"."id" operator(pg_catalog.=) "t"."conversation_id"
  left join lateral (select (u.auth_user_id) as v from (select t."conversation_id" as "conversation_id") as "t"
  join "public"."conversations" as "c" on "c"."id" operator(pg_catalog.=) "t"."conversation_id"
  join "public"."users" as "u" on "u"."id" operator(pg_catalog.=) "c"."user_id") as "AG0" on true
where (c.auth_user_id) is distinct from ("AG0".v)::uuid;
\echo ''
\echo 'All checks complete. Every status must be PASS; backfilld check says what to do about the others.'
rollback;
