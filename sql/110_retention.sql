-- Retention: the changelog is trimmed by whole segments, never row by row, without blocking writers or readers.

-- relay.retain(age, bytes) : sets how long changes are kept, and about how many bytes at most; null: unchanged
create or replace function relay.retain(age interval default null, bytes bigint default null) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  update relay.retention r set age = coalesce($1, r.age), bytes = coalesce($2, r.bytes)
$$;
comment on function relay.retain(interval, bigint) is 'how long changes are kept, and how many bytes of them at most';

drop function if exists relay.summarize(), relay.tend();

-- relay.trim_changelog() : moves writers to the next segment, and truncates segments by the rule; returns the steps taken
-- To be called every few seconds. Lock attempts are short: a long transaction only delays a truncation. One caller runs at a
-- time; the others return at once.
create or replace function relay.trim_changelog() returns text[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '20ms' as $$
declare
  rule relay.retention;
  one record;
  current constant int := relay.current_segment();
  next constant int := (relay.current_segment() + 1) % 3;
  total bigint;
  late boolean;
  done text[] := '{}';
begin
  if not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('trim')) then
    return done;
  end if;
  begin
    perform relay.sweep();
  exception when lock_not_available then
    null;
  end;
  select * into rule from relay.retention;
  total := (select sum(pg_total_relation_size(format('relay.log_%s', s)::regclass)) from generate_series(0, 2) s);

  -- Closed segments: once all transactions that wrote to one have finished, it is settled with a snapshot; later it is truncated.
  for one in select * from relay.segments s where s.closed_at is not null order by s.closed_at loop
    begin
      if one.settled is null then
        -- This mode conflicts with writers, not with readers.
        execute format('lock table relay.log_%s in share row exclusive mode', one.segment);
        update relay.segments s set settled = pg_current_snapshot() where s.segment = one.segment;
        done := done || format('settled %s', one.segment);
      elsif one.closed_at < clock_timestamp() - rule.age or total > rule.bytes then
        execute format('lock table relay.log_%s in access exclusive mode', one.segment);
        -- A transaction may have chosen the segment before the move and written to it long after.
        execute format('select exists (select from relay.log_%s c where c.xid >= pg_snapshot_xmax($1)
                        or c.xid = any (array(select pg_snapshot_xip($1))))', one.segment)
          into late using one.settled;
        if late then
          update relay.segments s set settled = pg_current_snapshot(), closed_at = clock_timestamp() where s.segment = one.segment;
          done := done || format('settled %s again', one.segment);
        else
          total := total - pg_total_relation_size(format('relay.log_%s', one.segment)::regclass);
          execute format('truncate relay.log_%s', one.segment);
          update relay.segments s set opened_at = null, closed_at = null, settled = null where s.segment = one.segment;
          update relay.history h set horizon = one.settled;
          done := done || format('truncated %s', one.segment);
          exit;
        end if;
      end if;
    exception when lock_not_available then
      null;
    end;
  end loop;

  -- The open segment: writers move on when it is old or large enough and the next one is empty.
  select * into one from relay.segments s where s.segment = current;
  if (select s.opened_at is null from relay.segments s where s.segment = next)
     and (one.opened_at < clock_timestamp() - rule.age / 2
          or pg_total_relation_size(format('relay.log_%s', current)::regclass) > rule.bytes / 3)
     and exists (select from relay.log) then
    execute format('create or replace function relay.current_segment() returns int language sql immutable as ''select %s''', next);
    update relay.segments s set closed_at = clock_timestamp() where s.segment = current;
    update relay.segments s set opened_at = clock_timestamp() where s.segment = next;
    done := done || format('moved on to %s', next);
  end if;
  return done;
end
$$;
comment on function relay.trim_changelog() is 'trims the changelog by the rule of relay.retain; run by the relay';

-- relay.horizon() : the snapshot before which changes are not kept
create or replace function relay.horizon() returns text
language sql stable security definer
set search_path = pg_catalog, pg_temp as $$
  select h.horizon::text from relay.history h
$$;
comment on function relay.horizon() is 'snapshot before which the changelog is not kept; an older cursor is a gap';

-- relay.health : the state of the changelog and the doorbell
do $$
begin
  alter view if exists relay.health rename column deputies to followers;
exception when undefined_column then
  null;
end
$$;
create or replace view relay.health as
with held as (
  select l.pid, l.mode, l.objid from pg_catalog.pg_locks l
  where l.locktype = 'advisory' and l.classid = relay.lock_class('relay')::pg_catalog.oid and l.objsubid = 2 and l.granted
    and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
)
select
  (select pg_catalog.sum(pg_catalog.pg_total_relation_size(pg_catalog.format('relay.log_%s', s)::pg_catalog.regclass))
   from pg_catalog.generate_series(0, 2) s)::bigint as bytes,
  (select pg_catalog.now() - pg_catalog.min(s.opened_at) from relay.segments s) as oldest,
  r.age as kept_for,
  r.bytes as kept_bytes,
  relay.current_segment() as segment,
  exists (select from held h where h.objid = relay.lock('doorbell')::pg_catalog.oid and h.mode = 'ExclusiveLock') as asleep,
  pg_catalog.pg_notification_queue_usage() as notify_queue,
  (select h.pid from held h where h.objid = relay.lock('leader')::pg_catalog.oid and h.mode = 'ExclusiveLock') as leader,
  (select pg_catalog.count(*) from held h
   where h.objid = relay.lock('followers')::pg_catalog.oid and h.mode = 'ShareLock') as followers,
  array(select pg_catalog.format('%s is %s: %s', coalesce(c.relation::text, c.collection), c.state, c.why)
        from relay.collected c where c.state <> 'watched' order by 1) as not_watched
from relay.retention r;
comment on view relay.health is
  'size and age of the changelog, retention rule, whether the relay sleeps, how full the NOTIFY queue is, backend of the leader, number of other relays, tables of publications and schemas that are not watched';
