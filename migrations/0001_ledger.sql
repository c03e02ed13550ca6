-- The ledger: everything that backfilld must remember. It lives in the database it works on, so that a batch and its
-- checkpoint commit together, and a failover loses both or neither.

create table backfilld.job (
  name text primary key,
  -- the job as it was started: JobSpec as JSON, and the hash that a restart has to match
  spec jsonb not null,
  spec_hash text not null,
  -- version of the meaning of `spec` and of the checkpoints; an older binary refuses a newer one
  format_version int not null,
  phase text not null default 'preflight'
    check (phase in ('preflight', 'expand', 'backfill', 'verify', 'constrain', 'flip', 'watch', 'done')),
  status text not null default 'running'
    check (status in ('running', 'paused', 'held', 'failed', 'rolling_back', 'rolled_back', 'done')),
  -- why it stands where it stands, and what an operator can do about it
  reason text not null default '',
  hint text not null default '',
  -- hold points that an operator has released
  released text[] not null default '{}',
  drop_column boolean not null default false,
  created_at timestamptz not null default clock_timestamp(),
  phase_since timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp()
);

-- Who may work on a job. Every batch transaction locks its row FOR KEY SHARE: a heartbeat changes no key column and passes,
-- a takeover changes the key and waits for the batch. The holder is random, since a failover can lose an epoch and
-- issue it again.
create table backfilld.lease (
  job text primary key references backfilld.job on delete cascade,
  epoch bigint not null,
  holder uuid not null,
  instance text not null,
  host text not null default '',
  acquired_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  unique (job, epoch, holder)
);

-- How far the backfill is. One row per lane.
create table backfilld.checkpoint (
  job text not null references backfilld.job on delete cascade,
  lane int not null default 0,
  strategy text not null,
  -- last key done and last key to do, as text in the order of the key's columns; null: none yet, or an empty table
  cursor text[],
  upper text[],
  sweep int not null default 1,
  finished boolean not null default false,
  batch_rows int not null,
  rows_scanned bigint not null default 0,
  rows_updated bigint not null default 0,
  batches bigint not null default 0,
  rows_estimate bigint not null default 0,
  started_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  primary key (job, lane)
);

-- Rows that could not be updated. The flip stays blocked while there are any.
create table backfilld.quarantine (
  job text not null references backfilld.job on delete cascade,
  key text[] not null,
  sqlstate text not null,
  message text not null,
  found_at timestamptz not null default clock_timestamp(),
  primary key (job, key)
);

-- What the verifier found, and on what state of the world it holds.
create table backfilld.verdict (
  id bigint generated always as identity primary key,
  job text not null references backfilld.job on delete cascade,
  passed boolean not null,
  rows_checked bigint not null,
  -- {"nulls": 0, "drift": 0, ...}
  counts jsonb not null,
  -- {"drift": [["key"], ...]}: keys only, never values
  samples jsonb not null default '{}',
  job_hash text not null,
  system_identifier text not null,
  timeline int not null,
  duration_ms bigint not null,
  at timestamptz not null default clock_timestamp()
);
create index verdict_job on backfilld.verdict (job, id desc);

-- How things were before we touched them; kept until `backfilld uninstall`.
create table backfilld.snapshot (
  job text not null references backfilld.job on delete cascade,
  kind text not null check (kind in ('policies', 'function', 'column', 'trigger_list')),
  ident text not null,
  definition jsonb not null,
  taken_at timestamptz not null default clock_timestamp(),
  primary key (job, kind, ident)
);

-- What we created, written in the transaction that creates it (or before it, for what cannot run in a transaction), so
-- that rollback removes what is ours and nothing else.
create table backfilld.object (
  job text not null references backfilld.job on delete cascade,
  kind text not null,
  ident text not null,
  created_at timestamptz not null default clock_timestamp(),
  primary key (job, kind, ident)
);

-- What happened, for people: phases, DDL, controls, errors. Never row values.
create table backfilld.event (
  id bigint generated always as identity primary key,
  job text not null,
  at timestamptz not null default clock_timestamp(),
  kind text not null,
  detail jsonb not null default '{}',
  actor text not null default session_user
);
create index event_job on backfilld.event (job, id desc);
