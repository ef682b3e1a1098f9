-- Names, triggers and partitions of watched relations as last recorded.

create table if not exists relay.known_relations (
  id int primary key,
  schema text not null,
  name text not null,
  named_by xid8 not null default pg_catalog.pg_current_xact_id(),
  named_at bigint not null default pg_catalog.nextval('relay.change_number'),
  mute text[] not null,
  parts oid[] not null
);
comment on table relay.known_relations is 'watched relations as relay.note_relations() last recorded them';
comment on column relay.known_relations.id is 'relay.watch_list.id';
comment on column relay.known_relations.named_by is
  'the transaction since which the relation is watched under this name: an older cursor is a gap';
comment on column relay.known_relations.named_at is 'the position of that transaction''s change in the changelog';
comment on column relay.known_relations.mute is 'capture triggers that are missing or not enabled ALWAYS: table, operation, pg_trigger.tgenabled';
comment on column relay.known_relations.parts is 'its partitions, at all levels';
