-- What operators set while a job runs, over the job file. A row whose time is over counts for nothing.
create table backfilld.tuning (
  job text not null references backfilld.job on delete cascade,
  -- a path in the job file such as throttle.duty, or 'throttled': no batches, for the reason in value
  key text not null,
  -- as it would stand in the job file; text without quotes
  value text not null,
  -- by this server's clock; null: until it is reset
  until timestamptz,
  set_at timestamptz not null default clock_timestamp(),
  set_by text not null default session_user,
  primary key (job, key)
);

-- Counts the changes of a job's tuning. Each batch reads it with its fence, so that a change is seen at once and costs nothing.
alter table backfilld.job add column tuning_version bigint not null default 0;

-- Who set it is the server's word, not the writer's.
create function backfilld.sign_tuning() returns trigger language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.set_at := clock_timestamp();
  new.set_by := session_user;
  return new;
end $$;
create trigger sign before insert or update on backfilld.tuning
  for each row execute function backfilld.sign_tuning();

create function backfilld.count_tuning() returns trigger language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update backfilld.job set tuning_version = tuning_version + 1 where name = coalesce(new.job, old.job);
  return null;
end $$;
create trigger count after insert or update or delete on backfilld.tuning
  for each row execute function backfilld.count_tuning();

-- What an operator may do to a job's row: pause, resume and cutover, as the commands do them, and nothing else. An operator is
-- who has rights on some columns and not on the table; see docs/control.md.
create function backfilld.guard_job() returns trigger language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if has_table_privilege(current_user, tg_relid, 'UPDATE') then
    return new;
  end if;
  if new.status <> old.status
     and (old.status, new.status) not in (('running', 'paused'), ('paused', 'running'), ('failed', 'running'), ('held', 'running')) then
    raise exception 'an operator may not make a job that is % %', old.status, new.status using errcode = '42501';
  end if;
  if old.status = 'held' and new.status = 'running' and not old.phase = any (new.released) and not new.phase = 'verify' then
    raise exception 'a hold point is released with backfilld cutover' using errcode = '42501';
  end if;
  if new.status = 'running' and old.status <> 'running' and new.phase in ('constrain', 'flip') then
    raise exception 'a job that goes on before % has to be verified anew', new.phase using errcode = '42501';
  end if;
  -- Back only, and only while the job stands.
  if new.phase <> old.phase
     and (old.status not in ('paused', 'failed', 'held') or (old.phase, new.phase) not in (('verify', 'backfill'),
       ('constrain', 'verify'), ('flip', 'verify'), ('backfill', 'backfill'))) then
    raise exception 'an operator may not move a job from % to %', old.phase, new.phase using errcode = '42501';
  end if;
  if new.released <> old.released and not (old.status = 'held' and new.released = old.released || old.phase) then
    raise exception 'an operator may release the hold point at which the job stands, and no other' using errcode = '42501';
  end if;
  return new;
end $$;
create trigger guard before update on backfilld.job
  for each row execute function backfilld.guard_job();
