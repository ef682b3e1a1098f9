-- The trigger function: the one place where a writer logs a change and rings the doorbell.

-- relay.image(row, relation) -> image, reduced
-- The careful way to an image, for rows that are large or hold types whose conversion is user code. Never raises for
-- what the row holds: where the whole image is over 1 MiB or cannot be made, it has the key columns and every column
-- of at most 1024 bytes of text that can be converted, and reduced is true. Runs inside relay.capture(), with its role and settings.
create or replace function relay.image(the_row anyelement, relation oid, out image json, out reduced boolean)
language plpgsql volatile as $$
declare
  col record;
  piece text;
  pieces text[] := '{}';
begin
  reduced := false;
  -- Stored values are compressed at most about ninetyfold and their text at most sixfold longer, so an attempt on
  -- 4 MiB stays below what a writer can bear, and above it no image is under 1 MiB.
  if pg_catalog.pg_column_size(the_row) <= 4194304 then
    begin
      image := pg_catalog.row_to_json(the_row);
      if pg_catalog.pg_column_size(image) <= 1048576 then
        return;
      end if;
    exception when others then
      null;
    end;
  end if;
  reduced := true;
  for col in
    select a.attname, coalesce(a.attnum = any (i.indkey::int2[]), false) as is_key
    from pg_catalog.pg_attribute a
    left join pg_catalog.pg_index i on i.indrelid = a.attrelid and i.indisprimary
    where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
    order by a.attnum
  loop
    piece := null;
    begin
      -- The stored size is looked at first, so that a value of hundreds of megabytes is never turned into text.
      execute pg_catalog.format(
        'select case when $2 or pg_catalog.pg_column_size(($1).%1$I) <= 2048
           and coalesce(pg_catalog.octet_length(($1).%1$I::pg_catalog.text), 0) <= 1024
         then coalesce(pg_catalog.to_json(($1).%1$I)::pg_catalog.text, ''null'') end', col.attname)
        into piece using the_row, col.is_key;
    exception when others then
      null;
    end;
    if piece is not null then
      pieces := pieces || (pg_catalog.to_json(col.attname)::text || ':' || piece);
    end if;
  end loop;
  image := ('{' || pg_catalog.array_to_string(pieces, ',') || '}')::json;
end
$$;
comment on function relay.image(anyelement, oid) is 'row image that never fails: reduced to key and short columns where it must be';

-- relay.log_change(...) : writes one change into the segment that its number names
create or replace function relay.log_change(relation int, operation "char", oversize boolean, before json, after json) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  next_number constant bigint := nextval('relay.change_number');
begin
  execute format('insert into relay.changes_%s (number, xid, at, relation, operation, oversize, before, after)
                  values ($1, pg_current_xact_id(), clock_timestamp(), $2, $3, $4, $5, $6)', (next_number >> 40) % 3)
    using next_number, relation, operation, oversize, before, after;
end
$$;
comment on function relay.log_change(int, "char", boolean, json, json) is 'logs one change that no trigger captures';

-- relay.ring(relation, operation) : the doorbell, as relay.capture() has it
create or replace function relay.ring(relation text, operation text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('relay.doorbell', true) is distinct from 'off'
     and not pg_try_advisory_xact_lock_shared(1919249009, 1) then
    perform pg_notify('relay', json_build_object('relation', relation, 'operation', operation, 'xid', pg_current_xact_id())::text);
  end if;
end
$$;
comment on function relay.ring(text, text) is 'notifies if the relay sleeps';

-- relay.capture() : trigger, arguments: id in relay.watch_list, and optionally 'careful'
-- Promises: logs each change of the row once, with images whose text does not depend on the writer's session; never
-- waits for another writer; never fails because of the row's size or, when told to be careful, its types; notifies
-- only if the relay sleeps and relay.doorbell is not 'off'. Runs as relay_writer, because converting a row to JSON can run casts written by
-- users. Writes one of relay.changes_0 .. 2.
create or replace function relay.capture() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
set lc_monetary = 'C'
as $$
declare
  next_number constant bigint := pg_catalog.nextval('relay.change_number');
  relation_id constant int := tg_argv[0];
  careful constant boolean := tg_nargs > 1;
  old_image json;
  new_image json;
  old_reduced boolean := false;
  new_reduced boolean := false;
  operation "char";
begin
  if tg_op = 'INSERT' then
    operation := 'I';
  elsif tg_op = 'UPDATE' then
    operation := 'U';
  elsif tg_op = 'DELETE' then
    operation := 'D';
  else
    operation := 'T';
  end if;

  if operation = 'I' or operation = 'U' then
    if careful or pg_catalog.pg_column_size(new) > 131072 then
      select i.image, i.reduced into new_image, new_reduced from relay.image(new, tg_relid) i;
    else
      new_image := pg_catalog.row_to_json(new);
      if pg_catalog.pg_column_size(new_image) > 1048576 then
        select i.image, i.reduced into new_image, new_reduced from relay.image(new, tg_relid) i;
      end if;
    end if;
  end if;
  if operation = 'U' or operation = 'D' then
    if careful or pg_catalog.pg_column_size(old) > 131072 then
      select i.image, i.reduced into old_image, old_reduced from relay.image(old, tg_relid) i;
    else
      old_image := pg_catalog.row_to_json(old);
      if pg_catalog.pg_column_size(old_image) > 1048576 then
        select i.image, i.reduced into old_image, old_reduced from relay.image(old, tg_relid) i;
      end if;
    end if;
  end if;

  case (next_number >> 40) % 3
    when 0 then
      insert into relay.changes_0 (number, xid, at, relation, operation, oversize, before, after)
      values (next_number, pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), relation_id, operation,
              old_reduced or new_reduced, old_image, new_image);
    when 1 then
      insert into relay.changes_1 (number, xid, at, relation, operation, oversize, before, after)
      values (next_number, pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), relation_id, operation,
              old_reduced or new_reduced, old_image, new_image);
    else
      insert into relay.changes_2 (number, xid, at, relation, operation, oversize, before, after)
      values (next_number, pg_catalog.pg_current_xact_id(), pg_catalog.clock_timestamp(), relation_id, operation,
              old_reduced or new_reduced, old_image, new_image);
  end case;

  -- A sleeping relay holds this lock exclusively. A writer that gets its share need not ring: the relay is awake, and
  -- cannot fall asleep before this transaction has ended.
  if pg_catalog.current_setting('relay.doorbell', true) is distinct from 'off'
     and not pg_catalog.pg_try_advisory_xact_lock_shared(1919249009, 1) then
    perform pg_catalog.pg_notify('relay', pg_catalog.json_build_object(
      'relation', tg_table_schema || '.' || tg_table_name, 'operation', operation,
      'xid', pg_catalog.pg_current_xact_id())::text);
  end if;
  return null;
end
$$;
comment on function relay.capture() is 'trigger of watched relations: logs the change, rings if the relay sleeps';

-- The owner must own the function through a role that may create in the schema for the moment of the change of hands.
do $$
begin
  if (select p.proowner <> 'relay_writer'::regrole from pg_catalog.pg_proc p
      where p.oid = 'relay.capture()'::pg_catalog.regprocedure) then
    grant create on schema relay to relay_writer;
    alter function relay.capture() owner to relay_writer;
    revoke create on schema relay from relay_writer;
  end if;
end
$$;
revoke all on function relay.capture(), relay.image(anyelement, oid) from public;
grant usage on schema relay to relay_writer;
grant insert on relay.changes_0, relay.changes_1, relay.changes_2 to relay_writer;
grant usage on sequence relay.change_number to relay_writer;
grant execute on function relay.image(anyelement, oid) to relay_writer;
