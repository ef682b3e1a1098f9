-- What the policies of a relation need and a role lacks.

-- relay.missing_grants(relation, role) : grants that the role lacks for the policies by which it reads the relation
-- PostgreSQL looks at these rights before the first row: while one of them is missing, each look at the relation raises.
-- plpgsql, because relay.policy_parts is made later.
create or replace function relay.missing_grants(relation regclass, role oid) returns text[]
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
begin
  if not relay.is_secured(relation, role) then
    return '{}';
  end if;
  return array(
    with parts as materialized (
      select d.class, d.object, d.part from relay.policy_parts(relation, role) d
    )
    select pg_catalog.format('grant select on %s to %s', c.oid::regclass, role::regrole)
    from parts d join pg_catalog.pg_class c on c.oid = d.object
    where d.class = 'pg_catalog.pg_class'::regclass and c.relkind in ('r', 'p', 'm', 'v', 'f')
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
comment on function relay.missing_grants(regclass, oid) is 'grants that a role lacks for the policies by which it reads a relation';
