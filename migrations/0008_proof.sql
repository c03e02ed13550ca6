-- How far a verification is, so that a daemon that was killed goes on there: on what it is made, and where it stands.
create table backfilld.verification (
  job text primary key references backfilld.job on delete cascade,
  job_hash text not null,
  system_identifier text not null,
  timeline int not null,
  state jsonb not null,
  walk jsonb not null,
  started_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp()
);

-- Keys of rows that are wrong, some of each kind; the verdict has the counts. 'verify': as of the last verdict. 'watch': since
-- the flip, until they are mended.
create table backfilld.finding (
  job text not null references backfilld.job on delete cascade,
  origin text not null check (origin in ('verify', 'watch')),
  kind text not null,
  key text[] not null,
  found_at timestamptz not null default clock_timestamp(),
  primary key (job, origin, kind, key)
);

-- Rows in quarantine that an operator has decided about: they stay without a value.
alter table backfilld.quarantine
  add column accepted_at timestamptz,
  add column accepted_by text,
  add column accepted_why text,
  add constraint quarantine_accepted check ((accepted_at is null) = (accepted_by is null)
                                            and (accepted_at is null) = (accepted_why is null));

-- What the watch after the flip has seen.
create table backfilld.watch (
  job text primary key references backfilld.job on delete cascade,
  since timestamptz not null,
  checked_at timestamptz,
  passes bigint not null default 0,
  -- the next page of the table to compare, of the file with this node
  filenode oid not null default 0,
  page bigint not null default 0,
  -- first pages of ranges with rows that were found wrong, looked at again in each pass
  dirty bigint[] not null default '{}',
  -- {"policy_drift": ["policy x has changed"], ...}: what is wrong now
  findings jsonb not null default '{}'
);
