-- A changelog that came with a dump or copy from another cluster belongs to another history of transaction ids.
--
-- Its ids may not have been handed out here yet: such rows would come up as new, one after the other, while this
-- cluster's counter passes them. They are of no use, since the epoch has changed and no cursor of theirs is honoured. Nor are
-- shapes and widenings, which are compared by such ids.

do $$
begin
  -- One statement, for one snapshot: against an older one, what others wrote since would look like the future.
  if (select exists (select from relay.log c where c.xid >= n.next) or exists (select from relay.shapes s where s.xid >= n.next)
             or exists (select from relay.widenings w where w.xid >= n.next)
             or exists (select from relay.segments s where pg_catalog.pg_snapshot_xmax(s.settled) > n.next)
      from pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot()) n (next)) then
    truncate relay.log_0, relay.log_1, relay.log_2;
    delete from relay.shapes;
    delete from relay.shape_doubts;
    delete from relay.widenings;
    update relay.segments set settled = null where settled is not null;
    update relay.history set mark = pg_catalog.gen_random_uuid();
    perform relay.renew_shapes();
  end if;
  -- Nor may what was kept there be asked of here.
  update relay.history set horizon = pg_catalog.pg_current_snapshot()
  where pg_catalog.pg_snapshot_xmax(horizon) > pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot());
  update relay.known_relations set named_by = default, named_at = default
  where named_by >= pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot());
end
$$;
