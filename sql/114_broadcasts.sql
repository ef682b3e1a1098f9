-- Broadcasts in the changelog: the trigger of realtime.messages, what is kept of the table, and what a member reads from it again.

-- relay.capture_broadcasts() : statement trigger of realtime.messages; logs each inserted broadcast as a change of relation -1
-- One call for a statement, however many rows it inserts. The image is the whole row, so a column that a later version of Supabase
-- adds changes nothing here. It is made as relay_image, as in relay.capture_carefully. An error is a warning: the row is stored, and
-- the writer's statement goes on. Not by relay.log_change, which would cost twice as much as all the rest.
create or replace function relay.capture_broadcasts() returns trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set bytea_output = 'hex' as $$
begin
  if relay.current_segment() = 0 then
    insert into relay.log_0 (number, xid, at, kind, after)
    select nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relay.broadcast_kind(i.image), relay.broadcast_image(i.image)
    from (select relay.image(n) as image from new_messages n where n.extension = 'broadcast' offset 0) i;
  elsif relay.current_segment() = 1 then
    insert into relay.log_1 (number, xid, at, kind, after)
    select nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relay.broadcast_kind(i.image), relay.broadcast_image(i.image)
    from (select relay.image(n) as image from new_messages n where n.extension = 'broadcast' offset 0) i;
  else
    insert into relay.log_2 (number, xid, at, kind, after)
    select nextval('relay.change_number'), pg_current_xact_id(), clock_timestamp(), relay.broadcast_kind(i.image), relay.broadcast_image(i.image)
    from (select relay.image(n) as image from new_messages n where n.extension = 'broadcast' offset 0) i;
  end if;
  if found and not pg_try_advisory_xact_lock_shared(relay.lock_class('relay'), relay.lock('doorbell')) then
    perform relay.ring('realtime.messages', tg_op);
  end if;
  return null;
exception when others then
  raise warning 'broadcast not sent: %', sqlerrm using hint = 'Run: relay doctor';
  return null;
end
$$;
comment on function relay.capture_broadcasts() is 'trigger of realtime.messages: logs broadcasts, rings if the relay sleeps';

-- relay.broadcast_kind(image), relay.broadcast_image(image) : how a broadcast is logged
-- 8 MiB of image is more than the bytes of the largest broadcast, 3 MB, need as hex digits. A larger one is logged without its
-- content: the relay says that it does not send it.
create or replace function relay.broadcast_kind(image json) returns text
language sql immutable as $$
  select case when pg_catalog.octet_length($1::text) > 8388608 then 'M -1 0 S' else 'M -1 0' end
$$;
comment on function relay.broadcast_kind(json) is 'kind of a broadcast in the changelog';

create or replace function relay.broadcast_image(image json) returns json
language sql immutable as $$
  select case when pg_catalog.octet_length($1::text) > 8388608 then
    pg_catalog.json_build_object('id', $1 -> 'id', 'topic', pg_catalog.left($1 ->> 'topic', 1024), 'event', pg_catalog.left($1 ->> 'event', 1024),
                                 'private', $1 -> 'private')
    else $1 end
$$;
comment on function relay.broadcast_image(json) is 'image of a broadcast in the changelog';

-- CREATE is granted temporarily: ALTER FUNCTION ... OWNER TO requires it of the new owner.
do $$
begin
  if (select p.proowner <> 'relay_writer'::regrole from pg_catalog.pg_proc p
      where p.oid = 'relay.capture_broadcasts()'::pg_catalog.regprocedure) then
    grant create on schema relay to relay_writer;
    alter function relay.capture_broadcasts() owner to relay_writer;
    revoke create on schema relay from relay_writer;
  end if;
end
$$;

-- relay.capture_messages() : creates the trigger of realtime.messages if it is missing and the installer may create it
-- And enables it ALWAYS if it fires in sessions of origin only, as after ENABLE TRIGGER ALL, and the installer owns the table. By short
-- attempts: while a long transaction has written to the table, this call waits, but no writer does. A trigger that an administrator has
-- disabled stays as it is: relay.realtime_problems() names it.
create or replace function relay.capture_messages() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  known_timeout constant text := current_setting('lock_timeout');
  messages constant oid := relay.messages();
  enabled constant "char" := (select t.tgenabled from pg_trigger t
                              where t.tgrelid = messages and t.tgfoid = 'relay.capture_broadcasts()'::regprocedure);
  owned boolean;
begin
  if messages is null or enabled in ('A', 'D', 'R')
     or not (has_schema_privilege('realtime', 'usage') and has_table_privilege(messages, 'trigger')) then
    return;
  end if;
  owned := (select pg_has_role(c.relowner, 'usage') from pg_class c where c.oid = messages);
  if enabled = 'O' and not owned then
    return;
  end if;
  perform set_config('lock_timeout', '50ms', true);
  for attempt in 1 .. 60 loop
    begin
      if enabled is null then
        create trigger "00_relay_broadcasts" after insert on realtime.messages referencing new table as new_messages
          for each statement execute function relay.capture_broadcasts();
      end if;
      if owned then
        alter table realtime.messages enable always trigger "00_relay_broadcasts";
      end if;
      exit;
    exception
      when lock_not_available then
        perform pg_sleep(0.5);
      when wrong_object_type then
        -- A view, for example.
        exit;
    end;
  end loop;
  perform set_config('lock_timeout', known_timeout, true);
end
$$;
comment on function relay.capture_messages() is 'creates the trigger of realtime.messages';

-- relay.trim_messages(most) : deletes up to `most` messages that are older than 72 hours; returns how many
-- Only of the table that relay.make_realtime() made. A row that another session has locked is left to the next call.
create or replace function relay.trim_messages(most int default 5000) returns int
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '20ms' as $$
declare
  deleted int;
begin
  if not relay.messages_are_ours() or not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('trim')) then
    return 0;
  end if;
  delete from realtime.messages m
  where m.ctid = any (array(
    select o.ctid from realtime.messages o
    where o.inserted_at < timezone('UTC', clock_timestamp()) - interval '72 hours'
    order by o.inserted_at limit trim_messages.most for update skip locked));
  get diagnostics deleted = row_count;
  return deleted;
exception when lock_not_available then
  return 0;
end
$$;
comment on function relay.trim_messages(int) is 'deletes messages older than 72 hours, a bounded number at a time; run by the relay';

-- relay.lacks_partition(moment) : whether realtime.messages is partitioned by time, as Supabase's is, without a partition for a moment
create or replace function relay.lacks_partition(moment timestamp) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
set datestyle = 'ISO' as $$
  select exists (select from pg_class c where c.oid = relay.messages() and c.relkind = 'p')
    and not exists (
      select from pg_inherits i join pg_class c on c.oid = i.inhrelid
      cross join lateral pg_get_expr(c.relpartbound, c.oid) bound
      where i.inhparent = relay.messages()
        and case when bound = 'DEFAULT' then true
                 else moment >= (regexp_match(bound, 'FROM \(''([^'']+)''\)'))[1]::timestamp
                  and moment < (regexp_match(bound, 'TO \(''([^'']+)''\)'))[1]::timestamp end)
$$;
comment on function relay.lacks_partition(timestamp) is 'whether realtime.messages is partitioned and has no partition for a moment';

-- relay.make_partitions() : partitions of realtime.messages for the next days, where it is partitioned and lacks them
-- Supabase's server makes them. Where that does not run any more, each send would be lost. What this function made is dropped after
-- 72 hours, and nothing else is. Short lock attempts: what cannot be had now is tried again by the next call.
create or replace function relay.make_partitions() returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '20ms'
set client_min_messages = warning as $$
declare
  made constant text := 'made by relay, which drops it after 72 hours';
  today constant timestamp := date_trunc('day', timezone('UTC', clock_timestamp()));
  day timestamp;
  old record;
begin
  if (select c.relkind = 'p' from pg_class c where c.oid = relay.messages()) is not true
     or not pg_try_advisory_xact_lock(relay.lock_class('relay'), relay.lock('trim')) then
    return;
  end if;
  for day in select today + n * interval '1 day' from generate_series(0, 3) n loop
    continue when not relay.lacks_partition(day);
    begin
      execute format('create table realtime.%I partition of realtime.messages for values from (%L) to (%L)',
                     to_char(day, '"messages_"YYYY_MM_DD'), day, day + interval '1 day');
      execute format('comment on table realtime.%I is %L', to_char(day, '"messages_"YYYY_MM_DD'), made);
    exception when others then
      -- relay.realtime_problems() names it.
      return;
    end;
  end loop;
  for old in
    select c.oid::regclass as name from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = relay.messages() and obj_description(c.oid, 'pg_class') = made
      and c.relname < to_char(today - interval '3 days', '"messages_"YYYY_MM_DD')
  loop
    begin
      execute format('drop table %s', old.name);
    exception when others then
      return;
    end;
  end loop;
end
$$;
comment on function relay.make_partitions() is 'makes partitions of realtime.messages for the next days; run by the relay';

-- relay.broadcast_history(topic, since, most) : the newest broadcasts to a private topic that are not older than `since`, oldest first
-- Each as the image that the changelog would have of it.
create or replace function relay.broadcast_history(topic text, since timestamptz, most int) returns setof text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set bytea_output = 'hex' as $$
begin
  if relay.messages() is null then
    return;
  end if;
  return query
    select n.image::text
    from (
      select relay.image(m) as image, m.inserted_at, m.id
      from realtime.messages m
      where m.topic = broadcast_history.topic and m.private and m.extension = 'broadcast'
        and m.inserted_at >= timezone('UTC', since)
      order by m.inserted_at desc limit most) n
    order by n.inserted_at;
end
$$;
comment on function relay.broadcast_history(text, timestamptz, int) is 'newest broadcasts to a private topic, oldest first';
