-- Sets owners, rights, replica identities and the sequence of the watch list, as in relay.rights_due().
--
-- Also run before the other files, when the schema may be of an older version: objects that do not exist are skipped. A dump
-- restored without owners or rights leaves relay.image() with a superuser, and writers without the right to log.

-- CREATE is granted temporarily: ALTER FUNCTION ... OWNER TO requires it of the new owner.
do $$
declare
  due record;
begin
  for due in
    select d.object, d.role from relay.rights_due() d
    join pg_catalog.pg_proc p on p.oid = pg_catalog.to_regprocedure(d.object)
    where d.kind = 'owner' and p.proowner <> d.role::pg_catalog.regrole
  loop
    execute pg_catalog.format('grant create on schema relay to %I', due.role);
    execute pg_catalog.format('alter function %s owner to %I', due.object, due.role);
    execute pg_catalog.format('revoke create on schema relay from %I', due.role);
  end loop;
end
$$;

-- Ordered so that the rights of relay_writer come first: the event trigger runs for each statement below, and calls functions
-- that only PUBLIC's default right allowed so far.
do $$
declare
  due record;
begin
  for due in
    select d.* from relay.rights_due() d
    where d.kind <> 'owner'
      and case d.kind when 'schema' then true when 'function' then pg_catalog.to_regprocedure(d.object) is not null
                      when 'column' then exists (select from pg_catalog.pg_attribute a
                                                 where a.attrelid = pg_catalog.to_regclass(d.object) and a.attname = d.privilege)
                      else pg_catalog.to_regclass(d.object) is not null end
    order by d.role desc, d.kind = 'schema' desc
  loop
    if due.kind = 'column' then
      execute pg_catalog.format('grant select (%I) on %s to %I', due.privilege, due.object, due.role);
    else
      execute pg_catalog.format('grant %s on %s %s to %I', due.privilege, due.kind, due.object, due.role);
    end if;
  end loop;
end
$$;

revoke all on schema relay from public;
revoke all on all tables in schema relay from public;
revoke all on all sequences in schema relay from public;
revoke all on all functions in schema relay from public;

-- Short lock attempts, repeated: a long transaction would make the lock request wait, and others behind it.
do $$
declare
  known constant text := pg_catalog.current_setting('lock_timeout');
  one record;
begin
  perform pg_catalog.set_config('lock_timeout', '50ms', true);
  for one in select t::pg_catalog.regclass as name from relay.without_identity() t loop
    loop
      begin
        execute pg_catalog.format('alter table %s replica identity full', one.name);
        exit;
      exception when lock_not_available then
        perform pg_catalog.pg_sleep(0.5);
      end;
    end loop;
  end loop;
  -- The rest of the transaction may wait for locks.
  perform pg_catalog.set_config('lock_timeout', known, true);
  perform pg_catalog.setval('relay.watch_list_id_seq', w.most) from (select pg_catalog.max(l.id) as most from relay.watch_list l) w
  where w.most > coalesce(pg_catalog.pg_sequence_last_value('relay.watch_list_id_seq'), 0);
end
$$;
