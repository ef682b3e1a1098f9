-- The retention rule of the changelog, and the states of its segments.

create table if not exists relay.retention (
  single boolean primary key default true check (single),
  age interval not null default '1 day' check (age >= '1 second'),
  bytes bigint not null default 1073741824 check (bytes >= 1048576)
);
comment on table relay.retention is 'retention rule: changes beyond this age or size are truncated, a segment at a time';
insert into relay.retention default values on conflict do nothing;

create table if not exists relay.segments (
  segment int primary key,
  opened_at timestamptz,
  closed_at timestamptz,
  settled pg_snapshot
);
comment on table relay.segments is 'the segments of the changelog; a segment is empty, or open, or closed, or settled';
comment on column relay.segments.opened_at is 'since when writers use it; null: empty';
comment on column relay.segments.closed_at is 'since when writers use another segment';
comment on column relay.segments.settled is 'a snapshot in which all transactions that wrote to it have finished';
insert into relay.segments (segment, opened_at) values (0, now()), (1, null), (2, null) on conflict do nothing;

-- Changes before this snapshot may be truncated: an older cursor is a gap.
alter table relay.history add column if not exists horizon pg_snapshot;
update relay.history set horizon = pg_current_snapshot() where horizon is null;
