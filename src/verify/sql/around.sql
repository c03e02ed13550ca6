-- What leads around policies or stands beside them after the flip, an item a line: item, definition. Parameters: 1 target (quoted
-- name); 2 names of the constraints and indexes that the job makes on it; 3 signatures of the job's functions.
with recursive target as (
  select c.oid, c.relname::text as name, c.relowner, coalesce(c.relacl, acldefault('r', c.relowner)) as acl
  from pg_class c where c.oid = to_regclass($1)
), over as (
  select oid from target
  union
  select w.ev_class from over o
  join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = o.oid and d.classid = 'pg_rewrite'::regclass
  join pg_rewrite w on w.oid = d.objid join pg_class v on v.oid = w.ev_class
  where v.relkind in ('v', 'm') and w.ev_class <> o.oid
), item(item, definition) as (
  -- TRUNCATE and REFERENCES look at no policy
  select 'rights on ' || $1, (select string_agg(a::text, ' ' order by a::text) from unnest(t.acl) as a) || coalesce(
           (select string_agg(concat_ws(' ', c.attname, c.attacl::text), ' ' order by c.attnum)
            from pg_attribute c where c.attrelid = t.oid and c.attacl is not null), '')
  from target t
  union all
  -- they read with their owner's rights, or keep what it saw
  select 'view ' || v.oid::regclass::text,
         concat_ws(' ', v.relkind, v.reloptions::text, v.relacl::text, v.relowner::regrole, pg_get_viewdef(v.oid))
  from over join pg_class v using (oid) where v.oid <> (select oid from target)
  union all
  -- they run with their owner's rights; a body may also be put together from strings, which nobody can see
  select 'security definer function ' || p.oid::regprocedure::text,
         concat_ws(' ', p.proconfig::text, p.proacl::text, p.proowner::regrole, p.prosrc, pg_get_function_sqlbody(p.oid))
  from target t join pg_proc p on p.prosecdef and p.prokind in ('f', 'p')
  join pg_namespace n on n.oid = p.pronamespace and n.nspname not in ('pg_catalog', 'backfilld', 'backfilld_sync')
  where concat_ws(' ', p.prosrc, pg_get_function_sqlbody(p.oid))
          ~* ('\m' || regexp_replace(t.name, '([^[:alnum:]_])', '\\\1', 'g') || '\M')
    and p.oid <> all (select to_regprocedure(s)::oid from unnest($3::text[]) as s where to_regprocedure(s) is not null)
  union all
  select format('constraint %s of %s', c.conname, $1), replace(pg_get_constraintdef(c.oid), ' NOT VALID', '')
  from target t join pg_constraint c on c.conrelid = t.oid and c.conname = any ($2::text[])
  union all
  select format('index %s of %s', c.relname, $1), pg_get_indexdef(i.indexrelid)
  from target t join pg_index i on i.indrelid = t.oid join pg_class c on c.oid = i.indexrelid and c.relname = any ($2::text[])
)
select item, encode(sha256(convert_to(coalesce(definition, ''), 'UTF8')), 'hex') from item
