-- The visibility rules of watched relations as last recorded, and the positions at which they were widened.

create table if not exists relay.known_rules (
  relation int not null,
  open text[] not null,
  shut text[] not null
);
comment on table relay.known_rules is 'the rules of each watched relation at the last relay.note_rules(); -1: a check was skipped';
comment on column relay.known_rules.open is 'rules that permit rows: an additional one widens visibility';
comment on column relay.known_rules.shut is 'rules that restrict rows: one less widens visibility';

create table if not exists relay.widenings (
  number bigint not null,
  xid xid8 not null,
  relation int not null
);
comment on table relay.widenings is 'positions at which visibility was widened: a reader positioned before one must not get older changes by the new rules';
comment on column relay.widenings.number is 'changes with smaller numbers are older';
comment on column relay.widenings.relation is 'relay.watch_list.id; 0: all relations';
