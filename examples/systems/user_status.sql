-- User status: who is online, in every list of participants.
-- Run it after `relay install`, as often as you like:
--   psql -1 -v ON_ERROR_STOP=1 "$DATABASE_URL" -f examples/systems/user_status.sql
--
-- A user sees the status of people with whom they share a conversation, of no others.
-- Names in quotes keep their capitals: the client's store reads userId, username and isOnline from each change.

-- status_history.sql has the same table: whichever runs first makes it.
create table if not exists user_status (
  "userId"       uuid primary key,
  username       text not null,
  "isAnonymous"  boolean not null default false,
  "isOnline"     boolean not null default false,
  "lastActiveAt" timestamptz not null default now(),
  "lastSeen"     timestamptz
);

-- Who is a member of what. All policies below ask this table.
create table if not exists conversation_members (
  "conversationId" bigint not null,
  "userId"         uuid not null,
  "joinedAt"       timestamptz not null default now(),
  primary key ("conversationId", "userId")
);
create index if not exists conversation_members_user on conversation_members ("userId");

-- The same list for screens, kept by the triggers below. It is a table of its own because its policy has to look up the reader
-- among the members, and a policy that reads its own table fails in PostgreSQL ("infinite recursion").
create table if not exists conversation_participants (
  "conversationId" bigint not null,
  "userId"         uuid not null,
  primary key ("conversationId", "userId"),
  foreign key ("conversationId", "userId") references conversation_members on update cascade on delete cascade
);
create index if not exists conversation_participants_user on conversation_participants ("userId");

create or replace function list_participant() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.conversation_participants values (new."conversationId", new."userId") on conflict do nothing;
  return null;
end
$$;
create or replace trigger list_participant after insert on conversation_members
  for each row execute function list_participant();


-- Rights. Supabase grants all rights on each new table to the roles of its API, hence the revoke.

revoke all on user_status, conversation_members, conversation_participants from anon, authenticated, service_role;
grant select on user_status, conversation_members, conversation_participants to anon, authenticated;
grant delete on conversation_members to anon, authenticated;
grant select, insert, update, delete on user_status, conversation_members to service_role;
grant select on conversation_participants to service_role;

-- The caller: a registered user by `sub`, an anonymous participant by the claim `participantId`.
create or replace function participant_id() returns uuid
language sql stable as $$
  select coalesce(auth.uid(), (auth.jwt() ->> 'participantId')::uuid)
$$;

alter table conversation_members enable row level security;
drop policy if exists "own memberships" on conversation_members;
create policy "own memberships" on conversation_members for select to anon, authenticated
  using ("userId" = participant_id());
drop policy if exists "leave" on conversation_members;
create policy "leave" on conversation_members for delete to anon, authenticated
  using ("userId" = participant_id());

alter table conversation_participants enable row level security;
drop policy if exists "participants of my conversations" on conversation_participants;
create policy "participants of my conversations" on conversation_participants for select to anon, authenticated
  using ("conversationId" in (select "conversationId" from conversation_members where "userId" = participant_id()));

alter table user_status enable row level security;
drop policy if exists "own status" on user_status;
create policy "own status" on user_status for select to anon, authenticated
  using ("userId" = participant_id());
drop policy if exists "people of my conversations" on user_status;
create policy "people of my conversations" on user_status for select to anon, authenticated
  using (
    exists (
      select
      from conversation_members as mine
      join conversation_participants as theirs using ("conversationId")
      where mine."userId" = participant_id() and theirs."userId" = user_status."userId"
    )
  );


-- Sample data: Ana talks with Ben (1) and with Chloe (2), Ben with Dev, Edda and a guest (3).

insert into user_status ("userId", username, "isAnonymous", "isOnline") values
  ('a0000000-0000-4000-8000-000000000001', 'Ana', false, true),
  ('b0000000-0000-4000-8000-000000000002', 'Ben', false, true),
  ('c0000000-0000-4000-8000-000000000003', 'Chloe', false, false),
  ('d0000000-0000-4000-8000-000000000004', 'Dev', false, false),
  ('e0000000-0000-4000-8000-000000000005', 'Edda', false, true),
  ('f0000000-0000-4000-8000-000000000006', 'Guest', true, false)
on conflict do nothing;
insert into conversation_members ("conversationId", "userId")
select talk.id, s."userId"
from (values
  (1, array ['Ana', 'Ben']),
  (2, array ['Ana', 'Chloe']),
  (3, array ['Ben', 'Dev', 'Edda', 'Guest'])) as talk (id, names)
join user_status as s on s.username = any (talk.names)
on conflict do nothing;


-- From here on each committed change reaches who may see it. A member who leaves is told by the delete of the own row in
-- conversation_members: the page then forgets the people of that conversation.

select relay.watch('user_status');
select relay.watch('conversation_members');
select relay.watch('conversation_participants');
