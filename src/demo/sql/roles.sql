-- Supabase's roles, and the daemon's. Roles belong to the whole server: this runs once per server, and again harmlessly.
set client_min_messages = warning;

do $$
declare
  wanted record;
begin
  for wanted in
    select * from (values
      ('anon', 'nologin noinherit'),
      ('authenticated', 'nologin noinherit'),
      ('service_role', 'nologin noinherit bypassrls'),
      -- What the API server logs in as; it becomes one of the three above for each request.
      ('authenticator', 'login noinherit'),
      -- Owns schema auth; the sign-in service logs in as this.
      ('supabase_auth_admin', 'login noinherit createrole'),
      -- Owns the application's tables and functions.
      ('app_owner', 'login'),
      -- The daemon's own login, which nobody else uses.
      ('backfilld', 'login bypassrls')
    ) as r(name, attributes)
  loop
    if not exists (select from pg_roles where rolname = wanted.name) then
      execute format('create role %I %s', wanted.name, wanted.attributes);
    end if;
  end loop;

  -- Who may set the parameters for batches: from version 15 on this can be granted, before it takes a superuser.
  if current_setting('server_version_num')::int >= 150000 then
    execute 'grant set on parameter session_replication_role, wal_compression to backfilld';
  else
    -- Then nobody's dedicated login, see login_is_dedicated.
    alter role backfilld superuser;
  end if;
end
$$;

grant anon, authenticated, service_role to authenticator;

-- As the platform sets them: an application request that waits longer fails.
alter role authenticator set statement_timeout = '8s';
alter role authenticator set lock_timeout = '8s';

-- Owner's rights for DDL; the API roles for comparing what each of them sees.
grant app_owner to backfilld;
grant anon, authenticated, service_role to backfilld with admin option;
-- Makes the roles on which new policies are tried before the flip.
alter role backfilld createrole;
-- Reading other sessions' state, and ending a predecessor's sessions.
grant pg_monitor, pg_signal_backend to backfilld;

reset client_min_messages;
