-- Schema changes in the changelog, in order with row changes: rules and columns may differ from there on.
--
-- Needs an event trigger. Where the installer may not create one, the relay checks the catalog for every page.

-- relay.rules_now() : the visibility rules of each watched relation and of each partition in relay.named_parts, as sets that
-- can be compared; `part` is the partition, 0 the relation itself
-- They are, of the relation and of the tables that its policies read, also by policies of their own and by functions: grants, owner,
-- row security, policies, and the functions that policies call, also by other functions, with the right to execute them.
drop function if exists relay.rules_now();
create or replace function relay.rules_now() returns table (relation int, part oid, open text[], shut text[])
language plpgsql stable rows 100
set search_path = pg_catalog, pg_temp
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query
    with reads as materialized (
      select r.relation as id, case when r.subject = w.relation then 0::oid else r.subject end as part, r.subject, r.class, r.object
      from relay.policy_reads(null) r join relay.watch_list w on w.id = r.relation
    ), tables as (
      select t.id, t.part, t.object as oid, t.object = t.subject as own from reads t where t.class = 'pg_class'::regclass
    ), items (id, part, item, is_open) as (
      select t.id, t.part, concat_ws(' ', case when t.own then 'right' else 'row' end, 'table', c.oid, a.grantee), true
      from tables t join pg_class c on c.oid = t.oid
      cross join aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
      where a.privilege_type = 'SELECT'
      union all
      select t.id, t.part, concat_ws(' ', case when t.own then 'right' else 'row' end, 'column', c.attrelid, c.attnum, a.grantee), true
      from tables t join pg_attribute c on c.attrelid = t.oid and c.attacl is not null and not c.attisdropped
      cross join aclexplode(c.attacl) a
      where a.privilege_type = 'SELECT'
      union all
      select t.id, t.part, concat_ws(' ', case when t.own then 'right' else 'row' end, 'schema', n.oid, a.grantee), true
      from tables t join pg_class c on c.oid = t.oid join pg_namespace n on n.oid = c.relnamespace
      cross join aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
      where a.privilege_type = 'USAGE'
      union all
      select t.id, t.part, concat_ws(' ', 'right owner', c.oid, c.relowner), true
      from tables t join pg_class c on c.oid = t.oid
      union all
      select t.id, t.part, concat_ws(' ', case when t.own then 'own' else 'row' end, 'security is off', c.oid), true
      from tables t join pg_class c on c.oid = t.oid
      where not c.relrowsecurity
      union all
      select t.id, t.part, concat_ws(' ', 'row security is not forced', c.oid), true
      from tables t join pg_class c on c.oid = t.oid
      where not c.relforcerowsecurity
      union all
      select t.id, t.part, concat_ws(' ', 'row policy', p.oid, r, md5(p.polqual::text)), p.polpermissive
      from tables t join pg_policy p on p.polrelid = t.oid cross join unnest(p.polroles) r
      where p.polcmd in ('r', '*') and p.polqual is not null
      union all
      select t.id, t.part, concat_ws(' ', 'row function', f.oid,
                             md5(concat_ws('|', f.prosrc, f.prosqlbody::text, f.prosecdef, f.proconfig, f.proowner, f.prolang))), true
      from (
        select t.id, t.part, o.oprcode::oid as oid
        from tables t join pg_policy p on p.polrelid = t.oid
        join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = p.oid and d.refclassid = 'pg_operator'::regclass
        join pg_operator o on o.oid = d.refobjid
        union
        select r.id, r.part, r.object from reads r where r.class = 'pg_proc'::regclass) t
      join pg_proc f on f.oid = t.oid
      union all
      -- Without the right to a function, each query of the table raises.
      select r.id, r.part, concat_ws(' ', 'row execute', f.oid, a.grantee), true
      from reads r join pg_proc f on f.oid = r.object
      cross join aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) a
      where r.class = 'pg_proc'::regclass and a.privilege_type = 'EXECUTE'
      union all
      select t.id, t.part, concat_ws(' ', 'row view', w.ev_class, md5(w.ev_action::text)), true
      from tables t join pg_rewrite w on w.ev_class = t.oid and w.rulename = '_RETURN'
      union all
      select t.id, t.part, 'right read policy ' || coalesce((select md5(p.policy) from relay.read_policies p where p.relation = t.oid), 'none'), true
      from tables t join pg_class c on c.oid = t.oid
      where t.own and c.relkind in ('m', 'f')
    )
    select i.id, i.part, coalesce(array_agg(distinct i.item) filter (where i.is_open), '{}'),
           coalesce(array_agg(distinct i.item) filter (where not i.is_open), '{}')
    from items i
    group by i.id, i.part;
end
$$;
comment on function relay.rules_now() is 'visibility rules of each watched relation, as sets that can be compared';

-- relay.note_rules(is_doubtful) : records the rules, and what was widened since the last call
-- Waits for no other transaction: while another one that changed rules is open, all relations count as widened, now and again
-- at the next call. `is_doubtful` has the same effect: the caller's snapshot may be older than a rule that others changed.
drop function if exists relay.note_rules(text);
create or replace function relay.note_rules(is_doubtful boolean default false) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
declare
  one record;
  more text[];
  less text[];
  doubtful boolean;
begin
  if not is_doubtful
     and not exists (select from relay.known_rules k where k.relation = -1)
     and not exists (
       select from relay.rules_now() n left join relay.known_rules k on (k.relation, k.part) = (n.relation, n.part)
       where (k.open, k.shut) is distinct from (n.open, n.shut)) then
    return;
  end if;
  if is_doubtful or not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('rules')) then
    insert into relay.widenings values (nextval('relay.change_number'), pg_current_xact_id(), 0);
    insert into relay.known_rules values (-1, '{}', '{}');
    return;
  end if;
  delete from relay.known_rules k where k.relation = -1;
  doubtful := found;
  for one in
    select n.*, k.open as was_open, k.shut as was_shut
    from relay.rules_now() n
    left join relay.known_rules k on (k.relation, k.part) = (n.relation, n.part)
    where doubtful or (k.open, k.shut) is distinct from (n.open, n.shut)
  loop
    delete from relay.known_rules k where (k.relation, k.part) = (one.relation, one.part);
    insert into relay.known_rules (relation, part, open, shut) values (one.relation, one.part, one.open, one.shut);
    continue when one.was_open is null and not doubtful;
    more := array(select unnest(one.open) except select unnest(one.was_open));
    less := array(select unnest(one.was_shut) except select unnest(one.shut));
    -- Without row security, roles with SELECT saw every row, so new policies widen nothing.
    if exists (select from unnest(one.was_open) i where i like 'own security is off %') then
      more := array(select i from unnest(more) i where i not like 'row %');
      less := '{}';
    end if;
    if doubtful or more <> '{}' or less <> '{}' then
      insert into relay.widenings (number, xid, relation, part)
      values (nextval('relay.change_number'), pg_current_xact_id(), one.relation, one.part);
    end if;
  end loop;
  delete from relay.known_rules k
  where k.relation > 0
    and case k.part when 0 then not exists (select from relay.watch_list w where w.id = k.relation)
                    else not exists (select from relay.named_parts n where (n.relation, n.part) = (k.relation, k.part)) end;
  -- A cursor before these is older than the horizon, and a gap anyway.
  delete from relay.widenings w using relay.history h where pg_visible_in_snapshot(w.xid, h.horizon);
end
$$;
comment on function relay.note_rules(boolean) is 'records visibility rules, and what was widened since the last call';

-- relay.name_parts(parts) : records that subscribers name these partitions, so that changes of their own rules are recorded from now on
-- What their rules were before is not known, so they count as widened now. The relay calls it for the partitions that it holds, before
-- it reads their rules. Those that no relay has named for an hour are forgotten, and at most a thousand are kept, because each
-- of them makes each change of the schema slower.
create or replace function relay.name_parts(parts oid[]) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  added oid[];
begin
  -- Other relays name them at the same time.
  update relay.named_parts n set used = clock_timestamp()
  where n.part in (select o.part from relay.named_parts o
                   where o.part = any (parts) and o.used < clock_timestamp() - interval '1 minute' for update skip locked);
  with new as (
    insert into relay.named_parts (part, relation)
    select s.relation, s.id from relay.subjects(parts) s
    where s.relation <> s.whole and not exists (select from relay.named_parts n where (n.part, n.relation) = (s.relation, s.id))
    order by 1
    on conflict (part) do update set relation = excluded.relation
    returning part)
  select array_agg(new.part) into added from new;
  if added is null then
    return;
  end if;
  -- Other transactions that change rules may hold entries from before they were forgotten: relay.note_rules() removes those.
  delete from relay.known_rules k
  where k.ctid = any (array(select o.ctid from relay.known_rules o where o.part = any (added) for update skip locked));
  insert into relay.known_rules (relation, part, open, shut)
  select r.relation, r.part, r.open, r.shut from relay.rules_now() r where r.part = any (added);
  insert into relay.widenings (number, xid, relation, part)
  select nextval('relay.change_number'), pg_current_xact_id(), n.relation, n.part from relay.named_parts n where n.part = any (added);
  delete from relay.named_parts n
  where n.part in (select o.part from relay.named_parts o
                   where o.used < clock_timestamp() - interval '1 hour'
                      or o.part in (select l.part from relay.named_parts l order by l.used desc offset 1000)
                   for update skip locked);
end
$$;
comment on function relay.name_parts(oid[]) is 'records that subscribers name these partitions';

-- relay.may_concern(class, object) : whether a created, altered or dropped object may affect watched relations or their rules
-- Checks neither columns nor rules, so that statements on other tables stay cheap. False only if that is certain: never with
-- an older snapshot, nor while a check is outstanding.
create or replace function relay.may_concern(class oid, object oid) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set jit = off
set plan_cache_mode = force_generic_plan as $$
begin
  return (
  with reads (class, object) as (
    select r.class, r.object from relay.policy_reads(null) r
  ), read_tables (oid) as (
    select r.object from reads r where r.class = 'pg_class'::regclass
  )
  select current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
    or exists (select from relay.shape_doubts) or exists (select from relay.known_rules k where k.relation = -1)
    or coalesce(case $1
      when 'pg_trigger'::regclass then false
      -- Columns also come from a parent, and from a table whose row type is the type of a column.
      when 'pg_class'::regclass then $2 in (select l.oid from read_tables l) or exists (
        select from pg_class c
        where c.oid = $2 and (
          c.relkind = 'c' or exists (select from pg_inherits i where i.inhparent = c.oid)
          or exists (select from pg_type t join pg_depend d on d.refclassid = 'pg_type'::regclass and d.refobjid in (t.oid, t.typarray)
                     where t.oid = c.reltype and d.deptype = 'n')))
      when 'pg_policy'::regclass then (select p.polrelid in (select l.oid from read_tables l) from pg_policy p where p.oid = $2)
      when 'pg_proc'::regclass then exists (
        select from pg_depend d left join pg_operator o on d.refclassid = 'pg_operator'::regclass and o.oid = d.refobjid
        where d.classid = 'pg_policy'::regclass and (d.refclassid = 'pg_proc'::regclass and d.refobjid = $2 or o.oprcode = $2))
        or exists (select from reads r where r.class = 'pg_proc'::regclass and r.object = $2)
    end, true));
end
$$;
comment on function relay.may_concern(oid, oid) is 'whether an object may affect watched relations or their rules';

-- relay.is_on_temporary(class, object) : whether a policy, trigger or rule is that of a temporary table or view
create or replace function relay.is_on_temporary(class oid, object oid) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from pg_class c
    where c.relpersistence = 't'
      and c.oid = case $1 when 'pg_policy'::regclass then (select p.polrelid from pg_policy p where p.oid = $2)
                          when 'pg_trigger'::regclass then (select t.tgrelid from pg_trigger t where t.oid = $2)
                          when 'pg_rewrite'::regclass then (select r.ev_class from pg_rewrite r where r.oid = $2) end)
$$;
comment on function relay.is_on_temporary(oid, oid) is 'whether a policy, trigger or rule is that of a temporary table or view';

-- relay.log_schema_change() : event trigger
-- Logs each CREATE, ALTER, DROP, GRANT and REVOKE in the same transaction, as operation S without a relation or details: the
-- relay reads the catalog again. Temporary objects are ignored. The objects that a DROP has dropped are only known in the
-- sql_drop event. A table rewrite that changes no values, only persistence (1) or access method (8), is no gap.
create or replace function relay.log_schema_change() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  is_drop constant boolean := tg_tag like 'DROP %' and tg_tag <> 'DROP OWNED';
  concerns boolean := tg_tag not in ('CREATE TYPE', 'CREATE DOMAIN');
begin
  if tg_event = 'table_rewrite' then
    if pg_event_trigger_table_rewrite_reason() & ~(1 | 8) <> 0 and relay.may_have_rows(pg_event_trigger_table_rewrite_oid()) then
      perform relay.note_rewrite(pg_event_trigger_table_rewrite_oid());
    end if;
    return;
  elsif tg_event = 'sql_drop' then
    -- A rule on a temporary view is only recognizable by its name.
    if not is_drop or not exists (select from pg_event_trigger_dropped_objects() d
                                  where not d.is_temporary and d.address_names[1] is distinct from 'pg_temp') then
      return;
    end if;
    -- These drop their own types, keys and defaults as well, which are ignored here.
    if tg_tag in ('DROP TABLE', 'DROP VIEW', 'DROP INDEX', 'DROP SEQUENCE', 'DROP TRIGGER') then
      concerns := exists (
        select from pg_event_trigger_dropped_objects() d
        where d.classid = 'pg_class'::regclass and relay.may_concern(d.classid, d.objid)
           or d.classid = 'pg_policy'::regclass and not exists (
             select from pg_event_trigger_dropped_objects() t
             where t.classid = 'pg_class'::regclass and array[t.schema_name, t.object_name] = d.address_names[:2]
               and not relay.may_concern(t.classid, t.objid)));
    end if;
  elsif is_drop then
    return;
  -- Grants on temporary objects cannot be recognized and are logged. Moving writers to another segment of the changelog is
  -- ignored below.
  elsif tg_tag in ('COMMENT', 'CREATE INDEX') then
    return;
  elsif tg_tag = 'REFRESH MATERIALIZED VIEW' then
    perform relay.note_refresh(d.objid) from pg_event_trigger_ddl_commands() d;
    return;
  -- A concurrent refresh makes temporary tables, by commands that are not reported.
  elsif tg_tag in ('CREATE TABLE', 'ALTER TABLE') and current_setting('relay.refreshing', true) = 'on'
        and not exists (select from pg_event_trigger_ddl_commands()) then
    return;
  elsif exists (select from pg_event_trigger_ddl_commands()) then
    if not exists (select from pg_event_trigger_ddl_commands() d
                   where d.schema_name is distinct from 'pg_temp' and not relay.is_on_temporary(d.classid, d.objid)
                     and d.object_identity is distinct from 'relay.current_segment()') then
      return;
    end if;
    -- So are functions of schema relay: replacing the trigger functions of watched relations fires this trigger.
    if not exists (select from pg_event_trigger_ddl_commands() d
                   where d.object_type <> 'function' or d.schema_name is distinct from 'relay') then
      return;
    end if;
    concerns := concerns and exists (select from pg_event_trigger_ddl_commands() d where relay.may_concern(d.classid, d.objid));
  end if;
  begin
    -- From the very next write on, images have the new shape.
    if concerns then
      perform relay.renew_shapes(true);
    end if;
  exception when others then
    insert into relay.shape_doubts (relation) values (0);
    raise notice 'the triggers of watched relations could not be updated: %', sqlerrm;
  end;
  -- The images that subscribers were told of get the new columns before the next refresh, which could not be compared otherwise.
  if tg_tag like 'ALTER %' and exists (
    select from pg_event_trigger_ddl_commands() d join relay.watch_list w on w.relation = d.objid
    join pg_class c on c.oid = d.objid and c.relkind = 'm') then
    perform relay.ring_jobs();
  end if;
  begin
    perform relay.note_relations();
  exception when others then
    raise notice 'the state of watched relations could not be recorded: %', sqlerrm;
  end;
  if concerns and tg_tag not in ('CREATE TABLE', 'CREATE TABLE AS', 'CREATE SEQUENCE', 'CREATE TRIGGER') then
    begin
      -- In an older snapshot, the effect of these statements may equal the rules already recorded; that of a drop cannot.
      perform relay.note_rules(current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
                               and tg_tag in ('GRANT', 'CREATE SCHEMA', 'CREATE POLICY', 'ALTER POLICY', 'ALTER TABLE',
                                              'CREATE FUNCTION', 'ALTER FUNCTION', 'CREATE VIEW', 'ALTER DEFAULT PRIVILEGES'));
    exception when others then
      -- All relations count as widened then.
      insert into relay.widenings values (nextval('relay.change_number'), pg_current_xact_id(), 0);
      raise notice 'widened rules could not be recorded: %', sqlerrm;
    end;
  end if;
  if tg_tag ~ '(TABLE|PUBLICATION|SCHEMA|INTO|OWNED|EXTENSION)' then
    begin
      perform relay.note_collections();
    exception when others then
      raise notice 'the tables of publications and schemas are left to the relay: %', sqlerrm;
    end;
  end if;
  perform relay.log_change(0, null, 'S', false, null, null);
  perform relay.ring('schema', tg_tag);
end
$$;
comment on function relay.log_schema_change() is 'event trigger: logs schema changes, in order with row changes';

do $$
begin
  if (select p.proowner <> 'relay_writer'::regrole from pg_catalog.pg_proc p
      where p.oid = 'relay.log_schema_change()'::pg_catalog.regprocedure) then
    grant create on schema relay to relay_writer;
    alter function relay.log_schema_change() owner to relay_writer;
    revoke create on schema relay from relay_writer;
  end if;
end
$$;
revoke all on function relay.log_schema_change() from public;

-- Relations that an older version watched.
insert into relay.known_relations (id, schema, name, mute, parts, parts_mark, part_names)
select n.id, n.schema, n.name, n.mute, n.parts, n.parts_mark, relay.part_names(w.relation)
from relay.relations_now() n join relay.watch_list w on w.id = n.id
on conflict (id) do update set parts_mark = excluded.parts_mark, part_names = excluded.part_names where known_relations.parts_mark is null;
