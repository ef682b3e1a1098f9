-- Shapes: what the columns of a watched relation were when an image was written, so that it keeps its meaning.

-- As in 006_indexes.sql: asked for again and again, for a moment only, so that no writer waits behind this.
do $$
begin
  perform set_config('lock_timeout', '50ms', true);
  loop
    begin
      lock table relay.changes, relay.changes_0, relay.changes_1, relay.changes_2 in access exclusive mode;
      exit;
    exception when lock_not_available then
      perform pg_sleep(0.5);
    end;
  end loop;
end
$$;

alter table relay.changes
  add column if not exists shape int,
  add column if not exists leaf oid,
  add column if not exists began xid8;
comment on column relay.changes.shape is
  'relay.shapes.shape of the images; 0: another one came while they were made; null: written before there were shapes';
comment on column relay.changes.leaf is 'the partition that holds the row; null: the relation has none';
comment on column relay.changes.began is
  'all transactions before this one were over in the snapshot of a transaction that reads by one alone, where a type can be altered meanwhile';

create table if not exists relay.shapes (
  relation int not null,
  shape int not null,
  columns jsonb not null,
  xid xid8 not null default pg_catalog.pg_current_xact_id(),
  seen pg_snapshot not null default pg_catalog.pg_current_snapshot(),
  loose boolean not null,
  guarded boolean not null,
  primary key (relation, shape)
);
comment on table relay.shapes is 'definitions under which images of watched relations were written; written by relay.renew_shapes';
comment on column relay.shapes.relation is 'relay.watch_list.id';
comment on column relay.shapes.columns is 'relay.columns_of(relation) at that time';
comment on column relay.shapes.xid is 'the transaction that made the shape';
comment on column relay.shapes.seen is 'the snapshot in which it was made';
comment on column relay.shapes.loose is 'the definition of a type changed, which no lock on the relation guards';
comment on column relay.shapes.guarded is
  'made by the statement that altered the relation; false: found later, so images with the number before may be of either';

create table if not exists relay.shape_doubts (
  relation int not null,
  xid xid8 not null default pg_catalog.pg_current_xact_id()
);
comment on table relay.shape_doubts is
  'relations that were altered while their shape could not be recorded; written and emptied by relay.renew_shapes';
comment on column relay.shape_doubts.relation is 'relay.watch_list.id; 0 is every one';
