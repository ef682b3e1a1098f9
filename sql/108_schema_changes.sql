-- Changes of the schema stand in the changelog too, in order with the changes of rows: from here on, other rules or columns.
--
-- Only where the installer may create an event trigger; elsewhere the relay looks at the catalog for every page.

-- relay.rules_now() : who may see each watched relation, as sets that can be compared
-- Of the relation and of the tables that its policies look into: grants, owner, row security, policies, and the functions
-- that policies call.
create or replace function relay.rules_now() returns table (relation int, open text[], shut text[])
language sql stable
set search_path = pg_catalog, pg_temp as $$
  with tables as (
    select w.id, w.relation::oid as oid, true as own from relay.watch_list w
    union
    select w.id, d.refobjid, false
    from relay.watch_list w
    join pg_policy p on p.polrelid = w.relation
    join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = p.oid and d.refclassid = 'pg_class'::regclass
    where d.refobjid <> w.relation
  ), items (id, item, is_open) as (
    select t.id, concat_ws(' ', case when t.own then 'right' else 'row' end, 'table', c.oid, a.grantee), true
    from tables t join pg_class c on c.oid = t.oid
    cross join aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
    where a.privilege_type = 'SELECT'
    union all
    select t.id, concat_ws(' ', case when t.own then 'right' else 'row' end, 'column', c.attrelid, c.attnum, a.grantee), true
    from tables t join pg_attribute c on c.attrelid = t.oid and c.attacl is not null and not c.attisdropped
    cross join aclexplode(c.attacl) a
    where a.privilege_type = 'SELECT'
    union all
    select t.id, concat_ws(' ', case when t.own then 'right' else 'row' end, 'schema', n.oid, a.grantee), true
    from tables t join pg_class c on c.oid = t.oid join pg_namespace n on n.oid = c.relnamespace
    cross join aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
    where a.privilege_type = 'USAGE'
    union all
    select t.id, concat_ws(' ', 'right owner', c.oid, c.relowner), true
    from tables t join pg_class c on c.oid = t.oid
    union all
    select t.id, concat_ws(' ', case when t.own then 'own' else 'row' end, 'security is off', c.oid), true
    from tables t join pg_class c on c.oid = t.oid
    where not c.relrowsecurity
    union all
    select t.id, concat_ws(' ', 'row security is not forced', c.oid), true
    from tables t join pg_class c on c.oid = t.oid
    where not c.relforcerowsecurity
    union all
    select t.id, concat_ws(' ', 'row policy', p.oid, r, md5(p.polqual::text)), p.polpermissive
    from tables t join pg_policy p on p.polrelid = t.oid cross join unnest(p.polroles) r
    where p.polcmd in ('r', '*') and p.polqual is not null
    union all
    select t.id, concat_ws(' ', 'row function', f.oid,
                           md5(concat_ws('|', f.prosrc, f.prosqlbody::text, f.prosecdef, f.proconfig, f.proowner, f.prolang))), true
    from tables t join pg_policy p on p.polrelid = t.oid
    join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = p.oid
    left join pg_operator o on d.refclassid = 'pg_operator'::regclass and o.oid = d.refobjid
    join pg_proc f on f.oid = case when d.refclassid = 'pg_proc'::regclass then d.refobjid else o.oprcode::oid end
    union all
    select t.id, concat_ws(' ', 'row view', w.ev_class, md5(w.ev_action::text)), true
    from tables t join pg_rewrite w on w.ev_class = t.oid and w.rulename = '_RETURN'
    union all
    select t.id, 'right read policy ' || coalesce((select md5(p.policy) from relay.read_policies p where p.relation = t.oid), 'none'), true
    from tables t join pg_class c on c.oid = t.oid
    where t.own and c.relkind in ('m', 'f')
  )
  select i.id, coalesce(array_agg(distinct i.item) filter (where i.is_open), '{}'),
         coalesce(array_agg(distinct i.item) filter (where not i.is_open), '{}')
  from items i
  group by i.id
$$;
comment on function relay.rules_now() is 'who may see each watched relation, as sets that can be compared';

-- relay.note_rules(is_doubtful) : notes what was widened since it looked last
-- Waits for no other transaction: where another one that changed rules stays open, all is taken for widened, and once more the
-- next time. `is_doubtful`: the same, because the caller's snapshot may be older than a rule that others changed.
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
       select from relay.rules_now() n left join relay.known_rules k on k.relation = n.relation
       where (k.open, k.shut) is distinct from (n.open, n.shut)) then
    return;
  end if;
  if is_doubtful or not pg_try_advisory_xact_lock(1919249009, 8) then
    insert into relay.widenings values (nextval('relay.change_number'), pg_current_xact_id(), 0);
    insert into relay.known_rules values (-1, '{}', '{}');
    return;
  end if;
  delete from relay.known_rules k where k.relation = -1;
  doubtful := found;
  for one in
    select n.*, k.open as was_open, k.shut as was_shut
    from relay.rules_now() n
    left join relay.known_rules k on k.relation = n.relation
    where doubtful or (k.open, k.shut) is distinct from (n.open, n.shut)
  loop
    delete from relay.known_rules k where k.relation = one.relation;
    insert into relay.known_rules values (one.relation, one.open, one.shut);
    continue when one.was_open is null and not doubtful;
    more := array(select unnest(one.open) except select unnest(one.was_open));
    less := array(select unnest(one.was_shut) except select unnest(one.shut));
    -- Whoever might read the table saw every row, whatever its policies were.
    if exists (select from unnest(one.was_open) i where i like 'own security is off %') then
      more := array(select i from unnest(more) i where i not like 'row %');
      less := '{}';
    end if;
    if doubtful or more <> '{}' or less <> '{}' then
      insert into relay.widenings values (nextval('relay.change_number'), pg_current_xact_id(), one.relation);
    end if;
  end loop;
  delete from relay.known_rules k where k.relation > 0 and not exists (select from relay.watch_list w where w.id = k.relation);
  -- Who stood before these is told of a gap in any case.
  delete from relay.widenings w using relay.history h where pg_visible_in_snapshot(w.xid, h.horizon);
end
$$;
comment on function relay.note_rules(boolean) is 'notes what was widened since it looked last';

-- relay.log_schema_change() : event trigger
-- Logs that something was created, altered, dropped, granted or revoked, as operation S of no relation, in the same
-- transaction. What it was is not said: the relay looks at the catalog anew. Temporary objects do not count.
create or replace function relay.log_schema_change() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
begin
  -- Grants on temporary objects do not say that they are temporary, and are logged. Nor is the move of writers to another
  -- segment of the changelog news.
  if tg_tag in ('REFRESH MATERIALIZED VIEW', 'COMMENT', 'CREATE INDEX')
     or exists (select from pg_event_trigger_ddl_commands())
        and not exists (select from pg_event_trigger_ddl_commands() d
                        where d.schema_name is distinct from 'pg_temp'
                          and d.object_identity is distinct from 'relay.current_segment()') then
    return;
  end if;
  -- The trigger functions of watched relations, which are written here and below, alter nothing else.
  if exists (select from pg_event_trigger_ddl_commands())
     and not exists (select from pg_event_trigger_ddl_commands() d
                     where d.object_type <> 'function' or d.schema_name is distinct from 'relay') then
    return;
  end if;
  begin
    -- From the very next write on, images have the new shape.
    perform relay.renew_shapes(true);
  exception when others then
    insert into relay.shape_doubts (relation) values (0);
    raise notice 'the triggers of watched relations could not be adapted: %', sqlerrm;
  end;
  begin
    perform relay.note_relations();
  exception when others then
    raise notice 'what became of watched relations could not be told: %', sqlerrm;
  end;
  if tg_tag not in ('CREATE TABLE', 'CREATE TABLE AS', 'CREATE TYPE', 'CREATE SEQUENCE', 'CREATE TRIGGER') then
    begin
      -- A drop is compared in any case; what these do may be what the rules already are in an older snapshot.
      perform relay.note_rules(current_setting('transaction_isolation') not in ('read committed', 'read uncommitted')
                               and tg_tag in ('GRANT', 'CREATE SCHEMA', 'CREATE POLICY', 'ALTER POLICY', 'ALTER TABLE',
                                              'CREATE FUNCTION', 'ALTER FUNCTION', 'CREATE VIEW', 'ALTER DEFAULT PRIVILEGES'));
    exception when others then
      -- Then everything is taken for widened.
      insert into relay.widenings values (nextval('relay.change_number'), pg_current_xact_id(), 0);
      raise notice 'what was widened could not be told: %', sqlerrm;
    end;
  end if;
  perform relay.log_change(0, null, 'S', false, null, null);
  perform relay.ring('schema', tg_tag);
end
$$;
comment on function relay.log_schema_change() is 'event trigger: logs that the schema changed, in order with the changes of rows';

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

-- What an older version watched is known from now on.
insert into relay.known_relations (id, schema, name, mute, parts)
select n.id, n.schema, n.name, n.mute, n.parts from relay.relations_now() n
on conflict (id) do nothing;
