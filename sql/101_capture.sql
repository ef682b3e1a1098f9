-- The trigger functions: the one place where a writer logs a change and rings the doorbell.
--
-- Only the functions that others call pin settings. Those below them are called from nowhere else and run under what
-- their caller has pinned: pinning again would cost every row again.

-- relay.key(relation) : the key columns in key order, {} without one
-- A table's key is its primary key. A materialized view has none, so there it is the unique index that
-- REFRESH ... CONCURRENTLY needs: on plain columns, without a condition; the narrowest, then the oldest.
create or replace function relay.key(relation regclass) returns text[]
language sql stable as $$
  select coalesce((
    select (select pg_catalog.array_agg(a.attname::text order by k.place)
            from pg_catalog.unnest(i.indkey::int2[]) with ordinality k (attnum, place)
            join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
            where k.place <= i.indnkeyatts)
    from pg_catalog.pg_index i
    join pg_catalog.pg_class c on c.oid = i.indrelid
    where i.indrelid = $1
      and case when c.relkind = 'm'
            then i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null
            else i.indisprimary end
    order by i.indnkeyatts, i.indexrelid
    limit 1), '{}')
$$;
comment on function relay.key(regclass) is 'key columns of a relation: primary key, or unique index of a materialized view';

-- relay.log_change(...) : writes one change into the current segment
create or replace function relay.log_change(relation int, operation "char", oversize boolean, before json, after json) returns void
language plpgsql volatile as $$
begin
  if relay.current_segment() = 0 then
    insert into relay.changes_0 (number, xid, at, relation, operation, oversize, before, after)
    values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relation, operation, oversize, before, after);
  elsif relay.current_segment() = 1 then
    insert into relay.changes_1 (number, xid, at, relation, operation, oversize, before, after)
    values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relation, operation, oversize, before, after);
  else
    insert into relay.changes_2 (number, xid, at, relation, operation, oversize, before, after)
    values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relation, operation, oversize, before, after);
  end if;
end
$$;
comment on function relay.log_change(int, "char", boolean, json, json) is 'logs one change';

-- relay.ring(relation, operation) : notifies, unless relay.doorbell is off
-- Called when the try-lock of the doorbell failed, which says that the relay sleeps. The payload is for a person who
-- listens; it holds no row data, so its length is bounded.
create or replace function relay.ring(relation text, operation text) returns void
language plpgsql volatile as $$
begin
  if current_setting('relay.doorbell', true) is distinct from 'off' then
    perform pg_notify('relay', json_build_object('relation', relation, 'operation', operation, 'xid', pg_current_xact_id())::text);
  end if;
end
$$;
comment on function relay.ring(text, text) is 'wakes the relay, unless relay.doorbell is off';

-- relay.shorten(image, key) : an image without values over 1024 bytes of text; the key stays
create or replace function relay.shorten(image json, key text[]) returns json
language sql immutable as $$
  select (select ('{' || coalesce(pg_catalog.string_agg(pg_catalog.to_json(e.key)::text || ':' || e.value::text, ','), '') || '}')::json
          from pg_catalog.json_each(image) e
          where e.key = any ($2) or pg_catalog.octet_length(e.value::text) <= 1024
             or pg_catalog.octet_length(coalesce(e.value #>> '{}', '')) <= 1024)
  where image is not null
$$;
comment on function relay.shorten(json, text[]) is 'row image reduced to its key and its short columns';

-- relay.sizes_query(relation) : query on one row, $1, for the stored size of each column, in order
-- The row stands in a subquery that is not flattened, so that the planner copies a row of hundreds of megabytes only once.
create or replace function relay.sizes_query(relation oid) returns text
language sql stable as $$
  select pg_catalog.format('select array[%s]::int[] from (select $1 as r offset 0) v',
    pg_catalog.string_agg(pg_catalog.format('pg_catalog.pg_column_size((v.r).%I)', a.attname), ', ' order by a.attnum))
  from pg_catalog.pg_attribute a
  where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
$$;
comment on function relay.sizes_query(oid) is 'query that measures each column of a row as it is stored';

-- relay.short_query(relation, sizes, whole) : query on one row, $1, for an image of its key and of what is small as stored
-- Without `whole`, only of columns of the system's own types, whose conversion cannot fail.
create or replace function relay.short_query(relation oid, sizes int[], whole boolean) returns text
language sql stable as $$
  select pg_catalog.format('select relay.image(s) from (select %s from (select $1 as r offset 0) v) s',
    pg_catalog.string_agg(pg_catalog.format('(v.r).%1$I as %1$I', a.attname), ', ' order by a.attnum))
  from (select a.*, pg_catalog.row_number() over (order by a.attnum) as place
        from pg_catalog.pg_attribute a
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped) a
  where ($3 or a.atttypid < 16384)
    and (a.attname = any (relay.key($1)) or coalesce($2[a.place], 0) <= 2048)
$$;
comment on function relay.short_query(oid, int[], boolean) is 'query that makes a reduced image of a row';

-- relay.image(row) : row_to_json as a role without any right
-- A row can hold types whose conversion runs casts that users wrote; as relay_writer those could log changes of their own.
create or replace function relay.image(the_row record) returns json
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
begin
  return row_to_json(the_row);
end
$$;
comment on function relay.image(record) is 'row image, made as relay_image, a role that may do nothing';

-- relay.capture_whole(...) : logs a change if both images can be made and are at most 1 MiB; returns whether it did
-- For what relay.capture() does not do on its common way: pins the rarer settings, and bears a conversion that fails, at
-- the price of a subtransaction.
create or replace function relay.capture_whole(old_row anyelement, new_row anyelement, relation int, operation "char") returns boolean
language plpgsql volatile
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set lc_monetary = 'C' as $$
declare
  old_image json;
  new_image json;
begin
  begin
    old_image := relay.image(old_row);
    new_image := relay.image(new_row);
  exception when others then
    return false;
  end;
  if greatest(pg_column_size(old_image), pg_column_size(new_image)) > 1048576 then
    return false;
  end if;
  perform relay.log_change(relation, operation, false, old_image, new_image);
  return true;
end
$$;
comment on function relay.capture_whole(anyelement, anyelement, int, "char") is
  'logs a change whose images may be large or fail to be made; false if so';

-- relay.capture() : row trigger; arguments: id in relay.watch_list, and 'careful' where relay.needs_care says so
-- Promises: logs each change of a row once, with images whose text does not depend on the writer's session; waits for no
-- other writer; does not fail for what the row holds; notifies only if the relay sleeps. Where an image is over 1 MiB or
-- cannot be made, both are reduced to the key and the short columns, and oversize is true. Runs as relay_writer, and
-- whatever may run casts written by users as relay_image. Writes one of relay.changes_0 .. 2.
--
-- Each statement, expression and setting costs a single-row transaction a microsecond or two. Hence the test of the row
-- stands in the insert, one expression asks whether anything is left to do, and only those settings are pinned that
-- common types need: the others are pinned where relay.needs_care asks for it. What 4000 stored bytes were compressed
-- from may still be large as text: the relay cuts such an image down when it reads it.
create or replace function relay.capture() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set extra_float_digits = 1
as $$
declare
  rarer constant text[] := '{datestyle,intervalstyle,bytea_output,lc_monetary}';
  saved text[];
  sizes int[];
  old_image json;
  new_image json;
  logged boolean;
begin
  if relay.current_segment() = 0 then
    insert into relay.changes_0 (number, xid, at, relation, operation, oversize, before, after)
    select nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), tg_argv[0]::int, tg_op::"char", false,
           row_to_json(old), row_to_json(new)
    where tg_nargs = 1 and coalesce(pg_column_size(old), 0) + coalesce(pg_column_size(new), 0) <= 4000;
  elsif relay.current_segment() = 1 then
    insert into relay.changes_1 (number, xid, at, relation, operation, oversize, before, after)
    select nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), tg_argv[0]::int, tg_op::"char", false,
           row_to_json(old), row_to_json(new)
    where tg_nargs = 1 and coalesce(pg_column_size(old), 0) + coalesce(pg_column_size(new), 0) <= 4000;
  else
    insert into relay.changes_2 (number, xid, at, relation, operation, oversize, before, after)
    select nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), tg_argv[0]::int, tg_op::"char", false,
           row_to_json(old), row_to_json(new)
    where tg_nargs = 1 and coalesce(pg_column_size(old), 0) + coalesce(pg_column_size(new), 0) <= 4000;
  end if;
  -- A sleeping relay holds this lock exclusively. A writer that gets its share need not ring: the relay is awake, and
  -- cannot fall asleep before this transaction has ended.
  if found and pg_try_advisory_xact_lock_shared(1919249009, 1) then
    return null;
  end if;

  logged := found;
  -- From over 1 MiB stored no attempt is made: the text could be of any size.
  if not logged and coalesce(pg_column_size(old), 0) + coalesce(pg_column_size(new), 0) <= 1048576 then
    logged := relay.capture_whole(old, new, tg_argv[0]::int, tg_op::"char");
  end if;
  if not logged then
    -- Here and not in a function that takes the row: each call would copy its hundreds of megabytes once more.
    saved := array(select current_setting(s) from unnest(rarer) s);
    perform set_config(s, v, true) from unnest(rarer, '{ISO,postgres,hex,C}'::text[]) x (s, v);
    -- All columns that are small as stored, then, if one cannot be converted, those that surely can.
    for attempt in 1 .. 2 loop
      begin
        if tg_op <> 'INSERT' then
          execute relay.sizes_query(tg_relid) into sizes using old;
          execute relay.short_query(tg_relid, sizes, attempt = 1) into old_image using old;
        end if;
        if tg_op <> 'DELETE' then
          execute relay.sizes_query(tg_relid) into sizes using new;
          execute relay.short_query(tg_relid, sizes, attempt = 1) into new_image using new;
        end if;
        exit;
      exception when others then
        if attempt = 2 then
          raise;
        end if;
      end;
    end loop;
    perform set_config(s, v, true) from unnest(rarer, saved) x (s, v);
    perform relay.log_change(tg_argv[0]::int, tg_op::"char", true, relay.shorten(old_image, relay.key(tg_relid)),
                             relay.shorten(new_image, relay.key(tg_relid)));
  end if;
  if not pg_try_advisory_xact_lock_shared(1919249009, 1) then
    perform relay.ring(tg_table_schema || '.' || tg_table_name, tg_op);
  end if;
  return null;
end
$$;
comment on function relay.capture() is 'row trigger of watched relations: logs the change, rings if the relay sleeps';

-- relay.capture_truncate() : statement trigger; argument: id in relay.watch_list
create or replace function relay.capture_truncate() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.log_change(tg_argv[0]::int, 'T', false, null, null);
  if not pg_try_advisory_xact_lock_shared(1919249009, 1) then
    perform relay.ring(tg_table_schema || '.' || tg_table_name, tg_op);
  end if;
  return null;
end
$$;
comment on function relay.capture_truncate() is 'truncate trigger of watched relations: logs it, rings if the relay sleeps';

-- A function changes hands only to a role that may create in its schema: for that moment its owner to be may.
do $$
declare
  hand record;
begin
  for hand in
    select f::regprocedure as function, r::regrole as role
    from (values ('relay.capture()', 'relay_writer'), ('relay.capture_truncate()', 'relay_writer'),
                 ('relay.image(record)', 'relay_image')) h (f, r)
  loop
    if (select p.proowner <> hand.role from pg_catalog.pg_proc p where p.oid = hand.function) then
      execute pg_catalog.format('grant create on schema relay to %s', hand.role);
      execute pg_catalog.format('alter function %s owner to %s', hand.function, hand.role);
      execute pg_catalog.format('revoke create on schema relay from %s', hand.role);
    end if;
  end loop;
end
$$;
