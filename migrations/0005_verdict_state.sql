-- The catalog as it was when a verdict was made, as digests by item; a verdict without it does not hold.
alter table backfilld.verdict add column state jsonb;
-- The catalog as the flip left it, by which later changes are known.
create table backfilld.flipped (
  job text primary key references backfilld.job on delete cascade,
  state jsonb not null,
  at timestamptz not null default clock_timestamp()
);
