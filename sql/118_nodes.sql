-- Messages between relays: relay.node_write, relay.node_read, and who is there.
--
-- A process writes its batches one after the other, so a batch is visible only after those before it. A reader keeps the last
-- number that it has read of each process: a number that is not the next one is a hole.

-- relay.node_segment() : the segment that is written now
create or replace function relay.node_segment() returns int
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  select (floor(extract(epoch from clock_timestamp()) / 30)::bigint % 3)::int
$$;
comment on function relay.node_segment() is 'segment of the messages between relays that is written now';

-- relay.node_write(node, incarnation, first, contents) : writes batches with ascending numbers from `first`, and rings
-- A batch that was written before is not written again, while its segment is the current one. Later a reader ignores the second.
create or replace function relay.node_write(node bigint, incarnation int, first bigint, contents bytea[]) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
begin
  case relay.node_segment()
    when 0 then
      insert into relay.node_log_0 select $1, $3 + c.place - 1, $2, c.content from unnest($4) with ordinality c (content, place) on conflict do nothing;
    when 1 then
      insert into relay.node_log_1 select $1, $3 + c.place - 1, $2, c.content from unnest($4) with ordinality c (content, place) on conflict do nothing;
    else
      insert into relay.node_log_2 select $1, $3 + c.place - 1, $2, c.content from unnest($4) with ordinality c (content, place) on conflict do nothing;
  end case;
  perform pg_notify('relay_nodes', $1::text);
end
$$;
comment on function relay.node_write(bigint, int, bigint, bytea[]) is 'writes messages of a relay to the others';

-- relay.node_read(nodes, numbers, most) : for each process the first `most` batches after a number, in order
create or replace function relay.node_read(nodes bigint[], numbers bigint[], most int)
returns table (node bigint, number bigint, incarnation int, content bytea)
language sql volatile security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
  select m.node, m.number, m.incarnation, m.content
  from unnest($1, $2) k (node, number)
  cross join lateral (
    select u.node, u.number, u.incarnation, u.content
    from (
      select l.node, l.number, l.incarnation, l.content from relay.node_log_0 l where l.node = k.node and l.number > k.number
      union all
      select l.node, l.number, l.incarnation, l.content from relay.node_log_1 l where l.node = k.node and l.number > k.number
      union all
      select l.node, l.number, l.incarnation, l.content from relay.node_log_2 l where l.node = k.node and l.number > k.number
    ) u
    order by u.number
    limit $3
  ) m
  order by m.node, m.number
$$;
comment on function relay.node_read(bigint[], bigint[], int) is 'messages of other relays after those that were read';

-- relay.node_numbers() : the last batch of each process
create or replace function relay.node_numbers() returns table (node bigint, number bigint)
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  select u.node, max(u.number)
  from (select l.node, l.number from relay.node_log_0 l
        union all select l.node, l.number from relay.node_log_1 l
        union all select l.node, l.number from relay.node_log_2 l) u
  group by u.node
$$;
comment on function relay.node_numbers() is 'number of the last message of each relay';

-- relay.node_incarnations() : the connections of relays that live
create or replace function relay.node_incarnations() returns setof int
language sql volatile
set search_path = pg_catalog, pg_temp as $$
  select (l.objid::bigint & 2147483647)::int
  from pg_locks l
  where l.locktype = 'advisory' and l.granted and l.objsubid = 2 and l.classid::bigint = relay.lock_class('node')
    and l.database = (select d.oid from pg_database d where d.datname = current_database())
$$;
comment on function relay.node_incarnations() is 'numbers of the connections of relays that live';

-- relay.node_trim() : empties the segment that is written next; returns whether any segment has messages
-- It was written for at least half a minute ago. A reader that has not read it finds a hole.
create or replace function relay.node_trim() returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '50ms' as $$
declare
  oldest constant int := (relay.node_segment() + 1) % 3;
  has_rows boolean;
begin
  execute format('select exists (select from relay.node_log_%s)', oldest) into has_rows;
  if has_rows then
    execute format('truncate relay.node_log_%s', oldest);
  end if;
  return exists (select from relay.node_log_0) or exists (select from relay.node_log_1) or exists (select from relay.node_log_2);
exception when lock_not_available then
  return true;
end
$$;
comment on function relay.node_trim() is 'removes old messages between relays';
