-- Status service: keeps isOnline and lastActiveAt true without drowning the database, and remembers who was online when.
-- Run it after `relay install`, with or without user_status.sql, as often as you like:
--   psql -1 -v ON_ERROR_STOP=1 "$DATABASE_URL" -f examples/systems/status_history.sql
--
-- The server that holds the connections of users calls these functions as service_role:
--   status_connected(user, connection, name)   a connection was opened: online at once
--   status_active(user, connection)            a request or heartbeat: at most one write per user in 60 seconds
--   status_disconnected(user, connection)      a connection was closed: the last one of a user sets them offline
--   status_sweep()                             every 15 seconds: users who were silent for five minutes go offline
-- A client that can call functions itself calls heartbeat(), which does the same for the caller alone.

-- user_status.sql has the same table: whichever runs first makes it.
create table if not exists user_status (
  "userId"       uuid primary key,
  username       text not null,
  "isAnonymous"  boolean not null default false,
  "isOnline"     boolean not null default false,
  "lastActiveAt" timestamptz not null default now(),
  "lastSeen"     timestamptz
);
-- The sweep reads only those who are online.
create index if not exists user_status_online on user_status ("lastActiveAt") where "isOnline";

-- One row for each open connection: browser tabs, phones. Unlogged, as connections do not outlive a crash either.
create unlogged table if not exists user_connections (
  "connectionId" uuid primary key,
  "userId"       uuid not null references user_status on delete cascade,
  "connectedAt"  timestamptz not null default now()
);
create index if not exists user_connections_user on user_connections ("userId");

-- One row for each time that a user was online; the last one is open while they are.
create table if not exists user_online_periods (
  id          bigint generated always as identity primary key,
  "userId"    uuid not null references user_status on delete cascade,
  "onlineAt"  timestamptz not null,
  "offlineAt" timestamptz
);
create index if not exists user_online_periods_user on user_online_periods ("userId", "onlineAt");
create unique index if not exists user_online_periods_open on user_online_periods ("userId") where "offlineAt" is null;

-- What the last sweep did: one row.
create table if not exists status_sweeps (
  id             integer primary key check (id = 1),
  "lastSweepAt"  timestamptz not null,
  "setOffline"   integer not null
);


-- Rights. Supabase grants all rights on each new table to the roles of its API, hence the revoke.

revoke all on user_status, user_connections, user_online_periods, status_sweeps from anon, authenticated, service_role;
grant select on user_status, user_online_periods to anon, authenticated;
grant select, insert, update, delete on user_status to service_role;
grant select on user_connections, user_online_periods, status_sweeps to service_role;

-- The caller: a registered user by `sub`, an anonymous participant by the claim `participantId`.
create or replace function participant_id() returns uuid
language sql stable as $$
  select coalesce(auth.uid(), (auth.jwt() ->> 'participantId')::uuid)
$$;

alter table user_status enable row level security;
drop policy if exists "own status" on user_status;
create policy "own status" on user_status for select to anon, authenticated
  using ("userId" = participant_id());

alter table user_online_periods enable row level security;
drop policy if exists "own periods, admins all" on user_online_periods;
create policy "own periods, admins all" on user_online_periods for select to anon, authenticated
  using ("userId" = participant_id() or auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');

-- No policy: only service_role and the functions below come here.
alter table user_connections enable row level security;
alter table status_sweeps enable row level security;


-- History, by a trigger: it is right for every writer of the status.

create or replace function keep_online_period() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if new."isOnline" then
    insert into public.user_online_periods ("userId", "onlineAt") values (new."userId", clock_timestamp())
    on conflict do nothing;
  else
    update public.user_online_periods set "offlineAt" = clock_timestamp()
    where "userId" = new."userId" and "offlineAt" is null;
  end if;
  return null;
end
$$;
create or replace trigger keep_online_period after insert on user_status
  for each row when (new."isOnline") execute function keep_online_period();
create or replace trigger keep_online_period_change after update on user_status
  for each row when (old."isOnline" <> new."isOnline") execute function keep_online_period();

-- Seconds online per user and day (UTC). The policy of the table decides whose: a user the own ones, an admin all.
create or replace function time_online(first_day date, last_day date) returns table ("userId" uuid, day date, seconds integer)
language sql stable set search_path = '' as $$
  select p."userId", d.day::date,
         extract(epoch from sum(least(coalesce(p."offlineAt", now()), d.next) - greatest(p."onlineAt", d.day)))::integer
  from (
    select day at time zone 'UTC' as day, (day + interval '1 day') at time zone 'UTC' as next
    from generate_series(first_day::timestamp, last_day::timestamp, interval '1 day') as day
  ) as d
  join public.user_online_periods as p on p."onlineAt" < d.next and coalesce(p."offlineAt", now()) > d.day
  group by p."userId", d.day
  order by p."userId", d.day
$$;


-- Writing the status.

create or replace function status_connected(participant uuid, connection uuid, name text, anonymous boolean default false)
returns void
language plpgsql security definer set search_path = '' as $$
begin
  -- The row of the user is taken first, here and below: so connections that open and close at once follow each other.
  insert into public.user_status ("userId", username, "isAnonymous", "isOnline", "lastActiveAt")
  values (participant, name, anonymous, true, clock_timestamp())
  on conflict ("userId") do update
    set username = excluded.username, "isOnline" = true, "lastActiveAt" = excluded."lastActiveAt";
  insert into public.user_connections ("connectionId", "userId") values (connection, participant) on conflict do nothing;
end
$$;

-- Whether it wrote. The condition is part of the update, so that of many heartbeats at once one writes.
create or replace function status_active(participant uuid, connection uuid default null) returns boolean
language plpgsql security definer set search_path = '' as $$
begin
  -- A connection that the sweep had taken for dead; as a rule it is there, and nothing is written.
  insert into public.user_connections ("connectionId", "userId")
  select connection, s."userId" from public.user_status as s where s."userId" = participant and connection is not null
  on conflict do nothing;
  update public.user_status set "isOnline" = true, "lastActiveAt" = clock_timestamp()
  where "userId" = participant and (not "isOnline" or "lastActiveAt" <= clock_timestamp() - interval '60 seconds');
  return found;
end
$$;

create or replace function heartbeat() returns boolean
language sql security definer set search_path = '' as $$
  select public.status_active(public.participant_id())
$$;

-- Whether the user went offline: this was the last connection.
create or replace function status_disconnected(participant uuid, connection uuid) returns boolean
language plpgsql security definer set search_path = '' as $$
begin
  perform from public.user_status where "userId" = participant for update;
  delete from public.user_connections where "connectionId" = connection and "userId" = participant;
  update public.user_status as s set "isOnline" = false, "lastSeen" = clock_timestamp()
  where s."userId" = participant and s."isOnline"
    and not exists (select from public.user_connections as c where c."userId" = participant);
  return found;
end
$$;

-- How many went offline. Rows in use are left for the next sweep, so that it waits for no lock.
create or replace function status_sweep() returns integer
language plpgsql security definer set search_path = '' as $$
declare
  silent uuid[];
begin
  select array_agg(s."userId") into silent
  from (
    select "userId" from public.user_status
    where "isOnline" and "lastActiveAt" < clock_timestamp() - interval '5 minutes'
    order by "userId" for update skip locked
  ) as s;
  delete from public.user_connections where "userId" = any (silent);
  update public.user_status set "isOnline" = false, "lastSeen" = clock_timestamp() where "userId" = any (silent);
  insert into public.status_sweeps values (1, clock_timestamp(), coalesce(cardinality(silent), 0))
  on conflict (id) do update set "lastSweepAt" = excluded."lastSweepAt", "setOffline" = excluded."setOffline";
  return coalesce(cardinality(silent), 0);
end
$$;

create or replace function maintenance_stats() returns jsonb
language sql stable security definer set search_path = '' as $$
  select jsonb_build_object(
    'maintenanceActive', exists (select from public.status_sweeps where "lastSweepAt" > clock_timestamp() - interval '1 minute'),
    'onlineUsers', (select count(*) from public.user_status where "isOnline"),
    'totalUsers', (select count(*) from public.user_status),
    'lastSweepAt', (select "lastSweepAt" from public.status_sweeps),
    'setOffline', (select "setOffline" from public.status_sweeps))
$$;

-- Forgets periods that ended before the given age, and says how many.
create or replace function maintenance_cleanup(keep interval default interval '90 days') returns bigint
language sql security definer set search_path = '' as $$
  with gone as (delete from public.user_online_periods where "offlineAt" < now() - keep returning 1) select count(*) from gone
$$;

-- A new function may be called by all roles until that right is revoked.
revoke all on function status_connected(uuid, uuid, text, boolean), status_active(uuid, uuid), status_disconnected(uuid, uuid),
  status_sweep(), maintenance_stats(), maintenance_cleanup(interval), heartbeat() from public, anon, authenticated;
grant execute on function status_connected(uuid, uuid, text, boolean), status_active(uuid, uuid), status_disconnected(uuid, uuid),
  status_sweep(), maintenance_stats(), maintenance_cleanup(interval) to service_role;
grant execute on function heartbeat() to anon, authenticated;


-- Sample data: Ana and a guest, who were online yesterday.

insert into user_status ("userId", username, "isAnonymous") values
  ('a0000000-0000-4000-8000-000000000001', 'Ana', false),
  ('f0000000-0000-4000-8000-000000000006', 'Guest', true)
on conflict do nothing;
insert into user_online_periods ("userId", "onlineAt", "offlineAt")
select u, now() - interval '26 hours', now() - interval '23 hours'
from unnest(array ['a0000000-0000-4000-8000-000000000001', 'f0000000-0000-4000-8000-000000000006']::uuid[]) as u
where not exists (select from user_online_periods as p where p."userId" = u);


-- From here on each committed change reaches who may see it.

select relay.watch('user_status');
select relay.watch('user_online_periods');

-- The sweep, where pg_cron is installed (1.5 and newer know seconds); otherwise by cron or a loop, see README.md:
--   select cron.schedule('status-sweep', '15 seconds', 'select status_sweep()');
