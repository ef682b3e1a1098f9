-- Queries of `relay explain`: why a subscriber receives nothing, and a row as the trigger would log it.

drop function if exists relay.hindrances(text, text, text);

-- relay.blockers(relation, role, login) : why subscribers of the role receive nothing from the relation, each with its remedy
-- {} if nothing blocks or there is no such relation. `login` is the judging login, null for the caller.
create or replace function relay.blockers(relation text, role text, login text) returns text[]
language plpgsql stable
set jit = off as $$
declare
  found constant oid := pg_catalog.to_regclass(relation);
  named constant text := (select pg_catalog.format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c
                          join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = found);
  subscriber constant oid := (select r.oid from pg_catalog.pg_roles r where r.rolname = role);
  judge constant text := coalesce(login, current_user);
  reasons text[] := '{}';
begin
  if found is null then
    return reasons;
  end if;
  if (select c.relkind = 'v' from pg_catalog.pg_class c where c.oid = found) then
    reasons := reasons || text 'it is a view: watch the tables it reads';
  elsif not exists (select from relay.subjects(array[found]) s where s.relation = found) then
    reasons := reasons || pg_catalog.format('it is not watched: select relay.watch(%L)', named);
  end if;
  if subscriber is null then
    return reasons || pg_catalog.format('the role %I does not exist', role);
  elsif (select r.rolsuper from pg_catalog.pg_roles r where r.oid = subscriber) then
    reasons := reasons || pg_catalog.format('%I is a superuser, and tokens with a superuser role receive nothing', role);
  elsif not coalesce(pg_catalog.pg_has_role((select r.oid from pg_catalog.pg_roles r where r.rolname = judge), subscriber, 'member'), false) then
    reasons := reasons || pg_catalog.format('the login that evaluates policies may not act as it: grant %I to %I', role, judge);
  end if;
  if not pg_catalog.has_schema_privilege(subscriber, (select c.relnamespace from pg_catalog.pg_class c where c.oid = found), 'usage') then
    reasons := reasons || pg_catalog.format('%I may not use its schema: grant usage on schema %I to %1$I', role,
      (select n.nspname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = found));
  end if;
  if not pg_catalog.has_any_column_privilege(subscriber, found, 'select') then
    reasons := reasons || pg_catalog.format('%I may not read it: grant select on %s to %1$I', role, named);
  end if;
  reasons := reasons || array(
    select pg_catalog.format('its policies read what %s may not: %s', role, g)
    from pg_catalog.unnest(relay.missing_grants(found, subscriber)) g);
  if relay.is_secured(found, subscriber) and not exists (select from relay.policies_for(found, subscriber) p where p.permissive) then
    reasons := reasons || pg_catalog.format(
      case role
        when 'service_role' then 'service_role has no BYPASSRLS, and no row-level policy lets it read a row: alter role service_role bypassrls'
        else 'no row-level policy lets %I read a row: create policy ... on %s for select to %1$I using (...)'
      end, role, named);
  end if;
  return reasons;
end
$$;
comment on function relay.blockers(text, text, text) is 'why subscribers of a role receive nothing from a relation, with remedies';

-- relay.row_like(relation, columns) : the first row that has these values, as the trigger would log it; null if there is none
-- Raises if a column does not exist or a value does not fit its type.
create or replace function relay.row_like(relation regclass, columns jsonb) returns text
language plpgsql stable
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1 as $$
declare
  unknown constant text := (
    select k from pg_catalog.jsonb_object_keys(columns) k
    where not exists (select from pg_catalog.pg_attribute a
                      where a.attrelid = relation and a.attname = k and a.attnum > 0 and not a.attisdropped) limit 1);
  types constant text := (
    select pg_catalog.string_agg(pg_catalog.format('%I %s', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)), ', ')
    from pg_catalog.pg_attribute a
    where a.attrelid = relation and columns ? a.attname::text and a.attnum > 0 and not a.attisdropped);
  read jsonb := columns;
  image text;
begin
  if unknown is not null then
    raise exception '% has no column %', relation, unknown using errcode = 'undefined_column';
  end if;
  if types is not null then
    execute pg_catalog.format('select pg_catalog.to_jsonb(x) from pg_catalog.jsonb_to_record($1) x (%s)', types) into read using columns;
  end if;
  execute pg_catalog.format('select pg_catalog.to_json(t)::text from %s t where pg_catalog.to_jsonb(t) @> $1 limit 1', relation)
    into image using read;
  return image;
end
$$;
comment on function relay.row_like(regclass, jsonb) is 'first row with these values as JSON, with the caller''s rights';
