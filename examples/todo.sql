-- A table, a policy, one call. Run it with psql on a database where `relay install` has run.

create table todos (
  id      bigint generated always as identity primary key,
  user_id uuid not null,
  title   text not null,
  done    boolean not null default false
);

alter table todos enable row level security;
create policy "own todos" on todos for select to authenticated using (user_id = auth.uid());
grant select on todos to authenticated;

select relay.watch('todos');

-- Now open todo.html (make client; node examples/demo/serve.mjs examples 8000; http://127.0.0.1:8000/todo.html) with a token of this user
-- (relay token --role authenticated --sub …) and then, from anywhere:
--   insert into todos (user_id, title) values ('11111111-1111-4111-8111-111111111111', 'Water the plants');
--   update todos set done = true;
--   delete from todos where done;
