-- Watched relations, read policies of relations that cannot have row security, and the refresh schedule.

create table if not exists relay.watch_list (
  id int generated always as identity primary key,
  relation regclass not null unique,
  leave_events boolean not null default false,
  since timestamptz not null default pg_catalog.now()
);
comment on table relay.watch_list is 'watched relations; written by relay.watch and relay.unwatch';

create table if not exists relay.read_policies (
  relation regclass primary key,
  policy text not null
);
alter table relay.read_policies add column if not exists condition text;
comment on column relay.read_policies.condition is 'the policy as PostgreSQL writes it, if it reads nothing but the row and the functions of claims; null otherwise';
comment on table relay.read_policies is 'read policies of materialized views and foreign tables; written by relay.allow';

create table if not exists relay.refresh_schedule (
  id int generated always as identity primary key,
  relation regclass not null unique,
  every interval not null check (every > interval '0'),
  next_run timestamptz not null default pg_catalog.clock_timestamp(),
  last_run timestamptz,
  duration interval,
  rows_changed bigint,
  error text
);
comment on table relay.refresh_schedule is 'materialized views refreshed on a schedule; read it through relay.refresh_jobs';
