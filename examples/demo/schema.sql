-- Four kinds of tables the relay is for. Run once, after `relay install`.

create table person (
  id   uuid primary key,
  name text not null unique
);
insert into person values
  ('a0000000-0000-4000-8000-000000000001', 'Ana'),
  ('b0000000-0000-4000-8000-000000000002', 'Ben'),
  ('c0000000-0000-4000-8000-000000000003', 'Chloe'),
  ('d0000000-0000-4000-8000-000000000004', 'Dev'),
  ('e0000000-0000-4000-8000-000000000005', 'Edda');


-- 1. Agent access: which assistants a person may use. Own rows; admins all.

create table agent_access (
  user_id    uuid not null references person (id),
  agent      text not null,
  enabled    boolean not null default true,
  changed_at timestamptz not null default now(),
  primary key (user_id, agent)
);
alter table agent_access enable row level security;
create policy "own rows, admins all" on agent_access for select to authenticated
  using (user_id = auth.uid() or auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');
grant select on agent_access to authenticated;
select relay.watch('agent_access');

insert into agent_access (user_id, agent)
select person.id, agent
from person, unnest(array ['web', 'code', 'image', 'voice']) as agent
where person.name in ('Ana', 'Ben');


-- 2. User status: seen by people who share a conversation.

create table conversation_member (
  conversation_id integer not null,
  user_id         uuid not null references person (id),
  primary key (conversation_id, user_id)
);
create index on conversation_member (user_id);
-- Without row security: a policy that read a table guarded by the same rule would never end.
grant select on conversation_member to authenticated;

insert into conversation_member
select conversation_id, person.id
from (values (1, array ['Ana', 'Ben']), (2, array ['Ana', 'Chloe']), (3, array ['Ben', 'Dev', 'Edda'])) as talk (conversation_id, names)
join person on person.name = any (names);

create table user_status (
  user_id        uuid primary key references person (id),
  username       text not null,
  is_online      boolean not null default false,
  last_active_at timestamptz not null default now()
);
alter table user_status enable row level security;
create policy "people of my conversations" on user_status for select to authenticated
  using (
    exists (
      select
      from conversation_member as mine
      join conversation_member as theirs using (conversation_id)
      where mine.user_id = auth.uid() and theirs.user_id = user_status.user_id
    )
  );
grant select on user_status to authenticated;
select relay.watch('user_status');

insert into user_status (user_id, username, is_online)
select id, name, name <> 'Dev' from person;


-- 3. System alerts: for admins, by a claim of their token. Any writer may raise one; a trigger here does too.

create table system_alerts (
  id         bigint generated always as identity primary key,
  severity   text not null check (severity in ('info', 'warning', 'critical')),
  message    text not null,
  created_at timestamptz not null default now()
);
alter table system_alerts enable row level security;
create policy "admins" on system_alerts for select to authenticated
  using (auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');
grant select on system_alerts to authenticated;
select relay.watch('system_alerts');

create table document (
  id    bigint generated always as identity primary key,
  state text not null default 'waiting' check (state in ('waiting', 'working', 'completed', 'failed'))
);
insert into document (state) select 'completed' from generate_series(1, 1240);
insert into document (state) select 'waiting' from generate_series(1, 12);

create table worker (
  name  text primary key,
  state text not null default 'idle' check (state in ('idle', 'busy', 'lost'))
);
insert into worker (name) values ('north'), ('south'), ('east'), ('west');

create function raise_document_alert() returns trigger
language plpgsql as $$
begin
  insert into system_alerts (severity, message)
  values ('warning', format('Document %s could not be read', new.id));
  return null;
end
$$;
create trigger raise_alert after update of state on document
  for each row when (new.state = 'failed' and old.state <> 'failed')
  execute function raise_document_alert();

create function raise_worker_alert() returns trigger
language plpgsql as $$
begin
  insert into system_alerts (severity, message)
  values (
    case new.state when 'lost' then 'critical' else 'info' end,
    format(case new.state when 'lost' then 'Worker %s was lost' else 'Worker %s is back' end, new.name)
  );
  return null;
end
$$;
create trigger raise_alert after update of state on worker
  for each row when ((new.state = 'lost') <> (old.state = 'lost'))
  execute function raise_worker_alert();


-- 4. Metrics: a materialized view, refreshed on a schedule. Only the rows that changed are sent.

create materialized view admin_metrics_view as
select
  1 as id,
  (select json_agg(json_build_object('name', name, 'state', state) order by name) from worker) as workers_real,
  (select count(*) from document) as total_documents,
  (select count(*) from document where state = 'completed') as files_completed,
  (select count(*) from document where state in ('waiting', 'working')) as files_waiting,
  (select count(*) from document where state = 'failed') as files_failed,
  (select count(*) from user_status where is_online) as users_online;
create unique index on admin_metrics_view (id);
grant select on admin_metrics_view to authenticated;
select relay.watch('admin_metrics_view');
-- A materialized view can't have row security of its own.
select relay.allow('admin_metrics_view', $$auth.jwt() -> 'app_metadata' ->> 'role' = 'admin'$$);
select relay.refresh_every('admin_metrics_view', '2 seconds');
