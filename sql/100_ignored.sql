-- Ignored columns: an UPDATE of a watched table that changes nothing but these is not logged.
--
-- relay.watch_list.ignored has them by number, so that a renamed column stays ignored, and one that is dropped and added again
-- is another. In a restored dump the table has another oid and its columns may have other numbers: there their names decide.

-- relay.ignored_now(relation, ignored) : relay.watch_list.ignored after changes of the table; null: no column is left
create or replace function relay.ignored_now(relation regclass, ignored jsonb) returns jsonb
language sql stable as $$
  select pg_catalog.jsonb_build_object('table', $1::oid::bigint, 'columns', pg_catalog.jsonb_object_agg(a.attnum, a.attname))
  from pg_catalog.jsonb_each_text($2 -> 'columns') c (num, name)
  join pg_catalog.pg_attribute a on a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
    and case when ($2 ->> 'table')::oid = $1 then a.attnum = c.num::int else a.attname::text = c.name end
  having pg_catalog.count(*) > 0
$$;
comment on function relay.ignored_now(regclass, jsonb) is 'ignored columns after changes of the table, as in relay.watch_list.ignored';

-- relay.ignored(id) : the ignored columns of a watched relation, by their names of now
-- Without columns that came to the key later: what identifies a row is never ignored.
create or replace function relay.ignored(id int) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select c.value from relay.watch_list w, jsonb_each_text(relay.ignored_now(w.relation, w.ignored) -> 'columns') c
    where w.id = ignored.id and c.value <> all (relay.key(w.relation))
    order by c.key::int);
end
$$;
comment on function relay.ignored(int) is 'ignored columns of a watched relation';

-- relay.ignored_of(relation, names) : these columns as in relay.watch_list.ignored; null: none
create or replace function relay.ignored_of(relation regclass, names text[]) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  columns constant text[] := array(select a.attname::text from pg_attribute a
                                   where a.attrelid = ignored_of.relation and a.attnum > 0 and not a.attisdropped order by a.attnum);
  name text;
begin
  if coalesce(names, '{}') = '{}' then
    return null;
  elsif (select c.relkind = 'm' from pg_class c where c.oid = ignored_of.relation) then
    raise exception 'materialized view % cannot ignore columns: nothing updates its rows', relation using errcode = 'wrong_object_type',
      hint = format('Leave the column out of its query, or watch it whole: select relay.watch(%L)', relation);
  end if;
  foreach name in array names loop
    if name is null or name <> all (columns) then
      raise exception '% has no column %, so it cannot be ignored', relation, coalesce(quote_ident(name), 'null') using errcode = 'undefined_column',
        hint = format('Its columns are %s: select relay.watch(%L, ignore => ''{...}'')',
                      (select string_agg(quote_ident(c), ', ') from unnest(columns) c where c <> all (relay.key(relation))), relation);
    elsif name = any (relay.key(relation)) then
      raise exception 'column % of % cannot be ignored: it belongs to the primary key, by which subscribers know the rows',
        quote_ident(name), relation using errcode = 'invalid_parameter_value',
        hint = format('Leave it out: select relay.watch(%L, ignore => %L)', relation,
                      array(select n from unnest(names) n where n <> all (relay.key(relation))));
    end if;
  end loop;
  return (select relay.ignored_now(relation, jsonb_build_object('table', 0, 'columns', jsonb_object_agg(n.place, n.name)))
          from unnest(names) with ordinality n (name, place));
end
$$;
comment on function relay.ignored_of(regclass, text[]) is 'columns to ignore, as in relay.watch_list.ignored';

-- relay.same_but(one, other, ignored) : whether two images of a table differ at most in these columns
-- False if that cannot be said: PostgreSQL takes no json apart that has \u0000.
create or replace function relay.same_but(one json, other json, ignored text[]) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp as $$
begin
  return (select string_agg(e.value::text, ',') from json_each(one) e where e.key <> all (ignored))
    is not distinct from (select string_agg(e.value::text, ',') from json_each(other) e where e.key <> all (ignored));
exception when others then
  return false;
end
$$;
comment on function relay.same_but(json, json, text[]) is 'whether two images differ at most in these columns';

-- relay.same_row(needs, ignored) : expression of a trigger function: whether `old` and `new` differ at most in these columns
-- As jsonb in a fraction of the time, unless a column is json: not each json value has a jsonb. Compared as stored, because 1.0
-- and 1.00 are equal as jsonb. A float -0 is 0 there, as for PostgreSQL's own operator.
create or replace function relay.same_row(needs text[], ignored text[]) returns text
language sql stable as $$
  select case when 'json' = any ($1)
    then pg_catalog.format('relay.same_but(pg_catalog.row_to_json(old), pg_catalog.row_to_json(new), %L::pg_catalog.text[])', $2)
    else pg_catalog.format('pg_catalog.record_image_eq(row(pg_catalog.to_jsonb(old) operator(pg_catalog.-) %1$L::pg_catalog.text[]),'
                           ' row(pg_catalog.to_jsonb(new) operator(pg_catalog.-) %1$L::pg_catalog.text[]))', $2) end
$$;
comment on function relay.same_row(text[], text[]) is 'condition of a trigger function: only ignored columns differ';

-- relay.still_named(relation, ignored) : expression of a trigger function: whether these columns still have the names of now
-- Between a rename and the renewal of the functions another column can have the name. This reads the catalog as it is, not as of
-- the snapshot of the writer, and fails for no relation or column that is gone.
create or replace function relay.still_named(relation regclass, ignored text[]) returns text
language sql stable as $$
  select pg_catalog.string_agg(pg_catalog.format(
    '(pg_catalog.pg_identify_object_as_address(%s, %s, %s)).object_names[3] operator(pg_catalog.=) %L',
    'pg_catalog.pg_class'::regclass::oid, $1::oid, a.attnum, a.attname), ' and ' order by a.attnum)
  from pg_catalog.pg_attribute a
  where a.attrelid = $1 and a.attname::text = any ($2) and a.attnum > 0 and not a.attisdropped
$$;
comment on function relay.still_named(regclass, text[]) is 'condition of a trigger function: ignored columns still have their names';
