-- The event trigger of relay.log_schema_change(): last, because it fires for every statement after it, and needs its rights.

do $$
begin
  if not exists (select from pg_catalog.pg_event_trigger e where e.evtname = 'relay_schema_changes') then
    create event trigger relay_schema_changes on ddl_command_end execute function relay.log_schema_change();
  end if;
  -- Also where session_replication_role is replica.
  if not exists (select from pg_catalog.pg_event_trigger e where e.evtname = 'relay_schema_changes' and e.evtenabled = 'A') then
    alter event trigger relay_schema_changes enable always;
  end if;
exception when insufficient_privilege then
  raise notice 'no event trigger: the relay looks at the catalog for every page of changes instead';
end
$$;
