-- What is known of watched relations by themselves: their names, triggers and partitions when they were looked at last.

create table if not exists relay.known_relations (
  id int primary key,
  schema text not null,
  name text not null,
  named_by xid8 not null default pg_catalog.pg_current_xact_id(),
  named_at bigint not null default pg_catalog.nextval('relay.change_number'),
  mute text[] not null,
  parts oid[] not null
);
comment on table relay.known_relations is 'watched relations as relay.note_relations() saw them last';
comment on column relay.known_relations.id is 'relay.watch_list.id';
comment on column relay.known_relations.named_by is
  'the transaction since which the relation is watched under this name: a cursor of before it is a gap';
comment on column relay.known_relations.named_at is 'where in the changelog that is';
comment on column relay.known_relations.mute is 'capturing triggers that are missing or do not fire always: table, operation, pg_trigger.tgenabled';
comment on column relay.known_relations.parts is 'its partitions, at all levels';
