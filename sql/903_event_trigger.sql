-- The event triggers of relay.log_schema_change(): last, because they fire for all statements after them, and need its rights.

do $$
declare
  one record;
begin
  for one in
    select * from (values ('relay_schema_changes', 'ddl_command_end'), ('relay_schema_drops', 'sql_drop'),
                          ('relay_rewrites', 'table_rewrite')) e (name, event)
  loop
    if not exists (select from pg_catalog.pg_event_trigger e where e.evtname = one.name) then
      execute pg_catalog.format('create event trigger %I on %s execute function relay.log_schema_change()', one.name, one.event);
    end if;
    -- ALWAYS: also when session_replication_role is replica.
    if not exists (select from pg_catalog.pg_event_trigger e where e.evtname = one.name and e.evtenabled = 'A') then
      execute pg_catalog.format('alter event trigger %I enable always', one.name);
    end if;
  end loop;
exception when insufficient_privilege then
  raise notice 'no event trigger, because the installer may not create one: the relay checks the catalog for every page of changes instead';
end
$$;
