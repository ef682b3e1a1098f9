-- relay.watch, relay.unwatch and relay.watched: the watched relations, their capture triggers and trigger functions.

drop function if exists relay.mend_triggers(int);

-- relay.parts(relation) : the relation and, if it is partitioned, every partition below it
-- Not pg_partition_tree(), which would wait for a locked partition.
create or replace function relay.parts(relation regclass) returns setof oid
language sql stable as $$
  with recursive part (oid) as (
    select $1::oid
    union
    select i.inhrelid
    from part
    join pg_catalog.pg_inherits i on i.inhparent = part.oid
    join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition)
  select part.oid from part
$$;
comment on function relay.parts(regclass) is 'the relation itself and all partitions below it';

-- relay.operations() : the operations that have a row trigger
create or replace function relay.operations() returns text[]
language sql immutable as $$
  select '{INSERT,UPDATE,DELETE}'::text[]
$$;
comment on function relay.operations() is 'operations that have a row trigger each';

-- relay.capture_function(id, operation) : name of the trigger function, in schema relay
create or replace function relay.capture_function(id int, operation text) returns text
language sql immutable as $$
  select 'capture_' || $1 || '_' || pg_catalog.lower($2)
$$;
comment on function relay.capture_function(int, text) is 'name of a trigger function';

-- relay.capture_trigger(id, operation) : name of the row trigger
-- Names begin with 00, so that the trigger fires before the users' own AFTER triggers: if one of these changes the row again,
-- that change must be logged after the first.
create or replace function relay.capture_trigger(id int, operation text) returns text
language sql immutable as $$
  select '00_relay_capture_' || $1 || '_' || pg_catalog.lower($2)
$$;
comment on function relay.capture_trigger(int, text) is 'name of a row trigger';

-- relay.owner_may_execute(relation, function) : whether the owner of a relation may execute a trigger function
create or replace function relay.owner_may_execute(relation regclass, function regprocedure) returns boolean
language sql stable as $$
  select pg_catalog.has_function_privilege(c.relowner, $2, 'execute') from pg_catalog.pg_class c where c.oid = $1
$$;
comment on function relay.owner_may_execute(regclass, regprocedure) is 'whether the owner of a relation may execute a trigger function';

-- relay.functions_intact(relation, id) : whether its trigger functions are as relay.set_functions writes them
create or replace function relay.functions_intact(relation regclass, id int) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  shape constant int := relay.shape(id);
begin
  return shape is not null and not exists (
    select from unnest(relay.operations()) o
    where not exists (
      select from pg_proc p
      where p.oid = to_regprocedure(format('relay.%I()', relay.capture_function(id, o)))
        and p.prosrc = relay.capture_body(relation, id, shape, o) and p.prosecdef and p.proconfig is null
        and p.proowner = 'relay_writer'::regrole and relay.owner_may_execute(relation, p.oid)));
end
$$;
comment on function relay.functions_intact(regclass, int) is 'whether the trigger functions of a watched relation are up to date';

-- relay.triggers_intact(relation, id, thorough) : whether all its capture triggers exist and are enabled ALWAYS
-- For a materialized view: whether it has the unique index that a refresh needs. `thorough` also checks the truncate
-- trigger of each partition, which a new partition lacks until relay.watch is called again.
create or replace function relay.triggers_intact(relation regclass, id int, thorough boolean default false) returns boolean
language sql stable as $$
  select case
    when c.relkind = 'm' then relay.key($1) <> '{}'
    else not exists (
      select from relay.parts($1) p (oid)
      join pg_catalog.pg_class part on part.oid = p.oid
      where exists (
          select from pg_catalog.unnest(relay.operations()) o
          where not exists (
            select from pg_catalog.pg_trigger t
            where t.tgrelid = p.oid and t.tgname = relay.capture_trigger($2, o)::pg_catalog.name and t.tgenabled = 'A'
              and t.tgfoid = pg_catalog.to_regprocedure(pg_catalog.format('relay.%I()', relay.capture_function($2, o)))))
        or (part.relkind <> 'f' and ($3 or p.oid = $1) and not exists (
          select from pg_catalog.pg_trigger t
          where t.tgrelid = p.oid and t.tgname = '00_relay_truncate_' || $2 and t.tgenabled = 'A'
            and t.tgfoid = 'relay.capture_truncate()'::pg_catalog.regprocedure))
    ) end
  from pg_catalog.pg_class c where c.oid = $1
$$;
comment on function relay.triggers_intact(regclass, int, boolean) is 'whether the triggers of a watched relation exist and are enabled ALWAYS';

-- relay.set_functions(relation, id, shape) : creates or replaces its trigger functions, which locks no table
-- Their owner becomes relay_writer. ALTER FUNCTION ... OWNER TO needs CREATE on the schema, which is granted temporarily.
create or replace function relay.set_functions(relation regclass, id int, shape int) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  operation text;
  name text;
  body text;
  is_new boolean := false;
  is_superuser constant boolean := (select r.rolsuper from pg_roles r where r.rolname = current_user);
begin
  foreach operation in array relay.operations() loop
    name := format('relay.%I()', relay.capture_function(id, operation));
    body := relay.capture_body(relation, id, shape, operation);
    if exists (select from pg_proc p where p.oid = to_regprocedure(name) and p.prosrc = body and p.prosecdef
               and p.proconfig is null and p.proowner = 'relay_writer'::regrole) then
      continue;
    end if;
    execute format('create or replace function %s returns pg_catalog.trigger language plpgsql volatile security definer as %L', name, body);
    is_new := is_new or exists (select from pg_proc p where p.oid = to_regprocedure(name) and p.proowner <> 'relay_writer'::regrole);
  end loop;
  if is_new then
    if not is_superuser then
      -- Serializes changes of the schema's rights.
      perform pg_advisory_xact_lock(relay.lock_class('relay'), relay.lock('rights'));
      execute 'grant create on schema relay to relay_writer';
    end if;
    execute (select format('revoke all on function %s from public', string_agg(format('relay.%I()', relay.capture_function(id, o)), ', '))
             from unnest(relay.operations()) o);
    foreach operation in array relay.operations() loop
      name := format('relay.%I()', relay.capture_function(id, operation));
      execute format('alter function %s owner to relay_writer', name);
    end loop;
    if not is_superuser then
      execute 'revoke create on schema relay from relay_writer';
    end if;
  end if;
  -- The owner needs EXECUTE to add a partition, which clones the triggers.
  foreach operation in array relay.operations() loop
    name := format('relay.%I()', relay.capture_function(id, operation));
    if not relay.owner_may_execute(relation, to_regprocedure(name)) then
      execute (select format('grant execute on function %s to %s', name, c.relowner::regrole) from pg_class c where c.oid = relation);
    end if;
  end loop;
end
$$;
comment on function relay.set_functions(regclass, int, int) is 'creates or replaces the trigger functions of a watched relation';

-- relay.drop_trigger(trigger, relation) : drops a trigger if it exists
-- Not DROP TRIGGER IF EXISTS, which takes an access exclusive lock even if there is none.
create or replace function relay.drop_trigger(trigger text, relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from pg_trigger t where t.tgrelid = drop_trigger.relation and t.tgname = trigger::name) then
    execute format('drop trigger %I on %s', trigger, relation);
  end if;
end
$$;
comment on function relay.drop_trigger(text, regclass) is 'drops a trigger if it exists';

-- relay.set_triggers(relation, id) : recreates the triggers of a watched relation
-- PostgreSQL clones row triggers to present and future partitions, but not TRUNCATE triggers, so each present partition gets
-- its own. A TRUNCATE of the partitioned table is then logged once per partition.
create or replace function relay.set_triggers(relation regclass, id int) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  truncate_trigger constant text := '00_relay_truncate_' || id;
  operation text;
  part record;
begin
  -- The trigger of an older version.
  perform relay.drop_trigger('00_relay_capture_' || id, relation);
  foreach operation in array relay.operations() loop
    perform relay.drop_trigger(relay.capture_trigger(id, operation), relation);
    execute format('create trigger %I after %s on %s for each row execute function relay.%I()',
                   relay.capture_trigger(id, operation), operation, relation, relay.capture_function(id, operation));
  end loop;
  for part in
    select p.oid::regclass as name, c.relkind from relay.parts(relation) p (oid) join pg_class c on c.oid = p.oid
  loop
    if part.relkind <> 'f' then
      perform relay.drop_trigger(truncate_trigger, part.name);
      -- Or replace: the event trigger may have created it meanwhile.
      execute format('create or replace trigger %I after truncate on %s for each statement execute function relay.capture_truncate(%L)',
                     truncate_trigger, part.name, id);
    end if;
    -- One statement, because the event trigger checks rules after each.
    execute (select format('alter table %s %s', part.name, string_agg(format('enable always trigger %I', t), ', '))
             from unnest(array(select relay.capture_trigger(id, o) from unnest(relay.operations()) o)
                         || case when part.relkind <> 'f' then array[truncate_trigger] end) t);
  end loop;
end
$$;
comment on function relay.set_triggers(regclass, int) is 'recreates the triggers of a watched relation';

-- relay.renew_shapes(guarded, wanted) : records changed shapes, replaces outdated trigger functions; returns the number of relations
-- Runs in the caller's transaction; `guarded` means that this transaction altered the table. Waits for no other transaction:
-- a relation that another transaction is renewing is left to the next call, and recorded in relay.shape_doubts. The next
-- call then records an unguarded shape, which invalidates all older images: images written in between carry the number of a
-- shape that they were not written under.
-- The statements below fire the event trigger, which calls this function again: relay.renewing ends that recursion.
create or replace function relay.renew_shapes(guarded boolean default false, wanted int[] default null) returns int
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  known record;
  renewed int := 0;
  doubts tid[];
  doubted int[];
begin
  if current_setting('relay.renewing', true) = 'on' then
    return 0;
  end if;
  perform set_config('relay.renewing', 'on', true);
  select array_agg(d.ctid), array_agg(d.relation) into doubts, doubted
  from (select d.ctid, d.relation from relay.shape_doubts d for update skip locked) d;
  for known in
    select w.id, w.relation, w.ignored, c.relkind, last.shape, last.columns as old, relay.columns_of(w.relation) as new,
           coalesce(0 = any (doubted) or w.id = any (doubted), false) as doubtful
    from relay.watch_list w
    join pg_class c on c.oid = w.relation
    left join lateral (
      select s.shape, s.columns from relay.shapes s where s.relation = w.id order by s.shape desc limit 1) last on true
    where wanted is null or w.id = any (wanted) or 0 = any (doubted) or w.id = any (doubted)
    order by w.id
  loop
    continue when known.old = known.new and not known.doubtful
      and (known.relkind = 'm' or guarded and known.ignored is null or relay.functions_intact(known.relation, known.id));
    if not pg_try_advisory_xact_lock(relay.lock_class('relation'), known.id) then
      insert into relay.shape_doubts (relation) values (known.id);
      continue;
    end if;
    if known.doubtful or known.old is distinct from known.new then
      insert into relay.shapes (relation, shape, columns, loose, guarded)
      values (known.id, coalesce(known.shape, 0) + 1, known.new, coalesce(relay.differs_loosely(known.old, known.new), false),
              renew_shapes.guarded and not known.doubtful);
    end if;
    if known.relkind <> 'm' then
      update relay.watch_list w set ignored = relay.ignored_now(w.relation, w.ignored) where w.id = known.id and w.ignored is not null;
      perform relay.set_functions(known.relation, known.id, relay.shape(known.id));
    end if;
    renewed := renewed + 1;
  end loop;
  delete from relay.shape_doubts d where d.ctid = any (doubts);
  perform set_config('relay.renewing', 'off', true);
  return renewed;
end
$$;
comment on function relay.renew_shapes(boolean, int[]) is 'records changed shapes of watched relations, and replaces outdated trigger functions';
drop function if exists relay.renew_shapes(boolean);

-- relay.sweep() : removes entries and functions of dropped relations, and shapes that no kept change has
create or replace function relay.sweep() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  leftover record;
begin
  delete from relay.watch_list w where not exists (select from pg_class c where c.oid = w.relation);
  delete from relay.told_views t where not exists (select from relay.watch_list w where w.id = t.id);
  delete from relay.told_rows r where not exists (select from relay.told_views t where t.id = r.view);
  for leftover in
    select p.oid::regprocedure as name from pg_proc p
    where p.pronamespace = 'relay'::regnamespace and p.proname ~ '^capture_[0-9]+_(insert|update|delete)$'
      and not exists (select from relay.watch_list w where p.proname = any (array(
        select relay.capture_function(w.id, o) from unnest(relay.operations()) o)::name[]))
      and not exists (select from pg_trigger t where t.tgfoid = p.oid)
  loop
    begin
      execute format('drop function %s', leftover.name);
    exception when others then
      raise notice 'function % could not be dropped: %', leftover.name, sqlerrm;
    end;
  end loop;
  delete from relay.shapes s
  where not exists (select from relay.watch_list w where w.id = s.relation)
     -- All changes of a shape finished before the next shape was recorded. That was before the horizon, so they are truncated.
     or exists (select from relay.shapes n, relay.history h
                where n.relation = s.relation and n.shape = s.shape + 1 and pg_visible_in_snapshot(n.xid, h.horizon));
end
$$;
comment on function relay.sweep() is 'removes unused functions and shapes';

-- relay.part_names(relation) : names and parents of all partitions below it, as in relay.known_relations
create or replace function relay.part_names(relation regclass) returns jsonb
language sql stable as $$
  with recursive part (oid, entry) as (
    select $1::oid, null::jsonb
    union all
    select i.inhrelid, pg_catalog.jsonb_build_array(s.nspname, c.relname, i.inhparent::bigint)
    from part
    join pg_catalog.pg_inherits i on i.inhparent = part.oid
    join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition
    join pg_catalog.pg_namespace s on s.oid = c.relnamespace)
  select coalesce(pg_catalog.jsonb_object_agg(part.oid, part.entry) filter (where part.entry is not null), '{}') from part
$$;
comment on function relay.part_names(regclass) is 'names and parents of partitions, by oid';

-- relay.parts_mark(relation) : a hash of relay.part_names(), which takes a fraction of its time; 0: there are none
create or replace function relay.parts_mark(relation regclass) returns bigint
language sql stable as $$
  with recursive part (oid, sign) as (
    select $1::oid, 0::bigint
    union all
    select i.inhrelid, pg_catalog.hashtextextended(s.nspname::text,
      pg_catalog.hashtextextended(c.relname::text, c.oid::bigint << 32 | i.inhparent::bigint))
    from part
    join pg_catalog.pg_inherits i on i.inhparent = part.oid
    join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition
    join pg_catalog.pg_namespace s on s.oid = c.relnamespace)
  select pg_catalog.bit_xor(part.sign) from part
$$;
comment on function relay.parts_mark(regclass) is 'hash of the names and parents of partitions';

-- relay.relations_now(wanted) : current names, incomplete triggers and partitions of watched relations; null: all
-- An entry of `mute` is a table, an operation that is not captured in every session, and how its trigger is enabled. parts_mark
-- is that of relay.parts_mark().
do $$
begin
  if (select not ('parts_mark' = any (p.proargnames)) from pg_catalog.pg_proc p
      where p.oid = pg_catalog.to_regprocedure('relay.relations_now(int)')) then
    drop function relay.relations_now(int);
  end if;
end
$$;
create or replace function relay.relations_now(wanted int default null)
returns table (id int, schema text, name text, mute text[], parts oid[], parts_mark bigint)
language plpgsql stable rows 100
set search_path = pg_catalog, pg_temp
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query
    select w.id, n.nspname::text, c.relname::text,
      array(select concat_ws(' ', p.oid, o, coalesce(t.tgenabled, '-'))
            from unnest(part.oids) p (oid) cross join unnest(relay.operations() || 'TRUNCATE'::text) o
            left join pg_trigger t on t.tgrelid = p.oid and t.tgname = case o
              when 'TRUNCATE' then '00_relay_truncate_' || w.id else relay.capture_trigger(w.id, o) end::name
            where c.relkind <> 'm' and t.tgenabled is distinct from 'A'
              and not (o = 'TRUNCATE' and (select f.relkind = 'f' from pg_class f where f.oid = p.oid))
            order by 1),
      array(select p from unnest(part.oids) p where p <> c.oid order by p),
      case when c.relkind = 'p' then relay.parts_mark(c.oid) else 0 end
    from relay.watch_list w
    join pg_class c on c.oid = w.relation
    join pg_namespace n on n.oid = c.relnamespace
    cross join lateral (
      select case when c.relkind = 'p' then array(select p from relay.parts(c.oid) p) else array[c.oid] end as oids) part
    where $1 is null or w.id = $1;
end
$$;
comment on function relay.relations_now(int) is 'current names, incomplete triggers and partitions of watched relations';

-- relay.log_gap(id, why, schema, part) : logs that changes of a watched relation, or of one partition, may be missing at this position
-- why: `unheard`: its triggers stopped, or started again, capturing every change; `parts`: rows came or went with a
-- partition; `rewritten`: a statement rewrote all rows without firing triggers; `gone`: it is no longer watched in this
-- schema; `doubt`: its state could not be determined.
drop function if exists relay.log_gap(int, text, text);
create or replace function relay.log_gap(id int, why text, schema text default null, part oid default null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.log_change(id, null, 'G', false, null, json_strip_nulls(json_build_object('why', why, 'left', schema)), part);
  if not pg_try_advisory_xact_lock_shared(relay.lock_class('relay'), relay.lock('doorbell')) then
    perform relay.ring('schema', why);
  end if;
end
$$;
comment on function relay.log_gap(int, text, text, oid) is 'logs that changes of a watched relation may be missing at this position';

-- relay.note_rewrite(table) : logs a gap for the watched relation that the table is, or is a partition of
create or replace function relay.note_rewrite(rewritten oid) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  select relay.log_gap(w.id, 'rewritten', part => case when w.relation <> rewritten then rewritten end) from relay.watch_list w
  where w.relation = rewritten or w.relation in (select a.relid from pg_partition_ancestors(rewritten) a)
$$;
comment on function relay.note_rewrite(oid) is 'logs a gap for the watched relation whose rows were rewritten';

-- relay.log_new_name() : logs that a relation was renamed, or is newly watched
create or replace function relay.log_new_name() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.log_change(0, null, 'S', false, null, null);
  if not pg_try_advisory_xact_lock_shared(relay.lock_class('relay'), relay.lock('doorbell')) then
    perform relay.ring('schema', 'watch');
  end if;
end
$$;
comment on function relay.log_new_name() is 'logs that the names of watched relations changed';

-- relay.repair_triggers(id) : enables triggers ALWAYS that fire only in some sessions, and creates truncate triggers of new partitions
-- ENABLE TRIGGER ALL makes triggers fire only in sessions of origin. A disabled trigger, or a missing one that PostgreSQL
-- would have cloned, is left as it is: a user did that on purpose.
create or replace function relay.repair_triggers(id int) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  truncate_trigger constant text := '00_relay_truncate_' || id;
  part record;
begin
  for part in
    select m.oid::regclass as name, m.oid = w.relation as is_whole,
           (select string_agg(format('enable always trigger %I', t.tgname), ', ') from pg_trigger t
            where t.tgrelid = m.oid and t.tgenabled in ('O', 'R')
              and t.tgname = any (array(select relay.capture_trigger(w.id, o) from unnest(relay.operations()) o)::name[] || truncate_trigger::name)
           ) as actions,
           not exists (select from pg_trigger t where t.tgrelid = m.oid and t.tgname = truncate_trigger::name) as lacks_truncate
    from relay.watch_list w
    cross join lateral (select distinct split_part(e, ' ', 1)::oid as oid from relay.relations_now(w.id) n, unnest(n.mute) e) m
    where w.id = repair_triggers.id
  loop
    if part.actions is not null then
      execute format('alter table %s %s', part.name, part.actions);
    end if;
    if part.lacks_truncate and not part.is_whole then
      execute format('create trigger %I after truncate on %s for each statement execute function relay.capture_truncate(%L)',
                     truncate_trigger, part.name, id);
      execute format('alter table %s enable always trigger %I', part.name, truncate_trigger);
    end if;
  end loop;
end
$$;
comment on function relay.repair_triggers(int) is 'enables capture triggers ALWAYS, and creates those of new partitions';

-- relay.part_named(was, names) : relay.known_relations.part_named for these part_names; a partition that is new or has another name
-- or parent has it since now
create or replace function relay.part_named(was relay.known_relations, names jsonb) returns jsonb
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(n.key, coalesce(
           case when n.value = was.part_names -> n.key then was.part_named -> n.key end,
           jsonb_build_object('xid', pg_current_xact_id()::text, 'number', nextval('relay.change_number'))))
         filter (where n.value is distinct from was.part_names -> n.key or was.part_named ? n.key), '{}')
  from jsonb_each(names) n
$$;
comment on function relay.part_named(relay.known_relations, jsonb) is 'since when each partition has its name and parent';

-- relay.note_parents(id, was, names) : records the former parents of partitions, from the part_names before and now
-- A partition that is new has no older changes: only one that was a partition of the relation before gets an entry when it comes.
create or replace function relay.note_parents(id int, was jsonb, names jsonb) returns void
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  delete from relay.former_parents f using relay.history h where pg_visible_in_snapshot(f.xid, h.horizon);
  insert into relay.former_parents (relation, part, parent, number)
  select $1, p::oid, (was -> p ->> 2)::oid, nextval('relay.change_number')
  from (select jsonb_object_keys(was) union select jsonb_object_keys(names)) k (p)
  where was -> p -> 2 is distinct from names -> p -> 2
    and (was ? p or exists (select from relay.former_parents f where (f.relation, f.part) = ($1, p::oid)))
$$;
comment on function relay.note_parents(int, jsonb, jsonb) is 'records the former parents of partitions';

-- relay.note_relation(id) : records the current state of a watched relation, and logs a gap where changes may be missing
-- Waits for no other transaction: if another one is recording it, this logs a gap and leaves the rest to the next call.
create or replace function relay.note_relation(id int) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  was relay.known_relations;
  now record;
  names jsonb;
  tables text[];
begin
  if not pg_try_advisory_xact_lock(relay.lock_class('relation'), id) then
    perform relay.log_gap(id, 'doubt');
    return;
  end if;
  -- Without a row here, the event trigger ignores the statements that repair triggers.
  delete from relay.known_relations k where k.id = note_relation.id returning k.* into was;
  select * into now from relay.relations_now(id);
  if was.id is null then
    return;
  end if;
  if now.schema is distinct from was.schema then
    perform relay.log_gap(id, 'gone', was.schema);
  end if;
  if now.id is null then
    return;
  end if;
  -- Only tables that were and are part of the relation: an attached or detached partition is handled below.
  tables := array(select p::text from unnest(was.parts) p where p = any (now.parts))
    || (select w.relation::oid::text from relay.watch_list w where w.id = was.id);
  if exists (select from unnest(now.mute || was.mute) m
             where not (m = any (now.mute) and m = any (was.mute)) and split_part(m, ' ', 1) = any (tables)) then
    perform relay.log_gap(id, 'unheard');
  end if;
  -- Later than the mark, so that a newer name is not taken for a recorded one.
  names := case when now.parts_mark is distinct from was.parts_mark then relay.part_names(
    (select w.relation from relay.watch_list w where w.id = was.id)) else was.part_names end;
  perform relay.note_parents(id, was.part_names, names);
  -- For readers of the partitions above it as well, which a gap of the partition would not reach any more.
  if exists (select from unnest(was.parts) p
             where (p <> all (now.parts) or names -> p::text -> 2 <> was.part_names -> p::text -> 2) and relay.may_have_rows(p)) then
    perform relay.log_gap(id, 'parts');
  end if;
  perform relay.log_gap(id, 'parts', part => p) from unnest(now.parts) p where p <> all (was.parts) and relay.may_have_rows(p);
  if (now.schema, now.name) <> (was.schema, was.name) then
    was.named_by := pg_current_xact_id();
    was.named_at := nextval('relay.change_number');
  end if;
  was.part_named := relay.part_named(was, names);
  if (now.schema, now.name, names) <> (was.schema, was.name, was.part_names) then
    perform relay.log_new_name();
  end if;
  begin
    perform relay.repair_triggers(id);
  exception when others then
    raise notice 'the triggers of % could not be repaired: %', format('%I.%I', now.schema, now.name), sqlerrm
      using hint = format('As its owner: select relay.watch(%L)', format('%I.%I', now.schema, now.name));
  end;
  insert into relay.known_relations (id, schema, name, named_by, named_at, mute, parts, parts_mark, part_names, part_named)
  select n.id, n.schema, n.name, was.named_by, was.named_at, n.mute, n.parts, now.parts_mark, names, was.part_named from relay.relations_now(id) n;
end
$$;
comment on function relay.note_relation(int) is 'records the current state of a watched relation, and logs gaps';

-- relay.may_have_rows(table) : false only if it certainly holds no rows of its own
-- Decided by file size, which no snapshot hides and which needs no privilege.
create or replace function relay.may_have_rows(relation oid) returns boolean
language sql volatile as $$
  select coalesce((select case when c.relkind = 'p' then false else c.relkind = 'f' or pg_catalog.pg_relation_size(c.oid) > 0 end
                   from pg_catalog.pg_class c where c.oid = $1), true)
$$;
comment on function relay.may_have_rows(oid) is 'whether a table may hold rows';

-- relay.note_relations() : records the current state of all watched relations that changed since the last call
-- Never fails: on an error it logs a gap for all watched relations.
create or replace function relay.note_relations() returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
declare
  one int;
begin
  for one in
    select k.id from relay.known_relations k left join relay.relations_now() n on n.id = k.id
    where (n.schema, n.name, n.mute, n.parts, n.parts_mark) is distinct from (k.schema, k.name, k.mute, k.parts, k.parts_mark)
    order by k.id
  loop
    perform relay.note_relation(one);
  end loop;
exception when others then
  raise notice 'the state of watched relations could not be recorded: %', sqlerrm;
  perform relay.log_gap(w.id, 'doubt') from relay.watch_list w;
end
$$;
comment on function relay.note_relations() is 'records watched relations that changed since the last call, and logs gaps';

-- relay.lock_for_triggers(relation, mode) : takes the lock that creating or dropping triggers needs
-- By short attempts, repeated: while a long transaction has written to the table, this call waits, but no writer does.
create or replace function relay.lock_for_triggers(relation regclass, mode text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  known constant text := current_setting('lock_timeout');
begin
  if (select c.relkind not in ('r', 'p') from pg_class c where c.oid = lock_for_triggers.relation) then
    return;
  end if;
  loop
    begin
      perform set_config('lock_timeout', '50ms', true);
      execute format('lock table %s in %s mode', relation, mode);
      exit;
    exception when lock_not_available then
      perform pg_sleep(0.5);
    end;
  end loop;
  perform set_config('lock_timeout', known, true);
end
$$;
comment on function relay.lock_for_triggers(regclass, text) is 'takes the lock for creating or dropping triggers, without blocking writers';

-- relay.notes(relation) : likely mistakes in the setup of a watched relation, each with its remedy
create or replace function relay.notes(relation regclass) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select array_remove(array[
    case when c.relkind in ('r', 'p') and c.relreplident <> 'f' and relay.key($1) = '{}' then
      format('it has no primary key, so updates and deletes name no row: alter table %s add primary key (...), or replica identity full', $1)
    end,
    case when c.relkind in ('r', 'p') and not c.relrowsecurity then
      format('row security is off, so every role with SELECT sees all rows: alter table %s enable row level security, and create policies', $1)
    end,
    case when c.relrowsecurity and not exists (select from pg_policy p where p.polrelid = c.oid) then
      format('row security is on and there is no policy, so only its owner sees rows: create policy ... on %s for select to authenticated using (...)', $1)
    end,
    case when not exists (
        select from pg_roles r
        where r.rolname in ('anon', 'authenticated', 'service_role')
          and has_any_column_privilege(r.oid, c.oid, 'select') and has_schema_privilege(r.oid, c.relnamespace, 'usage')) then
      format('none of anon, authenticated and service_role may read it: grant select on %s to authenticated (and usage on its schema)', $1)
    end,
    (select format('policy %1$I reads the ignored column %2$I, so a row that an update of nothing else shows or hides is not told: '
                   'select relay.watch(%3$L, ignore => %4$L)', p.polname, a.attname, $1, array_remove(relay.ignored(w.id), a.attname::text))
     from relay.watch_list w
     join pg_policy p on p.polrelid = w.relation and p.polcmd in ('r', '*')
     join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = p.oid and d.refclassid = 'pg_class'::regclass and d.refobjid = $1
     join pg_attribute a on a.attrelid = $1 and a.attnum = d.refobjsubid and a.attname::text = any (relay.ignored(w.id))
     where w.relation = $1
     order by p.polname, a.attnum limit 1),
    case when c.relpersistence = 'u' then 'it is unlogged, so a crash empties it without an event' end,
    (select format('trigger %1$I fires before those of the relay, so its changes of the same row are delivered in the wrong order: alter trigger %1$I on %2$s rename to ...',
                   t.tgname, $1)
     from pg_trigger t
     where t.tgrelid = c.oid and not t.tgisinternal and t.tgname < '00_relay_capture_'
       and t.tgtype & 1 = 1 and t.tgtype & 66 = 0
     order by t.tgname limit 1)] || array(
      select format('its policies read what %s may not, so that role sees nothing: %s', r.rolname, g)
      from pg_roles r, unnest(relay.missing_grants($1, r.oid)) g
      where r.rolname in ('anon', 'authenticated', 'service_role') and has_any_column_privilege(r.oid, c.oid, 'select')
      order by r.rolname, g), null)
  from pg_class c where c.oid = $1
$$;
comment on function relay.notes(regclass) is 'likely mistakes in the setup of a watched relation, with their remedies';

-- relay.trigger_lock(relation) : the lock that creating its triggers needs, or replacing those that there are
create or replace function relay.trigger_lock(relation regclass) returns text
language sql stable as $$
  select case when exists (select from pg_catalog.pg_trigger t where t.tgrelid = $1 and pg_catalog.starts_with(t.tgname, '00_relay_'))
              then 'access exclusive' else 'share row exclusive' end
$$;
comment on function relay.trigger_lock(regclass) is 'the lock that creating or replacing the triggers of a relation needs';

-- relay.watch_table(relation, leave_events, by_hand, ignore) : as relay.watch; not `by_hand`: for a collection, and in its transaction
drop function if exists relay.watch_table(regclass, boolean, boolean);
create or replace function relay.watch_table(relation regclass, leave_events boolean, by_hand boolean, ignore text[] default '{}') returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  found_relation record;
  list_id int;
  known relay.known_relations;
  note text;
begin
  select c.oid, c.relkind, c.relpersistence, n.nspname into found_relation
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where c.oid = watch_table.relation;
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
      hint = format('The index identifies rows: create unique index on %s (its key columns), without a condition.', relation);
  end if;
  if exists (select from pg_inherits i join pg_class c on c.oid = i.inhrelid
             where i.inhparent = watch_table.relation and not c.relispartition) then
    raise warning 'tables inherit from %: their own rows are not watched with it', relation
      using hint = 'Watch each of them, or make them partitions.';
  end if;

  -- Removes entries of dropped relations, because another relation can get the same oid. A table that comes into a collection has
  -- no entry, and the locks of this would be held by a statement of a user.
  if by_hand then
    perform relay.sweep();
  end if;
  insert into relay.watch_list as w (relation, leave_events, by_hand, ignored)
  values (watch_table.relation, watch_table.leave_events, watch_table.by_hand, relay.ignored_of(relation, ignore))
  on conflict on constraint watch_list_relation_key
    do update set leave_events = excluded.leave_events, by_hand = w.by_hand or excluded.by_hand, ignored = excluded.ignored
  returning w.id into list_id;
  if exists (select from relay.known_relations k where k.id = list_id) then
    perform relay.note_relation(list_id);
  end if;
  perform relay.renew_shapes(wanted => case when not by_hand then array[list_id] end);
  if found_relation.relkind = 'm' and not exists (select from relay.told_views t where t.id = list_id) then
    perform pg_advisory_xact_lock(relay.lock_class('refresh'), relation::oid::int4), relay.keep_images(list_id);
  end if;
  if found_relation.relkind <> 'm' and not relay.triggers_intact(relation, list_id, true) then
    perform relay.lock_for_triggers(relation, relay.trigger_lock(relation));
    -- Without a row here, the event trigger ignores the statements below.
    delete from relay.known_relations k where k.id = list_id returning k.* into known;
    -- Triggers change no columns: the event trigger need not look for changed shapes after each of them.
    perform set_config('relay.renewing', 'on', true);
    perform relay.set_triggers(relation, list_id);
    perform set_config('relay.renewing', 'off', true);
  else
    select k.* into known from relay.known_relations k where k.id = list_id;
  end if;
  insert into relay.known_relations (id, schema, name, named_by, named_at, mute, parts, parts_mark, part_names, part_named)
  select n.id, n.schema, n.name, coalesce(known.named_by, pg_current_xact_id()),
         coalesce(known.named_at, nextval('relay.change_number')), n.mute, n.parts, n.parts_mark, relay.part_names(relation), coalesce(known.part_named, '{}')
  from relay.relations_now(list_id) n
  on conflict (id) do nothing;
  if known.id is null then
    perform relay.log_new_name();
  elsif known.mute <> (select k.mute from relay.known_relations k where k.id = list_id) then
    perform relay.log_gap(list_id, 'unheard');
  end if;
  foreach note in array relay.notes(relation) loop
    raise notice '%: %', relation, note;
  end loop;
end
$$;
comment on function relay.watch_table(regclass, boolean, boolean, text[]) is 'publishes a table or materialized view, by hand or for a collection';

-- relay.watch(relation, leave_events, ignore)
-- Publishes a table, partitioned table, foreign table or materialized view. Idempotent: sets leave_events and ignore as given,
-- repairs missing or disabled triggers, and locks the table only if there is something to repair. Raises relay.notes as notices.
drop function if exists relay.watch(regclass, boolean);
create or replace function relay.watch(relation regclass, leave_events boolean default false, ignore text[] default '{}') returns void
language sql volatile as $$
  select relay.watch_table($1, $2, true, $3)
$$;
comment on function relay.watch(regclass, boolean, text[]) is
  'publishes a table or materialized view; again: repairs its triggers. leave_events: an UPDATE that hides a row is sent as a leave. ignore: an UPDATE of nothing but these columns is not logged';

-- relay.unwatch_table(relation) : drops all triggers, also those of partitions that were detached since
create or replace function relay.unwatch_table(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  list_id int;
  known_schema text;
  leftover record;
begin
  delete from relay.watch_list w where w.relation = unwatch_table.relation returning w.id into list_id;
  perform relay.lock_for_triggers(relation, 'access exclusive');
  -- Subscribers know the relation by the last recorded name.
  delete from relay.known_relations k where k.id = list_id returning k.schema into known_schema;
  if known_schema is not null then
    perform relay.log_gap(list_id, 'gone', known_schema);
  end if;
  for leftover in
    select t.tgname, t.tgrelid::regclass as name
    from pg_trigger t
    join pg_proc p on p.oid = t.tgfoid and p.pronamespace = 'relay'::regnamespace
    where t.tgparentid = 0
      and t.tgname = any (array(select relay.capture_trigger(list_id, o) from unnest(relay.operations()) o)::name[]
                          || array['00_relay_capture_' || list_id, '00_relay_truncate_' || list_id]::name[])
  loop
    execute format('drop trigger %I on %s', leftover.tgname, leftover.name);
  end loop;
  perform relay.sweep();
end
$$;
comment on function relay.unwatch_table(regclass) is 'unwatches a relation';

-- relay.unwatch(relation)
-- Reverts relay.watch. A table of a watched publication or schema stays watched for that. No error if it was not watched.
create or replace function relay.unwatch(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  list_id int;
  collections text := (select string_agg(t.collection, ', ') from relay.collection_tables() t
                       where t.relation = unwatch.relation and t.refused is null);
begin
  if not exists (select from relay.watch_list w where w.relation = unwatch.relation) then
    raise notice '% was not watched', relation;
  elsif collections is null then
    perform relay.unwatch_table(relation);
  else
    update relay.watch_list w set by_hand = false, ignored = null where w.relation = unwatch.relation returning w.id into list_id;
    perform relay.renew_shapes(wanted => array[list_id]);
    raise notice '% stays watched, because it is in %', relation, collections
      using hint = 'Take it out of the publication or schema, or: select relay.unwatch_publication(...), relay.unwatch_schema(...)';
  end if;
end
$$;
comment on function relay.unwatch(regclass) is 'reverts relay.watch and leaves no trace on the table';

-- relay.repair(wanted) : number of relations whose shape or functions were renewed; also records the state of all relations
-- The relay calls it when the catalog has changed, with the ids of the changed relations; null: all. With the event trigger
-- there is usually nothing to do.
drop function if exists relay.repair();
create or replace function relay.repair(wanted int[] default null) returns int
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  select relay.note_relations();
  select relay.renew_shapes(wanted => $1)
$$;
comment on function relay.repair(int[]) is 'renews outdated shapes and trigger functions; returns the number of relations';

create or replace view relay.watched as
select w.relation,
       case c.relkind when 'r' then 'table' when 'p' then 'partitioned table' when 'm' then 'materialized view'
                      when 'f' then 'foreign table' end as kind,
       relay.key(w.relation) as key,
       w.leave_events,
       w.since,
       c.relreplident = 'f' as full,
       relay.triggers_intact(w.relation, w.id) and (c.relkind = 'm' or relay.functions_intact(w.relation, w.id)) as intact,
       w.id,
       relay.ignored(w.id) as ignored
from relay.watch_list w
join pg_catalog.pg_class c on c.oid = w.relation;
comment on view relay.watched is
  'watched relations with their key and options. ignored: an UPDATE of nothing but these columns is not logged. full: old rows are sent whole. intact: if false, call relay.watch again';
