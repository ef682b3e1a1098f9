-- Webhooks: changes of a watched table are sent to an HTTP receiver by the relay that holds the lock for it.
--
-- The functions for operators run with the rights of their caller, and are for who installed the relay: who makes a webhook has rows
-- sent away. A SECURITY DEFINER function would have to ask who calls it, and a function in an index or a trigger runs for its author in
-- the session of another, such as that of autovacuum.

-- relay.check_operator() : refuses everybody but the owner of the schema relay and its members
create or replace function relay.check_operator() returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  owner constant regrole := (select n.nspowner from pg_namespace n where n.nspname = 'relay');
begin
  if not pg_has_role(current_user, owner, 'usage') then
    raise exception 'only %, who installed the relay, may do this', owner using errcode = 'insufficient_privilege',
      hint = format('set role %s', owner);
  end if;
end
$$;
comment on function relay.check_operator() is 'refuses everybody but the owner of the schema relay';

-- relay.check_webhook_role(relation, role) : refuses a role that does not see the relation
create or replace function relay.check_webhook_role(relation regclass, role text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  schema constant oid := (select c.relnamespace from pg_class c where c.oid = relation);
  reader record;
begin
  select r.oid, r.rolname, r.rolsuper into reader from pg_roles r where r.rolname = check_webhook_role.role;
  if not found then
    raise exception 'there is no role %', coalesce(quote_ident(role), 'null') using errcode = 'undefined_object',
      hint = 'role => ''service_role'' delivers all rows; another role those that its policies show.';
  elsif reader.rolsuper then
    raise exception '% is a superuser, with whose rights nothing is delivered', quote_ident(role) using errcode = 'wrong_object_type',
      hint = 'role => ''service_role'' delivers all rows; another role those that its policies show.';
  elsif not has_schema_privilege(reader.oid, schema, 'usage') then
    raise exception '% may not use the schema of %, so nothing would be delivered', quote_ident(role), relation
      using errcode = 'object_not_in_prerequisite_state', hint = format('grant usage on schema %s to %I', schema::regnamespace, role);
  elsif not has_any_column_privilege(reader.oid, relation, 'select') then
    raise exception '% may not read %, so nothing would be delivered', quote_ident(role), relation
      using errcode = 'object_not_in_prerequisite_state', hint = format('grant select on %s to %I', relation, role);
  end if;
end
$$;
comment on function relay.check_webhook_role(regclass, text) is 'refuses a role with whose rights a webhook would deliver nothing';

-- relay.is_watched(relation) : whether a relation is watched, or a table that it is a partition of
create or replace function relay.is_watched(relation regclass) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select exists (select from relay.watch_list w where w.relation = $1 or w.relation in (select a from pg_partition_ancestors($1) a))
$$;
comment on function relay.is_watched(regclass) is 'whether a relation is watched, or a table that it is a partition of';

-- relay.check_webhook_target(relation, url, secret) : refuses addresses and secrets that no delivery could use
create or replace function relay.check_webhook_target(relation regclass, url text, secret text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on as $$
declare
  one text;
begin
  if url is null or url !~ '^https?://[^/?#@\s]+([/?][^#\s]*)?$' or url !~ '^[\x21-\x7e]+$' or length(url) > 2048 then
    raise exception 'the address of the receiver cannot be used' using errcode = 'invalid_parameter_value',
      hint = 'http:// or https://, a host without name or password, and a path are expected, such as https://pager.example/hooks/todos';
  end if;
  if not relay.is_watched(relation) then
    raise exception '% is not watched, so it has no changes to deliver', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('First: select relay.watch(%L)', relation);
  end if;
  foreach one in array string_to_array(secret, ' ') loop
    -- 24 to 64 bytes. Not decoded, because an error of decode() would quote the secret.
    if one !~ '^whsec_[A-Za-z0-9+/]{32,86}={0,2}$' or length(rtrim(substr(one, 7), '=')) % 4 = 1 then
      raise exception 'the secret cannot be used' using errcode = 'invalid_parameter_value',
        hint = 'whsec_ and the base64 of 24 to 64 random bytes are expected, or null for one that is made here. While receivers change '
          'from one to another, give both with a blank between them.';
    end if;
  end loop;
end
$$;
comment on function relay.check_webhook_target(regclass, text, text) is 'refuses addresses and secrets that cannot be used';

-- relay.check_webhook_content(relation, events, filter, columns, role, in_order) : refuses what would deliver nothing, or not in order
-- A filter of one condition is checked here, others by the relay, which knows their grammar.
create or replace function relay.check_webhook_content(relation regclass, events text[], filter text, columns text[], role text, in_order boolean)
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on as $$
declare
  key constant text[] := relay.key(relation);
  one text;
  parts text[];
begin
  if coalesce(cardinality(events), 0) = 0 or not (events <@ '{INSERT,UPDATE,DELETE}') then
    raise exception 'unknown events %', events using errcode = 'invalid_parameter_value',
      hint = 'One or more of INSERT, UPDATE and DELETE are expected, such as ''{INSERT,UPDATE}''.';
  elsif cardinality(columns) = 0 then
    raise exception 'no columns would be delivered' using errcode = 'invalid_parameter_value', hint = 'Null delivers all columns.';
  elsif in_order and key = '{}' then
    raise exception '% has no primary key, so the changes of a row cannot be told from those of others', relation
      using errcode = 'object_not_in_prerequisite_state',
      hint = format('alter table %s add primary key (...), or in_order => false to deliver in any order', relation);
  end if;
  foreach one in array coalesce(columns, '{}') || case when in_order then key else '{}' end loop
    if not exists (select from pg_attribute a
                   where a.attrelid = check_webhook_content.relation and a.attname = one and a.attnum > 0 and not a.attisdropped) then
      raise exception '% has no column %', relation, quote_ident(one) using errcode = 'undefined_column',
        hint = 'Names are written as in the catalog, without quotes.';
    elsif not has_column_privilege(role, relation, one, 'select') then
      raise exception '% may not read column % of %', quote_ident(role), quote_ident(one), relation
        using errcode = 'object_not_in_prerequisite_state', hint = format('grant select (%I) on %s to %I', one, relation, role)
          || case when one = any (key) then ': by the key, the changes of a row are kept in order' else '' end;
    end if;
  end loop;
  parts := regexp_match(filter, '^\s*([A-Za-z_]\w*)=(eq|neq|gt|gte|lt|lte|like|ilike)\.([^,()"]*)$');
  if parts is not null then
    perform relay.filter_condition(relation, parts[1], parts[2], parts[3:3]);
  end if;
end
$$;
comment on function relay.check_webhook_content(regclass, text[], text, text[], text, boolean) is 'refuses a webhook that would deliver nothing, or not in order';

-- relay.webhook(relation, url, name, events, filter, columns, role, secret, in_order, attempts, pause)
-- From now on the changes of a watched table are sent to this address. Returns the secret of the signatures. Again with the same name:
-- takes the new options, keeps the position, the secret if none is given, and what waits.
create or replace function relay.webhook(
  relation regclass, url text, name text default null, events text[] default '{INSERT,UPDATE,DELETE}', filter text default null,
  columns text[] default null, role text default 'service_role', secret text default null, in_order boolean default true,
  attempts int default 24, pause interval default '1 second') returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on as $$
declare
  hook constant text := coalesce(webhook.name, (select format('%I.%I', n.nspname, c.relname)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = webhook.relation));
  wanted constant text[] := array(select upper(e) from unnest(webhook.events) e);
  known relay.webhook_list;
  key text := webhook.secret;
begin
  perform relay.check_operator();
  if not exists (select from pg_class c where c.oid = webhook.relation) then
    raise exception 'there is no such relation' using errcode = 'undefined_table', hint = 'Name a watched table: select relay.webhook(''public.todos'', ...)';
  elsif attempts is null or attempts not between 1 and 100 or pause is null or pause <= interval '0' or pause > interval '1 hour' then
    raise exception 'attempts from 1 to 100 are expected, and a pause of at most an hour' using errcode = 'invalid_parameter_value',
      hint = 'By default there are 24 attempts. The first pause is a second, each next one is twice as long, an hour at most.';
  elsif hook !~ '^\S(.*\S)?$' or length(hook) > 200 or in_order is null then
    raise exception 'the name cannot be used' using errcode = 'invalid_parameter_value', hint = 'Up to 200 characters are expected.';
  end if;
  perform relay.check_webhook_role(relation, role);
  select w.* into known from relay.webhook_list w where w.name = hook for update;
  if known.relation <> relation then
    raise exception 'the webhook % is of %', quote_ident(hook), known.relation using errcode = 'duplicate_object',
      hint = format('Take another name, or: select relay.drop_webhook(%L)', hook);
  elsif webhook.name is null and known.url <> url then
    raise exception '% has a webhook to another address', relation using errcode = 'duplicate_object',
      hint = format('Give this one a name, or change that one: name => %L', hook);
  end if;
  key := coalesce(key, known.secret, 'whsec_' || translate(encode(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()), 'base64'), E'\n', ''));
  perform relay.check_webhook_target(relation, url, key), relay.check_webhook_content(relation, wanted, filter, columns, role, in_order);
  insert into relay.webhook_list as w (name, relation, url, events, filter, columns, role, secret, in_order, attempts, pause, made_by, version,
                                       cursor, reached_at)
  values (hook, webhook.relation, webhook.url, wanted, nullif(btrim(webhook.filter), ''), webhook.columns, webhook.role, key, webhook.in_order,
          webhook.attempts, webhook.pause, current_user, gen_random_uuid(), relay.cursor(), clock_timestamp())
  on conflict on constraint webhook_list_pkey do update
    set url = excluded.url, events = excluded.events, filter = excluded.filter, columns = excluded.columns, role = excluded.role,
        secret = excluded.secret, in_order = excluded.in_order, attempts = excluded.attempts, pause = excluded.pause,
        made_by = excluded.made_by, changes = w.changes + 1, paused_until = null, disabled = null, error = null, error_at = null;
  perform relay.ring_jobs();
  return key;
end
$$;
comment on function relay.webhook(regclass, text, text, text[], text, text[], text, text, boolean, int, interval) is
  'sends the changes of a watched table to an HTTP receiver, from now on; returns the secret of the signatures';

-- relay.lock_webhook(name) : locks a webhook for an operator, who is refused if there is none
create or replace function relay.lock_webhook(name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.check_operator();
  perform from relay.webhook_list w where w.name = lock_webhook.name for update;
  if not found then
    raise exception 'there is no webhook %', quote_ident(name) using errcode = 'undefined_object', hint = 'select name, relation, url from relay.webhooks';
  end if;
end
$$;
comment on function relay.lock_webhook(text) is 'locks a webhook for an operator';

-- relay.drop_webhook(name) : sends nothing more, and forgets what waits
create or replace function relay.drop_webhook(name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.lock_webhook(name);
  delete from relay.webhook_list w where w.name = drop_webhook.name;
  perform relay.ring_jobs();
end
$$;
comment on function relay.drop_webhook(text) is 'sends the changes of a webhook no more, and forgets those that wait';

-- relay.enable_webhook(name) : sends again, from where it was; also ends a pause that the receiver wanted
create or replace function relay.enable_webhook(name text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.lock_webhook(name);
  update relay.webhook_list w set disabled = null, paused_until = null, error = null, error_at = null, changes = w.changes + 1
  where w.name = enable_webhook.name;
  update relay.webhook_deliveries d set due = clock_timestamp() where d.webhook = enable_webhook.name and not d.is_dead;
  perform relay.ring_jobs();
end
$$;
comment on function relay.enable_webhook(text) is 'sends the changes of a webhook again, from where it was, and tries at once what waits';

-- relay.retry_dead_letters(name, id) : tries dead letters again, as if they were new; null: all; returns how many
create or replace function relay.retry_dead_letters(name text, id text default null) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  retried bigint;
begin
  perform relay.lock_webhook(name);
  update relay.webhook_deliveries d set is_dead = false, attempts = 0, due = clock_timestamp()
  where d.webhook = retry_dead_letters.name and d.is_dead and d.id = coalesce(retry_dead_letters.id, d.id);
  get diagnostics retried = row_count;
  update relay.webhook_list w set handled = w.handled + 1 where w.name = retry_dead_letters.name;
  perform relay.ring_jobs();
  return retried;
end
$$;
comment on function relay.retry_dead_letters(text, text) is 'tries dead letters of a webhook again, all or one; returns how many';

-- relay.discard_dead_letters(name, id) : forgets dead letters; null: all; returns how many
create or replace function relay.discard_dead_letters(name text, id text default null) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  discarded bigint;
begin
  perform relay.lock_webhook(name);
  delete from relay.webhook_deliveries d
  where d.webhook = discard_dead_letters.name and d.is_dead and d.id = coalesce(discard_dead_letters.id, d.id);
  get diagnostics discarded = row_count;
  update relay.webhook_list w set handled = w.handled + 1 where w.name = discard_dead_letters.name;
  perform relay.ring_jobs();
  return discarded;
end
$$;
comment on function relay.discard_dead_letters(text, text) is 'forgets dead letters of a webhook, all or one; returns how many';

-- relay.webhook_problem(relation, role) : why a webhook has no changes; null: nothing is known
create or replace function relay.webhook_problem(relation regclass, role text) returns text
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select case
    when c.oid is null then 'its table was dropped: select relay.drop_webhook(...)'
    when r.oid is null then format('there is no role %I any more: select relay.webhook(...) with another one', $2)
    when not has_schema_privilege(r.oid, c.relnamespace, 'usage') or not has_any_column_privilege(r.oid, c.oid, 'select')
      then format('%I may not read %s: grant select on it, and usage on its schema', $2, $1)
    when not relay.is_watched($1) then format('%s is not watched any more: select relay.watch(%L)', $1, $1) end
  from (values (1)) one
  left join pg_class c on c.oid = $1
  left join pg_roles r on r.rolname = $2
$$;
comment on function relay.webhook_problem(regclass, text) is 'why a webhook has no changes';

-- relay.reading_rules(relation, role) : a hash of the rights and policies by which the role reads the relation
create or replace function relay.reading_rules(relation regclass, role text) returns text
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select md5(concat_ws('|', r.oid, r.rolsuper, r.rolbypassrls,
    array(select m.oid from pg_roles m where r.oid is not null and pg_has_role(r.oid, m.oid, 'usage') order by 1)::text,
    c.oid, c.relowner, c.relrowsecurity, c.relforcerowsecurity, has_schema_privilege(r.oid, c.relnamespace, 'usage'),
    array(select concat_ws(',', a.attnum, a.attname) from pg_attribute a
          where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and has_column_privilege(r.oid, c.oid, a.attnum, 'select')
          order by a.attnum)::text,
    array(select concat_ws(',', p.polname, p.polcmd, p.polpermissive, p.polroles::text, p.polqual::text)
          from pg_policy p where p.polrelid = c.oid and p.polcmd in ('r', '*') order by p.polname)::text))
  from (values (1)) one
  left join pg_roles r on r.rolname = $2
  left join pg_class c on c.oid = $1
$$;
comment on function relay.reading_rules(regclass, text) is 'hash of the rights and policies by which a role reads a relation';

-- relay.webhook_rules(reading, hook) : the same hash, with what the webhook itself leaves out, and where it sends to
create or replace function relay.webhook_rules(reading text, hook relay.webhook_list) returns text
language sql immutable
set search_path = pg_catalog, pg_temp as $$
  select md5(concat_ws('|', $1, ($2).role, ($2).url, ($2).filter, ($2).columns::text, ($2).events::text))
$$;
comment on function relay.webhook_rules(text, relay.webhook_list) is 'hash of what decides which changes a webhook sends, and where to';

-- relay.webhook_work() : the webhooks as the relay delivers them; schema and table are null if the relation was dropped
drop function if exists relay.webhook_work();
create or replace function relay.webhook_work()
returns table (name text, version text, schema_name text, table_name text, key text[], url text, events text[], filter text, columns text[], role text,
               secret text, in_order boolean, attempts int, pause float8, cursor text, paused float8, handled bigint, changes int, problem text, rules text)
language sql stable security definer
set search_path = pg_catalog, pg_temp as $$
  select w.name, w.version::text, n.nspname::text, c.relname::text, relay.key(c.oid), w.url, w.events, w.filter, w.columns, w.role, w.secret, w.in_order,
         w.attempts, extract(epoch from w.pause)::float8, w.cursor,
         greatest(extract(epoch from w.paused_until - clock_timestamp())::float8, 0), w.handled, w.changes, relay.webhook_problem(w.relation, w.role),
         relay.webhook_rules(r.rules, w)
  from relay.webhook_list w
  -- Once for all webhooks of a table and role.
  join (select k.relation, k.role, relay.reading_rules(k.relation, k.role) as rules
        from (select distinct l.relation, l.role from relay.webhook_list l) k) r on r.relation = w.relation and r.role = w.role
  left join pg_class c on c.oid = w.relation
  left join pg_namespace n on n.oid = c.relnamespace
  where w.disabled is null
  order by w.name
$$;
comment on function relay.webhook_work() is 'webhooks that are enabled, as the relay delivers them';

-- relay.webhook_held(name) : deliveries that wait, in their order; and the number and bytes of dead letters, in a row without id
create or replace function relay.webhook_held(name text)
returns table (id text, keys bigint[], is_gap boolean, attempts int, due float8, bytes bigint)
language sql stable security definer
set search_path = pg_catalog, pg_temp as $$
  select h.id, h.keys, h.is_gap, h.attempts, h.due, h.bytes
  from (select d.place, d.id, d.keys, d.is_gap, d.attempts, greatest(extract(epoch from d.due - clock_timestamp())::float8, 0) as due,
               octet_length(d.body)::bigint as bytes
        from relay.webhook_deliveries d where d.webhook = $1 and not d.is_dead
        union all
        select 0, null, null, false, count(*)::int, 0, coalesce(sum(octet_length(d.body)), 0)::bigint
        from relay.webhook_deliveries d where d.webhook = $1 and d.is_dead) h
  order by h.place
$$;
comment on function relay.webhook_held(text) is 'deliveries of a webhook that wait, and the number of its dead letters';

-- relay.webhook_body(name, id) : the body of a delivery that waits; null: there is none
-- What was read by other rights, policies or options than there are now is not sent any more: the body tells a gap instead.
create or replace function relay.webhook_body(name text, id text) returns text
language sql stable security definer
set search_path = pg_catalog, pg_temp as $$
  select case when d.is_gap or d.rules = relay.webhook_rules(relay.reading_rules(w.relation, w.role), w) then d.body
    else json_build_object('schema', n.nspname, 'table', c.relname, 'type', 'GAP', 'cursor', w.cursor, 'errors', json_build_array(
      'rights, policies or the webhook were changed after this change was read, read its rows again'))::text end
  from relay.webhook_deliveries d
  join relay.webhook_list w on w.name = d.webhook
  left join pg_class c on c.oid = w.relation
  left join pg_namespace n on n.oid = c.relnamespace
  where d.webhook = $1 and d.id = $2 and not d.is_dead
$$;
comment on function relay.webhook_body(text, text) is 'body of a delivery that waits';

-- relay.webhook_settle(name, version, changes, work) : writes what the relay has done, all or nothing; false: the webhook was dropped
-- work: {"rules" (by which new deliveries were read), "cursor", "reached" (its time), "delivered" (count), "gone": [ids], "held": [deliveries in their order, with a body if they are
-- new], "error", "pause" (seconds), "disabled"}. What the receiver wants counts only if no operator has changed the webhook meanwhile.
create or replace function relay.webhook_settle(name text, version text, changes int, work json) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  problem text := work ->> 'error';
  known relay.webhook_list;
begin
  select w.* into known from relay.webhook_list w
  where w.name = webhook_settle.name and w.version = webhook_settle.version::uuid for no key update;
  if not found then
    return false;
  end if;
  delete from relay.webhook_deliveries d
  where d.webhook = webhook_settle.name and d.id in (select json_array_elements_text(work -> 'gone'));
  insert into relay.webhook_deliveries (webhook, id, keys, is_gap, rules, body, attempts, due, error, failed_at, is_dead)
  select $1, h.id, h.keys, h.is_gap, work ->> 'rules', h.body, h.attempts, clock_timestamp() + make_interval(secs => h.pause), h.error,
         case when h.error is not null then clock_timestamp() end, h.is_dead
  from rows from (json_to_recordset(work -> 'held')
    as (id text, keys bigint[], is_gap boolean, body text, attempts int, pause float8, error text, is_dead boolean)) with ordinality
    as h (id, keys, is_gap, body, attempts, pause, error, is_dead, n)
  where h.body is not null
  order by h.n
  on conflict do nothing;
  update relay.webhook_deliveries d
  set attempts = h.attempts, due = clock_timestamp() + make_interval(secs => h.pause), error = h.error, failed_at = clock_timestamp(),
      is_dead = h.is_dead
  from json_to_recordset(work -> 'held') as h (id text, body text, attempts int, pause float8, error text, is_dead boolean)
  where d.webhook = webhook_settle.name and d.id = h.id and h.body is null and not d.is_dead;
  -- A relay that has taken over does not know why deliveries wait.
  if known.changes <> webhook_settle.changes or problem is null and exists (
       select from relay.webhook_deliveries d where d.webhook = webhook_settle.name and not d.is_dead) then
    problem := known.error;
  end if;
  update relay.webhook_list w
  set cursor = coalesce(work ->> 'cursor', w.cursor),
      reached_at = greatest(w.reached_at, (work ->> 'reached')::timestamptz),
      delivered = w.delivered + (work ->> 'delivered')::bigint,
      paused_until = case when known.changes = webhook_settle.changes
                          then coalesce(clock_timestamp() + make_interval(secs => (work ->> 'pause')::float8), w.paused_until) end,
      disabled = case when known.changes = webhook_settle.changes then work ->> 'disabled' else w.disabled end,
      error = problem,
      error_at = case when problem is null then null when w.error = problem then w.error_at else clock_timestamp() end
  where w.name = webhook_settle.name;
  return true;
end
$$;
comment on function relay.webhook_settle(text, text, int, json) is 'writes what the relay has delivered, and what waits';

create or replace view relay.webhooks as
select w.name, w.relation, w.url, w.events, w.filter, w.columns, w.role, w.in_order,
       case when c.oid is null then 'dropped'
            when w.disabled is not null then 'disabled'
            when w.paused_until > pg_catalog.clock_timestamp() then 'paused'
            when w.error is not null then 'failing'
            else 'delivering' end as state,
       pg_catalog.clock_timestamp() - w.reached_at as lag,
       w.delivered,
       d.waiting,
       d.dead_letters,
       coalesce(w.disabled, w.error) as error,
       w.error_at,
       case when w.disabled is null then greatest(d.next_try, w.paused_until) end as next_try,
       w.attempts, w.pause, w.cursor, w.made_by
from relay.webhook_list w
left join pg_catalog.pg_class c on c.oid = w.relation
cross join lateral (
  select pg_catalog.count(*) filter (where not d.is_dead) as waiting,
         pg_catalog.count(*) filter (where d.is_dead) as dead_letters,
         pg_catalog.min(d.due) filter (where not d.is_dead) as next_try
  from relay.webhook_deliveries d where d.webhook = w.name) d;
comment on view relay.webhooks is
  'webhooks: what they deliver, how far they are behind, what waits after a failure, the last error, when it is tried next, and dead letters';

create or replace view relay.dead_letters as
select d.webhook, d.id, d.attempts, d.error, d.failed_at, d.body
from relay.webhook_deliveries d
where d.is_dead
order by d.webhook, d.place;
comment on view relay.dead_letters is 'deliveries that failed too often; relay.retry_dead_letters tries them again, relay.discard_dead_letters forgets them';
