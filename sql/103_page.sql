-- Reading the changelog between two snapshots: relay.epoch, relay.cursor, relay.page, relay.flush.

-- relay.epoch() : identifies this history of transaction ids
-- Changes with the database (its mark, and its oid, as a copy has the same mark), the cluster (system identifier) and every
-- promotion (timeline). The timeline is taken from the WAL file name, because the control file lags after a promotion. On a
-- standby this raises, as it should: the changelog is never read there. Reads relay.history.
create or replace function relay.epoch() returns bigint
language sql stable security definer
set search_path = pg_catalog, pg_temp as $$
  select ('x' || left(encode(sha256(convert_to(
           h.mark::text || '/' || d.oid || '/' || s.system_identifier || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8), 'UTF8')), 'hex'), 16))::bit(64)::bigint
  from relay.history h, pg_control_system() s, pg_database d
  where d.datname = current_database()
$$;
comment on function relay.epoch() is 'number that identifies this history; a cursor of another epoch is a gap';

-- relay.varint(n) : unsigned LEB128
create or replace function relay.varint(n numeric) returns bytea
language plpgsql immutable strict
set search_path = pg_catalog, pg_temp as $$
declare
  rest numeric := n;
  bytes bytea := '';
begin
  loop
    if rest < 128 then
      return bytes || set_byte(decode('00', 'hex'), 0, rest::int);
    end if;
    bytes := bytes || set_byte(decode('00', 'hex'), 0, 128 + mod(rest, 128)::int);
    rest := div(rest, 128);
  end loop;
end
$$;
comment on function relay.varint(numeric) is 'a number as unsigned LEB128';

-- relay.cursor() : the caller's snapshot as a cursor
-- In a repeatable read transaction it belongs to the rows that the transaction reads. Layout: 1, epoch (8 bytes, big
-- endian), xmax, count of running transactions, then each from the largest down as the difference to the one before,
-- the first to xmax; varints; base64url without padding. If the WAL is not flushed up to that snapshot, the caller's commit
-- is made to flush it: use the cursor only after the commit, when a crash cannot undo what the snapshot sees.
create or replace function relay.cursor() returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
declare
  seen constant pg_snapshot := pg_current_snapshot();
  bytes bytea := decode('01', 'hex') || int8send(relay.epoch());
  previous numeric := pg_snapshot_xmax(seen)::text::numeric;
  -- What the caller's own transaction has written, and will write, is never before its cursor. Its snapshot does not have it.
  running numeric[] := array(
    select x::text::numeric from pg_snapshot_xip(seen) x
    union
    select o::text::numeric from pg_current_xact_id_if_assigned() o where o < pg_snapshot_xmax(seen)
    order by 1 desc);
  xid numeric;
begin
  if pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() then
    perform set_config('synchronous_commit', 'on', true), pg_logical_emit_message(true, 'relay', '');
  end if;
  bytes := bytes || relay.varint(previous) || relay.varint(cardinality(running));
  foreach xid in array running loop
    bytes := bytes || relay.varint(previous - xid);
    previous := xid;
  end loop;
  return translate(encode(bytes, 'base64'), E'+/=\n', '-_');
end
$$;
comment on function relay.cursor() is
  'cursor of the caller''s snapshot: read rows and call it in one repeatable read transaction, resume from it after the commit';

-- relay.is_legible(image) : whether the image can be converted to UTF-8, the encoding of clients
-- A database with SQL_ASCII holds any bytes; some other encodings have characters that Unicode lacks.
create or replace function relay.is_legible(image json) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
  perform convert_to(image::text, 'UTF8');
  return true;
exception when others then
  return false;
end
$$;
comment on function relay.is_legible(json) is 'whether a row image can be converted to UTF-8';

-- relay.legible(image) : the text of the image, without columns that cannot be converted to UTF-8
create or replace function relay.legible(image json) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
  if image is null or relay.is_legible(image) then
    return image::text;
  end if;
  return (select '{' || coalesce(string_agg(to_json(e.key)::text || ':' || e.value::text, ','), '') || '}'
          from json_each(image) e
          where relay.is_legible(to_json(e.key)) and relay.is_legible(e.value));
exception when others then
  return '{}';
end
$$;
comment on function relay.legible(json) is 'text of a row image without columns that cannot be converted to UTF-8';

-- relay.changes : the changelog in readable form, with `kind` split into columns
create or replace view relay.changes as
select c.number, c.xid, c.at,
  pg_catalog.split_part(c.kind, ' ', 2)::int as relation,
  pg_catalog.left(c.kind, 1)::"char" as operation,
  pg_catalog.split_part(c.kind, ' ', 3)::int as shape,
  c.kind ~ ' S$' as oversize,
  pg_catalog.substring(c.kind, ' L([0-9]+)')::oid as leaf,
  pg_catalog.substring(c.kind, ' B([0-9]+)')::xid8 as began,
  c.before, c.after
from relay.log c;
comment on view relay.changes is 'the changelog';
comment on column relay.changes.number is 'order of the writes';
comment on column relay.changes.xid is 'the top-level transaction that wrote the change';
comment on column relay.changes.relation is 'relay.watch_list.id; 0: the schema; -1: realtime.messages';
comment on column relay.changes.operation is 'I, U, D, T (truncate: no images), S (the schema changed), G (changes may be missing here) or M (a broadcast)';
comment on column relay.changes.shape is 'relay.shapes.shape of the images; 0: the shape changed while they were made';
comment on column relay.changes.oversize is 'an image holds only the key and the short columns';
comment on column relay.changes.leaf is 'the partition that holds the row; null: the relation is not partitioned';
comment on column relay.changes.began is
  'xmin of the snapshot of a repeatable read or serializable transaction, if the types of the relation can be altered meanwhile';

-- relay.relation_of(kind) : relay.watch_list.id of a change; 0 is the schema
create or replace function relay.relation_of(kind text) returns int
language sql immutable as $$
  select pg_catalog.split_part($1, ' ', 2)::int
$$;
comment on function relay.relation_of(text) is 'watched relation of a change, by its kind';

-- relay.page(seen, until, after_number, some_run) : the changes that finished after `seen`, up to `until`
-- First row: number null, snapshot = the page's end (`until`, else the statement's snapshot), unflushed = the WAL position to
-- flush so that a crash cannot undo the page, null if it is flushed. Then the changes by number, which for each row is the
-- order of its writes. The literal false for `some_run` means that no transaction runs in `seen`: half of the plan is left
-- out then. No change is skipped when a transaction commits late, and none comes twice: the page has the rows of transactions
-- that began after `seen` (a range of xid) and of those running in it (a list), if they are visible now. It does not use the
-- system column xmin, by which subtransactions look finished. Sorting carries compressed images; they become text last.
-- Language sql and stable, so that it is inlined and rows stream. Reads relay.log.
drop function if exists relay.page(pg_snapshot, pg_snapshot, bigint), relay.page(pg_snapshot, pg_snapshot, bigint, boolean);
create or replace function relay.page(seen pg_snapshot, until pg_snapshot default null, after_number bigint default 0,
                                      some_run boolean default true)
returns table (number bigint, xid text, at timestamptz, kind text, before text, after text, snapshot text, unflushed text)
language sql stable as $$
  select null::bigint, null::text, null::timestamptz, null::text, null::text, null::text,
         coalesce($2, pg_catalog.pg_current_snapshot())::text,
         case when pg_catalog.pg_current_wal_flush_lsn() < pg_catalog.pg_current_wal_insert_lsn()
              then pg_catalog.pg_current_wal_insert_lsn()::text end
  union all
  select p.number, p.xid::text, p.at,
         case when pg_catalog.getdatabaseencoding() = 'UTF8' or relay.is_legible(p.before) and relay.is_legible(p.after)
              then p.kind else p.kind || ' S' end,
         case when pg_catalog.getdatabaseencoding() = 'UTF8' then p.before::text else relay.legible(p.before) end,
         case when pg_catalog.getdatabaseencoding() = 'UTF8' then p.after::text else relay.legible(p.after) end,
         null::text, null::text
  from (
    select c.*
    from relay.log c
    where c.xid >= pg_catalog.pg_snapshot_xmax($1)
      and c.xid < pg_catalog.pg_snapshot_xmax(coalesce($2, pg_catalog.pg_current_snapshot()))
      and ($2 is null or pg_catalog.pg_visible_in_snapshot(c.xid, $2))
      and c.number > $3
    union all
    select c.*
    from relay.log c
    where $4
      and c.xid = any (array(select x from pg_catalog.pg_snapshot_xip($1) x))
      and ($2 is null or pg_catalog.pg_visible_in_snapshot(c.xid, $2))
      and c.number > $3
    order by number
  ) p
$$;
comment on function relay.page(pg_snapshot, pg_snapshot, bigint, boolean) is
  'one page of the changelog: a header row, then the changes finished after the first snapshot, in order';

-- relay.page_transactions(seen, until, most) : the transactions of a page, null if there are more than `most`
-- Looks up one transaction after the other in the index, so that a large transaction costs no more than a small one.
create or replace function relay.page_transactions(seen pg_snapshot, until pg_snapshot, most int) returns xid8[]
language sql stable as $$
  with recursive next (xid, place) as (
    (select c.xid, 1 from relay.log c
     where c.xid >= pg_catalog.pg_snapshot_xmax($1) and c.xid < pg_catalog.pg_snapshot_xmax($2)
     order by c.xid limit 1)
    union all
    select (select c.xid from relay.log c where c.xid > n.xid and c.xid < pg_catalog.pg_snapshot_xmax($2) order by c.xid limit 1), n.place + 1
    from next n
    where n.xid is not null and n.place <= $3
  )
  select case when pg_catalog.count(n.xid) <= $3 then
           coalesce(pg_catalog.array_agg(n.xid) filter (where pg_catalog.pg_visible_in_snapshot(n.xid, $2)), '{}')
           || array(select x from pg_catalog.pg_snapshot_xip($1) x where pg_catalog.pg_visible_in_snapshot(x, $2)) end
  from next n
$$;
comment on function relay.page_transactions(pg_snapshot, pg_snapshot, int) is 'transactions of a page, null if they are too many';

-- relay.page_slice(seen, until, after_number, through_number, transactions) : the changes of a page within a range of numbers
-- Columns as in relay.page. Given the page's transactions, the cost follows the size of the slice. Without them (null: too
-- many), it reads the index of the whole page, but no row outside the slice.
drop function if exists relay.page_slice(pg_snapshot, pg_snapshot, bigint, bigint);
create or replace function relay.page_slice(seen pg_snapshot, until pg_snapshot, after_number bigint, through_number bigint, transactions xid8[])
returns table (number bigint, xid text, at timestamptz, kind text, before text, after text, snapshot text, unflushed text)
language sql stable as $$
  select null::bigint, null::text, null::timestamptz, null::text, null::text, null::text, $2::text, null::text
  union all
  select p.number, p.xid::text, p.at,
         case when pg_catalog.getdatabaseencoding() = 'UTF8' or relay.is_legible(p.before) and relay.is_legible(p.after)
              then p.kind else p.kind || ' S' end,
         case when pg_catalog.getdatabaseencoding() = 'UTF8' then p.before::text else relay.legible(p.before) end,
         case when pg_catalog.getdatabaseencoding() = 'UTF8' then p.after::text else relay.legible(p.after) end,
         null::text, null::text
  from (
    select c.*
    from relay.log c
    where c.xid = any (coalesce($5, array(select x from pg_catalog.pg_snapshot_xip($1) x where pg_catalog.pg_visible_in_snapshot(x, $2))))
      and c.number > $3 and c.number <= $4
    union all
    select c.*
    from relay.log c
    where $5 is null
      and c.xid >= pg_catalog.pg_snapshot_xmax($1) and c.xid < pg_catalog.pg_snapshot_xmax($2)
      and pg_catalog.pg_visible_in_snapshot(c.xid, $2)
      and c.number > $3 and c.number <= $4
    order by number
  ) p
$$;
comment on function relay.page_slice(pg_snapshot, pg_snapshot, bigint, bigint, xid8[]) is
  'a header row, then the changes of a page with these numbers, in order';

-- relay.page_counts(seen, until, after_number) : number of changes of a page per relation; 0 is the schema
drop function if exists relay.page_relations(pg_snapshot, pg_snapshot, bigint);
create or replace function relay.page_counts(seen pg_snapshot, until pg_snapshot, after_number bigint)
returns table (relation int, count bigint)
language sql stable as $$
  select relay.relation_of(p.kind), pg_catalog.sum(p.count)::bigint
  from (
    select c.kind, pg_catalog.count(*)
    from (
      select c.kind
      from relay.log c
      where c.xid >= pg_catalog.pg_snapshot_xmax($1) and c.xid < pg_catalog.pg_snapshot_xmax($2)
        and pg_catalog.pg_visible_in_snapshot(c.xid, $2) and c.number > $3
      union all
      select c.kind
      from relay.log c
      where c.xid = any (array(select x from pg_catalog.pg_snapshot_xip($1) x))
        and pg_catalog.pg_visible_in_snapshot(c.xid, $2) and c.number > $3
    ) c
    group by c.kind
  ) p (kind, count)
  group by 1
$$;
comment on function relay.page_counts(pg_snapshot, pg_snapshot, bigint) is 'number of changes of a page after a number, per relation';

-- relay.flush() : makes all earlier commits survive a crash, once the caller has committed with synchronous_commit on
create or replace function relay.flush() returns void
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  select pg_logical_emit_message(true, 'relay', '')
$$;
comment on function relay.flush() is 'its commit makes all earlier commits survive a crash; run it as a transaction of its own';
