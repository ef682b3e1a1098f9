-- relay.watch_query: a query whose results are followed like a table.

-- relay.watch_query(name, query, key, policy, at_most_every, readers) : the materialized view that it made
-- Makes the view, its unique index on the key columns, grants SELECT on it to the readers alone, and has it watched, shown by the policy
-- (as in relay.allow) and refreshed on change. A mistake leaves nothing behind. Runs with the rights of the caller, and the query under the
-- caller's search path: PostgreSQL parses it, first as a cursor, which is one query and nothing else.
create or replace function relay.watch_query(name text, query text, key text[], policy text, at_most_every interval default '1 second',
                                             readers text[] default '{authenticated}') returns regclass
language plpgsql volatile as $$
declare
  parts constant text[] := pg_catalog.parse_ident(name);
  schema constant text := coalesce(parts[pg_catalog.cardinality(parts) - 1], pg_catalog.current_schema());
  title constant text := pg_catalog.format('%I.%I', schema, parts[pg_catalog.cardinality(parts)]);
  probe refcursor;
  role text;
begin
  if policy is null or pg_catalog.btrim(policy) = '' then
    raise exception 'a policy is required' using errcode = 'invalid_parameter_value',
      hint = 'A condition on the rows of the query, such as (auth.jwt() ->> ''admin'')::boolean or user_id = auth.uid(); true shows them to all readers.';
  elsif key is null or pg_catalog.cardinality(key) = 0 or pg_catalog.array_position(key, null) is not null then
    raise exception 'a key is required' using errcode = 'invalid_parameter_value',
      hint = 'The columns of the result that tell its rows apart, such as array[''user_id'', ''day''].';
  elsif pg_catalog.cardinality(parts) > 2 or schema is null then
    raise exception '% is not the name of a view', name using errcode = 'invalid_name', hint = 'Give a schema and a name: public.totals';
  elsif pg_catalog.to_regclass(title) is not null then
    raise exception '% exists already', title using errcode = 'duplicate_table',
      hint = pg_catalog.format('To replace what relay.watch_query made: select relay.unwatch_query(%L). Else choose another name.', title);
  end if;
  open probe for execute query;
  close probe;
  execute pg_catalog.format('create materialized view %s as %s', title, query);
  execute pg_catalog.format('create unique index on %s (%s)', title,
    (select pg_catalog.string_agg(pg_catalog.quote_ident(k), ', ' order by n) from pg_catalog.unnest(key) with ordinality u (k, n)));
  -- Default privileges may have granted more.
  execute pg_catalog.format('revoke all on %s from public', title);
  foreach role in array array['anon', 'authenticated', 'service_role'] loop
    execute pg_catalog.format('revoke all on %s from %I', title, role);
  end loop;
  foreach role in array readers loop
    execute pg_catalog.format('grant select on %s to %I', title, role);
  end loop;
  -- The policy first: there is no moment in which all rows are shown.
  perform relay.allow(title::regclass, policy);
  perform relay.watch(title::regclass);
  perform relay.refresh_on_change(title::regclass, at_most_every);
  return title::regclass;
end
$$;
comment on function relay.watch_query(text, text, text[], text, interval, text[]) is
  'makes a query a materialized view that is watched, shown by a policy and refreshed on change';

-- relay.unwatch_query(relation) : reverts relay.watch_query, and drops the view
create or replace function relay.unwatch_query(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.check_view(relation);
  perform relay.refresh_stop(relation), relay.unwatch(relation), relay.disallow(relation);
  execute format('drop materialized view %s', relation);
end
$$;
comment on function relay.unwatch_query(regclass) is 'reverts relay.watch_query, and drops the view';
