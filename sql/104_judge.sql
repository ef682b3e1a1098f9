-- Statements that evaluate policies and filters on row images, and read policies of relations that cannot have row security.
-- Run them with an empty search_path.

-- relay.judge_statement(relation, expression)
-- A statement with one parameter, text[] of row images as JSON, that returns one bool[] of the same order and length: true
-- where the expression is true; false and null both become false. The images have the relation's own name, so that columns,
-- todos.col and whole rows resolve as they do in a policy. They are in a sub-select of their own, so that a column name takes
-- precedence over an equal name outside.
create or replace function relay.judge_statement(relation regclass, expression text) returns text
language sql stable
set search_path = ''
set standard_conforming_strings = on
set quote_all_identifiers = off as $$
  select pg_catalog.format(
    E'select coalesce(pg_catalog.array_agg("relay verdicts"."relay verdict" order by "relay images"."relay n"), ''{}'')'
    ' from pg_catalog.unnest($1::pg_catalog.text[]) with ordinality as "relay images"("relay image", "relay n")'
    ' cross join lateral (select coalesce((%s\n), false) from'
    ' pg_catalog.json_populate_record(null::%I.%I, "relay images"."relay image"::pg_catalog.json) as %3$I) as "relay verdicts"("relay verdict")',
    $2, n.nspname, c.relname)
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where c.oid = $1 and $2 is not null
$$;
comment on function relay.judge_statement(regclass, text) is
  'statement that evaluates an expression on row images: $1 text[] of JSON, result one bool[]';

-- relay.operator_for(type, symbol) : SQL for an operator between two values of the type, independent of search_path
-- Searched in pg_catalog, then in the type's schema; else the bare symbol, which PostgreSQL resolves (enums, arrays, ranges).
create or replace function relay.operator_for(type oid, symbol text) returns text
language sql stable
set search_path = '' as $$
  select coalesce((
    select case when n.nspname = 'pg_catalog' then $2 else pg_catalog.format('operator(%I.%s)', n.nspname, $2) end
    from pg_catalog.pg_operator o
    join pg_catalog.pg_namespace n on n.oid = o.oprnamespace
    join pg_catalog.pg_type t on t.oid = $1
    where o.oprname = $2 and o.oprleft = $1 and o.oprright = $1
      and (n.nspname = 'pg_catalog' or o.oprnamespace = t.typnamespace)
    order by n.nspname <> 'pg_catalog'
    limit 1), $2)
$$;
comment on function relay.operator_for(oid, text) is 'an operator of a type, qualified where it is not the system''s';

-- relay.filter_condition(relation, column_name, operator, value) -> {"sql": "(...)", "values": [canonical texts]}
-- Operators: eq neq lt lte gt gte in like ilike is match imatch isdistinct. Values are cast to the column's type; where
-- the cast, the operator or a regular expression fails, PostgreSQL's own error is raised.
create or replace function relay.filter_condition(relation regclass, column_name text, operator text, value text[]) returns jsonb
language plpgsql stable
set search_path = ''
set standard_conforming_strings = on
set quote_all_identifiers = off as $$
declare
  col record;
  operand text;
  type_name text;
  base_type oid;
  symbol text;
  list_type text;
  canonical text[] := '{}';
  condition text;
begin
  select a.attname, a.atttypid, a.attcollation into col
  from pg_catalog.pg_attribute a
  where a.attrelid = relation and a.attname = column_name and a.attnum > 0 and not a.attisdropped;
  if not found then
    raise exception 'invalid column for filter %', column_name using errcode = 'undefined_column';
  end if;
  operand := '"' || pg_catalog.replace(col.attname, '"', '""') || '"';
  base_type := col.atttypid;
  loop
    select t.typbasetype into base_type from pg_catalog.pg_type t where t.oid = base_type and t.typtype = 'd';
    exit when not found;
    col.atttypid := base_type;
  end loop;
  base_type := col.atttypid;
  -- -1 and not null: otherwise character and bit would get a length of one.
  type_name := pg_catalog.format_type(base_type, -1);

  if operator = 'is' then
    if pg_catalog.cardinality(value) <> 1 or value[1] is null or pg_catalog.lower(value[1]) not in ('null', 'true', 'false', 'unknown') then
      raise exception 'invalid value for filter operator is' using errcode = 'invalid_parameter_value';
    end if;
    canonical := array[pg_catalog.lower(value[1])];
    condition := pg_catalog.format('(%s is %s)', operand, canonical[1]);
  else
    symbol := case operator
      when 'eq' then '=' when 'neq' then '<>' when 'lt' then '<' when 'lte' then '<=' when 'gt' then '>' when 'gte' then '>='
      when 'in' then '=' when 'isdistinct' then '=' when 'like' then '~~' when 'ilike' then '~~*' when 'match' then '~' when 'imatch' then '~*' end;
    if symbol is null then
      raise exception 'invalid filter operator %', operator using errcode = 'invalid_parameter_value';
    elsif operator <> 'in' and pg_catalog.cardinality(value) <> 1 then
      raise exception 'filter operator % takes one value', operator using errcode = 'invalid_parameter_value';
    end if;
    if operator in ('like', 'ilike', 'match', 'imatch') and relay.operator_for(base_type, symbol) = symbol then
      type_name := 'text';
    end if;
    symbol := relay.operator_for(base_type, symbol);
    if pg_catalog.array_position(value, null) is not null then
      raise exception 'a filter value cannot be null' using errcode = 'null_value_not_allowed';
    end if;
    execute pg_catalog.format('select pg_catalog.array_agg((v.one::%s)::pg_catalog.text order by v.n) from pg_catalog.unnest($1) with ordinality v (one, n)',
                              type_name) into canonical using value;
    canonical := coalesce(canonical, '{}');

    if operator = 'in' and value = '{}' then
      condition := 'false';
    elsif operator = 'in' then
      -- = any (array) is hashed and finds an index. Arrays and composite types have no such array, others separate its elements by
      -- another character than a comma: their comparisons are joined by OR.
      select pg_catalog.format_type(l.oid, -1) into list_type
      from pg_catalog.pg_type t join pg_catalog.pg_type l on l.oid = t.typarray
      where t.oid = base_type and t.typtype <> 'c' and l.typdelim = ',';
      if list_type is not null then
        condition := pg_catalog.format('%s %s any (%L::%s)', operand, symbol, value::pg_catalog.text, list_type);
      else
        select pg_catalog.string_agg(pg_catalog.format('%s %s %L::%s', operand, symbol, v.one, type_name), ' or ' order by v.n) into condition
        from pg_catalog.unnest(value) with ordinality v (one, n);
      end if;
    elsif operator = 'isdistinct' then
      condition := pg_catalog.format('not coalesce(%s %s %L::%s, false)', operand, symbol, value[1], type_name);
    else
      condition := pg_catalog.format('%s %s %L::%s', operand, symbol, value[1], type_name);
    end if;
    condition := '(' || condition || ')';
    if operator in ('match', 'imatch') then
      execute pg_catalog.format('select ''''::%s %s %L::%s', type_name, symbol, value[1], type_name);
    elsif operator in ('like', 'ilike') and type_name = 'text' then
      -- Such a pattern would raise for each row that matches up to its end: so it is refused now. The statement below finds a
      -- collation that does not support patterns.
      if (pg_catalog.length(value[1]) - pg_catalog.length(pg_catalog.rtrim(value[1], pg_catalog.chr(92)))) % 2 = 1 then
        raise exception 'LIKE pattern must not end with escape character' using errcode = 'invalid_escape_sequence';
      end if;
      execute pg_catalog.format('select ''''::pg_catalog.text collate %s %s ''''',
                                coalesce(nullif(col.attcollation, 0::oid), 'pg_catalog."default"'::pg_catalog.regcollation)::pg_catalog.regcollation, symbol);
    end if;
  end if;
  -- Finds a missing operator, without a row and without a right on the table or its schema.
  execute pg_catalog.format('select %s from (select null::%s as %s) as "relay row" where false',
                            condition, pg_catalog.format_type(base_type, -1), operand);
  return pg_catalog.jsonb_build_object('sql', condition, 'values', pg_catalog.to_jsonb(canonical));
end
$$;
comment on function relay.filter_condition(regclass, text, text, text[]) is
  'a subscription filter as an SQL condition with the column''s type, and its values in PostgreSQL''s canonical text';

-- relay.parsed_condition(relation, policy) : a condition as PostgreSQL writes it, if it reads nothing but the row and the functions of claims; else null
-- A view that does not outlive the call shows it. What the condition reads besides would have to be watched, as policies are.
create or replace function relay.parsed_condition(relation regclass, policy text) returns text
language plpgsql volatile
set search_path = ''
set standard_conforming_strings = on
set quote_all_identifiers = off as $$
declare
  name text;
  condition text;
begin
  select pg_catalog.format('%I.%I as %2$I', n.nspname, c.relname) into name
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = relation;
  execute pg_catalog.format(E'create temporary view "relay condition" as select (%s\n) as "relay condition" from %s', policy, name);
  if not exists (
    select from pg_catalog.pg_rewrite w
    join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass and d.objid = w.oid
    left join pg_catalog.pg_proc f on d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass and f.oid = d.refobjid
    left join pg_catalog.pg_namespace n on n.oid = f.pronamespace
    left join pg_catalog.pg_type t on d.refclassid = 'pg_catalog.pg_type'::pg_catalog.regclass and t.oid = d.refobjid
    where w.ev_class = 'pg_temp."relay condition"'::pg_catalog.regclass
      and not (d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.refobjid in (relation, w.ev_class))
      and not coalesce(n.nspname = 'auth' and f.proname in ('uid', 'jwt', 'role', 'email') or t.typtype = 'e', false)) then
    condition := (pg_catalog.regexp_match(pg_catalog.pg_get_viewdef('pg_temp."relay condition"'::pg_catalog.regclass, false),
                                          '^ SELECT (.*) AS "relay condition"\s+FROM [^\n]*$'))[1];
  end if;
  drop view pg_temp."relay condition";
  return condition;
exception when others then
  -- Such as a missing right to create temporary objects.
  return null;
end
$$;
comment on function relay.parsed_condition(regclass, text) is 'a condition as PostgreSQL writes it, if it reads nothing but the row and the functions of claims';

-- relay.allow(relation, policy)
-- Sets the read policy of a materialized view or foreign table: a condition as in CREATE POLICY ... USING, with every
-- name outside pg_catalog qualified by its schema. Parsed at once, so that mistakes show here. Replaces an earlier one.
create or replace function relay.allow(relation regclass, policy text) returns void
language plpgsql volatile
set search_path = ''
set standard_conforming_strings = on
set quote_all_identifiers = off as $$
declare
  kind "char" := (select c.relkind from pg_catalog.pg_class c where c.oid = relation);
  verdicts boolean[];
begin
  if kind is null then
    raise exception 'there is no such relation' using errcode = 'undefined_table';
  elsif kind not in ('m', 'f') then
    raise exception '% is not a materialized view or foreign table', relation using errcode = 'wrong_object_type',
      hint = pg_catalog.format('Use row security: alter table %s enable row level security; create policy ... on %s for select using (...)', relation, relation);
  elsif policy is null or pg_catalog.btrim(policy) = '' then
    raise exception 'a read policy is a condition' using errcode = 'invalid_parameter_value',
      hint = 'For every row: relay.allow(relation, ''true''); to leave it to the SELECT right: relay.disallow(relation).';
  end if;
  begin
    execute relay.judge_statement(relation, policy) into verdicts using '{}'::text[];
  exception when undefined_table or undefined_function or undefined_object or invalid_schema_name then
    raise exception using errcode = sqlstate, message = sqlerrm,
      hint = 'Names outside pg_catalog need their schema (public.members): the policy is evaluated with an empty search_path.';
  end;
  if verdicts <> '{}' then
    raise exception 'not a condition: %', policy using errcode = 'syntax_error';
  end if;
  delete from relay.read_policies p where not exists (select from pg_catalog.pg_class c where c.oid = p.relation);
  insert into relay.read_policies as p (relation, policy, condition)
  values (allow.relation, allow.policy, relay.parsed_condition(allow.relation, allow.policy))
  on conflict on constraint read_policies_pkey do update set policy = excluded.policy, condition = excluded.condition;
  -- No event trigger fires for a change of read policies.
  perform relay.note_rules();
  perform relay.log_change(0, null, 'S', false, null, null);
  perform relay.ring('schema', 'relay.allow');
end
$$;
comment on function relay.allow(regclass, text) is
  'read policy for a materialized view or foreign table; without one the role''s SELECT right decides';

create or replace function relay.disallow(relation regclass) returns void
language plpgsql volatile
set search_path = '' as $$
begin
  delete from relay.read_policies p where p.relation = disallow.relation;
  perform relay.note_rules();
  perform relay.log_change(0, null, 'S', false, null, null);
  perform relay.ring('schema', 'relay.disallow');
end
$$;
comment on function relay.disallow(regclass) is 'reverts relay.allow: the role''s SELECT right decides again';
