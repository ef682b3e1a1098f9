-- The ends of transactions that are read in several parts: relay.transaction_ends.

-- relay.transaction_ends(xids) : per transaction and relation the last change, and when the transaction committed
-- For visible transactions. `committed` is PostgreSQL's commit time if track_commit_timestamp was on, else the time of the
-- transaction's last change, the same for all of its relations. Sequential scans are off: a plan made while the changelog was
-- small would not use the index.
create or replace function relay.transaction_ends(xids xid8[])
returns table (xid text, relation int, last bigint, committed timestamptz)
language sql stable
set enable_seqscan = off
set search_path = pg_catalog, pg_temp as $$
  select c.xid::text, c.relation, max(c.number),
         coalesce(case when current_setting('track_commit_timestamp')::boolean then pg_xact_commit_timestamp(c.xid::xid) end,
                  max(max(c.at)) over (partition by c.xid))
  from relay.changes c
  where c.xid = any (xids)
  group by c.xid, c.relation
$$;
comment on function relay.transaction_ends(xid8[]) is
  'per transaction and relation the number of the last change, and when the transaction committed';
