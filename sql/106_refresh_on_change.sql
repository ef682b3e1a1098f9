-- Refresh on change: materialized views that follow the tables that they read.
--
-- A table that such a view reads has a statement trigger, which takes an advisory lock of the table, shared, until its transaction ends.
-- A relay holds it exclusively while the views are up to date: then the trigger cannot have it, and signals. The relay lets go of the
-- lock at the first signal, so that no other writer signals, marks the views dirty, takes the lock again when they may be refreshed, and
-- has them refreshed then. If a writer in progress keeps the relay from the lock, the view is refreshed and stays dirty. A relay that ends
-- loses its locks: the views whose locks no relay has held may have changed, so the next relay marks them dirty.

-- relay.sources(view) : what a materialized view reads, through views, partitions and inherited tables
-- hidden: why changes of it are not noticed. A materialized view changes with its own refresh only.
create or replace function relay.sources(view regclass) returns table (relation oid, kind "char", hidden text)
language sql stable
set search_path = pg_catalog, pg_temp as $$
  with recursive reads (oid) as (
    select $1::oid
    union
    select n.oid from reads r join pg_class c on c.oid = r.oid
    cross join lateral (
      select d.refobjid from pg_rewrite w join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid
      where w.ev_class = r.oid and w.rulename = '_RETURN' and d.refclassid = 'pg_class'::regclass and (c.relkind = 'v' or r.oid = $1)
      union all
      select i.inhrelid from pg_inherits i where i.inhparent = r.oid) n (oid)
  )
  select c.oid, c.relkind, case
    when c.relkind = 'f' then 'is a foreign table: changes at its server fire no trigger here'
    when exists (select from pg_subscription_rel s where s.srrelid = c.oid) then 'is written by a subscription, which fires no statement triggers' end
  from reads r join pg_class c on c.oid = r.oid
  where c.oid <> $1 and c.oid >= 16384 and c.relkind in ('r', 'p', 'm', 'f')
$$;
comment on function relay.sources(regclass) is 'what a materialized view reads, through views, and what of it changes unnoticed';

-- relay.hidden_inputs(view) : what else the queries of a materialized view, and of the views that it reads, depend on, as clauses
-- They are the functions of users that are not immutable, which may read tables; those of PostgreSQL whose results depend on the time, on
-- the session, on chance or on catalogs; and the catalogs themselves, which pg_depend does not name.
create or replace function relay.hidden_inputs(view regclass) returns setof text
language sql stable
set search_path = pg_catalog, pg_temp as $$
  with recursive reads (oid) as (
    select $1::oid
    union
    select d.refobjid from reads r join pg_class c on c.oid = r.oid and (c.relkind = 'v' or c.oid = $1)
    join pg_rewrite w on w.ev_class = r.oid and w.rulename = '_RETURN'
    join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid and d.refclassid = 'pg_class'::regclass
  ), queries (text) as (
    select w.ev_action::text from reads r join pg_class c on c.oid = r.oid and (c.relkind = 'v' or c.oid = $1)
    join pg_rewrite w on w.ev_class = r.oid and w.rulename = '_RETURN'
  ), calls (name) as (
    select case when p.pronamespace = 'pg_catalog'::regnamespace then p.proname || '()' else p.oid::regprocedure::text end
    from queries q cross join regexp_matches(q.text, ':(?:funcid|opfuncid|aggfnoid|winfnoid) (\d+)', 'g') m
    join pg_proc p on p.oid = m[1]::oid
    where p.provolatile <> 'i' and (
      p.oid >= 16384 or p.provolatile = 'v' or p.pronargs = 0 or p.proname = 'current_setting' or (p.proname = 'age' and p.pronargs = 1)
      or p.proname ~ '^(pg_|has_|to_reg|row_security_)')
    union
    select (array['current_date', 'current_time', 'current_time', 'current_timestamp', 'current_timestamp', 'localtime', 'localtime', 'localtimestamp',
                  'localtimestamp', 'current_role', 'current_user', 'user', 'session_user', 'current_catalog', 'current_schema'])[m[1]::int + 1]
    from queries q cross join regexp_matches(q.text, '\{SQLVALUEFUNCTION :op (\d+)', 'g') m
  )
  select format('it calls %s, whose result may change without a change of a table', c.name) from calls c
  union
  select format('it reads %s, a system catalog, which has no triggers', c.oid::regclass)
  from queries q cross join regexp_matches(q.text, ':relid (\d+)', 'g') m join pg_class c on c.oid = m[1]::oid and c.oid < 16384
$$;
comment on function relay.hidden_inputs(regclass) is 'functions and catalogs that a materialized view depends on, whose changes are not noticed';

-- relay.signal(relation) : records that a relation changed, and wakes the relays; once for a transaction and relation
create or replace function relay.signal(relation oid) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  known constant text := coalesce(current_setting('relay.signalled', true), '');
begin
  if strpos(known, ' ' || relation || ' ') = 0 then
    perform set_config('relay.signalled', known || ' ' || relation || ' ', true);
    insert into relay.signals (relation) values (signal.relation);
    perform relay.ring_jobs();
  end if;
end
$$;
comment on function relay.signal(oid) is 'records that a relation changed, and wakes the relays';

-- relay.signal_change() : statement trigger of the tables that views on change read
-- Runs as relay_writer under the writer's search path, without settings of its own, as the capture triggers. Waits for no other session.
create or replace function relay.signal_change() returns trigger
language plpgsql volatile security definer as $$
begin
  if not pg_catalog.pg_try_advisory_xact_lock_shared(relay.lock_class('signal'), tg_relid::pg_catalog.int4) then
    perform relay.signal(tg_relid);
  end if;
  return null;
end
$$;
comment on function relay.signal_change() is 'statement trigger: a view that reads the table is due';

do $$
begin
  if (select p.proowner <> 'relay_writer'::regrole from pg_catalog.pg_proc p
      where p.oid = 'relay.signal_change()'::pg_catalog.regprocedure) then
    grant create on schema relay to relay_writer;
    alter function relay.signal_change() owner to relay_writer;
    revoke create on schema relay from relay_writer;
  end if;
end
$$;

-- relay.signal_trigger(relation) : how the trigger of a table is enabled; null: there is none
create or replace function relay.signal_trigger(relation oid) returns "char"
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select t.tgenabled from pg_trigger t
  where t.tgrelid = $1 and t.tgname = '00_relay_signal' and t.tgfoid = 'relay.signal_change()'::regprocedure and t.tgtype & 60 = 60
$$;
comment on function relay.signal_trigger(oid) is 'how the signal trigger of a table is enabled, if there is one';

-- relay.set_signal(relation) : creates the trigger of a table, or enables it ALWAYS
create or replace function relay.set_signal(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
begin
  if relay.signal_trigger(relation) is distinct from 'A' then
    perform relay.lock_for_triggers(relation, 'share row exclusive');
    if relay.signal_trigger(relation) is null then
      execute format('create trigger "00_relay_signal" after insert or update or delete or truncate on %s '
                     'for each statement execute function relay.signal_change()', relation);
    end if;
    execute format('alter table only %s enable always trigger "00_relay_signal"', relation);
  end if;
end
$$;
comment on function relay.set_signal(regclass) is 'creates the signal trigger of a table';

create or replace function relay.drop_signal(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.lock_for_triggers(relation, 'access exclusive');
  perform relay.drop_trigger('00_relay_signal', relation);
end
$$;
comment on function relay.drop_signal(regclass) is 'drops the signal trigger of a table';

-- relay.idle_signals() : tables with a trigger that no view on change reads
create or replace function relay.idle_signals() returns setof oid
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select t.tgrelid from pg_trigger t
  where t.tgname = '00_relay_signal' and t.tgfoid = 'relay.signal_change()'::regprocedure
    and not exists (
      select from relay.refresh_schedule s join pg_class c on c.oid = s.relation
      where s.at_most_every is not null and (t.tgrelid = any (s.sources) or t.tgrelid in (select o.relation from relay.sources(s.relation) o)))
$$;
comment on function relay.idle_signals() is 'tables with a signal trigger that no view needs';

-- relay.refresh_on_change(relation, at_most_every)
-- Has a watched materialized view refreshed whenever a table that it reads was written to: at once, and then at most so often. The tables get
-- a statement trigger, and are not published by it. Says by NOTICE which of the view's inputs change unnoticed. A schedule that the view
-- has stays.
create or replace function relay.refresh_on_change(relation regclass, at_most_every interval default '1 second') returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  one record;
  found_sources oid[];
begin
  if at_most_every is null or at_most_every < interval '100 milliseconds' then
    raise exception 'the interval must be at least 100 milliseconds' using errcode = 'invalid_parameter_value',
      hint = 'select relay.refresh_on_change(''public.totals'', ''1 second'')';
  end if;
  perform relay.check_view(relation);
  found_sources := array(select s.relation from relay.sources(relation) s where s.hidden is null order by 1);
  -- A relay holds one lock for each.
  if cardinality(found_sources) not between 1 and 1000 then
    raise exception '% reads % tables and partitions whose changes can be noticed, and it takes 1 to 1000', relation, cardinality(found_sources)
      using errcode = 'object_not_in_prerequisite_state', hint = format('select relay.refresh_every(%L, ''1 minute'')', relation);
  end if;
  for one in
    select 0 as place, format('%s %s', s.relation::regclass, s.hidden) as text from relay.sources(relation) s where s.hidden is not null
    union all
    select 1, format('%s is a materialized view: a change counts when it is refreshed', s.relation::regclass)
    from relay.sources(relation) s where s.kind = 'm'
    union all
    select 2, h from relay.hidden_inputs(relation) h
    order by 1, 2
  loop
    raise notice '%: %', relation, one.text
      using hint = case one.place when 1 then 'Put that one on a schedule, or have it refreshed on change.'
                     else format('Also refresh it now and then: select relay.refresh_every(%L, ''1 minute'')', relation) end;
  end loop;
  perform relay.set_signal(s.relation) from relay.sources(relation) s where s.hidden is null and s.kind <> 'm' order by s.relation;
  delete from relay.refresh_schedule s where not exists (select from pg_class c where c.oid = s.relation);
  insert into relay.refresh_schedule as s (relation, at_most_every, sources, dirty_since)
  values (refresh_on_change.relation, refresh_on_change.at_most_every, found_sources, clock_timestamp())
  on conflict on constraint refresh_schedule_relation_key
    do update set at_most_every = excluded.at_most_every, sources = excluded.sources, dirty_since = coalesce(s.dirty_since, excluded.dirty_since),
                  sealed = null, not_before = excluded.not_before, checked_at = null;
  perform relay.ring_jobs();
end
$$;
comment on function relay.refresh_on_change(regclass, interval) is 'refreshes a watched materialized view whenever a table that it reads changes, at most so often';

-- relay.follow_sources(job) : looks up again what a view on change reads, and marks it dirty if that differs
-- Triggers that are missing, of a new partition for example, or fire only in some sessions, are set without waiting; a disabled one is left as
-- it is: a user did that on purpose.
create or replace function relay.follow_sources(job relay.refresh_schedule) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
declare
  source record;
  heard oid[] := '{}';
  problems text[] := '{}';
begin
  for source in select * from relay.sources(job.relation) s where s.hidden is null order by s.relation loop
    begin
      if source.kind <> 'm' and coalesce(relay.signal_trigger(source.relation), '-') not in ('A', 'D') then
        execute format('lock table only %s in share row exclusive mode', source.relation::regclass);
        perform relay.set_signal(source.relation);
      end if;
      if source.kind <> 'm' and relay.signal_trigger(source.relation) = 'D' then
        problems := problems || format('the trigger "00_relay_signal" of %1$s is disabled: alter table %1$s enable always trigger "00_relay_signal"',
                                       source.relation::regclass);
      else
        heard := heard || source.relation;
      end if;
    exception when others then
      problems := problems || format('%s has no trigger yet: %s', source.relation::regclass, sqlerrm);
    end;
  end loop;
  update relay.refresh_schedule s
  set checked_at = clock_timestamp(), unheard = problems, sources = heard,
      dirty_since = case when s.sources <> heard then coalesce(s.dirty_since, clock_timestamp()) else s.dirty_since end,
      sealed = case when s.sources <> heard then null else s.sealed end
  where s.id = job.id;
end
$$;
comment on function relay.follow_sources(relay.refresh_schedule) is 'looks up again what a view reads, and sets missing triggers';

-- relay.sealed_sources() : the relations whose lock of class `signal` this session holds exclusively
create or replace function relay.sealed_sources() returns oid[]
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  select array(select l.objid from pg_locks l
               where l.locktype = 'advisory' and l.classid = relay.lock_class('signal')::oid and l.objsubid = 2 and l.mode = 'ExclusiveLock'
                 and l.pid = pg_backend_pid() and l.granted)
$$;
comment on function relay.sealed_sources() is 'relations whose changes this session is signalled';

-- relay.note_signals() : the part of refresh on change that one relay does: marks views dirty, and seals those that are due; returns the time
-- until the next look, null: no view is refreshed on change
-- Call it in a session of its own, again and again, and end the session if it fails: the session keeps advisory locks, which a rollback
-- does not release. Then call relay.run_refreshes(), in another session, so that no long refresh keeps writers signalling.
create or replace function relay.note_signals() returns interval
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  class constant int := relay.lock_class('signal');
  held oid[];
  signalled oid[];
  job relay.refresh_schedule;
  source oid;
begin
  if exists (select from relay.refresh_schedule s where s.at_most_every is not null)
     and not exists (select from pg_locks l where l.locktype = 'advisory' and l.classid = relay.lock_class('relay')::oid
                       and l.objid = relay.lock('signals')::oid and l.objsubid = 2 and l.pid = pg_backend_pid())
     and not pg_try_advisory_lock(relay.lock_class('relay'), relay.lock('signals')) then
    return interval '1 second';
  end if;
  for job in
    select s.* from relay.refresh_schedule s join pg_class c on c.oid = s.relation
    where s.at_most_every is not null and coalesce(s.checked_at, '-infinity') < clock_timestamp() - interval '5 seconds' order by s.id
  loop
    perform relay.follow_sources(job);
  end loop;
  held := relay.sealed_sources();
  with taken as (delete from relay.signals g returning g.relation)
  select coalesce(array_agg(distinct t.relation), '{}') into signalled from taken t;
  for source in
    select h from unnest(held) h
    where h = any (signalled) or not exists (select from relay.refresh_schedule s where s.at_most_every is not null and h = any (s.sources))
  loop
    perform pg_advisory_unlock(class, source::int4);
  end loop;
  held := array(select h from unnest(held) h where h <> all (signalled));
  update relay.refresh_schedule s set dirty_since = coalesce(s.dirty_since, clock_timestamp()), sealed = null
  where s.at_most_every is not null and not s.sources <@ held and (s.dirty_since is null or s.sealed);
  for job in
    select s.* from relay.refresh_schedule s join pg_class c on c.oid = s.relation
    where s.at_most_every is not null and s.dirty_since is not null and s.sealed is null and s.not_before <= clock_timestamp() order by s.not_before
  loop
    -- Not while it is being refreshed: that refresh began before.
    continue when not pg_try_advisory_xact_lock(relay.lock_class('job'), job.id);
    job.sealed := true;
    for source in select r from unnest(job.sources) r where r <> all (held) loop
      if pg_try_advisory_lock(class, source::int4) then
        held := held || source;
      else
        job.sealed := false;
      end if;
    end loop;
    update relay.refresh_schedule s set sealed = job.sealed where s.id = job.id;
  end loop;
  perform relay.drop_idle_signals();
  -- One that is due is being refreshed, by this relay or by another.
  return (select least(case when current_setting('relay.doorbell', true) = 'off' then interval '1 second' else interval '5 seconds' end, min(case when s.not_before > clock_timestamp() then s.not_before - clock_timestamp()
                                                      else interval '500 milliseconds' end) filter (where s.dirty_since is not null and s.sealed is null))
          from relay.refresh_schedule s join pg_class c on c.oid = s.relation where s.at_most_every is not null having count(*) > 0);
end
$$;
comment on function relay.note_signals() is 'marks views dirty whose tables changed, and prepares their refresh; for a session of a relay';

-- relay.drop_idle_signals() : drops triggers that no view needs any more, as far as that does not wait
create or replace function relay.drop_idle_signals() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
declare
  one oid;
begin
  for one in select i from relay.idle_signals() i limit 10 loop
    begin
      execute format('lock table only %s in access exclusive mode', one::regclass);
      perform relay.drop_signal(one);
    exception when others then
      null;
    end;
  end loop;
end
$$;
comment on function relay.drop_idle_signals() is 'drops signal triggers that no view needs any more';
