-- Sample data, the same for the same demo.rows and demo.seed. Set-based; foreign keys and triggers are skipped, because
-- the rows are right by construction. Run by a superuser.
set session_replication_role = replica;
set synchronous_commit = off;

-- A version 4 uuid and a number in [0, 1), both from (seed, kind, n).
create function pg_temp.demo_uuid(kind text, n bigint) returns uuid language sql stable as $$
  select overlay(
    overlay(md5(current_setting('demo.seed') || kind || n) placing '4' from 13 for 1)
    placing substr('89ab', 1 + (n % 4)::int, 1) from 17 for 1
  )::uuid
$$;
create function pg_temp.demo_unit(kind int, n bigint) returns float8 language sql stable as $$
  select (hashint8extended(n, current_setting('demo.seed')::bigint * 31 + kind) & 4503599627370495)::float8
    / 4503599627370496
$$;

-- Hundred messages and five conversations to a user. One user in fifty, at least four, is about to leave; every second
-- of those has no conversation, the others share one conversation in fifty.
create temporary table demo_size as
  select rows, users, conversations, greatest(4, users / 50) as leaving
  from (
    select rows, greatest(20, rows / 100) as users, greatest(60, rows / 20) as conversations
    from (select current_setting('demo.rows')::bigint as rows) r
  ) s;

insert into auth.users (id, email)
  select pg_temp.demo_uuid('auth', n),
    case when n > users - leaving then 'leaving-' else 'user-' end || n || '@example.test'
  from demo_size, generate_series(1, users) n;

insert into public.users (id, auth_user_id, display_name, created_at, updated_at)
  select pg_temp.demo_uuid('user', n), pg_temp.demo_uuid('auth', n), 'User ' || n, t, t
  from demo_size, generate_series(1, users) n,
    lateral (select timestamptz '2024-01-01 00:00:00+00' + n * interval '1 second' as t) time;

insert into public.conversations (id, user_id, auth_user_id, title, created_at, updated_at)
  select pg_temp.demo_uuid('conversation', n), pg_temp.demo_uuid('user', owner), pg_temp.demo_uuid('auth', owner),
    'Conversation ' || n, t, t
  from demo_size, generate_series(1, conversations) n,
    lateral (select case
      when n % 50 = 0 then users - leaving + 1 + 2 * ((n / 50) % (leaving / 2))
      else 1 + floor(pg_temp.demo_unit(1, n) * (users - leaving))::bigint
    end as owner) o,
    lateral (select timestamptz '2024-01-02 00:00:00+00' + n * interval '1 second' as t) time;

-- The rank of a message's conversation follows a Zipf-Mandelbrot law, density 1 / (rank + 10): of 200,000 messages the
-- largest conversation gets about 2,700, the median one about 6, and some get none.
create temporary table demo_message as
  select n, pg_temp.demo_uuid('message', n) as id, 1 + least(conversations - 1,
      floor(10 * power((conversations + 10) / 10::float8, pg_temp.demo_unit(2, n)) - 10)::bigint) as conversation
  from demo_size, generate_series(1, rows) n;

-- Secondary indexes are built after the rows are in, which takes half the time.
select set_config('demo.indexes', string_agg(pg_get_indexdef(i.indexrelid), ';'), true),
  set_config('demo.drop', string_agg(i.indexrelid::regclass::text, ', '), true)
from pg_index i where i.indrelid = 'public.messages'::regclass and not i.indisprimary;
do $$ begin execute 'drop index ' || current_setting('demo.drop'); end $$;

insert into public.messages (id, conversation_id, role, content, image_url, metadata, created_at, updated_at)
  select id, pg_temp.demo_uuid('conversation', conversation),
    case when n % 2 = 0 then 'assistant' else 'user' end,
    'Message ' || n || ': ' || substr(prose, (n * 7919 % 400)::int + 1, (n * 6007 % 120)::int + 90),
    case when n % 25 = 0 then 'https://example.test/images/' || n || '.png' end,
    case when n % 2 = 0 then jsonb_build_object('model', 'm-' || n % 3, 'tokens', n % 900) else '{}' end,
    t, t
  from demo_message,
    lateral (select timestamptz '2024-02-01 00:00:00+00' + n * interval '20 seconds' as t) time,
    (select 'The harbour was quiet when the first boats came in, and nobody on the pier could say which of them had '
      || 'seen the storm and which had only heard of it. A clerk counted crates, twice, because the numbers in the '
      || 'ledger and the numbers on the quay had not agreed for a week. By noon the fog had gone, the cranes moved '
      || 'again, and someone had written the answer in chalk on the side of the warehouse: both were right, the book '
      || 'at dawn and the quay at dusk, and the difference between them was the work of a single careful day in May. '
      || 'Nobody thanked the clerk, who had expected nothing else, and who went on counting until the lamps were lit '
      || 'along the water and the last rope was made fast.' as prose) p;

do $$
declare
  statement text;
begin
  foreach statement in array string_to_array(current_setting('demo.indexes'), ';') loop
    execute statement;
  end loop;
end
$$;

drop function pg_temp.demo_uuid(text, bigint);
drop function pg_temp.demo_unit(int, bigint);
drop table demo_size, demo_message;
reset synchronous_commit;
reset session_replication_role;
