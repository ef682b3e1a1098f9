-- Shapes: what the text of an image depends on. Columns, types and enum labels are identified by number or oid, not by name.

-- relay.type_definition(type) : what the text of a value in an image depends on, besides the oid of its type
-- null for system types, whose text format never changes. Enum labels, attributes, casts to json and domain checks are
-- identified by oid or number, which a rename does not change.
create or replace function relay.type_definition(type oid) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  known record;
begin
  select t.typtype, t.typbasetype, t.typelem, t.typcategory, t.typrelid, t.typnotnull into known from pg_type t where t.oid = type_definition.type;
  if not found or type < 16384 and known.typtype <> 'd' then
    return null;
  end if;
  return jsonb_strip_nulls(case
    when known.typtype = 'd' then jsonb_build_object(
      'domain', known.typbasetype::bigint, 'of', relay.type_definition(known.typbasetype), 'not_null', known.typnotnull,
      'checks', (select jsonb_agg(c.oid::bigint order by c.oid) from pg_constraint c where c.contypid = type_definition.type))
    when known.typtype = 'c' then jsonb_build_object('row', (
      select coalesce(jsonb_agg(jsonb_build_object('num', a.attnum, 'name', a.attname, 'type', a.atttypid::bigint,
                                          'def', relay.type_definition(a.atttypid)) order by a.attnum), '[]')
      from pg_attribute a where a.attrelid = known.typrelid and a.attnum > 0 and not a.attisdropped))
    when known.typcategory = 'A' and known.typelem <> 0 then jsonb_build_object(
      'array', known.typelem::bigint, 'of', relay.type_definition(known.typelem))
    when known.typtype = 'e' then jsonb_build_object(
      'labels', (select coalesce(jsonb_object_agg(e.oid::bigint, e.enumlabel), '{}') from pg_enum e where e.enumtypid = type_definition.type))
    else jsonb_build_object('opaque', true) end
    || jsonb_build_object('cast', (
      select c.castfunc::bigint from pg_cast c where c.castsource = type_definition.type and c.casttarget = 'pg_catalog.json'::regtype)));
end
$$;
comment on function relay.type_definition(oid) is 'what the text of a value depends on, besides the oid of its type';

-- relay.columns_of(relation) : the current shape of a relation
-- [{"num": 1, "name": "id", "type": 20}, {"num": 3, "name": "mood", "type": 16999, "def": {"labels": {"17001": "sad"}}}]
create or replace function relay.columns_of(relation regclass) returns jsonb
language sql stable as $$
  select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object(
      'num', a.attnum, 'name', a.attname, 'type', a.atttypid::bigint,
      'def', case when a.atttypid >= 16384 or t.typtype = 'd' then relay.type_definition(a.atttypid) end)) order by a.attnum), '[]')
  from pg_catalog.pg_attribute a
  join pg_catalog.pg_type t on t.oid = a.atttypid
  where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
$$;
comment on function relay.columns_of(regclass) is 'columns of a relation with numbers, types and type definitions';

-- relay.is_loose(columns) : whether a shape contains a type that can be altered without a lock on the relation
create or replace function relay.is_loose(columns jsonb) returns boolean
language sql immutable as $$
  select exists (select from pg_catalog.jsonb_array_elements($1) c where c ? 'def')
$$;
comment on function relay.is_loose(jsonb) is 'whether a shape contains a type that can be altered without a lock on the relation';

-- relay.differs_loosely(old, new) : whether the type of a column is the same and its definition differs
create or replace function relay.differs_loosely(old jsonb, new jsonb) returns boolean
language sql immutable as $$
  select exists (
    select from pg_catalog.jsonb_array_elements($1) o
    join pg_catalog.jsonb_array_elements($2) n on n -> 'num' = o -> 'num' and n -> 'type' = o -> 'type'
    where n -> 'def' is distinct from o -> 'def')
$$;
comment on function relay.differs_loosely(jsonb, jsonb) is 'whether two shapes differ in the definition of a type';

-- relay.shape(id) : the number of the newest shape of a watched relation
create or replace function relay.shape(id int) returns int
language sql stable as $$
  select pg_catalog.max(s.shape) from relay.shapes s where s.relation = $1
$$;
comment on function relay.shape(int) is 'number of the newest shape of a watched relation';
