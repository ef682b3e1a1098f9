-- What is known of who may see watched relations, and when that was widened.

create table if not exists relay.known_rules (
  relation int not null,
  open text[] not null,
  shut text[] not null
);
comment on table relay.known_rules is 'the rules of each watched relation when relay.note_rules() looked last; -1: a look was left out';
comment on column relay.known_rules.open is 'what lets somebody see: one more of them widens';
comment on column relay.known_rules.shut is 'what keeps somebody from seeing: one less of them widens';

create table if not exists relay.widenings (
  number bigint not null,
  xid xid8 not null,
  relation int not null
);
comment on table relay.widenings is 'when somebody came to see more: changes before it may be told by the new rules to nobody who stood before it';
comment on column relay.widenings.number is 'changes with smaller numbers are older';
comment on column relay.widenings.relation is 'relay.watch_list.id; 0 is every one';
