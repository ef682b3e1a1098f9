-- Messages between relays: what clients broadcast, and who is present.
--
-- Three segments, of which writers use one for half a minute. Unlogged: a message costs no WAL, and all are gone after a crash or
-- a promotion, which ends the connections of the relays, too.

do $$
begin
  for segment in 0 .. 2 loop
    execute pg_catalog.format('create unlogged table if not exists relay.node_log_%s (
        node bigint not null, number bigint not null, incarnation int not null, content bytea not null, primary key (node, number)
      ) with (autovacuum_enabled = off, toast.autovacuum_enabled = off)', segment);
    execute pg_catalog.format('alter table relay.node_log_%s alter content set storage external', segment);
    execute pg_catalog.format('comment on table relay.node_log_%s is %L', segment, 'messages between relays');
    execute pg_catalog.format('comment on column relay.node_log_%s.node is %L', segment, 'the process that wrote it');
    execute pg_catalog.format('comment on column relay.node_log_%s.number is %L', segment, 'its place among those of the process, from 1');
    execute pg_catalog.format('comment on column relay.node_log_%s.incarnation is %L', segment,
      'the connection of the process: it holds the advisory lock of class node with this number');
  end loop;
end
$$;
