-- Old access against new access: one run before the flip, one after it. Keys and user ids, never other values of a row.
create table backfilld.access_run (
  id bigint generated always as identity primary key,
  job text not null references backfilld.job on delete cascade,
  stage text not null check (stage in ('before', 'after')),
  -- null: not finished; a restart goes on with it
  passed boolean,
  -- the job with its [access]; policies, functions, triggers and roles; the server: on these the result holds
  content_hash text not null,
  state_hash text not null,
  system_identifier text not null,
  timeline int not null,
  -- comparison of all users by sets: users, and (user, row) pairs under the old policies; null: not made, see notes
  set_users bigint,
  set_rows bigint,
  set_ms bigint,
  -- what was left out, and why; list of sentences
  notes jsonb not null default '[]',
  started_at timestamptz not null default clock_timestamp(),
  finished_at timestamptz
);
create index access_run_job on backfilld.access_run (job, id desc);

-- What one attempt gave before and after, as the server enforces it.
create table backfilld.access_result (
  run bigint not null references backfilld.access_run on delete cascade,
  role text not null,
  -- 'user', 'stranger' (a user that does not exist), 'nobody' (no user)
  who text not null check (who in ('user', 'stranger', 'nobody')),
  user_id text not null default '',
  command text not null check (command in ('select', 'insert', 'update', 'delete', 'call', 'execute', 'policies')),
  attempt text not null,
  -- '12 rows', '1 row', 'error 42501', 'ok', 'allowed'
  before text not null,
  after text not null,
  verdict text not null check (verdict in ('same', 'accepted', 'different')),
  effect text not null default '',
  -- lists of keys, each a list of texts; up to access.keys of them
  only_before jsonb not null default '[]',
  only_after jsonb not null default '[]',
  -- why, as far as can be told; for an accepted difference the job's reason
  cause text not null default '',
  at timestamptz not null default clock_timestamp(),
  primary key (run, role, who, user_id, command, attempt)
);
