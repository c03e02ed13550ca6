-- What `backfilld report` tells of the past. Written by the daemon under its lease, thinned to about a thousand rows per job.
create table backfilld.sample (
  job text not null references backfilld.job on delete cascade,
  at timestamptz not null default clock_timestamp(),
  -- phase or status, as the daemon shows it
  phase text not null,
  rows_scanned bigint not null,
  rows_updated bigint not null,
  batches bigint not null,
  -- WAL of the whole server since its beginning, in bytes
  wal_bytes bigint not null,
  table_bytes bigint not null,
  index_bytes bigint not null,
  -- {"signal": milliseconds}: how long batches have waited so far
  throttled_ms jsonb not null default '{}',
  -- of the batches since the sample before; null: none
  batch_p50_ms double precision,
  batch_p99_ms double precision,
  primary key (job, at)
);

-- EXPLAIN (ANALYZE, BUFFERS) of the application's queries under row level security, before and after the flip.
create table backfilld.query_plan (
  job text not null references backfilld.job on delete cascade,
  stage text not null check (stage in ('before', 'after')),
  query text not null,
  role text not null,
  -- whose rows: 'small', 'median', 'large'
  owner text not null check (owner in ('small', 'median', 'large')),
  -- the owner's value of the job's first column, and target rows with it
  owner_key text not null,
  owner_rows bigint not null,
  -- planning and execution, in milliseconds, the median of some runs; blocks of the server that were touched
  time_ms double precision,
  buffers bigint,
  -- nodes of the plan, outermost first; never conditions, which can hold values
  nodes jsonb not null default '[]',
  -- why it could not be measured; empty: it could
  error text not null default '',
  at timestamptz not null default clock_timestamp(),
  primary key (job, stage, query, owner)
);
