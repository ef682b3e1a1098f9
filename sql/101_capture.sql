-- The trigger functions: the one place where a writer logs a change and rings the doorbell.
--
-- Only the functions that others call pin settings. Those below them are called from nowhere else and run under what
-- their caller has pinned: pinning again would cost every row again.

-- relay.log_change(...) : writes one change into the segment that its number names
create or replace function relay.log_change(relation int, operation "char", oversize boolean, before json, after json) returns void
language plpgsql volatile as $$
declare
  next_number constant bigint := nextval('relay.change_number');
begin
  case (next_number >> 40) % 3
    when 0 then
      insert into relay.changes_0 (number, xid, at, relation, operation, oversize, before, after)
      values (next_number, pg_current_xact_id(), clock_timestamp(), relation, operation, oversize, before, after);
    when 1 then
      insert into relay.changes_1 (number, xid, at, relation, operation, oversize, before, after)
      values (next_number, pg_current_xact_id(), clock_timestamp(), relation, operation, oversize, before, after);
    else
      insert into relay.changes_2 (number, xid, at, relation, operation, oversize, before, after)
      values (next_number, pg_current_xact_id(), clock_timestamp(), relation, operation, oversize, before, after);
  end case;
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

-- relay.image(row, relation) -> image, reduced
-- The careful way to an image, for rows that are large or hold types whose conversion is user code. Never raises for
-- what the row holds: where the whole image is over 1 MiB or cannot be made, it has the key columns and every column
-- of at most 1024 bytes of text that can be converted, and reduced is true.
create or replace function relay.image(the_row anyelement, relation oid, out image json, out reduced boolean)
language plpgsql volatile as $$
declare
  col record;
  piece text;
  pieces text[] := '{}';
begin
  reduced := false;
  if the_row is not distinct from null then
    return;
  end if;
  -- Values are stored compressed; from over 1 MiB of them no attempt is made, because their text could be of any size.
  if pg_column_size(the_row) <= 1048576 then
    begin
      image := row_to_json(the_row);
      if pg_column_size(image) <= 1048576 then
        return;
      end if;
    exception when others then
      null;
    end;
  end if;
  reduced := true;
  for col in
    select a.attname, coalesce(a.attnum = any (i.indkey::int2[]), false) as is_key
    from pg_attribute a
    left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
    where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
    order by a.attnum
  loop
    piece := null;
    begin
      -- The stored size is looked at first, so that a value of hundreds of megabytes is never turned into text.
      execute format(
        'select case when $2 or pg_column_size(($1).%1$I) is null
                       or (pg_column_size(($1).%1$I) <= 2048 and octet_length(($1).%1$I::text) <= 1024)
                     then coalesce(to_json(($1).%1$I)::text, ''null'') end', col.attname)
        into piece using the_row, col.is_key;
    exception when others then
      null;
    end;
    if piece is not null then
      pieces := pieces || (to_json(col.attname)::text || ':' || piece);
    end if;
  end loop;
  image := ('{' || array_to_string(pieces, ',') || '}')::json;
end
$$;
comment on function relay.image(anyelement, oid) is 'row image that never fails: reduced to key and short columns where it must be';

-- relay.capture_carefully(...) : logs a change whose images may be large or fail
-- The images of small rows are tried together first: one exception block a row is what care costs then.
create or replace function relay.capture_carefully(old_row anyelement, new_row anyelement, table_id oid, relation int, operation "char") returns void
language plpgsql volatile
set lc_monetary = 'C' as $$
declare
  old_image json;
  new_image json;
  old_reduced boolean := false;
  new_reduced boolean := false;
  converted boolean := false;
begin
  if coalesce(pg_column_size(old_row), 0) + coalesce(pg_column_size(new_row), 0) <= 4000 then
    begin
      old_image := row_to_json(old_row);
      new_image := row_to_json(new_row);
      converted := true;
    exception when others then
      null;
    end;
  end if;
  if not converted then
    select i.image, i.reduced into old_image, old_reduced from relay.image(old_row, table_id) i;
    select i.image, i.reduced into new_image, new_reduced from relay.image(new_row, table_id) i;
  end if;
  perform relay.log_change(relation, operation, old_reduced or new_reduced, old_image, new_image);
end
$$;
comment on function relay.capture_carefully(anyelement, anyelement, oid, int, "char") is 'logs a change whose images may be large or fail';

-- relay.capture() : row trigger; arguments: id in relay.watch_list, and 'careful' where relay.needs_care says so
-- Promises: logs each change of a row once, with images whose text does not depend on the writer's session; waits for no
-- other writer; does not fail for what the row holds; notifies only if the relay sleeps. Runs as relay_writer, because
-- converting a row to JSON can run casts written by users. Writes one of relay.changes_0 .. 2.
--
-- Each expression and each setting costs a single-row transaction about a microsecond; hence one test, one insert, one try-lock.
-- 4000 stored bytes cannot make an image that hurts, whatever they are compressed from.
create or replace function relay.capture() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
  next_number bigint;
begin
  if tg_nargs = 1 and coalesce(pg_column_size(old), 0) + coalesce(pg_column_size(new), 0) <= 4000 then
    next_number := nextval('relay.change_number');
    case (next_number >> 40) % 3
      when 0 then
        insert into relay.changes_0 (number, xid, at, relation, operation, oversize, before, after)
        values (next_number, pg_current_xact_id(), clock_timestamp(), tg_argv[0]::int, tg_op::"char", false, row_to_json(old), row_to_json(new));
      when 1 then
        insert into relay.changes_1 (number, xid, at, relation, operation, oversize, before, after)
        values (next_number, pg_current_xact_id(), clock_timestamp(), tg_argv[0]::int, tg_op::"char", false, row_to_json(old), row_to_json(new));
      else
        insert into relay.changes_2 (number, xid, at, relation, operation, oversize, before, after)
        values (next_number, pg_current_xact_id(), clock_timestamp(), tg_argv[0]::int, tg_op::"char", false, row_to_json(old), row_to_json(new));
    end case;
  else
    perform relay.capture_carefully(old, new, tg_relid, tg_argv[0]::int, tg_op::"char");
  end if;
  -- A sleeping relay holds this lock exclusively. A writer that gets its share need not ring: the relay is awake, and
  -- cannot fall asleep before this transaction has ended.
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

-- A function changes hands only to a role that may create in its schema: for that moment relay_writer may.
do $$
declare
  trigger_function regprocedure;
begin
  foreach trigger_function in array array['relay.capture()', 'relay.capture_truncate()']::regprocedure[] loop
    if (select p.proowner <> 'relay_writer'::regrole from pg_catalog.pg_proc p where p.oid = trigger_function) then
      grant create on schema relay to relay_writer;
      execute pg_catalog.format('alter function %s owner to relay_writer', trigger_function);
      revoke create on schema relay from relay_writer;
    end if;
  end loop;
end
$$;
