-- A message is written by the owner of its conversation, or by the service role, which acts for the owner.
-- A caller without a user id is nobody's owner: "is distinct from" refuses it, where "!=" would let NULL pass.
create or replace function public.add_message(
  p_conversation_id uuid,
  p_role text,
  p_content text,
  p_image_url text default null,
  p_metadata jsonb default '{}'
) returns uuid
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_message_id uuid;
  v_owner uuid;
begin
  select c.auth_user_id into v_owner from public.conversations c where c.id = p_conversation_id;

  if v_owner is null then
    raise exception 'conversation % not found or without owner', p_conversation_id
      using errcode = 'no_data_found';
  end if;

  -- The setting "role" still names the caller's role inside a security definer function; current_user does not.
  if v_owner is distinct from auth.uid() and current_setting('role', true) is distinct from 'service_role' then
    raise exception 'permission denied: conversation % belongs to another user', p_conversation_id
      using errcode = 'insufficient_privilege';
  end if;

  insert into public.messages (conversation_id, role, content, image_url, metadata, auth_user_id)
  values (p_conversation_id, p_role, p_content, p_image_url, p_metadata, v_owner)
  returning id into v_message_id;

  update public.conversations set updated_at = now() where id = p_conversation_id;

  return v_message_id;
end;
$$;

comment on function public.add_message(uuid, text, text, text, jsonb) is
  'Insert message with auth_user_id from conversation. Includes ownership validation.';
