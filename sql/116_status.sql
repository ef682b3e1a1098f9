-- Status: relays write who is online into a table of the user's own.
--
-- The statements on that table run as its owner, by relay.status_run(): its triggers, defaults and policies get no right that the
-- owner has not. Rows are locked in the order of their keys, and rows that another transaction holds are left for later: the
-- status waits for no other transaction.

-- relay.status_problems() : what keeps the status from being written, as text
create or replace function relay.status_problems() returns setof text
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  t relay.status_table;
  kind "char";
  owner oid;
  remedy constant text := 'select relay.status_on(...) with the columns that it has, or relay.status_off()';
begin
  select * into t from relay.status_table;
  if not found then
    return;
  end if;
  select c.relkind, c.relowner into kind, owner from pg_class c where c.oid = t.relation;
  if not found then
    return next 'the status table was dropped: select relay.status_on(...) for another one, or relay.status_off()';
    return;
  elsif kind not in ('r', 'p') then
    return next format('%s is no table, so no status can be written to it', t.relation);
    return;
  end if;
  return query
    select case when a.attname is null
             then format('the status table %s has no column %I for %s: %s', t.relation, c.name, c.purpose, remedy)
             else format('column %I of the status table %s is of type %s, and must be %s: %s', c.name, t.relation,
                         format_type(a.atttypid, a.atttypmod), array_to_string(c.types, ' or '), remedy) end
    from (values (1, t.user_column, 'the user', '{uuid,text,varchar,int8,int4,int2}'::regtype[]),
                 (2, t.online_column, 'whether the user is online', '{bool}'),
                 (3, t.active_column, 'the last activity', '{timestamptz}'),
                 (4, t.seen_column, 'when the user went offline', '{timestamptz}'),
                 (5, t.anonymous_column, 'whether the user is anonymous', '{bool}')) c (place, name, purpose, types)
    left join pg_attribute a on a.attrelid = t.relation and a.attname = c.name and a.attnum > 0 and not a.attisdropped
    where c.name is not null and (a.attname is null or a.atttypid <> all (c.types::oid[]))
    order by c.place;
  return query
    select format('the status table %s has no unique index on %I alone, so a user could have several rows: create unique index on %s (%I)',
                  t.relation, a.attname, t.relation, a.attname)
    from pg_attribute a
    where a.attrelid = t.relation and a.attname = t.user_column and not a.attisdropped
      and not exists (select from pg_index i
                      where i.indrelid = t.relation and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
                        and i.indnkeyatts = 1 and i.indkey[0] = a.attnum);
  return query
    select format('the statements on the status table %s do not run as its owner, who has changed: %s', t.relation,
                  'select relay.status_on(...) for it again')
    where not exists (select from pg_proc p
                      where p.oid = to_regprocedure('relay.status_run(text, text[], boolean[], timestamptz[], boolean[])')
                        and p.proowner = owner and p.prosecdef);
  return query
    select format('trigger %I of the status table %s can be deferred, and would then run with the rights of the relay''s login: drop it',
                  g.tgname, g.tgrelid::regclass)
    from pg_trigger g
    where g.tgdeferrable and not g.tgisinternal
      and (g.tgrelid = t.relation or g.tgrelid in (select p.relid from pg_partition_tree(t.relation) p));
end
$$;
comment on function relay.status_problems() is 'what keeps the status from being written, and what to do';

-- relay.set_status_owner(relation) : makes relay.status_run(), which runs a statement as the owner of the status table
-- The owner can alter the function, and could make it run as its caller. The check inside is therefore written with qualified names
-- only, and the text of the function can be replaced by those alone who may create objects in the schema.
create or replace function relay.set_status_owner(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  signature constant text := 'relay.status_run(text, text[], boolean[], timestamptz[], boolean[])';
  owner constant regrole := (select c.relowner from pg_class c where c.oid = relation);
begin
  execute format('drop function if exists %s', signature);
  execute format($function$
    create function relay.status_run(statement text, users text[], online boolean[], active timestamptz[], anonymous boolean[])
    returns setof text language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $body$
    begin
      if (select r.rolname operator(pg_catalog.=) current_user from pg_catalog.pg_class c, pg_catalog.pg_roles r
          where r.oid operator(pg_catalog.=) c.relowner and c.oid operator(pg_catalog.=) %s::pg_catalog.oid) is not true then
        raise exception 'the owner of the status table has changed' using hint = 'select relay.status_on(...) for it again';
      end if;
      return query execute statement using users, online, active, anonymous;
    end
    $body$ $function$, relation::oid);
  execute format('comment on function %s is ''runs a statement on the status table as its owner''', signature);
  execute format('revoke all on function %s from public', signature);
  execute format('grant execute on function %s to %I', signature, current_user);
  if owner <> (select r.oid from pg_roles r where r.rolname = current_user) then
    execute format('grant create on schema relay to %s', owner);
    execute format('grant usage on schema relay to %s', owner);
    execute format('alter function %s owner to %s', signature, owner);
    execute format('revoke create on schema relay from %s', owner);
  end if;
end
$$;
comment on function relay.set_status_owner(regclass) is 'makes the function that runs statements as the owner of the status table';

-- relay.status_on(relation, user_column, online_column, active_column, seen_column, anonymous_column)
-- From now on relays write to these columns who is online. Null: the table has no such column.
-- A user without a row gets one if the table's other columns have defaults; otherwise users without a row stay without.
create or replace function relay.status_on(
  relation regclass, user_column text default 'userId', online_column text default 'isOnline',
  active_column text default 'lastActiveAt', seen_column text default 'lastSeen', anonymous_column text default null) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  owner name;
  problem text;
  required text;
begin
  if user_column is null or online_column is null then
    raise exception 'the columns of the user and of whether they are online are needed' using errcode = 'invalid_parameter_value',
      hint = 'select relay.status_on(''user_status'', ''userId'', ''isOnline'')';
  end if;
  -- All relays begin anew, and tell the table who is connected to them.
  delete from relay.status_connected;
  delete from relay.status_relays;
  insert into relay.status_table as t (relation, user_column, online_column, active_column, seen_column, anonymous_column)
  values ($1, $2, $3, $4, $5, $6)
  on conflict on constraint status_table_pkey do update
    set relation = excluded.relation, user_column = excluded.user_column, online_column = excluded.online_column,
        active_column = excluded.active_column, seen_column = excluded.seen_column, anonymous_column = excluded.anonymous_column;
  perform relay.set_status_owner(status_on.relation);
  select r.rolname into strict owner from pg_class c join pg_roles r on r.oid = c.relowner where c.oid = status_on.relation;
  if owner <> current_user then
    raise notice 'deferred triggers of %, and what else its owner % defers to the end of a transaction, run with the rights of the relay''s login before PostgreSQL 18: only for an owner whom you trust with them',
      relation, owner;
  end if;
  for problem in select p from relay.status_problems() p loop
    raise exception '%', split_part(problem, ': ', 1) using errcode = 'object_not_in_prerequisite_state',
      hint = substr(problem, length(split_part(problem, ': ', 1)) + 3);
  end loop;
  select string_agg(quote_ident(c), ', ') into required from relay.status_required() c;
  if required is not null then
    raise notice 'users without a row in % stay without, because these columns have no default: %', relation, required;
  end if;
  if active_column is not null and not exists (
    select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = status_on.relation and a.attname = active_column) then
    raise notice 'relays look for silent users every few seconds: create index on % (%) where %', relation, quote_ident(active_column),
      quote_ident(online_column);
  end if;
  perform pg_notify('relay', '{"status":true}');
end
$$;
comment on function relay.status_on(regclass, text, text, text, text, text) is 'relays write to this table who is online';

-- relay.status_off() : relays write no status any more; the rows stay as they are
create or replace function relay.status_off() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
begin
  delete from relay.status_table;
  delete from relay.status_connected;
  delete from relay.status_relays;
  drop function if exists relay.status_run(text, text[], boolean[], timestamptz[], boolean[]);
  perform pg_notify('relay', '{"status":true}');
end
$$;
comment on function relay.status_off() is 'relays write no status any more; the rows stay as they are';

-- relay.status_required() : columns of the status table that a new row needs and the status does not fill
create or replace function relay.status_required() returns setof name
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select a.attname from relay.status_table t join pg_attribute a on a.attrelid = t.relation
  where a.attnum > 0 and not a.attisdropped and a.attnotnull and not a.atthasdef and a.attidentity = ''
    and a.attname <> all (array_remove(array[t.user_column, t.online_column, t.active_column, t.anonymous_column], null)::name[])
  order by a.attnum
$$;
comment on function relay.status_required() is 'columns without default that keep users without a row from getting one';

-- relay.status_target() : the status table, with its names quoted and the type of its users; fails if it cannot be written
create or replace function relay.status_target(out name text, out who text, out kind text, out online text, out active text, out seen text,
                                               out anonymous text, out takes_new boolean)
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  problem text;
begin
  select p into problem from relay.status_problems() p limit 1;
  if found then
    raise exception '%', problem using errcode = 'object_not_in_prerequisite_state';
  end if;
  -- Without its modifier, so that the value of a token is never cut to the value of another user.
  select t.relation::text, quote_ident(t.user_column), a.atttypid::regtype::text, quote_ident(t.online_column), quote_ident(t.active_column),
         quote_ident(t.seen_column), quote_ident(t.anonymous_column), not exists (select from relay.status_required())
  into name, who, kind, online, active, seen, anonymous, takes_new
  from relay.status_table t join pg_attribute a on a.attrelid = t.relation and a.attname = t.user_column;
  if not found then
    raise exception 'there is no status table' using errcode = 'no_data_found';
  end if;
end
$$;
comment on function relay.status_target() is 'the status table and its columns; fails if it cannot be written';

-- relay.status_take(users) : locks the rows of these users in the order of their keys
-- `taken` are the locked ones, `missing` those that have no row. Other users are held by another transaction.
create or replace function relay.status_take(users text[], out taken text[], out missing text[])
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
  existing text[];
begin
  t := relay.status_target();
  taken := array(select r from relay.status_run(
    format('select s.%1$s::text from %2$s s where s.%1$s = any ($1::%3$s[]) order by s.%1$s for update skip locked', t.who, t.name, t.kind),
    users, null, null, null) r);
  missing := '{}';
  if cardinality(taken) < cardinality(users) then
    existing := array(select r from relay.status_run(
      format('select s.%1$s::text from %2$s s where s.%1$s = any ($1::%3$s[])', t.who, t.name, t.kind), users, null, null, null) r);
    missing := array(select u from unnest(users) u except select u from unnest(existing) u except select u from unnest(taken) u);
  end if;
end
$$;
comment on function relay.status_take(text[]) is 'locks the rows of users in the order of their keys; leaves those that are held';

-- relay.status_put(relay, users, here, online, anonymous, ages) : writes the status of users, all or none
-- here: connected at this relay. online: here, or active by a request. ages: seconds since the last activity.
-- Returns those whose row another transaction holds: nothing was written for them.
create or replace function relay.status_put(relay uuid, users text[], here boolean[], online boolean[], anonymous boolean[], ages float8[])
returns setof text
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
  locked record;
  named text[];
  who text[];
  present boolean[];
  active timestamptz[];
  unnamed boolean[];
begin
  t := relay.status_target();
  -- As the column writes them: relay.status_connected has them so, too.
  named := array(select v.r from relay.status_run(
    format('select u::text from unnest($1::%s[]) with ordinality v (u, n) order by n', t.kind), users, null, null, null)
    with ordinality v (r, n) order by v.n);
  locked := relay.status_take(named);
  delete from relay.status_connected c using unnest(named, here) v (u, h)
  where c.user_id = v.u and c.relay = $1 and not v.h and v.u = any (locked.taken || locked.missing);
  insert into relay.status_connected (user_id, relay)
  select v.u, $1 from unnest(named, here) v (u, h) where v.h and v.u = any (locked.taken || locked.missing)
  on conflict do nothing;
  -- Read after the locks: who ends the last other connection of a user locks the same row before.
  select array_agg(v.u), array_agg(v.o or exists (select from relay.status_connected c where c.user_id = v.u)),
         array_agg(clock_timestamp() - make_interval(secs => v.age)), array_agg(v.a)
  into who, present, active, unnamed
  from unnest(named, online, anonymous, ages) v (u, o, a, age) where v.u = any (locked.taken || locked.missing);
  perform relay.status_write_rows(who, present, active);
  if t.takes_new and locked.missing <> '{}' then
    perform from relay.status_run(
      format('insert into %s (%s) select %s from unnest($1::%s[], $2, $3, $4) v (who, online, active, anonymous)
              where v.online order by v.who on conflict do nothing returning null::text', t.name,
             concat_ws(', ', t.who, t.online, t.active, t.anonymous),
             concat_ws(', ', 'v.who', 'v.online', case when t.active is not null then 'v.active' end,
                       case when t.anonymous is not null then 'v.anonymous' end), t.kind),
      who, present, active, unnamed);
  end if;
  return query select v.raw from unnest(users, named) v (raw, u) where v.u <> all (locked.taken || locked.missing);
end
$$;
comment on function relay.status_put(uuid, text[], boolean[], boolean[], boolean[], float8[]) is 'writes the status of users, all or none; returns those whose row is held';

-- relay.status_write_rows(users, online, active) : updates the rows of these users, which the caller has locked
-- Who is offline already is not written again. A time of activity never goes back.
create or replace function relay.status_write_rows(users text[], online boolean[], active timestamptz[]) returns setof text
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
  columns text;
begin
  t := relay.status_target();
  columns := concat_ws(', ', t.online || ' = v.online',
    case when t.active is not null then format('%1$s = greatest(s.%1$s, v.active)', t.active) end,
    case when t.seen is not null then format('%1$s = case when v.online then s.%1$s else v.active end', t.seen) end);
  return query select r from relay.status_run(
    format('update %s s set %s from unnest($1::%s[], $2, $3) v (who, online, active)
            where s.%s = v.who and (s.%s is distinct from v.online%s) returning s.%s::text',
           t.name, columns, t.kind, t.who, t.online, case when t.active is not null then ' or v.online' end, t.who),
    users, online, active, null) r;
end
$$;
comment on function relay.status_write_rows(text[], boolean[], timestamptz[]) is 'updates the rows of users that the caller has locked';

-- relay.status_write(relay, users, here, online, anonymous, ages) : writes the status of users, as relay.status_put()
-- Returns those that were not written: `why` is null if another transaction holds the row, else the error's code. A value that the
-- table refuses keeps no other user from being written.
create or replace function relay.status_write(relay text, users text[], here boolean[], online boolean[], anonymous boolean[], ages float8[])
returns table (who text, why text)
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  writer constant uuid := $1;
begin
  -- Locked, so that no sweep takes the relay for dead meanwhile.
  perform from relay.status_relays r where r.id = writer for key share;
  if not found then
    raise exception 'this relay was taken for dead' using errcode = 'no_data_found';
  end if;
  begin
    return query select u, null::text from relay.status_put(writer, users, here, online, anonymous, ages) u;
    return;
  exception when others then
    if not relay.is_of_a_row(sqlstate) then
      raise;
    end if;
  end;
  for n in 1..cardinality(users) loop
    begin
      return query select u, null::text
        from relay.status_put(writer, users[n:n], here[n:n], online[n:n], anonymous[n:n], ages[n:n]) u;
    exception when others then
      if not relay.is_of_a_row(sqlstate) then
        raise;
      end if;
      who := users[n];
      why := sqlstate;
      return next;
    end;
  end loop;
end
$$;
comment on function relay.status_write(text, text[], boolean[], boolean[], boolean[], float8[]) is 'writes the status of users; returns those that were not written';

-- relay.is_of_a_row(code) : whether an error comes from the values of a row, and not from the table or the server
create or replace function relay.is_of_a_row(code text) returns boolean
language sql immutable parallel safe
return pg_catalog.left(code, 2) = any ('{21,22,23,44,P0}') and code <> 'P0002';
comment on function relay.is_of_a_row(text) is 'whether an error comes from the values of a row';

-- relay.status_begin() : the id of a relay that begins to write the status; null: there is no status table
create or replace function relay.status_begin() returns text
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  insert into relay.status_relays (id) select gen_random_uuid() from relay.status_table returning id::text
$$;
comment on function relay.status_begin() is 'id of a relay that begins to write the status';

-- relay.status_beat(relay) : whether the relay is known; it was seen now
create or replace function relay.status_beat(relay text) returns boolean
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  with beat as (update relay.status_relays set seen = clock_timestamp() where id = $1::uuid returning 1)
  select exists (select from beat)
$$;
comment on function relay.status_beat(text) is 'a relay says that it lives; false if it was taken for dead';

-- relay.status_end(relay) : the relay ends, and may be taken for dead at once
create or replace function relay.status_end(relay text) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  update relay.status_relays set seen = '-infinity' where id = $1::uuid
$$;
comment on function relay.status_end(text) is 'a relay ends';

-- relay.status_sweep(lease, silence, most) : sets users offline, at most so many; returns their number; null: another session sweeps
-- Who: users of relays that were not seen for `lease`, if they are connected nowhere else; users without connection whose last
-- activity is older than `silence`. Rows that another transaction holds are left for the next sweep.
create or replace function relay.status_sweep(lease float8, silence float8, most int default 1000) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
  locked record;
  started constant timestamptz := clock_timestamp();
  dead constant timestamptz := started - make_interval(secs => lease);
  candidates text[];
  silent text[] := '{}';
  swept bigint;
begin
  if not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('status')) then
    return null;
  end if;
  t := relay.status_target();
  candidates := array(
    select c.user_id from relay.status_connected c left join relay.status_relays r on r.id = c.relay
    where r.seen is null or r.seen < dead group by 1 order by 1 limit most);
  if t.active is not null then
    silent := array(
      select u from relay.status_run(
        format('select s.%1$s::text from %2$s s where s.%3$s and (s.%4$s < ($3)[1] or s.%4$s is null)', t.who, t.name, t.online, t.active),
        null, null, array[started - make_interval(secs => silence)], null) u
      where not exists (select from relay.status_connected c where c.user_id = u)
      order by 1 limit most);
  end if;
  candidates := array(select unnest(candidates) union select unnest(silent));
  locked := relay.status_take(candidates);
  delete from relay.status_connected c
  where c.user_id = any (locked.taken || locked.missing)
    and not exists (select from relay.status_relays r where r.id = c.relay and r.seen >= dead);
  candidates := array(select u from unnest(locked.taken) u where not exists (select from relay.status_connected c where c.user_id = u));
  -- Later activity was written by a living relay, and is no silence.
  select count(*) into swept from relay.status_set_offline(candidates, greatest(dead, started - make_interval(secs => silence)));
  delete from relay.status_relays r where r.seen < dead and not exists (select from relay.status_connected c where c.relay = r.id);
  update relay.status_table set swept_at = clock_timestamp(), sweep_took = clock_timestamp() - started, set_offline = set_offline + swept;
  return swept;
end
$$;
comment on function relay.status_sweep(float8, float8, int) is 'sets users of dead relays and silent users offline, by one session at a time';

-- relay.status_set_offline(users, before) : sets users offline, whose rows the caller has locked; they were last seen when they were last active
-- before: not those who were active at or after this time; null: all.
create or replace function relay.status_set_offline(users text[], before timestamptz default null) returns setof text
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
begin
  t := relay.status_target();
  return query select r from relay.status_run(
    format('update %s s set %s where s.%s = any ($1::%s[]) and s.%s%s returning s.%s::text', t.name,
           concat_ws(', ', t.online || ' = false', case when t.seen is not null then
             format('%s = %s', t.seen, coalesce('s.' || t.active, 'pg_catalog.clock_timestamp()')) end),
           t.who, t.kind, t.online,
           case when t.active is not null then format(' and (($3)[1] is null or s.%1$s is null or s.%1$s < ($3)[1])', t.active) end, t.who),
    users, null, array[before], null) r;
end
$$;
comment on function relay.status_set_offline(text[], timestamptz) is 'sets users offline whose rows the caller has locked';

-- relay.status_set(who, is_online) : sets the status of a user, whether they are connected or not; false: there is no such row
create or replace function relay.status_set(who text, is_online boolean) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
begin
  t := relay.status_target();
  perform from relay.status_run(format('select null::text from %1$s s where s.%2$s = any ($1::%3$s[]) for update', t.name, t.who, t.kind),
                                array[who], null, null, null);
  if not found then
    return false;
  end if;
  perform relay.status_write_rows(array[who], array[is_online], array[clock_timestamp()]);
  return true;
end
$$;
comment on function relay.status_set(text, boolean) is 'sets the status of a user';

-- relay.status_stats(lease) : users and sweeps as JSON; null: there is no status table
create or replace function relay.status_stats(lease float8) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
declare
  t record;
  counts text[];
begin
  if not exists (select from relay.status_table) then
    return null;
  end if;
  t := relay.status_target();
  counts := array(select r from relay.status_run(
    format('select unnest(array[count(*) filter (where s.%s), count(*)])::text from %s s', t.online, t.name), null, null, null, null) r);
  return (
    select json_build_object(
      'maintenanceActive', coalesce(s.swept_at > clock_timestamp() - make_interval(secs => 2 * lease), false),
      'onlineUsers', counts[1]::bigint, 'totalUsers', counts[2]::bigint,
      'lastSweepAt', s.swept_at, 'lastSweepMs', round(extract(epoch from s.sweep_took) * 1000, 1), 'setOffline', s.set_offline,
      'relays', (select count(*) from relay.status_relays r where r.seen > clock_timestamp() - make_interval(secs => lease)))::text
    from relay.status_table s);
end
$$;
comment on function relay.status_stats(float8) is 'users and sweeps as JSON';

-- After an update of the relay.
do $$
begin
  perform relay.set_status_owner(t.relation) from relay.status_table t join pg_catalog.pg_class c on c.oid = t.relation;
exception when insufficient_privilege then
  -- The installer is no member of the owner's role: relay doctor says what to do.
  null;
end
$$;
