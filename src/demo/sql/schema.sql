-- One application database: schema auth as the platform has it, and the reference's tables, functions, and policies as
-- they were before the migration. Run by a superuser in an empty database, after roles.sql.

create schema auth authorization supabase_auth_admin;

create table auth.users (
  id uuid primary key,
  email text
);
alter table auth.users owner to supabase_auth_admin;

create function auth.uid() returns uuid
language sql stable
as $$
  select
  coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')
  )::uuid
$$;
alter function auth.uid() owner to supabase_auth_admin;

grant usage on schema auth to anon, authenticated, service_role, app_owner, backfilld;
-- A foreign key to auth.users needs REFERENCES for the table's owner; checking all rows at once needs SELECT.
grant select, references on auth.users to app_owner, backfilld;

grant usage, create on schema public to app_owner;
grant usage on schema public to anon, authenticated, service_role;

set role app_owner;

create table public.users (
  id uuid primary key default gen_random_uuid(),
  auth_user_id uuid not null unique references auth.users (id) on delete cascade,
  display_name text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);

create table public.conversations (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references public.users (id) on delete cascade,
  auth_user_id uuid references auth.users (id) on delete cascade,
  title text not null default 'New conversation',
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create index conversations_user_id_idx on public.conversations (user_id);
create index conversations_auth_user_id_idx on public.conversations (auth_user_id);

create table public.messages (
  id uuid primary key default gen_random_uuid(),
  conversation_id uuid not null references public.conversations (id) on delete cascade,
  role text not null check (role in ('user', 'assistant', 'system')),
  content text not null,
  image_url text,
  metadata jsonb not null default '{}',
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create index messages_conversation_id_created_at_idx on public.messages (conversation_id, created_at);
create index messages_created_at_idx on public.messages (created_at);

-- What an update sets off in the application: a time stamp, and a broadcast per row.
create function public.touch_updated_at() returns trigger
language plpgsql
as $$
begin
  new.updated_at = now();
  return new;
end;
$$;

create trigger users_touch before update on public.users
  for each row execute function public.touch_updated_at();
create trigger conversations_touch before update on public.conversations
  for each row execute function public.touch_updated_at();
create trigger messages_touch before update on public.messages
  for each row execute function public.touch_updated_at();

create function public.broadcast_message() returns trigger
language plpgsql
as $$
begin
  perform pg_notify('realtime', tg_op || ' ' || coalesce(new.id, old.id));
  return null;
end;
$$;

create trigger messages_broadcast after insert or update or delete on public.messages
  for each row execute function public.broadcast_message();

-- The function as the reference found it: no search_path, no look at who calls.
CREATE OR REPLACE FUNCTION public.add_message(
  p_conversation_id uuid,
  p_role text,
  p_content text,
  p_image_url text DEFAULT NULL,
  p_metadata jsonb DEFAULT '{}'
) RETURNS uuid AS $$
DECLARE
  v_message_id uuid;
BEGIN
  INSERT INTO messages (
    conversation_id,
    role,
    content,
    image_url,
    metadata
  ) VALUES (
    p_conversation_id,
    p_role,
    p_content,
    p_image_url,
    p_metadata
  )
  RETURNING id INTO v_message_id;
  
  UPDATE conversations
  SET updated_at = now()
  WHERE id = p_conversation_id;
  
  RETURN v_message_id;
END;
$$ LANGUAGE plpgsql SECURITY DEFINER;

-- Row level security applies: a caller gets the messages that the policies let through.
create function public.get_conversation_messages(p_conversation_id uuid, p_limit int default 50)
returns table (id uuid, role text, content text, image_url text, metadata jsonb, created_at timestamptz)
language sql stable
as $$
  select m.id, m.role, m.content, m.image_url, m.metadata, m.created_at
  from public.messages m
  where m.conversation_id = p_conversation_id
  order by m.created_at desc
  limit p_limit
$$;

alter table public.users enable row level security;
create policy "Users can view own profile" on public.users
  for select using (auth_user_id = auth.uid());

alter table public.conversations enable row level security;
create policy "Users can view own conversations" on public.conversations
  for select using (auth_user_id = auth.uid());
create policy "Users can update own conversations" on public.conversations
  for update using (auth_user_id = auth.uid());

alter table public.messages enable row level security;

CREATE POLICY "Users can view messages from their conversations"
ON public.messages FOR SELECT
USING (conversation_id IN (
  SELECT c.id FROM conversations c
  JOIN users u ON c.user_id = u.id
  WHERE u.auth_user_id = auth.uid()
));

CREATE POLICY "Users can insert messages to their conversations"
ON public.messages FOR INSERT
WITH CHECK (conversation_id IN (
  SELECT c.id FROM conversations c
  JOIN users u ON c.user_id = u.id
  WHERE u.auth_user_id = auth.uid()
));

CREATE POLICY "Users can update messages in their conversations"
ON public.messages FOR UPDATE
USING (conversation_id IN (
  SELECT c.id FROM conversations c
  JOIN users u ON c.user_id = u.id
  WHERE u.auth_user_id = auth.uid()
));

CREATE POLICY "Users can delete messages from their conversations"
ON public.messages FOR DELETE
USING (conversation_id IN (
  SELECT c.id FROM conversations c
  JOIN users u ON c.user_id = u.id
  WHERE u.auth_user_id = auth.uid()
));

-- The platform's default: the API roles may do everything to every table, and the policies decide about rows.
grant select, insert, update, delete on public.users, public.conversations, public.messages
  to anon, authenticated, service_role;

reset role;
