-- Checkpoints of walks in heap order: see backfill/heap_cursor.rs. The file node says for which file the pages count: a
-- rewrite of the table (VACUUM FULL, CLUSTER, TRUNCATE) begins the sweep anew.
alter table backfilld.checkpoint
  add column filenode oid,
  add column heap_window bigint,
  add column heap_block bigint,
  add column heap_round int,
  add column heap_rounds int,
  add column heap_bound bigint;
