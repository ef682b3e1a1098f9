-- The changelog: one row per change, written by the trigger functions in the writer's own transaction.
--
-- Three segments hold the rows, so that old ones can be truncated whole. relay.current_segment() names the segment that
-- writers use: a constant, which the planner folds, so the choice costs a writer nothing. Moving writers to the next segment
-- is one CREATE OR REPLACE of that function, which locks no table; transactions in progress finish in the old segment.
--
-- Plain inheritance, not partitioning: no insert goes through relay.log, so tuple routing would be a cost without use.
--
-- Each column and each index costs a writer time for every row, even a null column. Hence `kind`, usually a constant of the
-- trigger function, and a single index. It finds a page by transactions, and a part of a transaction by numbers.

create table if not exists relay.log (
  number bigint,
  xid xid8,
  at timestamptz,
  kind text,
  before json,
  after json,
  -- Lets the planner exclude this empty table.
  constraint nothing check (xid is null) no inherit
);
comment on table relay.log is 'the changelog; empty itself, its rows are in the segments; relay.changes shows them in readable form';
comment on column relay.log.number is 'order of the writes';
comment on column relay.log.xid is 'the top-level transaction that wrote the change';
comment on column relay.log.kind is
  'space-separated: operation, relation and shape, as in relay.changes; then optionally L and the leaf, B and began, S for oversize';

create table if not exists relay.log_0 () inherits (relay.log);
create table if not exists relay.log_1 () inherits (relay.log);
create table if not exists relay.log_2 () inherits (relay.log);

create index if not exists log_0_xid_number on relay.log_0 (xid, number);
create index if not exists log_1_xid_number on relay.log_1 (xid, number);
create index if not exists log_2_xid_number on relay.log_2 (xid, number);

-- The writer compresses images over 2 kB; lz4 costs a fraction of pglz. Not every build has it.
do $$
declare
  segment int;
begin
  for segment in 0 .. 2 loop
    execute pg_catalog.format('alter table relay.log_%s alter before set compression lz4, alter after set compression lz4', segment);
  end loop;
exception when feature_not_supported then
  null;
end
$$;

-- Upgrade from an older version with other tables: a trigger redirects the rows of writers in progress to the new tables. The
-- rows already in the old tables are discarded, a gap for subscribers that had not read them. The installer drops the old
-- tables once nothing writes there.
do $do$
declare
  segment int;
begin
  if pg_catalog.to_regclass('relay.changes_0') is null then
    return;
  end if;
  -- A long transaction that wrote to the tables would make the lock request wait, and all other writers behind it. So each
  -- attempt is short, and repeated.
  perform pg_catalog.set_config('lock_timeout', '50ms', true);
  loop
    begin
      lock table relay.changes, relay.changes_0, relay.changes_1, relay.changes_2 in access exclusive mode;
      exit;
    exception when lock_not_available then
      perform pg_catalog.pg_sleep(0.5);
    end;
  end loop;
  grant insert on relay.log_0, relay.log_1, relay.log_2 to relay_writer;
  alter table relay.changes
    add column if not exists shape int, add column if not exists leaf oid, add column if not exists began xid8;
  create or replace function relay.redirect() returns trigger language plpgsql
  set search_path = pg_catalog, pg_temp as $$
  begin
    execute format('insert into relay.log_%s (number, xid, at, kind, before, after) values ($1, $2, $3, $4, $5, $6)', right(tg_table_name, 1))
    using new.number, new.xid, new.at,
          concat_ws(' ', new.operation, new.relation, coalesce(new.shape, 0), 'L' || new.leaf, 'B' || new.began, case when new.oversize then 'S' end),
          new.before, new.after;
    return null;
  end
  $$;
  for segment in 0 .. 2 loop
    execute pg_catalog.format('alter table relay.changes_%s no inherit relay.changes', segment);
    execute pg_catalog.format('create trigger redirect before insert on relay.changes_%1$s for each row execute function relay.redirect()', segment);
    execute pg_catalog.format('alter table relay.changes_%s enable always trigger redirect', segment);
  end loop;
  truncate relay.changes_0, relay.changes_1, relay.changes_2;
  drop table relay.changes;
  update relay.segments set opened_at = null, closed_at = null, settled = null where segments.segment <> relay.current_segment();
  update relay.history set horizon = pg_catalog.pg_current_snapshot();
end
$do$;
