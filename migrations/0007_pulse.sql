-- The small write by which the daemon feels how long commits take. Nothing reads it. Room for HOT updates on its page.
create table backfilld.pulse (
  job text primary key references backfilld.job on delete cascade,
  at timestamptz not null
) with (fillfactor = 50);
