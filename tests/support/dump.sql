-- The schema as text, a line for each thing: what pg_dump would show of it, for servers that are newer than the pg_dump at
-- hand. $1 is one table's name, or null for everything but our ledger. Defaults of access privileges are written out, as
-- revoking what was granted leaves them so.
with namespaces as (
  select n.* from pg_namespace n
  where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'backfilld') and n.nspname !~ '^pg_(temp|toast_temp)_'
), relations as (
  select c.*, c.oid::regclass::text as name from pg_class c join namespaces n on n.oid = c.relnamespace
  where c.oid = coalesce(to_regclass($1::text), c.oid)
), things(name, what, ordinal, text, acl, comment) as (
  select n.nspname::text, 'schema', 0, format('owner %s', n.nspowner::regrole),
         coalesce(n.nspacl, acldefault('n', n.nspowner)), obj_description(n.oid, 'pg_namespace')
  from namespaces n where $1::text is null
  union all
  select r.name, 'relation', 0,
         format('%s owner %s options %s security %s %s identity %s persistence %s view %s', r.relkind, r.relowner::regrole,
                r.reloptions, r.relrowsecurity, r.relforcerowsecurity, r.relreplident, r.relpersistence,
                case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end),
         coalesce(r.relacl, case when r.relkind in ('r', 'p', 'v', 'm', 'f') then acldefault('r', r.relowner) end),
         obj_description(r.oid, 'pg_class')
  from relations r
  union all
  select r.name, 'column',
         row_number() over (partition by r.oid order by a.attnum),
         format('%I %s not null %s default %s identity %s generated %s storage %s collation %s', a.attname,
                format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attidentity,
                a.attgenerated, a.attstorage, a.attcollation::regcollation),
         a.attacl, col_description(r.oid, a.attnum)
  from relations r
  join pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
  left join pg_attrdef d on d.adrelid = r.oid and d.adnum = a.attnum
  where r.relkind <> 'i'
  union all
  select r.name, 'constraint', 0, format('%I %s validated %s', c.conname, pg_get_constraintdef(c.oid), c.convalidated), null,
         obj_description(c.oid, 'pg_constraint')
  from relations r join pg_constraint c on c.conrelid = r.oid
  union all
  select r.name, 'index', 0,
         format('%s valid %s clustered %s identity %s', pg_get_indexdef(i.indexrelid), i.indisvalid, i.indisclustered,
                i.indisreplident), null, obj_description(i.indexrelid, 'pg_class')
  from relations r join pg_index i on i.indrelid = r.oid
  union all
  select r.name, 'trigger', 0, format('%s enabled %s', pg_get_triggerdef(t.oid), t.tgenabled), null,
         obj_description(t.oid, 'pg_trigger')
  from relations r join pg_trigger t on t.tgrelid = r.oid and not t.tgisinternal
  union all
  select r.name, 'policy', 0,
         format('%I %s permissive %s to %s using %s check %s', p.polname, p.polcmd, p.polpermissive,
                (select string_agg(x::regrole::text, ' ' order by x::regrole::text) from unnest(p.polroles) x),
                pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)), null,
         obj_description(p.oid, 'pg_policy')
  from relations r join pg_policy p on p.polrelid = r.oid
  union all
  select r.name, 'rule', 0, pg_get_ruledef(w.oid), null, obj_description(w.oid, 'pg_rewrite')
  from relations r join pg_rewrite w on w.ev_class = r.oid and w.rulename <> '_RETURN'
  union all
  select r.name, 'publication', 0, p.pubname::text, null, null
  from relations r join pg_publication_rel l on l.prrelid = r.oid join pg_publication p on p.oid = l.prpubid
  union all
  select p.oid::regprocedure::text, 'function', 0, format('%s owner %s', pg_get_functiondef(p.oid), p.proowner::regrole),
         coalesce(p.proacl, acldefault('f', p.proowner)), obj_description(p.oid, 'pg_proc')
  from pg_proc p join namespaces n on n.oid = p.pronamespace where p.prokind <> 'a' and $1::text is null
  union all
  select format_type(t.oid, null), 'type', 0, format('%s owner %s', t.typtype, t.typowner::regrole),
         coalesce(t.typacl, acldefault('T', t.typowner)), obj_description(t.oid, 'pg_type')
  from pg_type t join namespaces n on n.oid = t.typnamespace where t.typtype in ('d', 'e', 'r') and $1::text is null
  union all
  select p.pubname::text, 'publication', 0, to_jsonb(p)::text, null, obj_description(p.oid, 'pg_publication')
  from pg_publication p where $1::text is null
  union all
  select e.evtname::text, 'event trigger', 0, format('%s %s', e.evtfoid::regprocedure, e.evtenabled), null, null
  from pg_event_trigger e where $1::text is null
  union all
  select x.extname::text, 'extension', 0, x.extversion, null, null from pg_extension x where $1::text is null
)
select coalesce(string_agg(
         format('%s %s %s: %s privileges %s comment %s', what, name, ordinal, text,
                (select string_agg(a::text, ' ' order by a::text collate "C") from unnest(acl) a), comment),
         e'\n' order by name collate "C", what, ordinal, text collate "C"), '')
from things
