-- Webhooks: which changes are sent to which receiver, how far each has come, and the deliveries that wait or were given up.

create table if not exists relay.webhook_list (
  name text primary key,
  relation regclass not null,
  url text not null,
  events text[] not null,
  filter text,
  columns text[],
  role text not null,
  secret text not null,
  in_order boolean not null,
  attempts int not null,
  pause interval not null,
  made_by text not null,
  version uuid not null,
  changes int not null default 0,
  cursor text not null,
  reached_at timestamptz not null,
  delivered bigint not null default 0,
  handled bigint not null default 0,
  paused_until timestamptz,
  disabled text,
  error text,
  error_at timestamptz
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);
comment on table relay.webhook_list is 'webhooks; written by relay.webhook, and by the relay that delivers; read it through relay.webhooks';
comment on column relay.webhook_list.role is 'the role whose rights decide what is delivered';
comment on column relay.webhook_list.secret is 'keys of the signatures, separated by blanks';
comment on column relay.webhook_list.version is 'tells it from a dropped one of the same name, for which a relay may still write';
comment on column relay.webhook_list.changes is 'how often an operator changed or enabled it';
comment on column relay.webhook_list.cursor is 'everything before it is delivered, or is in relay.webhook_deliveries';
comment on column relay.webhook_list.reached_at is 'a time at or before that of the cursor';
comment on column relay.webhook_list.handled is 'how often an operator retried or discarded dead letters, which the relay then reads again';
comment on column relay.webhook_list.paused_until is 'until when the receiver wants nothing';
comment on column relay.webhook_list.disabled is 'why nothing is sent until relay.enable_webhook';

create table if not exists relay.webhook_deliveries (
  webhook text not null references relay.webhook_list on delete cascade,
  id text not null,
  place bigint not null generated always as identity,
  keys bigint[],
  is_gap boolean not null,
  rules text,
  body text not null,
  attempts int not null,
  due timestamptz not null,
  error text,
  failed_at timestamptz,
  is_dead boolean not null,
  primary key (webhook, id)
);
comment on table relay.webhook_deliveries is 'deliveries that failed, those that wait for them, and dead letters';
comment on column relay.webhook_deliveries.place is 'order of delivery';
comment on column relay.webhook_deliveries.keys is 'hashes of the keys of the rows that it is about; null: of any row';
comment on column relay.webhook_deliveries.rules is 'relay.webhook_rules() by which it was read: by others it is not sent';
comment on column relay.webhook_deliveries.is_gap is 'it waits for all before it, and none after it waits for it';
