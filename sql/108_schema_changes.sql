-- Changes of the schema stand in the changelog too, in order with the changes of rows: from here on, other rules or columns.
--
-- Only where the installer may create an event trigger; elsewhere the relay looks at the catalog for every page.

-- relay.log_schema_change() : event trigger
-- Logs that something was created, altered, dropped, granted or revoked, as operation S of no relation, in the same
-- transaction. What it was is not said: the relay looks at the catalog anew. Temporary objects do not count.
create or replace function relay.log_schema_change() returns event_trigger
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
begin
  -- Grants on temporary objects do not say that they are temporary, and are logged. Nor is the move of writers to another
  -- segment of the changelog news.
  if tg_tag in ('REFRESH MATERIALIZED VIEW', 'COMMENT', 'CREATE INDEX')
     or exists (select from pg_event_trigger_ddl_commands())
        and not exists (select from pg_event_trigger_ddl_commands() d
                        where d.schema_name is distinct from 'pg_temp'
                          and d.object_identity is distinct from 'relay.current_segment()') then
    return;
  end if;
  -- The trigger functions of watched relations, which are written here and below, alter nothing else.
  if exists (select from pg_event_trigger_ddl_commands())
     and not exists (select from pg_event_trigger_ddl_commands() d
                     where d.object_type <> 'function' or d.schema_name is distinct from 'relay') then
    return;
  end if;
  begin
    -- From the very next write on, images have the new shape.
    perform relay.renew_shapes(true);
  exception when others then
    raise notice 'the triggers of watched relations could not be adapted: %', sqlerrm;
  end;
  perform relay.log_change(0, null, 'S', false, null, null);
  perform relay.ring('schema', tg_tag);
end
$$;
comment on function relay.log_schema_change() is 'event trigger: logs that the schema changed, in order with the changes of rows';

do $$
begin
  if (select p.proowner <> 'relay_writer'::regrole from pg_catalog.pg_proc p
      where p.oid = 'relay.log_schema_change()'::pg_catalog.regprocedure) then
    grant create on schema relay to relay_writer;
    alter function relay.log_schema_change() owner to relay_writer;
    revoke create on schema relay from relay_writer;
  end if;
end
$$;
revoke all on function relay.log_schema_change() from public;
