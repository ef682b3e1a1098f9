-- Collections: publications and schemas whose tables are watched.

create table if not exists relay.collections (
  kind text not null check (kind in ('publication', 'schema')),
  name text not null,
  primary key (kind, name)
);
comment on table relay.collections is
  'publications and schemas whose tables are watched; written by relay.watch_publication, relay.watch_schema and their opposites';

create table if not exists relay.collection_work (
  relation oid primary key,
  why text not null,
  tries int not null,
  next_try timestamptz not null
);
comment on table relay.collection_work is 'tables that relay.sync_collections() has to watch or unwatch later';
comment on column relay.collection_work.why is 'why it was not done yet';

-- Whether relay.watch was called for the relation: then it stays watched when it leaves its collections.
alter table relay.watch_list add column if not exists by_hand boolean not null default true;
