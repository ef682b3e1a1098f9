-- What the relay must know of watched relations: columns, keys, rights and policies, and a cheap sign of their change.

-- relay.subscriber_roles(roles, login) : those of the roles that subscribers may have
-- A token's role counts only if the login that judges may act as it, as with PostgREST's authenticator; a superuser's
-- never does, since it would see everything without a judgement. A login that is null is the caller's.
create or replace function relay.subscriber_roles(roles text[], login text) returns text[]
language sql stable
set search_path = '' as $$
  select coalesce(pg_catalog.array_agg(r.rolname::text order by r.rolname), '{}')
  from pg_catalog.pg_roles r
  join pg_catalog.pg_roles l on l.rolname = coalesce($2, current_user)
  where r.rolname = any ($1) and not r.rolsuper and pg_catalog.pg_has_role(l.oid, r.oid, 'member')
$$;
comment on function relay.subscriber_roles(text[], text) is 'those of the roles that the judging login may act as, superusers apart';

-- relay.policy_for(relation, role) : the condition under which the role sees a row
-- null: every row. As PostgreSQL does it: no row security for superusers, BYPASSRLS, and the owner unless forced;
-- permissive policies joined by OR, restrictive ones by AND, each in PostgreSQL's own order, as one that raises may stand
-- behind one that decides; none permissive = no row. Deparsed under an empty search_path, so
-- that every name outside pg_catalog is qualified.
create or replace function relay.policy_for(relation regclass, role oid) returns text
language sql stable
set search_path = '' as $$
  select case
    when r.rolsuper or r.rolbypassrls then null
    when c.relkind in ('m', 'f') then (select '(' || a.policy || E'\n)' from relay.read_policies a where a.relation = $1)
    when not c.relrowsecurity then null
    when pg_catalog.pg_has_role(r.oid, c.relowner, 'usage') and not c.relforcerowsecurity then null
    else (
      select case when count(*) filter (where p.polpermissive) = 0 then 'false' else
        pg_catalog.concat_ws(' and ',
          pg_catalog.string_agg(p.condition, ' and ' order by p.polname) filter (where not p.polpermissive),
          '(' || pg_catalog.string_agg(p.condition, ' or ' order by p.polname desc) filter (where p.polpermissive) || ')') end
      from (
        select p.polname, p.polpermissive, '(' || pg_catalog.pg_get_expr(p.polqual, p.polrelid) || ')' as condition
        from pg_catalog.pg_policy p
        where p.polrelid = $1 and p.polcmd in ('r', '*') and p.polqual is not null
          and (0::oid = any (p.polroles)
               or exists (select from pg_catalog.unnest(p.polroles) m where pg_catalog.pg_has_role(r.oid, m, 'usage')))
      ) p)
    end
  from pg_catalog.pg_class c, pg_catalog.pg_roles r
  where c.oid = $1 and r.oid = $2
$$;
comment on function relay.policy_for(regclass, oid) is 'condition under which a role sees a row of the relation; null: every row';

-- relay.access(relation, role) -> {"columns": [...], "policy": ..., "judge": ...}, null if the role may select nothing
create or replace function relay.access(relation regclass, role oid) returns jsonb
language sql stable
set search_path = '' as $$
  select pg_catalog.jsonb_build_object('columns', may.columns, 'policy', rule.policy,
                                       'judge', relay.judge_statement($1, rule.policy))
  from pg_catalog.pg_class c
  cross join lateral (
    select pg_catalog.jsonb_agg(a.attname order by a.attnum) as columns
    from pg_catalog.pg_attribute a
    where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
      and pg_catalog.has_column_privilege($2, a.attrelid, a.attnum, 'select')) may
  cross join lateral (select relay.policy_for($1, $2) as policy) rule
  where c.oid = $1 and may.columns is not null
    and pg_catalog.has_schema_privilege($2, c.relnamespace, 'usage')
$$;
comment on function relay.access(regclass, oid) is 'what a role may see of a relation: columns, policy, and the statement that judges it';

-- relay.schema_changes_are_logged() : whether the event trigger is there and enabled
create or replace function relay.schema_changes_are_logged() returns boolean
language sql stable
set search_path = '' as $$
  select exists (select from pg_catalog.pg_event_trigger e where e.evtname = 'relay_schema_changes' and e.evtenabled in ('O', 'A'))
$$;
comment on function relay.schema_changes_are_logged() is 'whether changes of the schema stand in the changelog';

-- relay.catalog(roles) : every watched relation that exists, and what each of the roles may see of it
-- A role that does not exist, lacks USAGE on the schema or may select no column is absent from "access".
create or replace function relay.catalog(roles text[]) returns jsonb
language sql stable
set search_path = '' as $$
  select pg_catalog.jsonb_build_object('ordered', relay.schema_changes_are_logged(), 'relations', coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
    'id', w.id,
    'oid', c.oid::bigint,
    'schema', n.nspname,
    'table', c.relname,
    'kind', c.relkind,
    'leave_events', w.leave_events,
    'full', c.relreplident = 'f',
    'key', pg_catalog.to_jsonb(relay.key(w.relation)),
    'columns', (
      select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
        'name', a.attname, 'type', t.typname, 'readable_type', pg_catalog.format_type(a.atttypid, a.atttypmod)) order by a.attnum), '[]')
      from pg_catalog.pg_attribute a
      join pg_catalog.pg_type t on t.oid = a.atttypid
      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
    'access', (
      select coalesce(pg_catalog.jsonb_object_agg(seen.rolname, seen.access), '{}')
      from (select r.rolname, relay.access(w.relation, r.oid) as access
            from pg_catalog.pg_roles r where r.rolname = any ($1)) seen
      where seen.access is not null)) order by w.id), '[]'))
  from relay.watch_list w
  join pg_catalog.pg_class c on c.oid = w.relation
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
$$;
comment on function relay.catalog(text[]) is 'watched relations with columns, key, and what each role may see of them';

-- relay.catalog_fingerprint(roles) : differs whenever relay.catalog(roles) could
-- Made of the values the catalog is made of and not of row versions, which TRUNCATE or VACUUM FULL change too. A policy's
-- text also changes with the names of what it refers to, so these are in it. plpgsql and a generic plan, because planning
-- takes longer than the query.
create or replace function relay.catalog_fingerprint(roles text[]) returns text
language plpgsql stable
set search_path = ''
set plan_cache_mode = force_generic_plan as $$
declare
  relations constant oid[] := array(select w.relation::oid from relay.watch_list w order by w.id);
  facts text;
begin
  select pg_catalog.concat_ws('|',
    -- The roles themselves too: one more of them may be reachable from the others already.
    roles::text,
    (select pg_catalog.string_agg(pg_catalog.concat_ws(',', w.id, w.relation::oid, w.leave_events), ';' order by w.id)
     from relay.watch_list w),
    (select pg_catalog.string_agg(pg_catalog.concat_ws(',', p.relation::oid, p.policy), ';' order by p.relation::oid)
     from relay.read_policies p),
    (select pg_catalog.string_agg(pg_catalog.concat_ws(',', c.oid, c.relname, c.relkind, c.relowner, c.relreplident,
              c.relrowsecurity, c.relforcerowsecurity, c.relacl::text, '.', n.nspname, n.nspowner, n.nspacl::text), ';' order by c.oid)
     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
     where c.oid = any (relations)),
    (select pg_catalog.string_agg(pg_catalog.concat_ws(',', a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attacl::text,
              case when a.atttypid >= 16384
                then (select t.typname || ',' || t.typnamespace from pg_catalog.pg_type t where t.oid = a.atttypid) end),
              ';' order by a.attrelid, a.attnum)
     from pg_catalog.pg_attribute a
     where a.attrelid = any (relations) and a.attnum > 0 and not a.attisdropped),
    (select pg_catalog.string_agg(pg_catalog.concat_ws(',', i.indrelid, i.indexrelid, i.indkey::text, i.indisprimary, i.indisunique,
              i.indisvalid, i.indimmediate), ';' order by i.indexrelid)
     from pg_catalog.pg_index i
     where i.indrelid = any (relations) and i.indisunique),
    (select pg_catalog.string_agg(pg_catalog.concat_ws(',', p.polrelid, p.polname, p.polpermissive, p.polcmd, p.polroles::text,
              pg_catalog.pg_get_expr(p.polqual, p.polrelid)), ';' order by p.oid)
     from pg_catalog.pg_policy p
     where p.polrelid = any (relations)),
    (with recursive reachable (oid) as (
       select r.oid from pg_catalog.pg_roles r where r.rolname = any (roles)
       union
       select m.roleid from pg_catalog.pg_auth_members m join reachable on m.member = reachable.oid)
     select pg_catalog.concat_ws(':',
       (select pg_catalog.string_agg(pg_catalog.concat_ws(',', r.oid, r.rolname, r.rolsuper, r.rolbypassrls, r.rolinherit), ';' order by r.oid)
        from pg_catalog.pg_roles r join reachable on reachable.oid = r.oid),
       (select pg_catalog.string_agg(pg_catalog.concat_ws(',', m.member, m.roleid, m.xmin::text), ';' order by m.member, m.roleid)
        from pg_catalog.pg_auth_members m join reachable on m.member = reachable.oid))),
    (select d.datdba from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()),
    relay.schema_changes_are_logged())
  into facts;
  return pg_catalog.to_hex(pg_catalog.hashtextextended(facts, 0)) || '.' || pg_catalog.to_hex(pg_catalog.hashtextextended(facts, 1));
end
$$;
comment on function relay.catalog_fingerprint(text[]) is 'cheap hash that differs whenever relay.catalog of the same roles could';
