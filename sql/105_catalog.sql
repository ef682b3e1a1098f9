-- The catalog that the relay reads: columns, keys, rights and policies of watched relations, and a cheap fingerprint of it.

-- relay.subscriber_roles(roles, login) : those of the roles that subscribers may have
-- A token's role is allowed only if the judging login may act as it, as with PostgREST's authenticator. A superuser is never
-- allowed: it would see everything, without any policy. `login` null is the caller.
create or replace function relay.subscriber_roles(roles text[], login text) returns text[]
language sql stable
set search_path = '' as $$
  select coalesce(pg_catalog.array_agg(r.rolname::text order by r.rolname), '{}')
  from pg_catalog.pg_roles r
  join pg_catalog.pg_roles l on l.rolname = coalesce($2, current_user)
  where r.rolname = any ($1) and not r.rolsuper and pg_catalog.pg_has_role(l.oid, r.oid, 'member')
$$;
comment on function relay.subscriber_roles(text[], text) is 'those of the roles that the judging login may act as, without superusers';

-- The next functions are plpgsql, which caches plans: planning takes longer than the queries, which run for every table and
-- role.

-- relay.policies_for(relation, role, command) : the policies by which row security lets the role read, in PostgreSQL's own order
-- command, here and below: `r` to read rows, `a` to add them.
-- The order matters, because a policy that raises may come after one that decides. Deparsed with an empty search_path, so
-- that every name outside pg_catalog is qualified.
drop function if exists relay.policies_for(regclass, oid);
create or replace function relay.policies_for(relation regclass, role oid, command "char" default 'r')
returns table (policy oid, name text, permissive boolean, condition text)
language plpgsql stable rows 4
set search_path = ''
set standard_conforming_strings = on
set quote_all_identifiers = off
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query
    select p.oid, p.polname::text, p.polpermissive,
           '(' || pg_catalog.pg_get_expr(case command when 'a' then coalesce(p.polwithcheck, p.polqual) else p.polqual end, p.polrelid) || ')'
    from pg_catalog.pg_policy p
    where p.polrelid = relation and p.polcmd in (command, '*')
      and case command when 'a' then coalesce(p.polwithcheck, p.polqual) else p.polqual end is not null
      and (0::oid = any (p.polroles)
           or exists (select from pg_catalog.unnest(p.polroles) m where pg_catalog.pg_has_role(role, m, 'usage')))
    order by p.polpermissive, case when p.polpermissive then null else p.polname end, p.polname desc;
end
$$;
comment on function relay.policies_for(regclass, oid, "char") is 'policies by which row security lets a role read a relation, or add rows to it';

-- relay.is_secured(relation, role) : whether row security applies to the role
-- It does not apply to superusers, roles with BYPASSRLS, and the owner unless forced.
create or replace function relay.is_secured(relation regclass, role oid) returns boolean
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
begin
  return (
    select c.relrowsecurity and not r.rolsuper and not r.rolbypassrls
           and (c.relforcerowsecurity or not pg_catalog.pg_has_role(r.oid, c.relowner, 'usage'))
    from pg_catalog.pg_class c, pg_catalog.pg_roles r
    where c.oid = relation and r.oid = role);
end
$$;
comment on function relay.is_secured(regclass, oid) is 'whether row security of a relation applies to a role';

-- relay.policy_for(relation, role, command) : the condition under which the role sees or adds a row; null: every row
-- As in PostgreSQL: permissive policies are joined by OR, restrictive ones by AND; without a permissive policy, no row.
drop function if exists relay.policy_for(regclass, oid);
create or replace function relay.policy_for(relation regclass, role oid, command "char" default 'r') returns text
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
begin
  return (
    select case
      when r.rolsuper or r.rolbypassrls then null
      when c.relkind in ('m', 'f') then (select '(' || a.policy || E'\n)' from relay.read_policies a where a.relation = policy_for.relation)
      when not relay.is_secured(relation, role) then null
      else (
        select case when count(*) filter (where p.permissive) = 0 then 'false' else
          pg_catalog.concat_ws(' and ',
            pg_catalog.string_agg(p.condition, ' and ' order by p.name) filter (where not p.permissive),
            '(' || pg_catalog.string_agg(p.condition, ' or ' order by p.name desc) filter (where p.permissive) || ')') end
        from relay.policies_for(relation, role, command) p)
      end
    from pg_catalog.pg_class c, pg_catalog.pg_roles r
    where c.oid = relation and r.oid = role);
end
$$;
comment on function relay.policy_for(regclass, oid, "char") is 'condition under which a role sees or adds a row of the relation; null: every row';

-- relay.policy_parts(relation, role, command) : the objects that the role's policies refer to, besides system objects and the relation itself
-- `part` is the column, 0 for the whole object.
drop function if exists relay.policy_parts(regclass, oid);
create or replace function relay.policy_parts(relation regclass, role oid, command "char" default 'r')
returns table (class regclass, object oid, part int)
language plpgsql stable rows 4
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
begin
  return query
    select distinct d.refclassid::regclass, d.refobjid, d.refobjsubid
    -- Not relay.policies_for(), which deparses each policy and locks the tables in it.
    from pg_catalog.pg_policy p
    join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_policy'::pg_catalog.regclass and d.objid = p.oid
    where p.polrelid = relation and p.polcmd in (command, '*')
      and case command when 'a' then coalesce(p.polwithcheck, p.polqual) else p.polqual end is not null
      and (0::oid = any (p.polroles)
           or exists (select from pg_catalog.unnest(p.polroles) m where pg_catalog.pg_has_role(role, m, 'usage')))
      and d.refobjid <> relation;
end
$$;
comment on function relay.policy_parts(regclass, oid, "char") is 'objects that the policies of a relation refer to, for a role';

-- relay.subjects(parts) : the watched relations, and those of these tables that are partitions of one; null: those in relay.named_parts
-- `whole` is the watched relation: of several above a partition the nearest. A partition that is watched itself stands for itself.
create or replace function relay.subjects(parts oid[]) returns table (id int, whole regclass, relation regclass, leave_events boolean)
language sql stable as $$
  with recursive above (part, oid, height) as (
    select p, p, 0
    from pg_catalog.unnest(case when $1 is not null then $1 else array(select n.part from relay.named_parts n) end) p
    where p not in (select w.relation::oid from relay.watch_list w)
    union all
    select a.part, i.inhparent, a.height + 1
    from above a
    join pg_catalog.pg_class c on c.oid = a.oid and c.relispartition
    join pg_catalog.pg_inherits i on i.inhrelid = c.oid)
  select w.id, w.relation, w.relation, w.leave_events from relay.watch_list w
  union all
  (select distinct on (a.part) w.id, w.relation, a.part::regclass, w.leave_events
   from above a join relay.watch_list w on w.relation::oid = a.oid
   order by a.part, a.height)
$$;
comment on function relay.subjects(oid[]) is 'watched relations, and partitions of them';

-- relay.topic_table() : the table whose policies say who may use which private channel, if there is one
create or replace function relay.topic_table() returns table (relation oid)
language sql stable
set search_path = '' as $$
  select c.oid from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where n.nspname = 'realtime' and c.relname = 'messages' and c.relkind in ('r', 'p')
$$;
comment on function relay.topic_table() is 'table whose policies say who may use which private channel';

-- relay.body_reads(func) : the tables and functions that the body of an SQL function may read
-- pg_depend knows those of a body with BEGIN ATOMIC. Of a body that is a string, each object counts whose name occurs in it, in
-- any schema: more than it reads, and also what its names could mean when an object is created or renamed.
create or replace function relay.body_reads(func oid) returns table (class oid, object oid)
language plpgsql stable strict rows 8
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
begin
  -- The functions of Supabase that return claims are known otherwise.
  if exists (select from pg_catalog.pg_proc f join pg_catalog.pg_namespace n on n.oid = f.pronamespace
             where f.oid = func and n.nspname = 'auth' and f.proname in ('uid', 'jwt', 'role', 'email')) then
    return;
  end if;
  return query
    with words (word) as materialized (
      select distinct v.word
      from pg_catalog.pg_proc f
      cross join lateral pg_catalog.regexp_matches(f.prosrc, '[^][:space:]"(),.;:=<>+*/%!|''-]+', 'g') m
      cross join lateral (values (m[1]), (pg_catalog.lower(m[1]))) v (word)
      where f.oid = func and f.prosqlbody is null
        and f.prolang = (select l.oid from pg_catalog.pg_language l where l.lanname = 'sql')
    )
    select d.refclassid, d.refobjid
    from pg_catalog.pg_depend d
    where d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass and d.objid = func
      and d.refclassid in ('pg_catalog.pg_class'::pg_catalog.regclass, 'pg_catalog.pg_proc'::pg_catalog.regclass)
    union
    select 'pg_catalog.pg_class'::pg_catalog.regclass::oid, c.oid
    from words w join pg_catalog.pg_class c on c.relname = w.word::name
    where c.oid >= 16384 and c.relkind <> 't' and c.relnamespace <> 'relay'::pg_catalog.regnamespace
    union
    select 'pg_catalog.pg_proc'::pg_catalog.regclass::oid, p.oid
    from words w join pg_catalog.pg_proc p on p.proname = w.word::name
    where p.oid >= 16384 and p.oid <> func and p.pronamespace <> 'relay'::pg_catalog.regnamespace;
end
$$;
comment on function relay.body_reads(oid) is 'tables and functions that the body of an SQL function may read';

-- relay.policy_reads(parts) : the tables and functions that the policies of each subject read, and those that these read, for any role
-- `subject` is a watched relation or one of these partitions, as in relay.subjects(), or the table whose policies are those of
-- private channels; it is itself among its tables. `relation` is the id in relay.watch_list, 0 for private channels.
-- The estimates of a recursive query are far too high. PostgreSQL sizes a hash table by them, up to work_mem, and to clear it
-- would take many times longer than the query: hence the small work_mem.
create or replace function relay.policy_reads(parts oid[]) returns table (relation int, subject oid, class oid, object oid)
language plpgsql stable rows 100
set search_path = ''
set jit = off
set work_mem = '256kB'
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  of_tables constant oid := 'pg_catalog.pg_class'::pg_catalog.regclass;
  of_procs constant oid := 'pg_catalog.pg_proc'::pg_catalog.regclass;
  of_policies constant oid := 'pg_catalog.pg_policy'::pg_catalog.regclass;
begin
  return query
    with recursive policies ("table", class, object) as materialized (
      select p.polrelid, d.refclassid, d.refobjid
      from pg_catalog.pg_policy p
      join pg_catalog.pg_depend d on d.classid = of_policies and d.objid = p.oid
      where d.refclassid in (of_tables, of_procs)
    ), subjects (relation, subject) as materialized (
      select s.id, s.relation::oid from relay.subjects(parts) s
      union
      select 0, m.relation from relay.topic_table() m
    ), reached (class, object) as (
      select of_tables, s.subject from subjects s
      union
      select x.class, x.object
      from reached n cross join lateral (
        select p.class, p.object from policies p where n.class = of_tables and p."table" = n.object
        union all
        select r.class, r.object from relay.body_reads(case n.class when of_procs then n.object end) r) x
    ), read_by (of_class, of_object, class, object) as materialized (
      select of_tables, p."table", p.class, p.object from policies p
      union all
      select of_procs, f.object, r.class, r.object from reached f cross join lateral relay.body_reads(f.object) r where f.class = of_procs
    ), nodes (relation, subject, class, object) as (
      select s.relation, s.subject, of_tables, s.subject from subjects s
      union
      select n.relation, n.subject, x.class, x.object
      from nodes n join read_by x on x.of_class = n.class and x.of_object = n.object)
    select n.relation, n.subject, n.class, n.object from nodes n;
end
$$;
comment on function relay.policy_reads(oid[]) is 'tables and functions that the policies of watched relations read, directly or by policies and bodies of these';

-- relay.policy_tables(parts) : the tables among them
drop function if exists relay.policy_tables();
create or replace function relay.policy_tables(parts oid[]) returns table (relation int, subject oid, "table" oid)
language sql stable
set search_path = ''
set jit = off as $$
  select r.relation, r.subject, r.object from relay.policy_reads($1) r where r.class = 'pg_catalog.pg_class'::pg_catalog.regclass
$$;
comment on function relay.policy_tables(oid[]) is 'tables that the policies of watched relations look into, directly or by policies and functions of these';

-- relay.body_candidates(parts, wanted) : SQL functions of one select that the policies of watched relations may call
-- wanted: ids in relay.watch_list; null: all. `text`: of a body that is a string, the body and all that its words may mean:
-- {"function", "source", "names", "types", "returns", "path",
--  "tables": [{"oid", "schema", "name", "written", "columns": {"team": {"number", "type"}}}],
--  "functions": [{"oid", "schema", "name", "written", "returns"}], "system": ["lower"]}; `path` is null for the caller's.
-- `schemas` are those of the path, in which the role that runs the function needs USAGE, or its names mean something else.
-- `types` are such that a cast to one changes no value: `character` alone would be one character.
create or replace function relay.body_candidates(parts oid[], wanted int[])
returns table (func oid, schemas oid[], text text)
language sql stable
set search_path = ''
set jit = off as $$
  select f.oid, array(select n.oid from pg_catalog.pg_namespace n where n.nspname = any (s.names) order by n.oid),
    case when f.prosqlbody is null then pg_catalog.jsonb_build_object(
      'function', f.proname, 'source', f.prosrc, 'names', coalesce(f.proargnames[:f.pronargs], '{}'),
      'types', array(select pg_catalog.format_type(a.type, -1) from pg_catalog.unnest(f.proargtypes) with ordinality a (type, n) order by a.n),
      'returns', pg_catalog.format_type(f.prorettype, -1), 'path', case when f.proconfig is not null then s.names end,
      'tables', (
        select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
          'oid', t.oid::bigint, 'schema', n.nspname, 'name', t.relname, 'written', pg_catalog.format('%I.%I', n.nspname, t.relname),
          'columns', (select coalesce(pg_catalog.jsonb_object_agg(a.attname, pg_catalog.jsonb_build_object(
                        'number', a.attnum, 'type', pg_catalog.format_type(a.atttypid, -1))), '{}')
                      from pg_catalog.pg_attribute a where a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped))), '[]')
        from relay.body_reads(f.oid) r join pg_catalog.pg_class t on t.oid = r.object join pg_catalog.pg_namespace n on n.oid = t.relnamespace
        where r.class = 'pg_catalog.pg_class'::pg_catalog.regclass),
      'functions', (
        select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
          'oid', o.oid::bigint, 'schema', n.nspname, 'name', o.proname, 'written', pg_catalog.format('%I.%I', n.nspname, o.proname),
          'returns', pg_catalog.format_type(o.prorettype, -1))), '[]')
        from relay.body_reads(f.oid) r join pg_catalog.pg_proc o on o.oid = r.object join pg_catalog.pg_namespace n on n.oid = o.pronamespace
        where r.class = 'pg_catalog.pg_proc'::pg_catalog.regclass),
      'system', (
        select coalesce(pg_catalog.jsonb_agg(distinct o.proname), '[]')
        from pg_catalog.pg_proc o
        where o.pronamespace = 'pg_catalog'::pg_catalog.regnamespace and pg_catalog.strpos(pg_catalog.lower(f.prosrc), o.proname::text) > 0))::text end
  from (select distinct r.object from relay.policy_reads($1) r
        where r.class = 'pg_catalog.pg_proc'::pg_catalog.regclass and ($2 is null or r.relation = any ($2))) c
  join pg_catalog.pg_proc f on f.oid = c.object
  join pg_catalog.pg_language l on l.oid = f.prolang and l.lanname = 'sql'
  join pg_catalog.pg_type t on t.oid = f.prorettype
  cross join lateral (
    select pg_catalog.string_to_array(pg_catalog.translate(
      coalesce(pg_catalog.substr(f.proconfig[1], pg_catalog.length('search_path=') + 1), ''), '" ', ''), ',')) s (names)
  where not (f.proname in ('uid', 'jwt', 'role', 'email')
             and f.pronamespace in (select a.oid from pg_catalog.pg_namespace a where a.nspname = 'auth'))
    and f.prokind = 'f' and f.provolatile in ('i', 's') and f.provariadic = 0 and f.pronargdefaults = 0
    and (f.proconfig is null or pg_catalog.cardinality(f.proconfig) = 1 and f.proconfig[1] ~ '^search_path=(""|[a-z0-9_]+)(, *(""|[a-z0-9_]+))*$')
    and (t.oid < 16384 and t.typtype = 'b' or t.typtype = 'e')
    and not exists (
      select from pg_catalog.unnest(f.proargtypes) a (type) join pg_catalog.pg_type t on t.oid = a.type
      where not (t.oid < 16384 and t.typtype = 'b' or t.typtype = 'e'))
    and (f.proargmodes is null
         or f.proretset and pg_catalog.cardinality(f.proargmodes) = f.pronargs + 1
            and f.proargmodes @> array['t'::"char"] and f.proargmodes <@ array['i', 't']::"char"[])
    and not exists (select from pg_catalog.pg_proc o where o.proname = f.proname and o.pronamespace = f.pronamespace and o.oid <> f.oid)
    and not exists (select from pg_catalog.pg_cast a where a.castfunc = f.oid)
    and not exists (select from pg_catalog.pg_operator o where f.oid in (o.oprcode, o.oprrest, o.oprjoin))
    -- An operator in a text may be one of these.
    and (f.prosqlbody is not null or not exists (
      select from pg_catalog.pg_operator o
      left join pg_catalog.pg_type a on a.oid = o.oprleft left join pg_catalog.pg_type b on b.oid = o.oprright
      where o.oid >= 16384 and (f.proconfig is null or o.oprnamespace in (select n.oid from pg_catalog.pg_namespace n where n.nspname = any (s.names)))
        and (a.oid < 16384 or a.typtype = 'e') and (b.oid < 16384 or b.typtype = 'e') and pg_catalog.strpos(f.prosrc, o.oprname) > 0))
$$;
comment on function relay.body_candidates(oid[], int[]) is 'SQL functions that policies may call, and what their bodies may read';

-- relay.body_of(func) : a parsed body as SQL, and the objects that it refers to: {"sql", "parts": [{"class", "object", "part"}]}
create or replace function relay.body_of(func oid) returns jsonb
language sql stable
set search_path = ''
set standard_conforming_strings = on
set quote_all_identifiers = off as $$
  select pg_catalog.jsonb_build_object('sql', pg_catalog.pg_get_function_sqlbody(func), 'parts', (
    select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
             'class', d.refclassid::bigint, 'object', d.refobjid::bigint, 'part', d.refobjsubid)), '[]')
    from pg_catalog.pg_depend d
    where d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass and d.objid = func and d.deptype = 'n'
      -- What the signature refers to is known otherwise.
      and d.refclassid not in ('pg_catalog.pg_language'::pg_catalog.regclass, 'pg_catalog.pg_namespace'::pg_catalog.regclass)))
$$;
comment on function relay.body_of(oid) is 'parsed body of an SQL function, and the objects that it refers to';

-- relay.has_own_casts() : whether there is a user-defined cast between system types, which changes the meaning of expressions
create or replace function relay.has_own_casts() returns boolean
language sql stable
set search_path = '' as $$
  select exists (select from pg_catalog.pg_cast c where c.oid >= 16384 and c.castsource < 16384 and c.casttarget < 16384)
$$;
comment on function relay.has_own_casts() is 'whether there is a user-defined cast between system types';

-- relay.bodies_for(relation, role, bodies, command) : the bodies that may replace calls in the policies by which the role reads the relation
-- secured: tables that the policies or these functions read as the role, and that have row security for it, for their policies, too
-- tables: all tables that the bodies read; own_tables: those that they read as the role; functions: all that are called
-- locked: a body could not be read, because one of its tables is locked: its "sql" is null
-- A body is read with the rights of the role, or of the owner of a definer. It is left out if one of these rights is missing.
drop function if exists relay.bodies_for(regclass, oid, jsonb);
create or replace function relay.bodies_for(relation regclass, role oid, given jsonb, command "char" default 'r')
returns table (secured oid[], tables oid[], own_tables oid[], functions oid[], bodied oid[], bodies jsonb, past boolean, locked boolean)
language plpgsql stable rows 1
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  of_tables constant oid := 'pg_catalog.pg_class'::pg_catalog.regclass;
  of_procs constant oid := 'pg_catalog.pg_proc'::pg_catalog.regclass;
begin
  return query
  with recursive known (func, sql, parts, schemas) as materialized (
    select b.func, b.sql, b.parts, b.schemas
    from pg_catalog.jsonb_to_recordset(coalesce(given, '[]')) b (func oid, sql text, parts jsonb, schemas oid[])
  ), parts (func, class, object, part) as materialized (
    select k.func, p.class, p.object, p.part
    from known k cross join lateral pg_catalog.jsonb_to_recordset(k.parts) p (class oid, object oid, part int)
  ), nodes (class, object, acting) as (
    select of_tables, relation::oid, role
    union
    select x.class, x.object, case when f.prosecdef then f.proowner else x.acting end
    from nodes n
    cross join lateral (
      select d.class::oid, d.object, role
      from relay.policy_parts(n.object, role, case when n.object = relation then command else 'r' end) d
      where n.class = of_tables and n.acting = role and d.class in (of_tables, of_procs)
        and (n.object = relation or relay.is_secured(n.object, role))
      union all
      select p.class, p.object, n.acting from parts p
      where n.class = of_procs and p.func = n.object and p.class in (of_tables, of_procs)) x (class, object, acting)
    left join pg_catalog.pg_proc f on x.class = of_procs and f.oid = x.object
  ), called (func, acting, ways) as (
    select n.object, pg_catalog.min(n.acting), pg_catalog.count(*) from nodes n where n.class = of_procs group by n.object
  ), usable (func, acting, past) as (
    select c.func, c.acting, c.acting <> role and exists (
      select from parts p join pg_catalog.pg_class t on t.oid = p.object
      where p.func = c.func and p.class = of_tables
        and (not pg_catalog.has_schema_privilege(role, t.relnamespace, 'usage') or not pg_catalog.has_table_privilege(role, t.oid, 'select')
             or relay.is_secured(t.oid, role)))
    from called c join known k on k.func = c.func and k.sql is not null join pg_catalog.pg_proc f on f.oid = c.func
    where c.ways = 1 and not (f.prosecdef and f.proowner = role) and pg_catalog.has_function_privilege(role, c.func, 'execute')
      and not (f.prosecdef and k.sql ~ '\m(CURRENT_USER|CURRENT_ROLE|SESSION_USER|USER)\M')
      and k.sql !~* '\m((has_[a-z_]+_privilege|to_reg[a-z]+|current_schemas|row_security_active|nextval|currval|setval)\(|CURRENT_SCHEMA\M)'
      and k.sql !~ '::reg(class|procedure|proc|operator|oper|type|config|dictionary|collation|namespace|role)\M'
      and not exists (
        select from pg_catalog.unnest(k.schemas) s (oid) where not pg_catalog.has_schema_privilege(c.acting, s.oid, 'usage'))
      and not exists (
        select from parts p
        left join pg_catalog.pg_class t on p.class = of_tables and t.oid = p.object
        left join pg_catalog.pg_type e on p.class = 'pg_catalog.pg_type'::pg_catalog.regclass and e.oid = p.object
        where p.func = c.func and not coalesce(case p.class
          when of_tables then t.relkind in ('r', 'p', 'm') and pg_catalog.has_schema_privilege(c.acting, t.relnamespace, 'usage')
            and (pg_catalog.has_table_privilege(c.acting, t.oid, 'select')
                 or case when p.part > 0 then pg_catalog.has_column_privilege(c.acting, t.oid, p.part::smallint, 'select')
                         else pg_catalog.has_any_column_privilege(c.acting, t.oid, 'select') end)
            and (c.acting = role or not relay.is_secured(t.oid, c.acting))
          when of_procs then pg_catalog.has_function_privilege(c.acting, p.object, 'execute')
          when 'pg_catalog.pg_type'::pg_catalog.regclass then e.typtype = 'e' end, false))
      -- Columns of other types may bring operators of their own, which a search path finds.
      and (f.prosqlbody is not null or not exists (
        select from parts p join pg_catalog.pg_attribute a on a.attrelid = p.object and a.attnum = p.part
        join pg_catalog.pg_type t on t.oid = a.atttypid left join pg_catalog.pg_type e on e.oid = t.typelem
        where p.func = c.func and p.class = of_tables and p.part > 0
          and t.oid >= 16384 and t.typtype <> 'e' and not (t.typcategory = 'A' and e.typtype = 'e')))
  )
  select
    (select pg_catalog.array_agg(distinct n.object) from nodes n
     where n.class = of_tables and n.acting = role and n.object <> relation and relay.is_secured(n.object, role)),
    array(select distinct p.object from usable u join parts p on p.func = u.func where p.class = of_tables),
    array(select distinct p.object from usable u join parts p on p.func = u.func where p.class = of_tables and u.acting = role),
    array(select c.func from called c),
    array(select u.func from usable u),
    (select coalesce(pg_catalog.jsonb_object_agg(pg_catalog.format('%I.%I', n.nspname, f.proname), pg_catalog.jsonb_build_object(
       'function', f.proname, 'sql', k.sql, 'names', coalesce(f.proargnames[:f.pronargs], '{}'),
       'types', array(select pg_catalog.format_type(a.type, -1) from pg_catalog.unnest(f.proargtypes) with ordinality a (type, n) order by a.n),
       'returns', pg_catalog.format_type(f.prorettype, -1), 'many', f.proretset, 'strict', f.proisstrict, 'definer', f.prosecdef,
       'past', u.past, 'tables', array(
         select distinct pg_catalog.format('%I.%I', tn.nspname, t.relname)
         from parts p join pg_catalog.pg_class t on t.oid = p.object join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace
         where p.func = u.func and p.class = of_tables))), '{}')
     from usable u join known k on k.func = u.func join pg_catalog.pg_proc f on f.oid = u.func
     join pg_catalog.pg_namespace n on n.oid = f.pronamespace),
    coalesce((select pg_catalog.bool_or(u.past) from usable u), false),
    exists (select from called c join known k on k.func = c.func and k.sql is null);
end
$$;
comment on function relay.bodies_for(regclass, oid, jsonb, "char") is 'bodies that may replace calls in the policies of a relation, for a role';

-- relay.rights(relation, role, login, bodies, command) : the role's policies, and what they depend on
-- {"policies": [{"name", "permissive", "condition"}]  in PostgreSQL's own order
--  "helpers": {"auth.uid": {"returns": "uuid", "body": "..."}}  functions that may be replaced by their body
--  "name": "public.todos"  the relation, if it may not be looked into: only a policy for adding rows may read its own table
--  "tables": ["public.members"]  tables that policies read and that show the role all their rows
--  "secured": {"public.owners": {"table", "policy", "columns"}}  tables that policies read and that have row security for the
--    role, with its policy. What these policies depend on is included in all other fields, too.
--  "reads_as": "service_role"  a role of the judging login that reads all rows of both kinds; null: there is none
--  "bodies": {"private.is_member": {"function", "sql", "names", "types", "returns", "many", "strict", "definer", "tables", "past"}}
--    functions that may be replaced by their body, which reads these tables with the rights that the function has: its owner's if
--    it is a definer. `past`: the role itself may not see all their rows.
--  "bodies_locked": false  whether more of them could be, but a table is locked now
--  "folding": "letters"  what lower() does to texts of claims, as relay.known_folding(), where it is called
--  "unique": {"public.members": ["id"]}  columns of these tables of which each value is in one row at most
--  "unreadable": "public.secret"  a table that the role may not read: then every query on the relation raises
--  "missing": ["grant select on public.secret to anon"]  grants that the role lacks, with the same effect
--  "unusable": {"hidden": "grant usage on schema hidden to relay_judge"}  USAGE grants that are missing to resolve names
--  "calls_own": true  user-defined functions are called, whose bodies may depend on the search path
--  "own_casts": false, "obstacles": ["..."]  why the dependencies of the policies are not known completely}
-- Helpers are SQL functions without arguments that the policies call, or that Supabase's own functions call. Security definer
-- makes no difference, because only bodies that read nothing but claims are used. Names in a body are resolved by the search
-- path of the caller, so pg_catalog must come first in it. User-defined functions and operators may read any setting;
-- user-defined types have functions of their own, enums apart; under a nondeterministic collation, equal values can have
-- different texts.
drop function if exists relay.rights(regclass, oid), relay.rights(regclass, oid, text), relay.rights(regclass, oid, text, jsonb);
create or replace function relay.rights(relation regclass, role oid, login text, bodies jsonb default null, command "char" default 'r') returns jsonb
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  procs oid[];
  classes oid[];
  parts int[];
  types oid[];
  others text[];
  policies jsonb;
  helpers jsonb;
  helping oid[];
  secured oid[];
  within jsonb;
  read_bodies jsonb;
  bodied oid[];
  read_tables oid[];
  own_tables oid[];
  nested oid[];
  past boolean;
  locked boolean;
  reads_as text;
  missing text[];
  looks_up boolean;
begin
  select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
      'name', p.name, 'permissive', p.permissive, 'condition', p.condition)), '[]')
    into policies
  from relay.policies_for(relation, role, command) p;
  select r.secured, r.tables, r.own_tables, r.functions, r.bodied, r.bodies, r.past, r.locked
    into secured, read_tables, own_tables, nested, bodied, read_bodies, past, locked
  from relay.bodies_for(relation, role, bodies, command) r;
  select coalesce(pg_catalog.jsonb_object_agg(pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.jsonb_build_object(
           'table', c.relname, 'policy', relay.policy_for(c.oid, role), 'columns', (
             select pg_catalog.jsonb_agg(a.attname)
             from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped))), '{}')
    into within
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where c.oid = any (secured) and c.relkind in ('r', 'p');
  -- System functions that take a name as text, and casts to reg types that are not of constants.
  looks_up := exists (
    select from (
      select p ->> 'condition' from pg_catalog.jsonb_array_elements(policies) p
      union all
      select t.value ->> 'policy' from pg_catalog.jsonb_each(within) t) p (condition)
    where p.condition ~* '\m((has_[a-z_]+_privilege|to_reg[a-z]+|current_schemas|row_security_active|nextval|currval|setval)\(|CURRENT_SCHEMA\M)'
       or p.condition ~ '[^'']::reg(class|procedure|proc|operator|oper|type|config|dictionary|collation)\M');
  select coalesce(pg_catalog.array_agg(distinct d.object) filter (where d.class = 'pg_catalog.pg_proc'::pg_catalog.regclass), '{}'),
         coalesce(pg_catalog.array_agg(d.object order by d.object, d.part) filter (where d.class = 'pg_catalog.pg_class'::pg_catalog.regclass), '{}'),
         coalesce(pg_catalog.array_agg(d.part order by d.object, d.part) filter (where d.class = 'pg_catalog.pg_class'::pg_catalog.regclass), '{}'),
         coalesce(pg_catalog.array_agg(distinct d.object) filter (where d.class = 'pg_catalog.pg_type'::pg_catalog.regclass), '{}'),
         coalesce(pg_catalog.array_agg(distinct case d.class
             when 'pg_catalog.pg_operator'::pg_catalog.regclass then (
               select pg_catalog.format('operator %I.%s may read any claim', n.nspname, o.oprname)
               from pg_catalog.pg_operator o join pg_catalog.pg_namespace n on n.oid = o.oprnamespace where o.oid = d.object)
             when 'pg_catalog.pg_collation'::pg_catalog.regclass then 'a collation of its own is used'
             else pg_catalog.format('it depends on an object of %s', d.class) end)
           filter (where d.class not in ('pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_class'::pg_catalog.regclass,
                                         'pg_catalog.pg_type'::pg_catalog.regclass)), '{}')
    into procs, classes, parts, types, others
  from (
    select distinct p.* from pg_catalog.unnest(secured || relation::oid) t (oid)
    cross join lateral relay.policy_parts(t.oid, role, case when t.oid = relation then command else 'r' end) p) d;
  missing := array(
    select distinct m from pg_catalog.unnest(secured || relation::oid) t (oid),
    pg_catalog.unnest(relay.missing_grants(t.oid, role, case when t.oid = relation then command else 'r' end)) m order by m);

  select coalesce(pg_catalog.jsonb_object_agg(pg_catalog.format('%I.%I', n.nspname, p.proname), pg_catalog.jsonb_build_object(
           'returns', pg_catalog.format_type(p.prorettype, null), 'body', p.prosrc)), '{}'),
         coalesce(pg_catalog.array_agg(p.oid), '{}')
    into helpers, helping
  from pg_catalog.pg_proc p
  join pg_catalog.pg_namespace n on n.oid = p.pronamespace
  join pg_catalog.pg_language l on l.oid = p.prolang
  where p.oid = any (procs || nested || array(
      select f.oid from pg_catalog.pg_proc f
      where f.proname in ('uid', 'jwt', 'role', 'email')
        and f.pronamespace = (select a.oid from pg_catalog.pg_namespace a where a.nspname = 'auth')))
    and l.lanname = 'sql' and p.pronargs = 0 and p.prokind = 'f' and not p.proretset and p.prosqlbody is null
    and (p.proconfig is null or p.proconfig = array['search_path=""'])
    and pg_catalog.has_function_privilege(role, p.oid, 'execute') and pg_catalog.has_schema_privilege(role, n.oid, 'usage');

  if secured is not null or past then
    -- The login itself, or else a role that it may become. A superuser may become any role, and needs none.
    select r.rolname into reads_as
    from pg_catalog.pg_roles l
    join pg_catalog.pg_roles r on r.oid = l.oid or not l.rolsuper and not r.rolsuper and pg_catalog.pg_has_role(l.oid, r.oid, 'member')
    where l.rolname = coalesce(login, current_user) and not exists (
      select from pg_catalog.pg_class c
      where c.oid = any (classes || read_tables || relation::oid)
        and (not pg_catalog.has_schema_privilege(r.oid, c.relnamespace, 'usage')
             or (c.oid <> relation or c.oid = any (read_tables))
                and (not pg_catalog.has_table_privilege(r.oid, c.oid, 'select') or relay.is_secured(c.oid, r.oid))))
    order by r.oid <> l.oid, r.rolname
    limit 1;
  end if;

  return pg_catalog.jsonb_build_object(
    'name', (
      select case when command = 'a' then '' else pg_catalog.format('%I.%I', n.nspname, c.relname) end
      from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = relation),
    'policies', policies,
    'helpers', helpers,
    'secured', within,
    'reads_as', reads_as,
    'bodies', read_bodies,
    'bodies_locked', locked,
    'folding', case when pg_catalog.concat(policies, within, read_bodies, helpers) ~* '\m(lower|upper)\s*\('
      then relay.known_folding('pg_catalog.text'::pg_catalog.regtype, 'pg_catalog."default"'::pg_catalog.regcollation) end,
    'tables', (
      select coalesce(pg_catalog.jsonb_agg(distinct pg_catalog.format('%I.%I', n.nspname, c.relname)), '[]')
      from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
      where c.oid = any (classes || own_tables) and c.relkind in ('r', 'p', 'm') and not relay.is_secured(c.oid, role)),
    'unique', (
      select coalesce(pg_catalog.jsonb_object_agg(k.name, k.columns), '{}')
      from (
        select pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.jsonb_agg(distinct a.attname)
        from pg_catalog.pg_class c
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        join pg_catalog.pg_index i on i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indimmediate
          and i.indnkeyatts = 1 and i.indpred is null and i.indexprs is null
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = i.indkey[0]
        where c.oid = any (classes || read_tables) and not exists (select from pg_catalog.pg_inherits h where h.inhparent = c.oid and c.relkind = 'r')
        group by 1) k (name, columns)),
    'unreadable', (
      select pg_catalog.min(c.oid::pg_catalog.regclass::text)
      from unnest(classes, parts) d (object, part)
      join pg_catalog.pg_class c on c.oid = d.object
      where c.relkind in ('r', 'p', 'm', 'v', 'f')
        and not pg_catalog.has_table_privilege(role, c.oid, 'select')
        and not case when d.part > 0 then pg_catalog.has_column_privilege(role, c.oid, d.part::smallint, 'select')
                     else pg_catalog.has_any_column_privilege(role, c.oid, 'select') end),
    'missing', pg_catalog.to_jsonb(missing),
    'unusable', relay.missing_usage(relation, role, login, command),
    -- Views, tables with row security, and types may call functions, too.
    'calls_own', others <> '{}' or looks_up
      or exists (
        select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where p.oid = any (procs) and not (n.nspname = 'auth' and p.proname in ('uid', 'jwt', 'role', 'email')))
      or exists (
        select from pg_catalog.pg_class c
        where c.oid = any (classes) and (c.relkind not in ('r', 'p', 'm') or c.relrowsecurity))
      or exists (select from pg_catalog.pg_type t where t.oid = any (types) and t.typtype <> 'e'),
    'own_casts', relay.has_own_casts(),
    'obstacles', pg_catalog.to_jsonb(others || case when looks_up then array['it looks names up along the search path'] else '{}' end || array(
      select pg_catalog.format('%I.%I() may read any claim', n.nspname, p.proname)
      from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
      where p.oid = any (procs) and p.oid <> all (helping) and p.oid <> all (bodied)
      union all
      select pg_catalog.format('type %s brings functions of its own', pg_catalog.format_type(t.oid, null))
      from pg_catalog.pg_type t left join pg_catalog.pg_type e on e.oid = t.typelem
      where t.oid = any (types) and t.typtype <> 'e' and not (t.typcategory = 'A' and e.typtype = 'e')
      union all
      select distinct pg_catalog.format('equality in %s follows a collation and not the bytes', a.attrelid::pg_catalog.regclass)
      from pg_catalog.pg_attribute a join pg_catalog.pg_collation l on l.oid = a.attcollation
      where a.attrelid = any (classes || read_tables) and a.attnum > 0 and not l.collisdeterministic)));
end
$$;
comment on function relay.rights(regclass, oid, text, jsonb, "char") is 'policies of a relation for a role, and what they depend on';

-- relay.access(relation, role, login, bodies, command) -> {"columns": [...], "policy": ..., "judge": ...}, null if the role has a right on no column
-- {"columns": [...], "pending": true} if a policy cannot be read because a table in it is locked: PostgreSQL opens the tables
-- of a policy to deparse it. The caller sets lock_timeout; after the first timeout it is 1 ms for the remaining relations.
drop function if exists relay.access(regclass, oid), relay.access(regclass, oid, text), relay.access(regclass, oid, text, jsonb);
create or replace function relay.access(relation regclass, role oid, login text, bodies jsonb default null, command "char" default 'r') returns jsonb
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  kind "char";
  columns jsonb;
  policy text;
  allowed text;
begin
  select c.relkind, (
      select pg_catalog.jsonb_agg(a.attname order by a.attnum)
      from pg_catalog.pg_attribute a
      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        and pg_catalog.has_column_privilege(role, a.attrelid, a.attnum, case command when 'a' then 'insert' else 'select' end))
    into kind, columns
  from pg_catalog.pg_class c
  where c.oid = relation and pg_catalog.has_schema_privilege(role, c.relnamespace, 'usage');
  if columns is null then
    return null;
  end if;
  begin
    policy := relay.policy_for(relation, role, command);
    if policy is not null and kind in ('m', 'f') then
      allowed := (select p.condition from relay.read_policies p where p.relation = access.relation);
    end if;
    return pg_catalog.jsonb_build_object('columns', columns, 'policy', policy, 'allowed', allowed,
      'judge', relay.judge_statement(relation, policy),
      'rights', case when policy is not null and (kind not in ('m', 'f') or allowed is not null)
        then relay.rights(relation, role, login, bodies, command) else '{}' end);
  exception when lock_not_available then
    perform pg_catalog.set_config('lock_timeout', '1ms', true);
    return pg_catalog.jsonb_build_object('columns', columns, 'pending', true);
  end;
end
$$;
comment on function relay.access(regclass, oid, text, jsonb, "char") is 'what a role may see of a relation or add to it: columns, policy, and the statement that evaluates it';

-- relay.schema_changes_are_logged() : whether the event triggers exist and are enabled ALWAYS
-- session_replication_role would disable a trigger that fires only in sessions of origin.
create or replace function relay.schema_changes_are_logged() returns boolean
language sql stable
set search_path = '' as $$
  select pg_catalog.count(*) = 3
  from pg_catalog.pg_event_trigger e
  where e.evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites') and e.evtenabled = 'A'
    and e.evtfoid = pg_catalog.to_regprocedure('relay.log_schema_change()')
$$;
comment on function relay.schema_changes_are_logged() is 'whether schema changes are in the changelog';

-- relay.rule_scope(roles, login, parts) : the arguments of relay.rules_mark() for these roles, the judging login and these partitions
-- roles: the roles, the owners of definers that the policies call, and all roles that these are members of. owned: watched relations,
-- the tables that their policies look into, the schemas of both, and definers, that one of these roles owns; REASSIGN OWNED, which
-- fires no event trigger, changes their owner.
drop function if exists relay.rule_scope(text[], text);
create or replace function relay.rule_scope(roles text[], login text, parts oid[] default '{}') returns table (roles oid[], owned oid[])
language sql stable
set search_path = ''
set jit = off as $$
  with recursive reads (class, object) as materialized (
    select distinct r.class, r.object from relay.policy_reads($3) r
  ), definers (oid, owner) as materialized (
    select f.oid, f.proowner from reads r join pg_catalog.pg_proc f on f.oid = r.object
    where r.class = 'pg_catalog.pg_proc'::pg_catalog.regclass and f.prosecdef
  ), reachable (oid) as (
    select r.oid from pg_catalog.pg_roles r
    where r.rolname = any ($1) or r.rolname = coalesce($2, current_user) or r.oid in (select d.owner from definers d)
    union
    select m.roleid from pg_catalog.pg_auth_members m join reachable on m.member = reachable.oid)
  select array(select r.oid from reachable r order by r.oid), array(
    select c.oid
    from reads t join pg_catalog.pg_class c on t.class = 'pg_catalog.pg_class'::pg_catalog.regclass and c.oid = t.object
    where c.relowner in (select r.oid from reachable r)
    union
    select n.oid
    from reads t
    join pg_catalog.pg_class c on t.class = 'pg_catalog.pg_class'::pg_catalog.regclass and c.oid = t.object
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspowner in (select r.oid from reachable r)
    union
    select d.oid from definers d
    order by 1)
$$;
comment on function relay.rule_scope(text[], text, oid[]) is 'arguments of relay.rules_mark for roles and the judging login';

-- relay.rules_mark(roles, owned, some_owned) : a hash of the visibility rules whose changes fire no event trigger
-- Covers roles, memberships, owners, and the event triggers themselves; their row versions reveal one that was disabled for a
-- while. Takes the result of relay.rule_scope(); the literal false for `some_owned` means that `owned` is empty, and leaves that
-- part of the plan out. Language sql and without settings, so that it is inlined into the statement that reads a page and
-- shares its snapshot: a rule changed together with a row, or before it, changes the mark of the row's page. Each part costs
-- time on each page.
drop function if exists relay.rules_mark(oid[], oid[]);
create or replace function relay.rules_mark(roles oid[], owned oid[], some_owned boolean default true) returns table (mark bigint)
language sql stable rows 1 as $$
  select pg_catalog.hash_array_extended($1, 0) # coalesce(pg_catalog.bit_xor(s.sign), 0)
  from (
    select pg_catalog.hashtextextended(r.rolname::text, r.oid::bigint * 8 + r.rolsuper::int * 4 + r.rolbypassrls::int * 2 + r.rolinherit::int)
    from pg_catalog.pg_roles r where r.oid = any ($1)
    union all
    select pg_catalog.hashtextextended(m.xmin::text, m.member::bigint << 32 | m.roleid::bigint # (m.grantor::bigint << 16))
    from pg_catalog.pg_auth_members m where m.member = any ($1)
    union all
    select pg_catalog.hashint8extended(d.datdba::bigint, 3) from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()
    union all
    select pg_catalog.hashtextextended(e.xmin::text, e.oid::bigint << 8 | pg_catalog.ascii(e.evtenabled::text))
    from pg_catalog.pg_event_trigger e where e.evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites')
    union all
    select pg_catalog.hashint8extended(c.oid::bigint << 32 | c.relowner::bigint, 5) from pg_catalog.pg_class c where $3 and c.oid = any ($2)
    union all
    select pg_catalog.hashint8extended(n.oid::bigint << 32 | n.nspowner::bigint, 6) from pg_catalog.pg_namespace n where $3 and n.oid = any ($2)
    union all
    select pg_catalog.hashint8extended(f.oid::bigint << 32 | f.proowner::bigint, 7) from pg_catalog.pg_proc f where $3 and f.oid = any ($2)
  ) s (sign)
$$;
comment on function relay.rules_mark(oid[], oid[], boolean) is 'hash of the visibility rules whose changes fire no event trigger';

-- relay.role_versions(roles) : the transactions that last changed each of the roles
-- These are the transactions that granted its memberships, direct or indirect, and that last altered one of these roles, if the
-- installer may read that. Changes of a transaction that began before one of them may have been invisible to the role. A
-- subtransaction has an id of its own.
create or replace function relay.role_versions(roles text[]) returns table (role text, xid bigint)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
declare
  now constant bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
  versions jsonb := '[]';
begin
  if has_table_privilege('pg_catalog.pg_authid', 'select') then
    select jsonb_agg(jsonb_build_object('oid', a.oid::bigint, 'xmin', a.xmin::text::bigint)) into versions from pg_authid a;
  end if;
  return query
  with recursive reachable (name, oid) as (
    select r.rolname::text, r.oid from pg_roles r where r.rolname = any (role_versions.roles)
    union
    select e.name, m.roleid from pg_auth_members m join reachable e on m.member = e.oid
  ), versions_of (name, xmin) as (
    select e.name, m.xmin::text::bigint from pg_auth_members m join reachable e on m.member = e.oid
    union
    select e.name, v.xmin from reachable e join jsonb_to_recordset(versions) v (oid bigint, xmin bigint) on v.oid = e.oid::bigint
    union
    select e.name, d.xmin::text::bigint from reachable e join pg_database d on d.datdba = e.oid where d.datname = current_database()
  )
  -- xmin has only the lower 32 bits of a transaction id, and is never in the future.
  select v.name, v.xmin + ((now - v.xmin) >> 32 << 32) from versions_of v where v.xmin > 2;
end
$$;
comment on function relay.role_versions(text[]) is 'the transactions that last changed each of the roles';

-- relay.known_kind(type, collation) : the kind of a type, or of an array's elements, that the relay compares as PostgreSQL does
-- null for all other types, and for texts with a nondeterministic collation.
create or replace function relay.known_kind(type oid, collation oid) returns text
language sql stable
set search_path = '' as $$
  select case
    when t.typtype = 'e' then 'enum'
    when t.typnamespace <> 'pg_catalog'::pg_catalog.regnamespace then null
    when pg_catalog.ltrim(t.typname, '_') in ('bool', 'int2', 'int4', 'int8', 'uuid') then pg_catalog.ltrim(t.typname, '_')
    when pg_catalog.ltrim(t.typname, '_') in ('text', 'varchar')
      and not exists (select from pg_catalog.pg_collation l where l.oid = $2 and not l.collisdeterministic)
      then pg_catalog.ltrim(t.typname, '_')
    end
  from pg_catalog.pg_type t
  where t.oid = $1
$$;
comment on function relay.known_kind(oid, oid) is 'kind of values that the relay compares as PostgreSQL does';

-- relay.known_folding(type, collation) : how lower() folds texts of types that the relay matches with patterns as PostgreSQL does
-- null: the relay does not match them. Patterns compare character by character if the encoding is UTF-8 and the collation
-- deterministic; ilike compares lower() of both sides. 'ascii': lower() changes ASCII letters only; 'letters': ASCII letters as
-- usual, other letters in ways not known here; 'unknown': not even ASCII letters as usual, as in Turkish.
create or replace function relay.known_folding(type oid, collation oid) returns text
language plpgsql stable
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  upper constant text := 'ABCDEFGHIJKLMNOPQRSTUVWXYZ';
  small constant text := 'abcdefghijklmnopqrstuvwxyz';
  named record;
  ctype text;
  folded text;
begin
  if $1 <> all (array['text', 'varchar', 'bpchar', 'name']::pg_catalog.regtype[]) or pg_catalog.getdatabaseencoding() <> 'UTF8' then
    return null;
  end if;
  select l.collprovider, l.collctype, l.collisdeterministic into named from pg_catalog.pg_collation l where l.oid = $2;
  if not found or not named.collisdeterministic then
    return null;
  end if;
  if named.collprovider = 'd' then
    select case when coalesce(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c') = 'c' then d.datctype end into ctype
    from pg_catalog.pg_database d where d.datname = pg_catalog.current_database();
  elsif named.collprovider = 'c' then
    ctype := named.collctype;
  end if;
  if ctype in ('C', 'POSIX') then
    return 'ascii';
  end if;
  -- A collation that this server cannot use any more raises here, and in the pattern for each row.
  begin
    execute pg_catalog.format('select pg_catalog.lower(%L::pg_catalog.text collate %s)', upper || small, $2::pg_catalog.regcollation)
      into folded;
  exception when others then
    return null;
  end;
  return case when folded = small || small then 'letters' else 'unknown' end;
end
$$;
comment on function relay.known_folding(oid, oid) is 'how lower() folds texts of types that the relay matches with patterns as PostgreSQL does';

-- relay.capture_mode(relation, id) : how its capture triggers are enabled, as in pg_trigger.tgenabled; null: one is missing
create or replace function relay.capture_mode(relation oid, id int) returns "char"
language sql stable as $$
  select case when pg_catalog.count(*) < 3 then null
              when pg_catalog.bool_and(t.tgenabled = 'A') then 'A'::"char"
              when pg_catalog.bool_and(t.tgenabled in ('A', 'O')) then 'O'
              else 'D' end
  from pg_catalog.pg_trigger t
  where t.tgrelid = $1
    and t.tgname = any (array(select relay.capture_trigger($2, o) from pg_catalog.unnest(relay.operations()) o)::pg_catalog.name[])
$$;
comment on function relay.capture_mode(oid, int) is 'how the capture triggers of a watched relation are enabled';

-- relay.catalog_columns(relation) : the columns of a relation as relay.catalog() describes them
create or replace function relay.catalog_columns(relation oid) returns jsonb
language sql stable as $$
  select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
    'num', a.attnum, 'name', a.attname, 'type', t.typname, 'readable_type', pg_catalog.format_type(a.atttypid, null),
    'known', relay.known_kind(a.atttypid, a.attcollation), 'many', t.typcategory = 'A',
    'folding', relay.known_folding(a.atttypid, a.attcollation),
    'plain', t.typtype in ('b', 'e', 'r', 'm'), 'domain', t.typtype = 'd') order by a.attnum), '[]')
  from pg_catalog.pg_attribute a
  join pg_catalog.pg_type t on t.oid = a.atttypid
  where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
$$;
comment on function relay.catalog_columns(oid) is 'columns of a relation as the catalog describes them';

-- A relation whose trigger is disabled or dropped is absent; its subscribers get a gap.
-- A role that does not exist, lacks USAGE on the schema or may select no column is absent from "access". A locked table affects
-- only the relations whose policies read it.
drop function if exists relay.catalog(text[]), relay.catalog(text[], text), relay.catalog(text[], text, int[]);
drop function if exists relay.catalog(text[], text, int[], oid[]);
create or replace function relay.catalog(
  roles text[], login text default null, wanted int[] default null, parts oid[] default '{}', bodies jsonb default null) returns jsonb
language sql stable
set search_path = ''
set lock_timeout = '20ms'
set jit = off as $$
  select pg_catalog.jsonb_build_object('ordered', relay.schema_changes_are_logged(), 'relations', coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
    'id', w.id,
    'oid', c.oid::bigint,
    'schema', n.nspname,
    'table', c.relname,
    'part', w.relation <> w.whole,
    'parts_mark', coalesce((
      select k.parts_mark from relay.known_relations k where k.id = w.id and c.relkind = 'p' and w.relation = w.whole), 0),
    'former_parents', case when c.relkind = 'p' and w.relation = w.whole then (
      select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
        'part', f.part::bigint, 'parent', f.parent::bigint, 'number', f.number) order by f.number), '[]')
      from relay.former_parents f where f.relation = w.id) else '[]' end,
    'named', (
      select coalesce(case when w.relation <> w.whole then k.part_named -> w.relation::oid::text end,
                      pg_catalog.jsonb_build_object('xid', k.named_by::text, 'number', k.named_at))
      from relay.known_relations k where k.id = w.id),
    'kind', c.relkind,
    'leave_events', w.leave_events,
    'full', c.relreplident = 'f',
    'key', pg_catalog.to_jsonb(relay.key(w.relation)),
    'columns', relay.catalog_columns(c.oid),
    -- null: the recorded shape is not the current one, so images cannot be read.
    'shape', (
      select s.shape from relay.shapes s
      where s.relation = w.id and s.shape = relay.shape(w.id) and s.columns = relay.columns_of(w.whole)),
    'shapes', (
      select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
        'shape', s.shape, 'columns', s.columns, 'xid', s.xid::text, 'seen', s.seen::text, 'loose', s.loose, 'guarded', s.guarded) order by s.shape), '[]')
      from relay.shapes s where s.relation = w.id),
    'access', (
      select coalesce(pg_catalog.jsonb_object_agg(seen.rolname, seen.access), '{}')
      from (select r.rolname, relay.access(w.relation, r.oid, $2, $5) as access
            from pg_catalog.pg_roles r where r.rolname = any ($1)) seen
      where seen.access is not null)) order by w.id), '[]'))
  from relay.subjects($4) w
  join pg_catalog.pg_class c on c.oid = w.relation
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where ($3 is null or w.id = any ($3)) and (c.relkind = 'm' or relay.capture_mode(w.relation, w.id) in ('A', 'O')
    and (w.relation = w.whole or relay.capture_mode(w.whole, w.id) in ('A', 'O')))
$$;
comment on function relay.catalog(text[], text, int[], oid[], jsonb) is 'watched relations with columns, key, and what each role may see of them';

-- relay.catalog_marks(roles, login, parts) : hashes of the inputs of relay.catalog(), by part of the result
-- kind `database`: inputs of all entries, including the schemas that the judging login may use and the roles with BYPASSRLS that
-- it may act as; `role`, by role name: the role and the roles that it is a member of; `relation`, by id in relay.watch_list;
-- `topics`: inputs of relay.topic_rules().
-- Hashes values and not row versions, which TRUNCATE or VACUUM FULL change, too. Policies enter in parsed form, with the names
-- of the objects they refer to: deparsing a policy would lock its tables, and wait for a transaction that alters one.
-- plpgsql with a generic plan, because planning takes longer than the query.
drop function if exists relay.catalog_fingerprint(text[]), relay.catalog_marks(text[], text);
create or replace function relay.catalog_marks(roles text[], login text default null, parts oid[] default '{}') returns table (kind text, name text, mark text)
language plpgsql stable rows 100
set search_path = ''
set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
  judge constant oid := (select r.oid from pg_catalog.pg_roles r where r.rolname = coalesce(login, current_user));
begin
  return query
    with recursive reads (relation, class, object) as materialized (
      select t.subject, t.class, t.object from relay.policy_reads($3) t
    ), tables (relation, "table") as materialized (
      select t.relation, t.object from reads t where t.class = 'pg_catalog.pg_class'::pg_catalog.regclass
    ), reachable (root, oid) as (
      select r.oid, r.oid from pg_catalog.pg_roles r
      where r.rolname = any (roles) or r.oid in (
        select f.proowner from reads t join pg_catalog.pg_proc f on f.oid = t.object
        where t.class = 'pg_catalog.pg_proc'::pg_catalog.regclass and f.prosecdef)
      union
      select reachable.root, m.roleid from pg_catalog.pg_auth_members m join reachable on m.member = reachable.oid
    ), role_facts (root, fact) as materialized (
      select r.root, pg_catalog.string_agg(pg_catalog.concat_ws(',', r.oid, a.rolname, a.rolsuper, a.rolbypassrls, a.rolinherit,
               (select pg_catalog.string_agg(pg_catalog.concat_ws(',', m.roleid, m.xmin::text), '/' order by m.roleid)
                from pg_catalog.pg_auth_members m where m.member = r.oid)), ';' order by r.oid)
      from reachable r join pg_catalog.pg_roles a on a.oid = r.oid
      group by r.root
    ), bodies (relation, fact) as materialized (
      -- What functions read, and who their definers are; the operators that there are, which their bodies may resolve to.
      select t.relation, pg_catalog.string_agg(pg_catalog.concat_ws(',', t.class, t.object, e.fact,
               (select pg_catalog.string_agg(pg_catalog.concat_ws(',', a.attnum, a.attname, a.atttypid, a.attcollation, a.attacl::text), '/' order by a.attnum)
                from pg_catalog.pg_attribute a
                where t.class = 'pg_catalog.pg_class'::pg_catalog.regclass and a.attrelid = t.object and a.attnum > 0)), ';'
               order by t.class, t.object)
             || (select pg_catalog.concat_ws(',', pg_catalog.count(*), pg_catalog.max(o.oid)) from pg_catalog.pg_operator o where o.oid >= 16384)
      from reads t
      left join pg_catalog.pg_proc f on t.class = 'pg_catalog.pg_proc'::pg_catalog.regclass and f.oid = t.object and f.prosecdef
      left join role_facts e on e.root = f.proowner
      where t.relation in (select o.relation from reads o where o.class = 'pg_catalog.pg_proc'::pg_catalog.regclass)
      group by t.relation
    ), looked_up (relation, fact) as materialized (
      select t.relation, pg_catalog.string_agg(pg_catalog.concat_ws(',', p.polrelid, p.polname, p.polpermissive, p.polcmd, p.polroles::text,
               p.polqual::text), ';' order by p.oid)
      from tables t join pg_catalog.pg_policy p on p.polrelid = t."table"
      where t."table" <> t.relation
      group by t.relation
    ), unique_keys (relation, fact) as materialized (
      select t.relation, pg_catalog.string_agg(pg_catalog.concat_ws(',', i.indexrelid, i.indkey::text, i.indnkeyatts, i.indisvalid,
               i.indimmediate, exists (select from pg_catalog.pg_inherits h where h.inhparent = t."table")), ';' order by i.indexrelid)
      from tables t join pg_catalog.pg_index i on i.indrelid = t."table" and i.indisunique
      where t."table" <> t.relation
      group by t.relation
    ), referenced (relation, fact) as materialized (
      select d.relation, pg_catalog.string_agg(pg_catalog.concat_ws(',', d.refclassid, d.refobjid, d.refobjsubid, n.nspname, n.nspacl::text,
               c.relname, c.relkind, c.relowner, c.relrowsecurity, c.relforcerowsecurity, c.relacl::text, a.attname, a.attcollation,
               a.attacl::text,
               f.proname, f.provolatile, f.proisstrict, f.prosrc, f.prosqlbody::text, f.proowner, f.prosecdef, f.prolang, f.proacl::text, f.proconfig::text,
               t.typname, o.oprname,
               (select pg_catalog.string_agg(e.enumlabel, '/' order by e.oid) from pg_catalog.pg_enum e where e.enumtypid = t.oid)), ';'
               order by d.refclassid, d.refobjid, d.refobjsubid)
      from (select t.relation, d.refclassid, d.refobjid, d.refobjsubid
            from tables t
            join pg_catalog.pg_policy p on p.polrelid = t."table"
            join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_policy'::pg_catalog.regclass and d.objid = p.oid
            where d.refobjid <> t.relation
            union
            select t.relation, t.class, t.object, 0 from reads t where t.object <> t.relation) d
      left join pg_catalog.pg_class c on d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass and c.oid = d.refobjid
      left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid and d.refobjsubid > 0
      left join pg_catalog.pg_type t on d.refclassid = 'pg_catalog.pg_type'::pg_catalog.regclass and t.oid = d.refobjid
      left join pg_catalog.pg_operator o on d.refclassid = 'pg_catalog.pg_operator'::pg_catalog.regclass and o.oid = d.refobjid
      left join pg_catalog.pg_proc f on f.oid = case when d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass then d.refobjid else o.oprcode::oid end
      left join pg_catalog.pg_namespace n on n.oid = coalesce(c.relnamespace, f.pronamespace, t.typnamespace, o.oprnamespace)
      group by d.relation
    ), facts (kind, name, fact) as (
      select 'role', o.rolname::text, r.fact
      from role_facts r join pg_catalog.pg_roles o on o.oid = r.root
      where o.rolname = any (roles)
      union all
      select 'database', '', pg_catalog.concat_ws('|', relay.has_own_casts(), relay.schema_changes_are_logged(), judge,
        -- All that the entries take from the judging login. Its memberships change with each role that a cluster creates for it.
        (select pg_catalog.string_agg(n.oid::text, ',' order by n.oid) from pg_catalog.pg_namespace n
         where n.nspname !~ '^pg_(toast|temp)' and pg_catalog.has_schema_privilege(judge, n.oid, 'usage')),
        (select pg_catalog.string_agg(b.oid::text, ',' order by b.oid) from pg_catalog.pg_roles b
         where b.rolbypassrls and not b.rolsuper and pg_catalog.pg_has_role(judge, b.oid, 'member')),
        (select d.datdba from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()),
        (select pg_catalog.string_agg(pg_catalog.concat_ws(',', f.oid, f.prosrc, f.prosecdef, f.prolang, f.proacl::text, f.proconfig::text,
                  n.nspacl::text), ';' order by f.oid)
         from pg_catalog.pg_namespace n join pg_catalog.pg_proc f on f.pronamespace = n.oid
         where n.nspname = 'auth' and f.proname in ('uid', 'jwt', 'role', 'email')))
      union all
      select 'relation', w.id::text, pg_catalog.concat_ws('|', w.relation::oid, w.leave_events, relay.capture_mode(w.relation, w.id),
        n.mute::text, n.parts_mark, k.named_by, k.named_at, k.part_named::text, relay.columns_of(w.relation)::text,
        (select p.policy from relay.read_policies p where p.relation = w.relation),
        (select pg_catalog.concat_ws(',', c.relname, c.relkind, c.relowner, c.relreplident,
                  c.relrowsecurity, c.relforcerowsecurity, c.relacl::text, '.', s.nspname, s.nspowner, s.nspacl::text)
         from pg_catalog.pg_class c join pg_catalog.pg_namespace s on s.oid = c.relnamespace
         where c.oid = w.relation),
        (select pg_catalog.string_agg(pg_catalog.concat_ws(',', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attcollation, a.attacl::text,
                  case when a.atttypid >= 16384
                    then (select t.typname || ',' || t.typnamespace from pg_catalog.pg_type t where t.oid = a.atttypid) end),
                  ';' order by a.attnum)
         from pg_catalog.pg_attribute a
         where a.attrelid = w.relation and a.attnum > 0 and not a.attisdropped),
        (select pg_catalog.string_agg(pg_catalog.concat_ws(',', i.indexrelid, i.indkey::text, i.indisprimary, i.indisunique,
                  i.indisvalid, i.indimmediate), ';' order by i.indexrelid)
         from pg_catalog.pg_index i
         where i.indrelid = w.relation and i.indisunique),
        (select pg_catalog.string_agg(pg_catalog.concat_ws(',', p.polname, p.polpermissive, p.polcmd, p.polroles::text,
                  p.polqual::text), ';' order by p.oid)
         from pg_catalog.pg_policy p
         where p.polrelid = w.relation),
        r.fact, l.fact, u.fact, b.fact,
        (select pg_catalog.string_agg(s.shape::text, ';' order by s.shape) from relay.shapes s where s.relation = w.id),
        (select pg_catalog.string_agg(d.xid::text, ';' order by d.xid) from relay.shape_doubts d where d.relation in (0, w.id)))
      from relay.subjects($3) w
      join relay.relations_now() n on n.id = w.id
      left join relay.known_relations k on k.id = w.id
      left join referenced r on r.relation = w.relation
      left join looked_up l on l.relation = w.relation
      left join unique_keys u on u.relation = w.relation
      left join bodies b on b.relation = w.relation
      union all
      select 'topics', '', pg_catalog.concat_ws('|', c.oid, c.relkind, c.relowner, c.relrowsecurity, c.relforcerowsecurity, c.relacl::text,
        s.nspowner, s.nspacl::text,
        (select pg_catalog.string_agg(pg_catalog.concat_ws(',', a.attnum, a.attname, a.atttypid, a.attcollation, a.attacl::text), ';' order by a.attnum)
         from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
        (select pg_catalog.string_agg(pg_catalog.concat_ws(',', p.polname, p.polpermissive, p.polcmd, p.polroles::text,
                  p.polqual::text, '.', p.polwithcheck::text), ';' order by p.oid)
         from pg_catalog.pg_policy p where p.polrelid = c.oid),
        r.fact, l.fact, u.fact, b.fact)
      from relay.topic_table() m
      join pg_catalog.pg_class c on c.oid = m.relation
      join pg_catalog.pg_namespace s on s.oid = c.relnamespace
      left join referenced r on r.relation = m.relation
      left join looked_up l on l.relation = m.relation
      left join unique_keys u on u.relation = m.relation
      left join bodies b on b.relation = m.relation)
    select f.kind, f.name, pg_catalog.to_hex(pg_catalog.hashtextextended(f.facts, 0)) || '.' || pg_catalog.to_hex(pg_catalog.hashtextextended(f.facts, 1))
    from (select facts.kind, facts.name, pg_catalog.string_agg(facts.fact, '|' order by facts.fact) as facts from facts group by 1, 2) f;
end
$$;
comment on function relay.catalog_marks(text[], text, oid[]) is 'hashes of the inputs of relay.catalog for the same roles';
