-- What subscribers were told of materialized views last, and the tables whose changes make a view due.

create table if not exists relay.told_views (
  id int primary key,
  mark text,
  shape int,
  at timestamptz not null default pg_catalog.clock_timestamp(),
  tries int not null default 0,
  next_try timestamptz,
  error text
);
comment on table relay.told_views is 'watched materialized views as subscribers were told of them last; read it through relay.refreshes';
comment on column relay.told_views.id is 'relay.watch_list.id';
comment on column relay.told_views.mark is 'relay.refresh_mark() of the refresh that they were told of; null: the view had never been filled';
comment on column relay.told_views.shape is 'the shape of the images in relay.told_rows';
comment on column relay.told_views.tries is 'failed attempts since';
comment on column relay.told_views.error is 'why the last attempt failed';

-- Equal rows, which a unique index allows if their key has a null, are one row here.
create table if not exists relay.told_rows (
  view int not null,
  image text collate "C" not null,
  copies int not null
);
comment on table relay.told_rows is 'images of the rows that subscribers were told of: the next refresh is compared with them';
comment on column relay.told_rows.view is 'relay.watch_list.id';
create index if not exists told_rows_view on relay.told_rows (view);

do $$
begin
  alter table relay.told_rows alter image set compression lz4;
exception when feature_not_supported then
  null;
end
$$;

-- Insert-only for writers, so that none waits for another. At most one row a transaction and table, and only while the view is
-- up to date: see relay.signal_change().
create table if not exists relay.signals (
  relation oid not null,
  at timestamptz not null default pg_catalog.clock_timestamp()
);
comment on table relay.signals is 'tables that changed since a relay looked; written by relay.signal_change, emptied by relay.note_signals';

alter table relay.refresh_schedule
  alter every drop not null,
  add column if not exists at_most_every interval check (at_most_every > interval '0'),
  add column if not exists sources oid[] not null default '{}',
  add column if not exists dirty_since timestamptz,
  add column if not exists sealed boolean,
  add column if not exists not_before timestamptz not null default pg_catalog.clock_timestamp(),
  add column if not exists tries int not null default 0,
  add column if not exists unheard text[] not null default '{}',
  add column if not exists checked_at timestamptz,
  add column if not exists cron_job bigint;
comment on column relay.refresh_schedule.every is 'interval of the schedule; null: there is none';
comment on column relay.refresh_schedule.at_most_every is 'shortest interval between refreshes on change; null: it is not refreshed on change';
comment on column relay.refresh_schedule.sources is 'tables and materialized views whose changes make it due';
comment on column relay.refresh_schedule.dirty_since is 'since when changes may be missing in the view; null: there are none';
comment on column relay.refresh_schedule.sealed is
  'true: since before the next refresh, each change of a source writes to relay.signals, so the view has all others after it; '
  'false: a writer in progress does not; null: not tried since the last signal';
comment on column relay.refresh_schedule.not_before is 'when it may be refreshed on change again';
comment on column relay.refresh_schedule.tries is 'failed refreshes on change since the last that succeeded';
comment on column relay.refresh_schedule.unheard is 'sources whose changes are not noticed, and why';
comment on column relay.refresh_schedule.checked_at is 'when its sources were looked up in the catalog';
comment on column relay.refresh_schedule.cron_job is 'the job of pg_cron that runs the schedule; null: the relay runs it';
