-- Schema realtime: the table whose inserts are broadcasts, and the functions that insert. Existing objects, as Supabase has them,
-- are never replaced.

-- relay.messages() : the oid of realtime.messages, null if there is none
-- By the catalog: a cast to regclass raises without the right to use the schema.
create or replace function relay.messages() returns oid
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'realtime' and c.relname = 'messages'
$$;
comment on function relay.messages() is 'oid of realtime.messages; null: there is none';

-- relay.messages_comment() : the comment by which it is recognized
create or replace function relay.messages_comment() returns text
language sql immutable as $$
  select 'broadcasts: each row that is inserted with extension broadcast is sent to the channel of its topic; kept for 72 hours'::text
$$;
comment on function relay.messages_comment() is 'comment of realtime.messages, if relay install made it';

-- relay.messages_are_ours() : whether relay.make_realtime() made realtime.messages
create or replace function relay.messages_are_ours() returns boolean
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select coalesce(obj_description(relay.messages(), 'pg_class') = relay.messages_comment(), false)
$$;
comment on function relay.messages_are_ours() is 'whether relay install made realtime.messages';

-- relay.make_realtime() : creates what is missing of schema realtime, and renews the functions that an older relay created
-- Run by each installation. What the installer may not create is left out without an error: relay.realtime_problems() names it.
--
-- A plain table, not partitions by day: an insert never lacks its partition, also if no relay has run for days, and its upkeep is
-- no schema change, which would lock the table and make each relay read its catalog again. Old rows are deleted in small steps.
create or replace function relay.make_realtime() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $make$
declare
  one record;
  present oid;
begin
  if to_regnamespace('realtime') is null then
    create schema realtime;
    comment on schema realtime is 'broadcasts from the database';
  end if;
  if not (has_schema_privilege('realtime', 'usage') and has_schema_privilege('realtime', 'create')) then
    return;
  end if;
  if relay.messages() is null then
    -- The columns of Supabase's table. Its times are in UTC, whatever the time zone of the writer.
    create table realtime.messages (
      topic text not null,
      extension text not null,
      payload jsonb,
      event text,
      private boolean default false,
      updated_at timestamp not null default pg_catalog.timezone('UTC', pg_catalog.clock_timestamp()),
      inserted_at timestamp not null default pg_catalog.timezone('UTC', pg_catalog.clock_timestamp()),
      id uuid not null default pg_catalog.gen_random_uuid(),
      binary_payload bytea,
      primary key (id, inserted_at)
    );
    execute format('comment on table realtime.messages is %L', relay.messages_comment());
    create index messages_inserted_at on realtime.messages (inserted_at);
    create index messages_replay on realtime.messages (topic, inserted_at) where private and extension = 'broadcast';
    alter table realtime.messages enable row level security;
    if (select pg_has_role(n.nspowner, 'usage') from pg_namespace n where n.nspname = 'realtime') then
      grant usage on schema realtime to anon, authenticated, service_role;
    end if;
    grant select, insert, update on realtime.messages to anon, authenticated, service_role;
  end if;
  for one in select * from relay.realtime_functions() loop
    present := to_regprocedure(one.signature);
    if present is null
       or exists (select from pg_proc p
                  where p.oid = present and pg_has_role(p.proowner, 'usage') and p.prosrc <> one.body
                    and obj_description(p.oid, 'pg_proc') = one.description) then
      execute format('create or replace function %s returns %s language %s as %L', one.declaration, one.returns, one.language, one.body);
      execute format('comment on function %s is %L', one.signature, one.description);
    end if;
  end loop;
end
$make$;
comment on function relay.make_realtime() is 'creates what is missing of schema realtime';

-- relay.realtime_functions() : the functions of schema realtime that clients of Supabase know
-- They run with the rights and the search path of the caller, as the policies of realtime.messages and what these call expect.
-- So every name in them is qualified.
create or replace function relay.realtime_functions()
returns table (signature text, declaration text, returns text, language text, body text, description text)
language sql immutable as $list$
  values
  ('realtime.topic()', 'realtime.topic()', 'text', 'sql stable', $body$
  select nullif(pg_catalog.current_setting('realtime.topic', true), '')::pg_catalog.text
$body$, 'the topic that a policy of realtime.messages is asked about'),
  ('realtime.send(jsonb, text, text, boolean)', 'realtime.send(payload jsonb, event text, topic text, private boolean default true)',
   'void', 'plpgsql volatile', $body$
declare
  message_id constant pg_catalog.uuid := pg_catalog.gen_random_uuid();
  content pg_catalog.jsonb := send.payload;
begin
  if pg_catalog.jsonb_typeof(content) operator(pg_catalog.=) 'object' and not content operator(pg_catalog.?) 'id' then
    content := content operator(pg_catalog.||) pg_catalog.jsonb_build_object('id', message_id);
  end if;
  perform pg_catalog.set_config('realtime.topic', send.topic, true);
  insert into realtime.messages (id, payload, event, topic, private, extension)
  values (message_id, content, send.event, send.topic, send.private, 'broadcast');
exception when others then
  raise warning 'WarnSendingBroadcastMessage: %', sqlerrm;
end
$body$, 'sends a broadcast when the transaction commits; an error is a warning'),
  ('realtime.send_binary(bytea, text, text, boolean)',
   'realtime.send_binary(payload bytea, event text, topic text, private boolean default true)', 'void', 'plpgsql volatile', $body$
begin
  perform pg_catalog.set_config('realtime.topic', send_binary.topic, true);
  insert into realtime.messages (id, binary_payload, event, topic, private, extension)
  values (pg_catalog.gen_random_uuid(), send_binary.payload, send_binary.event, send_binary.topic, send_binary.private, 'broadcast');
exception when others then
  raise warning 'WarnSendingBroadcastMessage: %', sqlerrm;
end
$body$, 'sends a broadcast of bytes when the transaction commits; an error is a warning'),
  ('realtime.broadcast_changes(text, text, text, text, text, record, record, text)',
   'realtime.broadcast_changes(topic_name text, event_name text, operation text, table_name text, table_schema text, new record, '
   || 'old record, level text default ''ROW'')', 'void', 'plpgsql volatile', $body$
begin
  if level operator(pg_catalog.<>) 'ROW' then
    raise exception 'function can only be triggered for each row, not for each statement'
      using hint = 'create trigger ... for each row execute function ...';
  elsif not operation operator(pg_catalog.=) any ('{INSERT,UPDATE,DELETE}'::pg_catalog.text[]) then
    raise exception 'Unexpected operation type: %', operation using hint = 'Pass TG_OP of a trigger for insert, update or delete.';
  end if;
  perform realtime.send(
    pg_catalog.jsonb_build_object('schema', table_schema, 'table', table_name, 'operation', operation, 'record', new, 'old_record', old),
    event_name, topic_name);
end
$body$, 'for row triggers: broadcasts the change of a row to a private channel')
$list$;
comment on function relay.realtime_functions() is 'functions that relay install creates in schema realtime';

-- relay.realtime_problems() : what is missing so that broadcasts from the database are sent, with the remedy
create or replace function relay.realtime_problems() returns setof text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
declare
  -- In a security definer function: the owner of schema relay.
  installer constant text := quote_ident(current_user);
  missing text;
begin
  if to_regnamespace('realtime') is null then
    return next 'the schema realtime does not exist: run `relay install`';
    return;
  elsif relay.messages() is null then
    return next format('the table realtime.messages does not exist: grant usage, create on schema realtime to %s, then run `relay install`',
                       installer);
    return;
  end if;
  select string_agg(c, ', ') into missing from unnest('{topic,extension,payload,event,private,inserted_at,id,binary_payload}'::text[]) c
  where not exists (select from pg_attribute a where a.attrelid = relay.messages() and a.attname = c and not a.attisdropped);
  if missing is not null then
    return next format('the table realtime.messages lacks columns (%s): update Supabase Realtime, or rename the table and run `relay install`', missing);
    return;
  end if;
  select string_agg(f.signature, ', ') into missing from relay.realtime_functions() f
  where not exists (select from pg_proc p where p.pronamespace = to_regnamespace('realtime')
                      and format('realtime.%s(%s)', p.proname, oidvectortypes(p.proargtypes)) = f.signature);
  if missing is not null then
    return next format('functions are missing (%s): grant usage, create on schema realtime to %s, then run `relay install`', missing, installer);
  end if;
  if not exists (select from pg_trigger t
                 where t.tgrelid = relay.messages() and t.tgfoid = 'relay.capture_broadcasts()'::regprocedure) then
    return next format('realtime.messages has no trigger of the relay: grant usage on schema realtime to %1$s; grant trigger on '
                       'realtime.messages to %1$s, then run `relay install`', installer);
  elsif exists (select from pg_trigger t
                where t.tgrelid = relay.messages() and t.tgfoid = 'relay.capture_broadcasts()'::regprocedure and t.tgenabled not in ('A', 'O')) then
    return next 'the trigger of the relay on realtime.messages is disabled: alter table realtime.messages enable always trigger "00_relay_broadcasts"';
  end if;
  if relay.lacks_partition(timezone('UTC', clock_timestamp()) + interval '1 day') then
    return next format('realtime.messages has no partition for tomorrow, so sends will be lost: grant %s to %s, and the relay makes it; or let '
                       'the server of Supabase run',
                       (select c.relowner::regrole from pg_class c where c.oid = relay.messages()), installer);
  end if;
  if not (select c.relrowsecurity from pg_class c where c.oid = relay.messages()) then
    return next 'row security of realtime.messages is off, so every role with rights on it reads and sends all: '
                'alter table realtime.messages enable row level security';
  end if;
end
$$;
comment on function relay.realtime_problems() is 'what is missing so that broadcasts from the database are sent';
