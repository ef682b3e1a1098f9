-- What the clients subscribe to: notes with an owner (without one, every user sees them), a public board, and a table whose rows
-- no policy shows.
create table notes (
  id bigint primary key,
  owner uuid,
  title text not null,
  stars integer not null default 0,
  done boolean not null default false,
  price numeric(10, 2),
  tags text[],
  details jsonb,
  due timestamptz
);
alter table notes enable row level security;
create policy own on notes for select to authenticated using (owner is null or owner = (select auth.uid()));
grant select on notes to authenticated, service_role;

create table board (id integer primary key, list integer not null, text text not null);
alter table board replica identity full;
grant select on board to anon, authenticated;

create table unwatched (id integer primary key);
grant select on unwatched to anon, authenticated;

create table closed (id integer primary key);
alter table closed enable row level security;
grant select on closed to anon, authenticated;

select relay.watch('notes'), relay.watch('board'), relay.watch('closed');
