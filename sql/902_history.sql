-- Discards a changelog that came with a dump or copy from another cluster, with another history of transaction ids.
--
-- Its ids may lie ahead of this cluster's counter: such rows would appear as new changes, one after the other, as the counter
-- passes them. They are useless, because the epoch has changed and no old cursor is accepted. So are shapes and widenings,
-- which are compared by such ids.

do $$
begin
  -- One statement, for one snapshot: compared with an older snapshot, newer changes of others would look like future ones.
  if (select exists (select from relay.log c where c.xid >= n.next) or exists (select from relay.shapes s where s.xid >= n.next)
             or exists (select from relay.former_parents f where f.xid >= n.next)
             or exists (select from relay.widenings w where w.xid >= n.next)
             or exists (select from relay.segments s where pg_catalog.pg_snapshot_xmax(s.settled) > n.next)
      from pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot()) n (next)) then
    truncate relay.log_0, relay.log_1, relay.log_2;
    delete from relay.shapes;
    delete from relay.shape_doubts;
    delete from relay.widenings;
    delete from relay.former_parents;
    update relay.segments set settled = null where settled is not null;
    update relay.history set mark = pg_catalog.gen_random_uuid();
    perform relay.renew_shapes();
  end if;
  -- The horizon and the positions of names must not lie in the future, either.
  update relay.history set horizon = pg_catalog.pg_current_snapshot()
  where pg_catalog.pg_snapshot_xmax(horizon) > pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot());
  update relay.known_relations set named_by = default, named_at = default, part_named = '{}'
  where named_by >= pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())
     or exists (select from pg_catalog.jsonb_each(part_named) p
                where (p.value ->> 'xid')::pg_catalog.xid8 >= pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot()));
end
$$;
