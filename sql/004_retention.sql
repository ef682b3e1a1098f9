-- What is kept of the changelog, and what is known of its segments.

create table if not exists relay.retention (
  single boolean primary key default true check (single),
  age interval not null default '1 day' check (age >= '1 second'),
  bytes bigint not null default 1073741824 check (bytes >= 1048576)
);
comment on table relay.retention is 'how much of the changelog is kept: what is older, or beyond so many bytes, is truncated, a segment at a time';
insert into relay.retention default values on conflict do nothing;

create table if not exists relay.segments (
  segment int primary key,
  opened_at timestamptz,
  closed_at timestamptz,
  settled pg_snapshot
);
comment on table relay.segments is 'the segments of the changelog; a segment is empty, or open, or closed, or settled';
comment on column relay.segments.opened_at is 'since when writers use it; null: it is empty';
comment on column relay.segments.closed_at is 'since when they use another';
comment on column relay.segments.settled is 'a snapshot in which everybody who wrote to it is done';
insert into relay.segments (segment, opened_at) values (0, now()), (1, null), (2, null) on conflict do nothing;

-- Before this moment nothing is kept for certain: an older cursor is a gap.
alter table relay.history add column if not exists horizon pg_snapshot;
update relay.history set horizon = pg_current_snapshot() where horizon is null;
