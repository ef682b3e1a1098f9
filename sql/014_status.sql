-- Status: the table whose rows say who is online, and on which relays its users are connected.

create table if not exists relay.status_table (
  single boolean primary key default true check (single),
  relation regclass not null,
  user_column text not null,
  online_column text not null,
  active_column text,
  seen_column text,
  anonymous_column text,
  swept_at timestamptz,
  sweep_took interval,
  set_offline bigint not null default 0
);
comment on table relay.status_table is 'the table whose rows say who is online; written by relay.status_on and relay.status_off';
comment on column relay.status_table.swept_at is 'time of the last sweep';
comment on column relay.status_table.set_offline is 'users that sweeps have set offline';

create table if not exists relay.status_relays (
  id uuid primary key default gen_random_uuid(),
  seen timestamptz not null default clock_timestamp()
);
comment on table relay.status_relays is 'relays that write the status; one that was not seen for long is dead';

create table if not exists relay.status_connected (
  user_id text not null,
  relay uuid not null,
  primary key (user_id, relay)
);
create index if not exists status_connected_relay on relay.status_connected (relay);
comment on table relay.status_connected is 'users with a connection at a relay';
