-- Every row that must exist against every row that does. A row that the traffic wrote must be as the traffic last left
-- it; a row that it did not write must be as it was generated. 'unknown' is a write whose outcome the client did not
-- learn: both outcomes are right. One row of counts.
with expected as (
  select id, l.conversation_id, l.expected, l.content_sha256, null::bigint as fingerprint, null::timestamptz as updated_at
  from traffic_ledger l
  union all
  select b.id, b.conversation_id, 'generated', null, b.fingerprint, b.updated_at
  from demo.baseline b
  where not exists (select from traffic_ledger l where l.id = b.id)
),
judged as (
  select e.expected, e.id is null as is_unexpected, m.id is not null as is_there,
    gone.conversation_id is not null as may_be_gone, coalesce(gone.certain, false) as is_gone,
    case e.expected
      when 'live' then m.content is not null
        and (m.conversation_id, encode(sha256(convert_to(m.content, 'UTF8')), 'hex'))
          is distinct from (e.conversation_id, e.content_sha256)
      when 'generated' then m.id is not null
        and (m.conversation_id, hash_record_extended(row(m.role, m.content, m.image_url, m.metadata, m.created_at), 0))
          is distinct from (e.conversation_id, e.fingerprint)
      else false
    end as is_altered,
    -- An owner's change may be carried to the messages by a trigger, whose update is the application's own.
    e.expected = 'generated' and moved.conversation_id is null and m.updated_at is distinct from e.updated_at
      and m.id is not null as is_touched
  from expected e
  full join public.messages m on m.id = e.id
  left join traffic_gone gone on gone.conversation_id = e.conversation_id
  left join traffic_moved moved on moved.conversation_id = e.conversation_id
)
select count(*) filter (where expected in ('live', 'generated') and not is_there and not may_be_gone) as lost,
  count(*) filter (where is_altered) as altered,
  count(*) filter (where is_there and (expected = 'deleted' or is_gone)) as resurrected,
  count(*) filter (where is_unexpected) as unexpected,
  count(*) filter (where is_touched) as touched,
  (select count(*) from traffic_broadcast b
    where not exists (select from traffic_ledger l where l.id = b.id)
      and not exists (
        select from demo.baseline g join traffic_moved v on v.conversation_id = g.conversation_id where g.id = b.id
      )) as stray_broadcasts
from judged
