-- The changelog: one row per change, written by the trigger functions in the writer's own transaction.
--
-- Three segments hold the rows, so that old ones can be truncated whole. relay.current_segment() says which one writers
-- use: a constant, which the planner folds, so that choosing costs a writer nothing. Moving on to the next segment is
-- one CREATE OR REPLACE of it, which locks no table; writers under way finish in the old one.
--
-- Plain inheritance, not partitioning: nobody inserts through relay.log, so routing would be paid for nothing.
--
-- Each column and each index costs a writer time with every row, even where it is null: hence `kind`, which is a constant of
-- a trigger function as a rule, and one index. It finds a page by transactions, and a part of a transaction by numbers.

create table if not exists relay.log (
  number bigint,
  xid xid8,
  at timestamptz,
  kind text,
  before json,
  after json,
  -- Lets the planner leave the empty table itself out.
  constraint nothing check (xid is null) no inherit
);
comment on table relay.log is 'the changelog; empty itself, its rows are in the segments; relay.changes tells them for people';
comment on column relay.log.number is 'order of the writes';
comment on column relay.log.xid is 'the top-level transaction that wrote the change';
comment on column relay.log.kind is
  'words: operation, relation and shape, as in relay.changes; then, where there is one, L and the leaf, B and began, S for oversize';

create table if not exists relay.log_0 () inherits (relay.log);
create table if not exists relay.log_1 () inherits (relay.log);
create table if not exists relay.log_2 () inherits (relay.log);

create index if not exists log_0_xid_number on relay.log_0 (xid, number);
create index if not exists log_1_xid_number on relay.log_1 (xid, number);
create index if not exists log_2_xid_number on relay.log_2 (xid, number);

-- Images over 2 kB are compressed by the writer; lz4 costs it a fraction of pglz. Not every build has it.
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

-- An older version had other tables, to which writers under way go on writing: their rows come here instead. What these tables hold is
-- given up, and is a gap for whoever had not read it. The installer drops them once nothing writes there any more.
do $do$
declare
  segment int;
begin
  if pg_catalog.to_regclass('relay.changes_0') is null then
    return;
  end if;
  -- A transaction that wrote and stays open would make the lock wait, and all other writers behind it: it is asked for
  -- again and again instead, for a moment only.
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
