-- Agent access: an admin switches agents (assistants) on or off for a user, and the user's screen follows at once.
-- Run it after `relay install`, as often as you like:
--   psql -1 -v ON_ERROR_STOP=1 "$DATABASE_URL" -f examples/systems/agent_access.sql
--
-- A user sees the own rows, an admin all. Only an admin may change them. That is written in policies and nowhere else, so
-- it holds for the relay, for an API and for psql alike.

create table if not exists agents (
  agent text primary key,
  title text not null
);

create table if not exists agent_access (
  user_id    uuid not null, -- on Supabase: references auth.users on delete cascade
  agent      text not null references agents,
  enabled    boolean not null default true,
  changed_at timestamptz not null default now(),
  primary key (user_id, agent) -- also the index by which the policy finds a user's rows
);
-- Deletes and updates carry the whole old row, so that a client sees what an agent was before.
alter table agent_access replica identity full;

-- One row for each change, written by a trigger. It has no foreign keys: it outlives users and agents.
create table if not exists agent_access_audit (
  id         bigint generated always as identity primary key,
  user_id    uuid not null,
  agent      text not null,
  before     boolean, -- null: the row is new
  after      boolean, -- null: the row was deleted
  changed_by text not null,
  changed_at timestamptz not null
);
create index if not exists agent_access_audit_user on agent_access_audit (user_id, id);


-- Rights. Supabase grants all rights on each new table to the roles of its API, hence the revoke.

revoke all on agents, agent_access, agent_access_audit from anon, authenticated, service_role;
grant select on agents to authenticated;
grant select, delete, insert (user_id, agent, enabled), update (enabled) on agent_access to authenticated;
grant select on agent_access_audit to authenticated;
grant select, insert, update, delete on agents, agent_access to service_role;
grant select on agent_access_audit to service_role;

alter table agents enable row level security;
drop policy if exists "everyone knows the agents" on agents;
create policy "everyone knows the agents" on agents for select to authenticated using (true);

alter table agent_access enable row level security;
drop policy if exists "own rows" on agent_access;
create policy "own rows" on agent_access for select to authenticated
  using (user_id = auth.uid());
-- Being an admin is a claim of the token. Users cannot write app_metadata (user_metadata they can).
drop policy if exists "admins see and change all" on agent_access;
create policy "admins see and change all" on agent_access for all to authenticated
  using (auth.jwt() -> 'app_metadata' ->> 'role' = 'admin')
  with check (auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');

alter table agent_access_audit enable row level security;
drop policy if exists "admins read the audit" on agent_access_audit;
create policy "admins read the audit" on agent_access_audit for select to authenticated
  using (auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');


-- Audit: who, when, before, after. In the transaction of the change: there is no change without it.
-- `security definer`, because no role of the API may write the audit.

create or replace function audit_agent_access() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  who constant text := coalesce(auth.uid()::text, session_user);
begin
  if tg_op = 'UPDATE' and (old.user_id, old.agent) = (new.user_id, new.agent) then
    if old.enabled <> new.enabled then
      insert into public.agent_access_audit (user_id, agent, before, after, changed_by, changed_at)
      values (new.user_id, new.agent, old.enabled, new.enabled, who, clock_timestamp());
    end if;
    return null;
  end if;
  if tg_op <> 'INSERT' then
    insert into public.agent_access_audit (user_id, agent, before, changed_by, changed_at)
    values (old.user_id, old.agent, old.enabled, who, clock_timestamp());
  end if;
  if tg_op <> 'DELETE' then
    insert into public.agent_access_audit (user_id, agent, after, changed_by, changed_at)
    values (new.user_id, new.agent, new.enabled, who, clock_timestamp());
  end if;
  return null;
end
$$;
create or replace trigger audit after insert or update or delete on agent_access
  for each row execute function audit_agent_access();

create or replace function date_agent_access() returns trigger
language plpgsql as $$
begin
  new.changed_at := now();
  return new;
end
$$;
create or replace trigger date_change before update of enabled on agent_access
  for each row execute function date_agent_access();


-- One call switches several agents of a user, all or none:
--   select * from set_agent_access('a0000000-0000-4000-8000-000000000001', '{"agents": {"web": false, "x": false}}');
-- It runs with the caller's rights. If the caller is no admin, the policy raises an error and nothing changes.

create or replace function set_agent_access(target uuid, body jsonb) returns table (agent text, enabled boolean)
language plpgsql set search_path = '' as $$
#variable_conflict use_column
begin
  if jsonb_typeof(body -> 'agents') is distinct from 'object' then
    raise exception 'the body has no object "agents"' using errcode = 'invalid_parameter_value',
      hint = 'Like this: {"agents": {"web": false, "x": true}}';
  elsif exists (select from jsonb_each(body -> 'agents') as a where jsonb_typeof(a.value) <> 'boolean') then
    raise exception 'each agent is true or false' using errcode = 'invalid_parameter_value',
      hint = 'Like this: {"agents": {"web": false, "x": true}}';
  end if;
  insert into public.agent_access as mine (user_id, agent, enabled)
  select target, a.key, a.value::boolean from jsonb_each(body -> 'agents') as a order by a.key
  on conflict (user_id, agent) do update set enabled = excluded.enabled where mine.enabled <> excluded.enabled;
  return query
    select mine.agent, mine.enabled from public.agent_access as mine where mine.user_id = target order by mine.agent;
end
$$;
revoke all on function set_agent_access(uuid, jsonb) from public, anon;
grant execute on function set_agent_access(uuid, jsonb) to authenticated, service_role;


-- Sample data: Ana and Ben have all agents.

insert into agents values ('web', 'Web search'), ('x', 'Posts on X'), ('code', 'Code'), ('image', 'Images')
on conflict do nothing;
insert into agent_access (user_id, agent)
select user_id, agent
from agents, unnest(array ['a0000000-0000-4000-8000-000000000001', 'b0000000-0000-4000-8000-000000000002']::uuid[]) as user_id
on conflict do nothing;


-- From here on each committed change reaches who may see it.

select relay.watch('agent_access');
select relay.watch('agent_access_audit');
