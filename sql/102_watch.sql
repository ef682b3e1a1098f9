-- relay.watch, relay.unwatch and relay.watched: which relations are captured, and the triggers that do it.

-- relay.needs_care(relation) : whether images of its rows need more than relay.capture() does by itself
-- So it is with every type but those listed: types outside the system's own can have a cast to json that users wrote, and the
-- text of others (bytea, interval, money, ranges ...) follows settings that are pinned only there.
create or replace function relay.needs_care(relation regclass) returns boolean
language sql stable as $$
  with recursive used (type) as (
    select a.atttypid from pg_catalog.pg_attribute a
    where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
    union
    select part.type
    from used u
    join pg_catalog.pg_type t on t.oid = u.type
    cross join lateral (
      select t.typbasetype where t.typtype = 'd'
      union all select t.typelem where t.typcategory = 'A'
      union all select a.atttypid from pg_catalog.pg_attribute a
        where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped) part (type)
  )
  select exists (
    select from used u
    join pg_catalog.pg_type t on t.oid = u.type
    where t.typtype not in ('d', 'c') and t.typcategory <> 'A'
      and t.oid <> all (array['bool', '"char"', 'name', 'int2', 'int4', 'int8', 'float4', 'float8', 'numeric', 'oid',
        'text', 'varchar', 'bpchar', 'uuid', 'json', 'jsonb', 'date', 'time', 'timetz', 'timestamp', 'timestamptz',
        'bit', 'varbit', 'inet', 'cidr', 'macaddr', 'macaddr8', 'tsvector', 'xid', 'xid8']::pg_catalog.regtype[]))
$$;
comment on function relay.needs_care(regclass) is 'whether rows hold types whose conversion may fail or follows rarer settings';

-- relay.parts(relation) : the relation and, if it is partitioned, every partition below it
create or replace function relay.parts(relation regclass) returns setof oid
language sql stable as $$
  select $1::oid union select t.relid::oid from pg_catalog.pg_partition_tree($1) t
$$;
comment on function relay.parts(regclass) is 'the relation itself and all partitions below it';

-- relay.triggers_intact(relation, id, thorough) : whether everything that captures its changes is there and fires always
-- For a materialized view: whether it has the unique index that a refresh needs. `thorough` also asks for the truncate
-- trigger of each partition, which one made since lacks until relay.watch is called again.
create or replace function relay.triggers_intact(relation regclass, id int, thorough boolean default false) returns boolean
language sql stable as $$
  select case
    when c.relkind = 'm' then relay.key($1) <> '{}'
    else not exists (
      select from relay.parts($1) p (oid)
      join pg_catalog.pg_class part on part.oid = p.oid
      where not exists (
          select from pg_catalog.pg_trigger t
          where t.tgrelid = p.oid and t.tgname = '00_relay_capture_' || $2 and t.tgenabled = 'A'
            and t.tgfoid = 'relay.capture()'::pg_catalog.regprocedure
            and (t.tgnargs > 1 or not relay.needs_care($1)))
        or (part.relkind <> 'f' and ($3 or p.oid = $1) and not exists (
          select from pg_catalog.pg_trigger t
          where t.tgrelid = p.oid and t.tgname = '00_relay_truncate_' || $2 and t.tgenabled = 'A'
            and t.tgfoid = 'relay.capture_truncate()'::pg_catalog.regprocedure))
    ) end
  from pg_catalog.pg_class c where c.oid = $1
$$;
comment on function relay.triggers_intact(regclass, int, boolean) is 'whether the triggers of a watched relation are there and enabled';

-- relay.set_triggers(relation, id)
-- Names begin with 00 to fire before the users' own AFTER triggers: one that changes the row again must be logged after
-- the change that caused it. The row trigger is cloned to partitions, present and future; TRUNCATE triggers are not,
-- so each present partition gets its own. A TRUNCATE of the whole is then logged once per part.
create or replace function relay.set_triggers(relation regclass, id int) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  row_trigger constant text := '00_relay_capture_' || id;
  truncate_trigger constant text := '00_relay_truncate_' || id;
  arguments constant text := case when relay.needs_care(relation) then format('%L, %L', id, 'careful') else format('%L', id) end;
  part record;
begin
  execute format('drop trigger if exists %I on %s', row_trigger, relation);
  execute format('create trigger %I after insert or update or delete on %s for each row execute function relay.capture(%s)',
                 row_trigger, relation, arguments);
  execute format('alter table %s enable always trigger %I', relation, row_trigger);
  for part in
    select p.oid::regclass as name, c.relkind from relay.parts(relation) p (oid) join pg_class c on c.oid = p.oid
  loop
    execute format('alter table %s enable always trigger %I', part.name, row_trigger);
    if part.relkind <> 'f' then
      execute format('drop trigger if exists %I on %s', truncate_trigger, part.name);
      execute format('create trigger %I after truncate on %s for each statement execute function relay.capture_truncate(%L)',
                     truncate_trigger, part.name, id);
      execute format('alter table %s enable always trigger %I', part.name, truncate_trigger);
    end if;
  end loop;
end
$$;
comment on function relay.set_triggers(regclass, int) is 'makes the triggers of a watched relation anew';

-- relay.notes(relation) : what somebody who watches a relation may not have meant, and what to do
create or replace function relay.notes(relation regclass) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select array_remove(array[
    case when c.relkind in ('r', 'p') and c.relreplident <> 'f' and relay.key($1) = '{}' then
      format('it has no primary key, so updates and deletes name no row: alter table %s add primary key (...), or replica identity full', $1)
    end,
    case when c.relkind in ('r', 'p') and not c.relrowsecurity then
      format('row security is off, so everybody with SELECT sees all rows: alter table %s enable row level security, and create policies', $1)
    end,
    case when c.relrowsecurity and not exists (select from pg_policy p where p.polrelid = c.oid) then
      'row security is on and there is no policy, so nobody but its owner sees a row'
    end,
    case when not exists (
        select from pg_roles r
        where r.rolname in ('anon', 'authenticated', 'service_role')
          and has_any_column_privilege(r.oid, c.oid, 'select') and has_schema_privilege(r.oid, c.relnamespace, 'usage')) then
      format('none of anon, authenticated and service_role may read it: grant select on %s to authenticated (and usage on its schema)', $1)
    end,
    case when c.relpersistence = 'u' then 'it is unlogged, so a crash empties it without an event' end], null)
  from pg_class c where c.oid = $1
$$;
comment on function relay.notes(regclass) is 'what somebody who watches a relation may not have meant, and what to do';

-- relay.watch(relation, leave_events)
-- Publishes a table, partitioned table, foreign table or materialized view. Idempotent: sets leave_events as given,
-- repairs what is missing or disabled, and locks the table only if there is something to repair. Tells relay.notes.
create or replace function relay.watch(relation regclass, leave_events boolean default false) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  found_relation record;
  list_id int;
  note text;
begin
  select c.oid, c.relkind, c.relpersistence, n.nspname into found_relation
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where c.oid = watch.relation;
  if not found then
    raise exception 'there is no such relation' using errcode = 'undefined_table',
      hint = 'Name an existing table: select relay.watch(''public.todos'')';
  elsif found_relation.nspname = 'relay' then
    raise exception '% belongs to the relay and cannot be watched', relation using errcode = 'wrong_object_type',
      hint = 'Watch tables of your own.';
  elsif found_relation.nspname in ('pg_catalog', 'information_schema', 'pg_toast') or found_relation.oid < 16384 then
    raise exception '% is a system catalog and cannot be watched', relation using errcode = 'wrong_object_type',
      hint = 'PostgreSQL allows no triggers there. Watch tables of your own.';
  elsif found_relation.relpersistence = 't' then
    raise exception '% is a temporary table and cannot be watched', relation using errcode = 'wrong_object_type',
      hint = 'Only its own session sees it. Create it as an ordinary table.';
  elsif found_relation.relkind = 'v' then
    raise exception '% is a view and cannot be watched', relation using errcode = 'wrong_object_type',
      hint = 'A view has no rows of its own: watch the tables it reads, or make it a materialized view and refresh it with relay.refresh.';
  elsif found_relation.relkind not in ('r', 'p', 'm', 'f') then
    raise exception '% is not a table and cannot be watched', relation using errcode = 'wrong_object_type',
      hint = 'Tables, partitioned tables, foreign tables and materialized views can be watched.';
  elsif found_relation.relkind = 'm' and relay.key(relation) = '{}' then
    raise exception 'materialized view % has no unique index', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('It tells which row is which: create unique index on %s (its key columns), without a condition.', relation);
  end if;
  if exists (select from pg_inherits i join pg_class c on c.oid = i.inhrelid
             where i.inhparent = watch.relation and not c.relispartition) then
    raise warning 'tables inherit from %: their own rows are not watched with it', relation
      using hint = 'Watch each of them, or make them partitions.';
  end if;

  -- Entries of dropped relations go now, lest another relation get the same oid one day.
  delete from relay.watch_list w where not exists (select from pg_class c where c.oid = w.relation);
  insert into relay.watch_list as w (relation, leave_events) values (watch.relation, watch.leave_events)
  on conflict on constraint watch_list_relation_key do update set leave_events = excluded.leave_events
  returning w.id into list_id;
  if found_relation.relkind <> 'm' and not relay.triggers_intact(relation, list_id, true) then
    perform relay.set_triggers(relation, list_id);
  end if;
  foreach note in array relay.notes(relation) loop
    raise notice '%: %', relation, note;
  end loop;
end
$$;
comment on function relay.watch(regclass, boolean) is
  'publishes a table or materialized view; again: repairs its triggers. leave_events: an UPDATE that hides a row is sent as a leave';

-- relay.unwatch(relation)
-- Takes it back: no trigger remains, also not on partitions that were detached since. Harmless if it was not watched.
create or replace function relay.unwatch(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  list_id int;
  leftover record;
begin
  delete from relay.watch_list w where w.relation = unwatch.relation returning w.id into list_id;
  if list_id is null then
    raise notice '% was not watched', relation;
    return;
  end if;
  for leftover in
    select t.tgname, t.tgrelid::regclass as name
    from pg_trigger t
    where t.tgfoid in ('relay.capture()'::regprocedure, 'relay.capture_truncate()'::regprocedure) and t.tgparentid = 0
      and t.tgname in ('00_relay_capture_' || list_id, '00_relay_truncate_' || list_id)
  loop
    execute format('drop trigger %I on %s', leftover.tgname, leftover.name);
  end loop;
end
$$;
comment on function relay.unwatch(regclass) is 'takes back relay.watch and leaves no trace on the table';

-- relay.repair() : number of tables whose triggers were made anew
-- For the relay to call when the catalog has changed: a column added since relay.watch may need care that its trigger was
-- not told to take. Leaves alone what somebody disabled or dropped on purpose, and gives up fast where a table is locked.
create or replace function relay.repair() returns int
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms' as $$
declare
  careless record;
  repaired int := 0;
begin
  for careless in
    select w.id, w.relation
    from relay.watch_list w
    join pg_trigger t on t.tgrelid = w.relation and t.tgname = '00_relay_capture_' || w.id
    where t.tgenabled = 'A' and t.tgnargs = 1 and relay.needs_care(w.relation)
  loop
    begin
      perform relay.set_triggers(careless.relation, careless.id);
      repaired := repaired + 1;
    exception when lock_not_available or insufficient_privilege then
      raise notice 'the triggers of % wait for relay.watch', careless.relation;
    end;
  end loop;
  return repaired;
end
$$;
comment on function relay.repair() is 'adapts triggers to columns added since; returns how many tables it touched';

create or replace view relay.watched as
select w.relation,
       case c.relkind when 'r' then 'table' when 'p' then 'partitioned table' when 'm' then 'materialized view'
                      when 'f' then 'foreign table' end as kind,
       relay.key(w.relation) as key,
       w.leave_events,
       w.since,
       c.relreplident = 'f' as full,
       relay.triggers_intact(w.relation, w.id) as intact,
       w.id
from relay.watch_list w
join pg_catalog.pg_class c on c.oid = w.relation;
comment on view relay.watched is
  'what is published, since when, with which key and options. full: old rows are sent whole. intact: false asks for relay.watch again';
