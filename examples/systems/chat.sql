-- Chat: a client that waits has each message within milliseconds of the commit, by long poll, event stream or socket.
-- Run it after `relay install`, as often as you like:
--   psql -1 -v ON_ERROR_STOP=1 "$DATABASE_URL" -f examples/systems/chat.sql
--
-- The participants of a session see it and its messages, and may write while it is active.

create table if not exists chat_sessions (
  id               bigint generated always as identity primary key,
  title            text not null,
  status           text not null default 'active' check (status in ('active', 'ended')),
  price_per_minute numeric(10, 2) not null default 0,
  started_at       timestamptz not null default now(),
  duration_minutes integer not null default 0,
  total_cost       numeric(10, 2) not null default 0
);

create table if not exists chat_participants (
  chat_session_id bigint not null references chat_sessions on delete cascade,
  user_id         uuid not null,
  sender_type     text not null check (sender_type in ('user', 'consultant')),
  sender_name     text not null,
  primary key (chat_session_id, user_id)
);
create index if not exists chat_participants_user on chat_participants (user_id);

create table if not exists chat_messages (
  id              bigint generated always as identity primary key,
  chat_session_id bigint not null references chat_sessions on delete cascade,
  sender_type     text not null,
  sender_id       uuid not null,
  sender_name     text not null,
  message         text not null check (length(message) between 1 and 4000),
  created_at      timestamptz not null default now(),
  is_read         boolean not null default false
);
create index if not exists chat_messages_session on chat_messages (chat_session_id, id);


-- Rights. Supabase grants all rights on each new table to the roles of its API, hence the revoke.
-- A message is written by send_chat_message() alone; a reader may set is_read, and nothing else.

revoke all on chat_sessions, chat_participants, chat_messages from anon, authenticated, service_role;
grant select on chat_sessions, chat_participants, chat_messages to authenticated;
grant update (is_read) on chat_messages to authenticated;
grant select, insert, update, delete on chat_sessions, chat_participants, chat_messages to service_role;

-- A user sees the own rows only. The policies below look the reader up here.
alter table chat_participants enable row level security;
drop policy if exists "own participation" on chat_participants;
create policy "own participation" on chat_participants for select to authenticated
  using (user_id = auth.uid());

alter table chat_sessions enable row level security;
drop policy if exists "own sessions" on chat_sessions;
create policy "own sessions" on chat_sessions for select to authenticated
  using (id in (select chat_session_id from chat_participants where user_id = auth.uid()));

alter table chat_messages enable row level security;
drop policy if exists "messages of own sessions" on chat_messages;
create policy "messages of own sessions" on chat_messages for select to authenticated
  using (chat_session_id in (select chat_session_id from chat_participants where user_id = auth.uid()));
drop policy if exists "read what others wrote" on chat_messages;
create policy "read what others wrote" on chat_messages for update to authenticated
  using (sender_id <> auth.uid()
         and chat_session_id in (select chat_session_id from chat_participants where user_id = auth.uid()));


-- Writes a message as the caller: {"success": true, "messageId": 7}. Sender and name are not up to the caller, hence
-- `security definer`. The share lock makes a message and the end of its session follow each other.

create or replace function send_chat_message(session_id bigint, text text) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  message_id bigint;
begin
  insert into public.chat_messages (chat_session_id, sender_type, sender_id, sender_name, message)
  select p.chat_session_id, p.sender_type, p.user_id, p.sender_name, text
  from public.chat_participants as p
  join public.chat_sessions as s on s.id = p.chat_session_id
  where p.chat_session_id = session_id and p.user_id = auth.uid() and s.status = 'active'
  for share of s
  returning id into message_id;
  if message_id is null then
    raise exception 'the caller has no active chat session %', session_id using errcode = 'insufficient_privilege',
      hint = 'Only participants write, and only until the session has ended.';
  end if;
  return jsonb_build_object('success', true, 'messageId', message_id);
end
$$;

-- Ends a session of the caller, with what it took and costs.
create or replace function end_chat_session(session_id bigint) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  ended public.chat_sessions;
begin
  update public.chat_sessions as s
  set status = 'ended',
      duration_minutes = ceil(extract(epoch from clock_timestamp() - s.started_at) / 60),
      total_cost = s.price_per_minute * ceil(extract(epoch from clock_timestamp() - s.started_at) / 60)
  where s.id = session_id and s.status = 'active'
    and exists (select from public.chat_participants as p where p.chat_session_id = s.id and p.user_id = auth.uid())
  returning * into ended;
  if ended.id is null then
    raise exception 'the caller has no active chat session %', session_id using errcode = 'insufficient_privilege';
  end if;
  return jsonb_build_object('status', ended.status, 'duration_minutes', ended.duration_minutes, 'total_cost', ended.total_cost);
end
$$;

-- What is there already, in one object and at once: for a page that opens, and for clients that ask every few seconds.
create or replace function get_chat_messages(session_id bigint, last_message_id bigint default 0) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'messages', (
      select coalesce(jsonb_agg(to_jsonb(m) order by m.id), '[]')
      from public.chat_messages as m where m.chat_session_id = session_id and m.id > last_message_id),
    'session', (
      select jsonb_build_object('status', s.status, 'duration_minutes', s.duration_minutes, 'total_cost', s.total_cost)
      from public.chat_sessions as s where s.id = session_id),
    'longPolling', false)
$$;

revoke all on function send_chat_message(bigint, text), end_chat_session(bigint), get_chat_messages(bigint, bigint)
  from public, anon;
grant execute on function send_chat_message(bigint, text), end_chat_session(bigint), get_chat_messages(bigint, bigint)
  to authenticated;


-- Sample data: Ana asks the consultant Ben.

with session as (
  insert into chat_sessions (title, price_per_minute)
  select 'First questions', 1.50 where not exists (select from chat_sessions)
  returning id
), participants as (
  insert into chat_participants (chat_session_id, user_id, sender_type, sender_name)
  select session.id, p.user_id::uuid, p.sender_type, p.sender_name
  from session, (values
    ('a0000000-0000-4000-8000-000000000001', 'user', 'Ana'),
    ('b0000000-0000-4000-8000-000000000002', 'consultant', 'Ben')) as p (user_id, sender_type, sender_name)
  returning *
)
insert into chat_messages (chat_session_id, sender_type, sender_id, sender_name, message)
select chat_session_id, sender_type, user_id, sender_name, 'How can I help?'
from participants where sender_type = 'consultant';


-- From here on each committed change reaches who may see it. A participant who is removed is told by the delete of the own row.

select relay.watch('chat_sessions');
select relay.watch('chat_messages');
select relay.watch('chat_participants');
