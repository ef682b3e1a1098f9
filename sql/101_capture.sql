-- The trigger functions: the one place where a writer logs a change and rings the doorbell.
--
-- Those of the rows are written for each table and operation (relay.capture_body); here is their text, and what they call.
-- Functions that are called from functions that pin settings run under what those have pinned.

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
create or replace function relay.log_change(relation int, shape int, operation "char", oversize boolean, before json, after json,
                                            leaf oid default null, began xid8 default null) returns void
language plpgsql volatile as $$
declare
  kind constant text := concat_ws(' ', operation, relation, coalesce(shape, 0), 'L' || leaf, 'B' || began, case when oversize then 'S' end);
begin
  if relay.current_segment() = 0 then
    insert into relay.log_0 (number, xid, at, kind, before, after)
    values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), kind, before, after);
  elsif relay.current_segment() = 1 then
    insert into relay.log_1 (number, xid, at, kind, before, after)
    values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), kind, before, after);
  else
    insert into relay.log_2 (number, xid, at, kind, before, after)
    values (nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), kind, before, after);
  end if;
end
$$;
comment on function relay.log_change(int, int, "char", boolean, json, json, oid, xid8) is 'logs one change';

-- relay.ring(relation, operation) : notifies, unless relay.doorbell is off
-- Called when the try-lock of the doorbell failed, which says that the relay sleeps. The payload is for a person who
-- listens; it holds no row data, so its length is bounded.
create or replace function relay.ring(relation text, operation text) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('relay.doorbell', true) is distinct from 'off' then
    perform pg_notify('relay', json_build_object('relation', relation, 'operation', operation, 'xid', pg_current_xact_id())::text);
  end if;
end
$$;
comment on function relay.ring(text, text) is 'wakes the relay, unless relay.doorbell is off';

-- relay.rung(relation, operation) : relay.ring as a condition that holds
create or replace function relay.rung(relation text, operation text) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  perform relay.ring(relation, operation);
  return true;
end
$$;
comment on function relay.rung(text, text) is 'wakes the relay, unless relay.doorbell is off; true';

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

-- relay.capture_carefully(...) : logs a change whose images may be large, fail to be made, or follow settings of the session
-- Pins every setting that the text of an image follows. Both images whole if they can be made and are at most 1 MiB; else
-- both are reduced to the key and the short columns, and oversize is true.
--
-- `loose` says that a type can be altered while its values are written: neither is the text of this transaction's functions then
-- known to fit that of its images. A snapshot taken after the images were made tells whether it does. One that was taken before,
-- as some isolation levels have it, is logged for the reader to tell. Nothing is read then: what a serializable transaction
-- reads and others write can end either.
create or replace function relay.capture_carefully(old_row anyelement, new_row anyelement, part oid, relation int, shape int,
                                                   operation "char", leaf oid, loose boolean) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set extra_float_digits = 1
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set lc_monetary = 'C' as $$
declare
  stored bigint := coalesce(pg_column_size(old_row), 0) + coalesce(pg_column_size(new_row), 0);
  written constant int := shape;
  sizes int[];
  old_image json;
  new_image json;
  oversize boolean;
  began xid8;
begin
  -- From over 1 MiB stored no attempt is made: the text could be of any size.
  if stored <= 1048576 then
    begin
      if operation <> 'I' then
        old_image := relay.image(old_row);
      end if;
      if operation <> 'D' then
        new_image := relay.image(new_row);
      end if;
    exception when others then
      stored := 1048577;
    end;
  end if;
  oversize := stored > 1048576 or greatest(pg_column_size(old_image), pg_column_size(new_image)) > 1048576;
  -- All columns that are small as stored, then, if one cannot be converted, those that surely can.
  for attempt in 1 .. case when oversize then 2 else 0 end loop
    begin
      if operation <> 'I' then
        execute relay.sizes_query(part) into sizes using old_row;
        execute relay.short_query(part, sizes, attempt = 1) into old_image using old_row;
      end if;
      if operation <> 'D' then
        execute relay.sizes_query(part) into sizes using new_row;
        execute relay.short_query(part, sizes, attempt = 1) into new_image using new_row;
      end if;
      exit;
    exception when others then
      if attempt = 2 then
        raise;
      end if;
    end;
  end loop;
  if oversize then
    old_image := relay.shorten(old_image, relay.key(part));
    new_image := relay.shorten(new_image, relay.key(part));
  end if;
  if loose then
    if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
      began := pg_snapshot_xmin(pg_current_snapshot());
    elsif (select max(s.shape) from relay.shapes s where s.relation = capture_carefully.relation) is distinct from written then
      shape := 0;
    end if;
  end if;
  perform relay.log_change(relation, shape, operation, oversize, old_image, new_image, leaf, began);
end
$$;
comment on function relay.capture_carefully(anyelement, anyelement, oid, int, int, "char", oid, boolean) is
  'logs a change whose images may be large, fail to be made or follow settings';

-- relay.image_needs(relation) : what the images of its rows need to be made at once, without relay.capture_carefully
-- `care`: it holds a type that is not of the system's own, whose cast to json may be a user's, whose labels or attributes may get
-- other names meanwhile, or one not known here.
-- `size`: a row may be large. Else the settings, with their values, that the text of its types follows. TimeZone is none of
-- them for a timestamptz, whose image carries its offset: the reader mends it.
create or replace function relay.image_needs(relation regclass) returns text[]
language sql stable as $$
  with recursive used (type) as (
    select a.atttypid from pg_catalog.pg_attribute a
    where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
    union
    select part.type
    from used u
    join pg_catalog.pg_type t on t.oid = u.type
    cross join lateral (
      select t.typbasetype where t.typtype = 'd'
      union all select t.typelem where t.typcategory = 'A'
      union all select a.atttypid from pg_catalog.pg_attribute a
        where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped) part (type)
  ), needed (need) as (
    select case
      when t.typname in ('bool', 'char', 'name', 'int2', 'int4', 'int8', 'numeric', 'oid', 'text', 'varchar', 'bpchar', 'uuid',
        'json', 'jsonb', 'date', 'time', 'timetz', 'timestamp', 'timestamptz', 'bit', 'varbit', 'inet', 'cidr', 'macaddr',
        'macaddr8', 'tsvector', 'xid', 'xid8', 'int4range', 'int8range', 'numrange', 'int4multirange', 'int8multirange',
        'nummultirange') then null
      when t.typname in ('float4', 'float8', 'point', 'line', 'lseg', 'box', 'path', 'polygon', 'circle') then 'extra_float_digits=1'
      when t.typname = 'interval' then 'IntervalStyle=postgres'
      when t.typname = 'bytea' then 'bytea_output=hex'
      else 'care' end
    from used u
    join pg_catalog.pg_type t on t.oid = u.type
    where t.typtype not in ('d', 'c') and t.typcategory <> 'A' and t.typnamespace = 'pg_catalog'::pg_catalog.regnamespace and t.oid < 16384
    union
    select 'care' from used u join pg_catalog.pg_type t on t.oid = u.type
    where t.typtype <> 'd' and t.typcategory <> 'A' and not (t.typnamespace = 'pg_catalog'::pg_catalog.regnamespace and t.oid < 16384)
    union
    -- Rows whose columns are all of a fixed length and few are never large.
    select 'size'
    where exists (select from pg_catalog.pg_attribute a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped and a.attlen < 0)
       or (select pg_catalog.sum(a.attlen) from pg_catalog.pg_attribute a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped) > 1000
  )
  select coalesce(pg_catalog.array_agg(distinct n.need order by n.need) filter (where n.need is not null), '{}') from needed n
$$;
comment on function relay.image_needs(regclass) is 'what the images of a relation''s rows need to be made at once';

-- relay.capture_body(relation, id, shape, operation) : text of the trigger function for INSERT, UPDATE or DELETE
-- Promises of the function: logs each change of a row once, with images whose text does not depend on the writer's session,
-- time zone apart; waits for no other writer; does not fail for what the row holds; notifies only if the relay sleeps.
--
-- It runs as relay_writer and pins nothing, since each setting would cost every row a microsecond or two: the search path is
-- the writer's. So every function, type and operator is qualified, no form stands in it that cannot be (IN, BETWEEN, LIKE,
-- NULLIF, IS DISTINCT FROM, simple CASE, USING), no literal has a backslash, and no column is named. What it calls
-- pins the search path, or is called from nowhere else. Where `care` is needed images are made elsewhere, as relay_image.
--
-- One condition joins all: what a row has to fulfil, the bell, and the choice of the segment, which the planner folds, so that the
-- conditions of other segments cost nothing. A second statement would cost a third of a microsecond.
--
-- A sleeping relay holds the lock of the bell exclusively. A writer that gets its share need not ring: the relay is awake, and
-- cannot fall asleep before this transaction has ended.
--
-- What 4000 stored bytes were compressed from may still be large as text: the relay cuts such an image down when it reads it.
create or replace function relay.capture_body(relation regclass, id int, shape int, operation text) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  needs constant text[] := relay.image_needs(relation);
  letter constant text := left(operation, 1);
  images constant text[] := case operation when 'INSERT' then '{new}' when 'DELETE' then '{old}' else '{old,new}' end;
  leaf constant text := case when (select c.relkind = 'p' from pg_class c where c.oid = capture_body.relation) then 'tg_relid' end;
  loose constant text := relay.is_loose(relay.columns_of(relation))::text;
  kind constant text := case when leaf is null then format('%L', concat_ws(' ', letter, id, shape))
                             else format('pg_catalog.concat(%L, %s)', concat_ws(' ', letter, id, shape, 'L'), leaf) end;
  bell constant text := 'pg_catalog.pg_try_advisory_xact_lock_shared(1919249009, 1)';
  ring constant text := '(pg_catalog.concat(tg_table_schema, ''.'', tg_table_name), tg_op)';
  careful constant text := format(E'  perform relay.capture_carefully(old, new, tg_relid, %s, %s, %L::pg_catalog."char", %s, %s);\n'
                                  '  if not %s then\n    perform relay.ring%s;\n  end if;\n',
                                  id, shape, letter, coalesce(leaf, 'null::pg_catalog.oid'), loose, bell, ring);
  conditions text[] := '{}';
  body text;
begin
  if 'care' = any (needs) then
    body := careful;
  else
    conditions := array(
      select format('pg_catalog.current_setting(%L) operator(pg_catalog.=) %L', split_part(n, '=', 1), split_part(n, '=', 2))
      from unnest(needs) n where n like '%=%');
    if 'size' = any (needs) then
      conditions := conditions || ((select string_agg(format('pg_catalog.pg_column_size(%s)', i), ' operator(pg_catalog.+) ' order by n)
                                   from unnest(images) with ordinality u (i, n)) || ' operator(pg_catalog.<=) 4000');
    end if;
    body := (
      select string_agg(format($text$  %s %s then
    insert into relay.log_%s (number, xid, at, kind, %s)
    values (pg_catalog.nextval('relay.change_number'::pg_catalog.regclass), pg_catalog.pg_current_xact_id(),
            pg_catalog.clock_timestamp(), %s, %s);
$text$,
          case segment when 0 then 'if' else 'elsif' end,
          array_to_string(conditions || format('(%s or relay.rung%s)', bell, ring) || format('relay.current_segment() operator(pg_catalog.=) %s', segment), ' and '),
          segment,
          (select string_agg(case i when 'old' then 'before' else 'after' end, ', ' order by n) from unnest(images) with ordinality u (i, n)),
          kind,
          (select string_agg(format('pg_catalog.row_to_json(%s)', i), ', ' order by n) from unnest(images) with ordinality u (i, n))),
        '' order by segment)
      from generate_series(0, 2) segment) || format(E'  else\n%s  end if;\n', careful);
  end if;
  return format($text$
begin
%s  return null;
end
$text$, body);
end
$$;
comment on function relay.capture_body(regclass, int, int, text) is 'text of the trigger function of a watched relation for one operation';

-- relay.capture_truncate() : statement trigger; argument: id in relay.watch_list
-- A partition keeps it when it is detached, and is then none of what is watched.
grant select (id, relation) on relay.watch_list to relay_writer;
create or replace function relay.capture_truncate() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (
    select from relay.watch_list w
    where w.id = tg_argv[0]::int
      and (w.relation::oid = tg_relid or exists (select from pg_partition_ancestors(tg_relid) a where a.relid = w.relation))) then
    return null;
  end if;
  perform relay.log_change(tg_argv[0]::int, null, 'T', false, null, null);
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
    from (values ('relay.capture_truncate()', 'relay_writer'), ('relay.image(record)', 'relay_image')) h (f, r)
  loop
    if (select p.proowner <> hand.role from pg_catalog.pg_proc p where p.oid = hand.function) then
      execute pg_catalog.format('grant create on schema relay to %s', hand.role);
      execute pg_catalog.format('alter function %s owner to %s', hand.function, hand.role);
      execute pg_catalog.format('revoke create on schema relay from %s', hand.role);
    end if;
  end loop;
end
$$;
