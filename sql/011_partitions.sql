-- Partitions of watched relations: their names and parents as last recorded, and those that have readers of their own.

alter table relay.known_relations
  add column if not exists parts_mark bigint, add column if not exists part_names jsonb not null default '{}',
  add column if not exists part_named jsonb not null default '{}';
comment on column relay.known_relations.parts_mark is 'relay.parts_mark() of part_names';
comment on column relay.known_relations.part_names is 'by the oid of a partition: schema, name, and the oid of its parent';
comment on column relay.known_relations.part_named is
  'by the oid of a partition: since when it has these, as named_by and named_at; absent: as long as the relation is watched';

create table if not exists relay.former_parents (
  relation int not null,
  part oid not null,
  parent oid,
  number bigint not null,
  xid xid8 not null default pg_catalog.pg_current_xact_id()
);
comment on table relay.former_parents is 'what partitions were partitions of before: older changes of a partition are of these';
comment on column relay.former_parents.relation is 'relay.watch_list.id';
comment on column relay.former_parents.parent is 'its parent up to the number; null: it was no partition of the relation';
comment on column relay.former_parents.number is 'changes with smaller numbers are older';

-- Partitions have rules of their own.
alter table relay.known_rules add column if not exists part oid not null default 0;
comment on column relay.known_rules.part is 'a partition of the relation; 0: the relation itself';
alter table relay.widenings add column if not exists part oid not null default 0;
comment on column relay.widenings.part is 'the partition whose own rules were widened; 0: those of the relation itself';

create table if not exists relay.named_parts (
  part oid primary key,
  relation int not null,
  used timestamptz not null default pg_catalog.clock_timestamp()
);
comment on table relay.named_parts is 'partitions that subscribers name: changes of their own rules are recorded; see relay.name_parts()';
comment on column relay.named_parts.relation is 'relay.watch_list.id';
comment on column relay.named_parts.used is 'when a relay last named it, to about a minute';
