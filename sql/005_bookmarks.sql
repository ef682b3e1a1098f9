-- Bookmarks: up to where a client that may come back has surely received a channel.

create table if not exists relay.bookmarks (
  session uuid not null,
  channel bytea not null,
  owner uuid not null,
  cursor text not null,
  at timestamptz not null,
  primary key (session, channel)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);
comment on table relay.bookmarks is 'up to where a client that named its session has surely received a channel';
comment on column relay.bookmarks.session is 'the name that the client gave itself';
comment on column relay.bookmarks.channel is 'hash of the subject of its token and the topic';
comment on column relay.bookmarks.owner is 'the connection that may move it: the one that joined last';
comment on column relay.bookmarks.at is 'when it was moved or joined last';
