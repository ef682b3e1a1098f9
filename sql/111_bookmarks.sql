-- Bulk operations on bookmarks: relay.open_bookmarks, relay.move_bookmarks, relay.drop_bookmarks, relay.trim_bookmarks.

-- relay.open_bookmarks(sessions, channels, cursors) : takes over these bookmarks, or creates them at these cursors
-- The arrays have one length and contain no bookmark twice. Returns for each its new owner, its cursor, and the seconds since
-- its last move.
create or replace function relay.open_bookmarks(sessions uuid[], channels bytea[], cursors text[])
returns table (session text, channel bytea, owner text, cursor text, age float8)
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  insert into relay.bookmarks as b (session, channel, owner, cursor, at)
  select s, c, gen_random_uuid(), k, clock_timestamp() from unnest($1, $2, $3) as u (s, c, k) order by s, c
  on conflict (session, channel) do update set owner = gen_random_uuid()
  returning b.session::text, b.channel, b.owner::text, b.cursor, extract(epoch from clock_timestamp() - b.at)::float8
$$;
comment on function relay.open_bookmarks(uuid[], bytea[], text[]) is 'takes over bookmarks, or creates them at these cursors';

-- relay.move_bookmarks(sessions, channels, owners, cursors) : moves bookmarks that still belong to these owners
-- Returns the owners of the moved ones; another connection has taken over the rest.
create or replace function relay.move_bookmarks(sessions uuid[], channels bytea[], owners uuid[], cursors text[])
returns setof text
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  update relay.bookmarks b set cursor = m.k, at = clock_timestamp()
  from (select s, c, o, k from unnest($1, $2, $3, $4) as u (s, c, o, k) order by s, c) m
  where b.session = m.s and b.channel = m.c and b.owner = m.o
  returning b.owner::text
$$;
comment on function relay.move_bookmarks(uuid[], bytea[], uuid[], text[]) is 'moves the bookmarks that still belong to these owners';

-- relay.drop_bookmarks(sessions, channels, owners) : drops bookmarks that still belong to these owners; null: any owner
create or replace function relay.drop_bookmarks(sessions uuid[], channels bytea[], owners uuid[]) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  delete from relay.bookmarks b using unnest($1, $2, $3) as u (s, c, o)
  where b.session = u.s and b.channel = u.c and b.owner = coalesce(u.o, b.owner)
$$;
comment on function relay.drop_bookmarks(uuid[], bytea[], uuid[]) is 'drops the bookmarks that still belong to these owners';

-- relay.trim_bookmarks(age, most) : drops bookmarks not moved for `age`, and the oldest of a subject beyond `most`
-- `age` is longer than the resume window, because a client that comes back too late has to get a gap. The limit keeps a
-- subject, the first half of `channel`, from filling the table. A first byte of 0 means a role, shared by all tokens without
-- a subject: its limit is a hundred times higher.
drop function if exists relay.trim_bookmarks(interval);
create or replace function relay.trim_bookmarks(age interval, most bigint default 10000) returns bigint
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  with crowded as (
    select substr(b.channel, 1, 16) as subject, case get_byte(substr(b.channel, 1, 16), 0) when 0 then 100 else 1 end * $2 as most
    from relay.bookmarks b
    group by 1
    having count(*) > case get_byte(substr(b.channel, 1, 16), 0) when 0 then 100 else 1 end * $2
  ), counted as (
    select b.session, b.channel, b.at, row_number() over (partition by c.subject order by b.at desc) > c.most as beyond
    from crowded c
    join relay.bookmarks b on substr(b.channel, 1, 16) = c.subject
  ), dropped as (
    delete from relay.bookmarks b using counted c
    where b.session = c.session and b.channel = c.channel and b.at = c.at and c.beyond
    returning 1
  ), old as (
    delete from relay.bookmarks b where b.at < clock_timestamp() - $1
    returning 1
  )
  select (select count(*) from dropped) + (select count(*) from old)
$$;
comment on function relay.trim_bookmarks(interval, bigint) is 'drops bookmarks not moved for this age, and the oldest of subjects beyond the limit; run by the relay';
