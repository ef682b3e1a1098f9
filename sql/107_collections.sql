-- Collections: relay.watch_publication and relay.watch_schema keep the watched tables equal to those of a publication or schema.
--
-- Statements of users wait for nothing and take no lock for this: the event trigger watches only tables that the transaction has
-- locked anyway, mostly because it made them, and wakes the relay, which does the rest, a transaction for each table.

-- relay.is_excluded(schema) : whether the tables of a schema are in no collection
create or replace function relay.is_excluded(schema text) returns boolean
language sql immutable as $$
  select $1 in ('relay', 'realtime', 'information_schema') or pg_catalog.starts_with($1, 'pg_')
$$;
comment on function relay.is_excluded(text) is 'whether the tables of a schema are in no collection';

-- relay.publication_tables() : the tables of the watched publications
-- `named`: the publication names the table itself. `refused`: why it cannot be watched for this publication, and what to do.
-- Schemas, row filters and column lists of publications exist since PostgreSQL 15. plpgsql, because PostgreSQL 14 has not their catalogs.
create or replace function relay.publication_tables() returns table (publication text, relation oid, named boolean, refused text)
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  watched_names constant name[] := array(select c.name from relay.collections c where c.kind = 'publication');
  remedy constant text := 'alter publication %1$I drop table %2$s; alter publication %1$I add table %2$s; or watch all of it: select relay.watch(%3$L)';
begin
  return query
    select p.pubname::text, c.oid, false, null::text from pg_publication p, pg_class c
    where p.pubname = any (watched_names) and p.puballtables and c.relkind in ('r', 'p') and c.relpersistence = 'p' and c.oid >= 16384;
  if current_setting('server_version_num')::int < 150000 then
    return query
      select p.pubname::text, r.prrelid, true, null::text from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
      where p.pubname = any (watched_names);
    return;
  end if;
  return query
    select p.pubname::text, c.oid, false, null::text
    from pg_publication_namespace n join pg_publication p on p.oid = n.pnpubid join pg_class c on c.relnamespace = n.pnnspid
    where p.pubname = any (watched_names) and c.relkind in ('r', 'p') and c.relpersistence = 'p';
  return query
    select p.pubname::text, r.prrelid, true, case
      when r.prqual is not null then format(
        'publication %1$I has a row filter for it, and the relay shows rows by their policies only: ' || remedy,
        p.pubname, r.prrelid::regclass, r.prrelid::regclass)
      when r.prattrs is not null then format(
        'publication %1$I lists its columns, and the relay shows those that a role may select: ' || remedy,
        p.pubname, r.prrelid::regclass, r.prrelid::regclass) end
    from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
    where p.pubname = any (watched_names);
end
$$;
comment on function relay.publication_tables() is 'tables of watched publications, with the reason why one cannot be watched';

-- relay.collection_tables() : the tables of all collections; `refused` as in relay.publication_tables()
-- A partition is watched with the table above it, if that is in the same collection.
create or replace function relay.collection_tables() returns table (collection text, relation oid, refused text)
language sql stable
set search_path = pg_catalog, pg_temp as $$
  with listed (kind, name, relation, named, refused) as (
    select c.kind, c.name, t.relation, t.named, coalesce(t.refused, case
      when not (p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate) then format(
        'publication %1$I publishes only: %2$s; the relay shows all changes: alter publication %1$I set '
        '(publish = ''insert, update, delete, truncate''); or watch all of it: select relay.watch(%3$L)', p.pubname,
        concat_ws(', ', case when p.pubinsert then 'insert' end, case when p.pubupdate then 'update' end,
                  case when p.pubdelete then 'delete' end, case when p.pubtruncate then 'truncate' end),
        t.relation::regclass) end)
    from relay.collections c
    join relay.publication_tables() t on c.kind = 'publication' and t.publication = c.name
    join pg_publication p on p.pubname = c.name
    union all
    select c.kind, c.name, r.oid, false, null
    from relay.collections c
    join pg_namespace n on n.nspname = c.name
    join pg_class r on r.relnamespace = n.oid and r.relkind in ('r', 'p') and r.relpersistence <> 't'
    where c.kind = 'schema'
      and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = r.oid and d.deptype = 'e')
  ), members as (
    select l.kind, l.name, l.relation, c.relispartition as is_part,
           case when relay.is_excluded(n.nspname) then format('tables of the schema %I are not watched', n.nspname)
                when bool_and(l.refused is not null) then min(l.refused) end as refused
    from listed l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
    where l.named or not relay.is_excluded(n.nspname)
    group by l.kind, l.name, l.relation, c.relispartition, n.nspname
  )
  select m.kind || ' ' || quote_ident(m.name), m.relation, m.refused
  from members m
  where not (m.is_part and exists (
    select from pg_partition_ancestors(m.relation) a join members above on above.relation = a.relid
    where a.relid <> m.relation and (above.kind, above.name) = (m.kind, m.name)))
$$;
comment on function relay.collection_tables() is 'tables of collections, with the reason why one cannot be watched';

-- relay.collected : the tables of collections and their state; a row without a table is a collection that does not exist
create or replace view relay.collected as
select c.collection, c.relation,
       case when w.by_hand or w.id is not null and c.refused is null then 'watched' when c.refused is not null then 'refused'
            when k.tries > 0 then 'failed' else 'pending' end as state,
       case when w.by_hand or w.id is not null and c.refused is null then null
            else coalesce(c.refused, k.why, 'a relay that runs watches it shortly') end as why
from (
  select pg_catalog.string_agg(t.collection, ', ' order by t.collection) as collection, t.relation::pg_catalog.regclass as relation,
         case when pg_catalog.bool_and(t.refused is not null) then pg_catalog.min(t.refused) end as refused
  from relay.collection_tables() t group by t.relation) c
left join relay.watch_list w on w.relation = c.relation
left join relay.collection_work k on k.relation = c.relation
union all
select c.kind || ' ' || pg_catalog.quote_ident(c.name), null, 'missing',
       pg_catalog.format('there is no such %1$s: create it, or select relay.unwatch_%1$s(%2$L)', c.kind, c.name)
from relay.collections c
where case c.kind when 'publication' then not exists (select from pg_catalog.pg_publication p where p.pubname = c.name)
                  else not exists (select from pg_catalog.pg_namespace n where n.nspname = c.name) end;
comment on view relay.collected is
  'tables of watched publications and schemas: watched, pending, refused or failed, and what to do';

-- relay.collection_steps(comes, goes) : the tables to watch, and those to unwatch
-- A table that was watched by a call of relay.watch stays watched.
create or replace function relay.collection_steps(out comes oid[], out goes oid[])
language sql stable
set search_path = pg_catalog, pg_temp as $$
  with wanted as (
    select t.relation from relay.collection_tables() t group by t.relation having bool_or(t.refused is null)
  )
  select array(select w.relation from wanted w where not exists (select from relay.watch_list l where l.relation = w.relation) order by 1),
         array(select l.relation::oid from relay.watch_list l join pg_class c on c.oid = l.relation
               where not l.by_hand and not exists (select from wanted w where w.relation = l.relation) order by 1)
$$;
comment on function relay.collection_steps() is 'tables that have to be watched or unwatched for collections';

-- relay.take_step(relation, is_new) : watches or unwatches a table; fails if it cannot lock it at once
create or replace function relay.take_step(relation regclass, is_new boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
begin
  -- The event trigger has nothing to do for the statements below.
  perform set_config('relay.collecting', 'on', true);
  execute format('lock table %s in %s mode', relation, relay.trigger_lock(relation));
  if is_new then
    perform relay.watch_table(relation, false, false);
  else
    perform relay.unwatch_table(relation);
  end if;
  perform set_config('relay.collecting', 'off', true);
end
$$;
comment on function relay.take_step(regclass, boolean) is 'watches or unwatches a table of a collection';

-- relay.sync_collections() : watches or unwatches one table; returns the time until the next one, at most 5 seconds: then a change
-- without event trigger is found; null: there are no collections
-- A table that cannot be had now is tried again, more and more rarely, and delays no other. A table that leaves its collections
-- is unwatched after five seconds: migrations drop a publication and create it anew.
create or replace function relay.sync_collections() returns interval
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  steps record;
  step oid;
  failure text;
begin
  if not exists (select from relay.collections) and not exists (select from relay.watch_list w where not w.by_hand) then
    return null;
  elsif not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('collections')) then
    return interval '1 second';
  end if;
  steps := relay.collection_steps();
  delete from relay.collection_work k where k.relation <> all (steps.comes || steps.goes);
  insert into relay.collection_work (relation, why, tries, next_try)
  select r, 'it is unwatched shortly', 0, clock_timestamp() + interval '5 seconds' from unnest(steps.goes) r
  on conflict on constraint collection_work_pkey do nothing;
  select r into step from unnest(steps.comes || steps.goes) r left join relay.collection_work k on k.relation = r
  where coalesce(k.next_try, '-infinity') <= clock_timestamp() order by k.next_try nulls first limit 1;
  if found then
    begin
      perform relay.take_step(step, step = any (steps.comes));
      delete from relay.collection_work k where k.relation = step;
    exception when others then
      failure := case sqlstate
        when '55P03' then 'a transaction that is open has locked it; it is tried again'
        when '42501' then sqlerrm || (
          select format(': grant %s to %I, or as a superuser: select relay.%s(%L)', c.relowner::regrole, current_user,
                        case when step = any (steps.comes) then 'watch' else 'unwatch' end, c.oid::regclass)
          from pg_class c where c.oid = step)
        else sqlerrm end;
      insert into relay.collection_work as k (relation, why, tries, next_try)
      values (step, failure, 1, clock_timestamp() + interval '250 milliseconds')
      on conflict on constraint collection_work_pkey
        do update set why = excluded.why, tries = k.tries + 1,
                      next_try = clock_timestamp() + least(interval '250 milliseconds' * 2 ^ least(k.tries, 10), interval '1 minute');
    end;
  end if;
  return (
    select least(greatest(coalesce(min(coalesce(k.next_try, clock_timestamp())) - clock_timestamp(), interval '5 seconds'), interval '0'),
                 interval '5 seconds')
    from unnest(steps.comes || steps.goes) r left join relay.collection_work k on k.relation = r
    where r is distinct from step or k.relation is not null);
end
$$;
comment on function relay.sync_collections() is 'watches or unwatches one table for collections; returns the time until the next; run by the relay';

-- relay.ring_collections() : wakes the task of the relay that calls relay.sync_collections()
create or replace function relay.ring_collections() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('relay.doorbell', true) is distinct from 'off' then
    perform pg_notify('relay', '{"collections":true}');
  end if;
end
$$;
comment on function relay.ring_collections() is 'wakes the relay to look at collections';

-- relay.note_collections() : the part of the event trigger: watches new tables that this transaction has locked, and wakes the relay
-- Does not wait, except for a moment: what is left undone, the relay does. The statements below fire the event trigger again, which calls
-- this function again: relay.collecting ends that recursion.
create or replace function relay.note_collections() returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
set client_min_messages = warning as $$
declare
  step oid;
begin
  if current_setting('relay.collecting', true) = 'on' or not exists (select from relay.collections) then
    return;
  end if;
  perform set_config('relay.collecting', 'on', true);
  for step in
    select r from unnest((relay.collection_steps()).comes) r
    where exists (
      select from pg_locks l
      where l.locktype = 'relation' and l.pid = pg_backend_pid() and l.relation = r and l.granted
        and l.database = (select d.oid from pg_database d where d.datname = current_database())
        and l.mode in ('ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'))
  loop
    -- An installer that is no superuser waits for this lock in relay.set_functions().
    exit when not (select r.rolsuper from pg_roles r where r.rolname = current_user)
      and not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('rights'));
    begin
      perform relay.watch_table(step, false, false);
    exception when others then
      null;
    end;
  end loop;
  perform relay.ring_collections();
  perform set_config('relay.collecting', 'off', true);
end
$$;
comment on function relay.note_collections() is 'watches new tables of collections that the transaction has locked, and wakes the relay';

-- relay.begin_syncing() : watches or unwatches tables for a quarter of a second, and leaves the rest to the relay
-- Not longer: the tables stay locked until the transaction ends.
create or replace function relay.begin_syncing() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  until constant timestamptz := clock_timestamp() + interval '250 milliseconds';
  one record;
begin
  while relay.sync_collections() = interval '0' and clock_timestamp() < until loop
  end loop;
  perform relay.ring_collections();
  for one in select * from relay.collected c where c.state <> 'watched' order by c.relation::text loop
    raise notice '% is %: %', coalesce(one.relation::text, one.collection), one.state, one.why;
  end loop;
end
$$;
comment on function relay.begin_syncing() is 'watches or unwatches tables of collections, those that can be had at once';

-- relay.watch_publication(name)
-- Keeps the tables of a publication watched from now on: those that it has, and those that are added. A table that leaves it is
-- unwatched, unless relay.watch was called for it.
create or replace function relay.watch_publication(name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from pg_publication p where p.pubname = watch_publication.name) then
    raise exception 'there is no publication %', name using errcode = 'undefined_object',
      hint = format('create publication %I for table ...', name);
  end if;
  insert into relay.collections (kind, name) values ('publication', watch_publication.name)
  on conflict on constraint collections_pkey do nothing;
  perform relay.begin_syncing();
end
$$;
comment on function relay.watch_publication(text) is 'keeps the tables of a publication watched, present and future ones';

-- relay.watch_schema(name) : the same for all tables of a schema, except those of extensions
create or replace function relay.watch_schema(name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if relay.is_excluded(name) then
    raise exception 'tables of the schema % are not watched', name using errcode = 'wrong_object_type',
      hint = 'Watch a schema of your own: select relay.watch_schema(''public'')';
  elsif not exists (select from pg_namespace n where n.nspname = watch_schema.name) then
    raise exception 'there is no schema %', name using errcode = 'invalid_schema_name', hint = format('create schema %I', name);
  end if;
  insert into relay.collections (kind, name) values ('schema', watch_schema.name)
  on conflict on constraint collections_pkey do nothing;
  perform relay.begin_syncing();
end
$$;
comment on function relay.watch_schema(text) is 'keeps the tables of a schema watched, present and future ones';

-- relay.end_collection(kind, name) : forgets a collection, and unwatches the tables that were watched only for it
create or replace function relay.end_collection(kind text, name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  delete from relay.collections c where (c.kind, c.name) = (end_collection.kind, end_collection.name);
  if not found then
    raise notice '% % was not watched', kind, name;
    return;
  end if;
  -- At once, and not after a while.
  insert into relay.collection_work (relation, why, tries, next_try)
  select r, 'it is unwatched shortly', 0, clock_timestamp() from unnest((relay.collection_steps()).goes) r
  on conflict on constraint collection_work_pkey do update set next_try = excluded.next_try;
  perform relay.begin_syncing();
end
$$;
comment on function relay.end_collection(text, text) is 'forgets a publication or schema whose tables were watched';

create or replace function relay.unwatch_publication(name text) returns void
language sql volatile as $$
  select relay.end_collection('publication', $1)
$$;
comment on function relay.unwatch_publication(text) is 'reverts relay.watch_publication; tables that were watched by hand stay watched';

create or replace function relay.unwatch_schema(name text) returns void
language sql volatile as $$
  select relay.end_collection('schema', $1)
$$;
comment on function relay.unwatch_schema(text) is 'reverts relay.watch_schema; tables that were watched by hand stay watched';
