-- Admin metrics, logs and alerts: a dashboard that follows the database.
-- Run it after `relay install`, as often as you like:
--   psql -1 -v ON_ERROR_STOP=1 "$DATABASE_URL" -f examples/systems/admin_metrics.sql
--
-- Admins see all of it, by a claim of their token; others get nothing.

-- The data that is measured.
create table if not exists documents (
  id         bigint generated always as identity primary key,
  title      text not null,
  chunks     integer not null default 0 check (chunks >= 0),
  status     text not null default 'waiting' check (status in ('waiting', 'processing', 'completed', 'failed')),
  created_at timestamptz not null default now()
);
create index if not exists documents_status on documents (status);

create table if not exists workers (
  name  text primary key,
  state text not null default 'idle' check (state in ('idle', 'busy', 'lost'))
);

-- Two feeds that any writer may insert into: a program, a trigger, psql, cron.
create table if not exists system_logs (
  id         bigint generated always as identity primary key,
  level      text not null default 'info' check (level in ('debug', 'info', 'warning', 'error')),
  message    text not null,
  created_at timestamptz not null default now()
);
create table if not exists system_alerts (
  id         bigint generated always as identity primary key,
  severity   text not null check (severity in ('info', 'warning', 'critical')),
  message    text not null,
  source     text not null default session_user,
  created_at timestamptz not null default now()
);

-- Sample data.
insert into documents (title, chunks, status, created_at)
select 'Document ' || n, n % 17, case when n > 112 then 'waiting' else 'completed' end, now() - n % 14 * interval '1 day'
from generate_series(1, 120) as n
where not exists (select from documents);
insert into workers (name) values ('north'), ('south'), ('east'), ('west') on conflict do nothing;
insert into system_logs (message) select 'The examples were loaded' where not exists (select from system_logs);
insert into system_alerts (severity, message) select 'info', 'Alerts begin here' where not exists (select from system_alerts);


-- Metrics: one row of totals, and one row per day for a chart. A unique index says which row is which: without one a refresh
-- could not tell which rows have changed.

create materialized view if not exists admin_metrics_view as
select
  1 as id,
  count(*) as total_documents,
  coalesce(sum(chunks), 0) as total_chunks,
  count(*) filter (where status = 'completed') as files_completed,
  count(*) filter (where status = 'failed') as files_failed,
  count(*) filter (where status in ('waiting', 'processing')) as files_waiting,
  (select coalesce(json_agg(json_build_object('name', name, 'state', state) order by name), '[]') from workers) as workers_real
from documents;
create unique index if not exists admin_metrics_view_id on admin_metrics_view (id);

-- The zone is named: `created_at::date` would give other days to each session that refreshes with another TimeZone.
create materialized view if not exists admin_metrics_by_day as
select
  (created_at at time zone 'UTC')::date as day,
  count(*) as documents,
  count(*) filter (where status = 'completed') as completed,
  sum(chunks) as chunks
from documents
group by 1;
create unique index if not exists admin_metrics_by_day_day on admin_metrics_by_day (day);


-- Rights. Supabase grants all rights on each new table to the roles of its API, hence the revoke.

revoke all on documents, workers, system_logs, system_alerts, admin_metrics_view, admin_metrics_by_day
  from anon, authenticated, service_role;
grant select on system_logs, system_alerts, admin_metrics_view, admin_metrics_by_day to authenticated;
grant select, insert, update, delete on documents, workers, system_logs, system_alerts to service_role;
grant select on admin_metrics_view, admin_metrics_by_day to service_role;

alter table documents enable row level security;
alter table workers enable row level security;

alter table system_logs enable row level security;
drop policy if exists "admins" on system_logs;
create policy "admins" on system_logs for select to authenticated
  using (auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');

alter table system_alerts enable row level security;
drop policy if exists "admins" on system_alerts;
create policy "admins" on system_alerts for select to authenticated
  using (auth.jwt() -> 'app_metadata' ->> 'role' = 'admin');


-- Alerts from the data itself: no application code. One alert a statement, however many rows it changed.
-- `security definer`: a writer of documents need not have the right to raise alerts.

create or replace function alert_of_documents() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.system_alerts (severity, message, source)
  select 'warning',
         case count(*) when 1 then format('%s could not be read', min(after.title))
           else format('%s documents could not be read, among them %s', count(*), min(after.title)) end,
         'documents'
  from changed_to as after join changed_from as before using (id)
  where after.status = 'failed' and before.status <> 'failed'
  having count(*) > 0;
  return null;
end
$$;
create or replace trigger raise_alert after update on documents
  referencing old table as changed_from new table as changed_to
  for each statement execute function alert_of_documents();

create or replace function alert_of_worker() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.system_alerts (severity, message, source)
  values (
    case new.state when 'lost' then 'critical' else 'info' end,
    format(case new.state when 'lost' then 'Worker %s was lost' else 'Worker %s is back' end, new.name),
    'workers'
  );
  return null;
end
$$;
create or replace trigger raise_alert after update of state on workers
  for each row when ((new.state = 'lost') <> (old.state = 'lost'))
  execute function alert_of_worker();


-- From here on each committed change reaches who may see it.

select relay.watch('system_logs');
select relay.watch('system_alerts');
select relay.watch('admin_metrics_view');
select relay.watch('admin_metrics_by_day');

-- A materialized view has no row security; this is its policy for the relay. PostgREST and psql do not know it: where people
-- have other ways into the database, let them read a table that a job fills, or views in a schema that they do not reach.
select relay.allow('admin_metrics_view', $$auth.jwt() -> 'app_metadata' ->> 'role' = 'admin'$$);
select relay.allow('admin_metrics_by_day', $$auth.jwt() -> 'app_metadata' ->> 'role' = 'admin'$$);

-- Refreshes both views now, and returns how many rows have changed: these, and no others, are sent. A plain REFRESH MATERIALIZED VIEW
-- is told just the same, but does not count them.
create or replace function refresh_admin_metrics_view() returns bigint
language sql security definer set search_path = '' as $$
  select relay.refresh('public.admin_metrics_view') + relay.refresh('public.admin_metrics_by_day')
$$;
revoke all on function refresh_admin_metrics_view() from public, anon, authenticated;
grant execute on function refresh_admin_metrics_view() to service_role;

-- Refreshed on a schedule: by pg_cron if it is installed in this database, else by the relay. To follow the tables instead:
--   select relay.refresh_on_change('admin_metrics_view', '1 second');
select relay.refresh_every('admin_metrics_view', '2 minutes');
select relay.refresh_every('admin_metrics_by_day', '2 minutes');
