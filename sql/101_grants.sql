-- Grants that policies need and a role lacks.

-- relay.is_constantly_true(condition) : whether a condition of a policy is true by its constants alone, as `true` is
-- PostgreSQL leaves out what is joined to such a condition by OR, and asks for no rights on it.
create or replace function relay.is_constantly_true(condition pg_catalog.pg_node_tree) returns boolean
language plpgsql stable strict
set search_path = '' as $$
declare
  is_true boolean;
begin
  if condition::text ~ '[{](?!CONST |BOOLEXPR )' then
    return false;
  end if;
  -- Without a column in it, it is deparsed without its table, and so without a lock.
  execute 'select ' || pg_catalog.pg_get_expr(condition, 0) into is_true;
  return coalesce(is_true, false);
end
$$;
comment on function relay.is_constantly_true(pg_node_tree) is 'whether a condition of a policy is true by its constants alone';

-- relay.missing_grants(relation, role, command) : grants that the role lacks for the policies by which it reads the relation, or adds rows
-- to it: command is `r` or `a`, as in relay.policies_for().
-- PostgreSQL checks these rights before the first row: while one is missing, each query on the relation raises. Where a permissive
-- policy is constantly true, only those of restrictive policies count.
-- plpgsql, because relay.policy_parts is created later.
drop function if exists relay.missing_grants(regclass, oid);
create or replace function relay.missing_grants(relation regclass, role oid, command "char" default 'r') returns text[]
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  is_open boolean;
begin
  if not relay.is_secured(relation, role) then
    return '{}';
  end if;
  is_open := exists (
    select from pg_catalog.pg_policy p
    where p.polrelid = relation and p.polpermissive and p.polcmd in (command, '*')
      and (0::oid = any (p.polroles)
           or exists (select from pg_catalog.unnest(p.polroles) m where pg_catalog.pg_has_role(role, m, 'usage')))
      and relay.is_constantly_true(case command when 'a' then coalesce(p.polwithcheck, p.polqual) else p.polqual end));
  return array(
    with parts as materialized (
      select d.class, d.object, d.part from relay.policy_parts(relation, role, command) d
      where not is_open or exists (
        select from pg_catalog.pg_policy p
        join pg_catalog.pg_depend e on e.classid = 'pg_catalog.pg_policy'::regclass and e.objid = p.oid
        where p.polrelid = relation and not p.polpermissive and e.refclassid = d.class and e.refobjid = d.object)
    )
    select pg_catalog.format('grant select on %s to %s', c.oid::regclass, role::regrole)
    from parts d join pg_catalog.pg_class c on c.oid = d.object
    where d.class = 'pg_catalog.pg_class'::regclass and c.relkind in ('r', 'p', 'm', 'v', 'f')
      -- A constant of type regclass refers to a table without reading it.
      and exists (select from pg_catalog.pg_policy p
                  where p.polrelid = relation and pg_catalog.strpos(
                    case command when 'a' then coalesce(p.polwithcheck, p.polqual) else p.polqual end::text, ':relid ' || c.oid || ' ') > 0)
      and not pg_catalog.has_table_privilege(role, c.oid, 'select')
      and not case when d.part > 0 then pg_catalog.has_column_privilege(role, c.oid, d.part::smallint, 'select')
                   else pg_catalog.has_any_column_privilege(role, c.oid, 'select') end
    union
    select pg_catalog.format('grant execute on function %s to %s', f.oid::regprocedure, role::regrole)
    from parts d
    left join pg_catalog.pg_operator o on d.class = 'pg_catalog.pg_operator'::regclass and o.oid = d.object
    join pg_catalog.pg_proc f on f.oid = case when d.class = 'pg_catalog.pg_proc'::regclass then d.object else o.oprcode::oid end
    where not pg_catalog.has_function_privilege(role, f.oid, 'execute')
    order by 1);
end
$$;
comment on function relay.missing_grants(regclass, oid, "char") is 'grants that a role lacks for the policies by which it reads a relation, or adds rows to it';

-- relay.missing_usage(relation, role, login, command) : USAGE grants that are missing to resolve the names in these policies
-- {"hidden": "grant usage on schema hidden to relay_judge"}, by schema as written in the policies.
-- PostgreSQL resolves the names of a policy when it is created. The relay's statements resolve them again, as the role or
-- else as the judging login, which therefore needs USAGE on all schemas. Where a policy reads a table with row security,
-- also through views, PostgreSQL resolves the names once more as the role: then only a grant to the role helps.
drop function if exists relay.missing_usage(regclass, oid, text);
create or replace function relay.missing_usage(relation regclass, role oid, login text, command "char" default 'r') returns jsonb
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  judge constant text := coalesce(login, current_user);
  schemas oid[];
  by_role boolean;
begin
  schemas := array(
    select distinct coalesce(c.relnamespace, f.pronamespace, t.typnamespace, o.oprnamespace, l.collnamespace)
    from relay.policy_parts(relation, role, command) d
    left join pg_catalog.pg_class c on d.class = 'pg_catalog.pg_class'::regclass and c.oid = d.object
    left join pg_catalog.pg_proc f on d.class = 'pg_catalog.pg_proc'::regclass and f.oid = d.object
    left join pg_catalog.pg_type t on d.class = 'pg_catalog.pg_type'::regclass and t.oid = d.object
    left join pg_catalog.pg_operator o on d.class = 'pg_catalog.pg_operator'::regclass and o.oid = d.object
    left join pg_catalog.pg_collation l on d.class = 'pg_catalog.pg_collation'::regclass and l.oid = d.object);
  if not exists (
    select from pg_catalog.pg_namespace n where n.oid = any (schemas) and not pg_catalog.has_schema_privilege(role, n.oid, 'usage')) then
    return '{}';
  end if;
  with recursive reads (oid) as (
    select d.object from relay.policy_parts(relation, role, command) d where d.class = 'pg_catalog.pg_class'::regclass
    union
    select d.refobjid
    from reads l
    join pg_catalog.pg_rewrite w on w.ev_class = l.oid
    join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_rewrite'::regclass and d.objid = w.oid
      and d.refclassid = 'pg_catalog.pg_class'::regclass
  )
  select exists (select from reads l join pg_catalog.pg_class c on c.oid = l.oid where c.relrowsecurity) into by_role;
  return (
    select coalesce(pg_catalog.jsonb_object_agg(pg_catalog.quote_ident(n.nspname),
             pg_catalog.format('grant usage on schema %I to %s', n.nspname, w.who)), '{}')
    from pg_catalog.pg_namespace n
    cross join lateral (select case when by_role then role::regrole::text else pg_catalog.quote_ident(judge) end) w (who)
    where n.oid = any (schemas)
      and not pg_catalog.has_schema_privilege(case when by_role then role else judge::regrole::oid end, n.oid, 'usage'));
end
$$;
comment on function relay.missing_usage(regclass, oid, text, "char") is 'USAGE grants that are missing to resolve the names in policies';

-- relay.missing_filter_usage(relation, columns, role, login) : grants that are missing to filter by these columns
-- The caller parses filter values with the types of the columns; the role, or else the judging login, compares them.
create or replace function relay.missing_filter_usage(relation regclass, columns text[], role text, login text) returns text[]
language sql stable
set search_path = '' as $$
  select coalesce(pg_catalog.array_agg(distinct pg_catalog.format('grant usage on schema %I to %I', n.nspname, w.who)), '{}')
  from pg_catalog.pg_attribute a
  join pg_catalog.pg_type t on t.oid = a.atttypid
  left join pg_catalog.pg_type b on b.oid = t.typbasetype
  join pg_catalog.pg_namespace n on n.oid in (t.typnamespace, b.typnamespace)
  cross join lateral (
    select current_user::text where not pg_catalog.has_schema_privilege(current_user, n.oid, 'usage')
    union
    select j.judge from (select coalesce(login, current_user::text)) j (judge)
    where not pg_catalog.has_schema_privilege(j.judge, n.oid, 'usage') and not pg_catalog.has_schema_privilege(role, n.oid, 'usage')
  ) w (who)
  where a.attrelid = relation and a.attname = any (columns) and a.attnum > 0 and not a.attisdropped
$$;
comment on function relay.missing_filter_usage(regclass, text[], text, text) is 'grants that are missing to filter by columns';
