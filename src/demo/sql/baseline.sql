-- What the rows looked like before anything ran; the oracle compares with it. The new column is not part of it.
create schema demo;
create unlogged table demo.baseline as
  select id, conversation_id, updated_at,
    hash_record_extended(row(role, content, image_url, metadata, created_at), 0) as fingerprint
  from public.messages;
alter table demo.baseline add primary key (id);
analyze demo.baseline;
