-- A walk in heap order by several lanes: each has a row of its own, with its range of pages.
alter table backfilld.checkpoint
  add column heap_start bigint not null default 0;
