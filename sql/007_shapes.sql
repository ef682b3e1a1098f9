-- Shapes: the column definitions of a watched relation under which an image was written, needed to read that image later.

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
comment on table relay.shapes is 'column definitions under which images of watched relations were written; written by relay.renew_shapes';
comment on column relay.shapes.relation is 'relay.watch_list.id';
comment on column relay.shapes.columns is 'relay.columns_of(relation) at that time';
comment on column relay.shapes.xid is 'the transaction that made the shape';
comment on column relay.shapes.seen is 'the snapshot in which it was made';
comment on column relay.shapes.loose is 'the definition of a type changed, which needs no lock on the relation';
comment on column relay.shapes.guarded is
  'recorded by the statement that altered the relation; false: found later, so images with the previous number may be of either shape';

create table if not exists relay.shape_doubts (
  relation int not null,
  xid xid8 not null default pg_catalog.pg_current_xact_id()
);
comment on table relay.shape_doubts is
  'relations that were altered while their shape could not be recorded; written and emptied by relay.renew_shapes';
comment on column relay.shape_doubts.relation is 'relay.watch_list.id; 0: all relations';
