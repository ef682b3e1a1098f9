-- The changelog: one row per change, written by relay.capture() in the writer's own transaction.
--
-- Three segments hold the rows, so that old ones can be truncated whole. relay.current_segment() says which one writers
-- use: a constant, which the planner folds, so that choosing costs a writer nothing. Moving on to the next segment is
-- one CREATE OR REPLACE of it, which locks no table; writers under way finish in the old one.
--
-- Plain inheritance, not partitioning: nobody inserts through relay.changes, so routing would be paid for nothing.

create sequence if not exists relay.change_number as bigint cache 1;
comment on sequence relay.change_number is
  'numbers of changes; CACHE must stay 1, or the changes of one row could be numbered out of order';

create table if not exists relay.changes (
  number bigint not null,
  xid xid8 not null,
  at timestamptz not null,
  relation int not null,
  operation "char" not null,
  oversize boolean not null,
  before json,
  after json
);
comment on table relay.changes is 'the changelog; empty itself, its rows are in the segments';
comment on column relay.changes.number is 'order of the writes';
comment on column relay.changes.xid is 'the top-level transaction that wrote the change';
comment on column relay.changes.relation is 'relay.watch_list.id';
comment on column relay.changes.operation is 'I, U, D or T (truncate: no images)';
comment on column relay.changes.oversize is 'an image holds only the key and the short columns';

create table if not exists relay.changes_0 () inherits (relay.changes);
create table if not exists relay.changes_1 () inherits (relay.changes);
create table if not exists relay.changes_2 () inherits (relay.changes);

-- Made once and then replaced by whoever moves on: applying this file again must not move writers back.
do $$
begin
  if pg_catalog.to_regprocedure('relay.current_segment()') is null then
    create function relay.current_segment() returns int language sql immutable as 'select 0';
    comment on function relay.current_segment() is 'the segment of the changelog that writers use';
  end if;
end
$$;

-- Images over 2 kB are compressed by the writer; lz4 costs it a fraction of pglz. Not every build has it.
do $$
declare
  segment int;
begin
  for segment in 0 .. 2 loop
    execute pg_catalog.format('alter table relay.changes_%s alter before set compression lz4, alter after set compression lz4', segment);
  end loop;
exception when feature_not_supported then
  null;
end
$$;
