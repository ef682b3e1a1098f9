-- Bookmarks: the position up to which a client has received a channel, from which it can resume.

create table if not exists relay.bookmarks (
  session uuid not null,
  channel bytea not null,
  owner uuid not null,
  cursor text not null,
  at timestamptz not null,
  primary key (session, channel)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);
comment on table relay.bookmarks is 'position up to which a client with a named session has received a channel';
comment on column relay.bookmarks.session is 'session id chosen by the client';
comment on column relay.bookmarks.channel is 'hash of the token''s subject and the topic';
comment on column relay.bookmarks.owner is 'the connection that may move it: the last one that joined';
comment on column relay.bookmarks.at is 'time of the last move or join';
