-- What a proof depends on in the catalog, an item a line: stage, item, definition. Parameters: 1 tables (quoted names), the
-- target first; 2, 3 columns that matter, as table and column; 4 columns that the job fills (target); 5 names of our
-- triggers; 6 names of the constraints and indexes that the job makes on the target; 7 signatures of the job's functions;
-- 8, 9 functions that expressions call, as schema and name.
with rel as (
  select o.name, to_regclass(o.name)::oid as oid, o.n = 1 as is_target
  from unnest($1::text[]) with ordinality as o(name, n)
), col as (
  select r.oid, r.name as rel, w.column_name, a.attnum, a.atttypid, a.atttypmod, a.attcollation, a.attgenerated,
         case when r.is_target and w.column_name = any ($4::text[]) then pg_get_expr(d.adbin, d.adrelid) end as filled_default,
         a.attnotnull and not (r.is_target and w.column_name = any ($4::text[])) as not_null
  from unnest($2::text[], $3::text[]) as w(rel, column_name) join rel r on r.name = w.rel
  left join pg_attribute a on a.attrelid = r.oid and a.attname = w.column_name and a.attnum > 0 and not a.attisdropped
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
), cols as (
  select oid, array_agg(attnum) filter (where attnum is not null) as nums from col group by oid
), trg as (
  select r.name as rel, t.oid, t.tgname, t.tgfoid, t.tgenabled, t.tgname = any ($5::text[]) as ours, t.xmin::text as version
  from rel r join pg_trigger t on t.tgrelid = r.oid and not t.tgisinternal
  -- of others: what can change a row of the target before it is stored
  where t.tgname = any ($5::text[]) or (r.is_target and t.tgtype & 3 = 3 and t.tgtype & 20 <> 0)
), fn as (
  -- a function of ours, or that a value needs
  select p.oid, bool_or(x.ours) as ours from (
    select tgfoid as oid, ours from trg
    union all
    select p.oid, false from unnest($8::text[], $9::text[]) as f(schema_name, function_name)
    join pg_namespace n on n.nspname = f.schema_name join pg_proc p on p.pronamespace = n.oid and p.proname = f.function_name
  ) x join pg_proc p on p.oid = x.oid group by p.oid
), item(stage, item, definition) as (
  select 'data', 'table ' || name, concat_ws(' ', r.oid, c.relkind, c.relpersistence) from rel r left join pg_class c on c.oid = r.oid
  union all
  select 'data', format('column %s of %s', column_name, rel),
         case when attnum is not null then concat_ws(' ', format_type(atttypid, atttypmod), attcollation::regcollation, attgenerated, not_null, filled_default)
         end
  from col
  union all
  -- the version shows that a trigger was disabled and enabled again, or made anew
  select 'data', format('trigger %s on %s', tgname, rel),
         concat_ws(' ', tgenabled, case when ours then version end, pg_get_triggerdef(oid))
  from trg
  union all
  -- without version: whoever makes it anew as it was has mended it
  select 'data', format('definition of trigger %s on %s', tgname, rel), pg_get_triggerdef(oid) from trg where ours
  union all
  select 'data', 'function ' || p.oid::regprocedure::text,
         concat_ws(' ', case when fn.ours then p.xmin::text end, p.prolang, p.prosecdef, p.proconfig::text, r.rolname, p.probin, p.prosrc)
  from fn join pg_proc p on p.oid = fn.oid join pg_roles r on r.oid = p.proowner
  union all
  select 'data', format('constraint %s of %s', c.conname, r.name), concat_ws(' ', pg_get_constraintdef(c.oid), c.convalidated)
  from rel r join cols using (oid) join pg_constraint c on c.conrelid = r.oid and c.contype in ('p', 'u', 'f') and c.conkey && cols.nums
  where not (r.is_target and c.conname = any ($6::text[]))
  union all
  select 'data', format('unique index %s of %s', i.indexrelid::regclass, r.name), pg_get_indexdef(i.indexrelid)
  from rel r join cols using (oid)
  join pg_index i on i.indrelid = r.oid and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
                 and i.indkey::int2[] <@ cols.nums
  join pg_class c on c.oid = i.indexrelid
  where not (r.is_target and c.relname = any ($6::text[]))
  union all
  select 'data', format('rule %s on %s', w.rulename, r.name), concat_ws(' ', w.ev_enabled, pg_get_ruledef(w.oid))
  from rel r join pg_rewrite w on w.ev_class = r.oid and w.rulename <> '_RETURN'
  union all
  select 'access', 'row level security of ' || r.name, concat_ws(' ', c.relrowsecurity, c.relforcerowsecurity)
  from rel r join pg_class c on c.oid = r.oid
  union all
  select 'access', format('policy %s on %s', quote_ident(p.polname), r.name),
         concat_ws(' ', p.polcmd, p.polpermissive,
                   (select string_agg(coalesce(a.rolname, 'public'), ',' order by coalesce(a.rolname, 'public'))
                    from unnest(p.polroles) x(oid) left join pg_roles a on a.oid = x.oid),
                   pg_get_expr(p.polqual, p.polrelid), '/', pg_get_expr(p.polwithcheck, p.polrelid))
  from rel r join pg_policy p on p.polrelid = r.oid
  union all
  select 'access', 'function ' || s.signature,
         concat_ws(' ', pg_get_functiondef(p.oid), r.rolname, p.proacl::text)
  from unnest($7::text[]) as s(signature) left join pg_proc p on p.oid = to_regprocedure(s.signature)
  left join pg_roles r on r.oid = p.proowner
  union all
  -- what policies call
  select distinct 'access', 'function ' || p.oid::regprocedure::text, concat_ws(' ', p.proconfig::text, p.prosecdef, p.proacl::text, p.prosrc)
  from rel r join pg_policy y on y.polrelid = r.oid
  join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = y.oid and d.refclassid = 'pg_proc'::regclass
  join pg_proc p on p.oid = d.refobjid and p.oid <> all (select to_regprocedure(s)::oid from unnest($7::text[]) s where to_regprocedure(s) is not null)
)
select stage, item, encode(sha256(convert_to(coalesce(string_agg(definition, ' ' order by definition), ''), 'UTF8')), 'hex')
from item group by stage, item
