-- The owners, rights, replica identities and sequences that an installation has, and a check of them.
--
-- Also applied before the other files if it is missing: it depends on nothing else in the schema to be created.

drop function if exists relay.amiss();

-- relay.rights_due() : the owners and rights of the schema's objects
-- relay_writer may only log; relay_reader is the group of the relay's login; PUBLIC has no rights.
create or replace function relay.rights_due() returns table (kind text, object text, role text, privilege text)
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select 'owner', o.object, o.role, null
  from (values ('relay.image(record)', 'relay_image'), ('relay.capture_truncate()', 'relay_writer'),
               ('relay.log_schema_change()', 'relay_writer'), ('relay.capture_broadcasts()', 'relay_writer'),
               ('relay.signal_change()', 'relay_writer')) o (object, role)
  union all
  select 'schema', 'relay', r, 'usage' from unnest('{relay_writer,relay_reader}'::text[]) r
  union all
  -- Only if 107_auth.sql created the functions, recognized by their comment: another schema auth is left as it is.
  select 'schema', 'auth', r, 'usage' from unnest('{anon,authenticated,service_role}'::text[]) r
  where exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                where n.nspname = 'auth' and p.proname = 'uid' and obj_description(p.oid, 'pg_proc') = 'the caller: the claim sub')
  union all
  -- The trigger functions run as relay_writer: it may log, and read only which relations are watched and their newest shape.
  select 'table', t, 'relay_writer', 'insert'
  from unnest('{relay.log_0,relay.log_1,relay.log_2,relay.widenings,relay.shape_doubts,relay.signals}'::text[]) t
  union all
  select 'sequence', 'relay.change_number', 'relay_writer', 'usage'
  union all
  select 'column', 'relay.shapes', 'relay_writer', c from unnest('{relation,shape}'::text[]) c
  union all
  select 'column', 'relay.watch_list', 'relay_writer', c from unnest('{id,relation}'::text[]) c
  union all
  select 'column', 'relay.known_relations', 'relay_reader', c from unnest('{id,named_by,named_at,parts_mark,part_names,part_named}'::text[]) c
  union all
  select 'function', f, 'relay_writer', 'execute'
  from unnest(array['relay.lock_class(text)', 'relay.lock(text)', 'relay.note_rules(boolean)', 'relay.log_change(int, int, "char", boolean, json, json, oid, xid8)',
    'relay.ring(text, text)', 'relay.rung(text, text)', 'relay.key(regclass)', 'relay.image(record)', 'relay.shorten(json, text[])',
    'relay.sizes_query(oid)', 'relay.short_query(oid, int[], boolean)',
    'relay.capture_carefully(anyelement, anyelement, oid, int, int, "char", oid, boolean, text[], boolean)', 'relay.current_segment()',
    'relay.same_but(json, json, text[])',
    'relay.renew_shapes(boolean, int[])', 'relay.note_relations()', 'relay.may_concern(oid, oid)', 'relay.is_on_temporary(oid, oid)',
    'relay.may_have_rows(oid)', 'relay.note_rewrite(oid)', 'relay.note_collections()',
    'relay.note_refresh(oid)', 'relay.signal(oid)', 'relay.ring_jobs()',
    'relay.broadcast_kind(json)', 'relay.broadcast_image(json)']) f
  union all
  select 'table', t, 'relay_reader', 'select'
  from unnest('{relay.ledger,relay.history,relay.log,relay.changes,relay.watch_list,relay.watched,relay.read_policies,relay.refresh_jobs,relay.refreshes,
                relay.retention,relay.segments,relay.health,relay.shapes,relay.widenings,relay.shape_doubts,relay.former_parents,relay.named_parts,
                relay.collections,relay.collection_work,relay.collected,relay.status_table,
                relay.webhooks,relay.dead_letters}'::text[]) t
  union all
  select 'function', f, 'relay_reader', 'execute'
  from unnest(array['relay.lock_class(text)', 'relay.lock(text)', 'relay.epoch()', 'relay.cursor()', 'relay.page(pg_snapshot, pg_snapshot, bigint, boolean)',
    'relay.page_slice(pg_snapshot, pg_snapshot, bigint, bigint, xid8[])', 'relay.page_transactions(pg_snapshot, pg_snapshot, int)', 'relay.page_counts(pg_snapshot, pg_snapshot, bigint)', 'relay.transaction_ends(xid8[])',
    'relay.relation_of(text)', 'relay.is_legible(json)', 'relay.legible(json)', 'relay.flush()', 'relay.key(regclass)', 'relay.notes(regclass)', 'relay.parts(regclass)',
    'relay.triggers_intact(regclass, int, boolean)', 'relay.functions_intact(regclass, int)', 'relay.owner_may_execute(regclass, regprocedure)', 'relay.operations()',
    'relay.capture_function(int, text)', 'relay.capture_trigger(int, text)', 'relay.capture_body(regclass, int, int, text)',
    'relay.image_needs(regclass)', 'relay.ignored_now(regclass, jsonb)', 'relay.ignored(int)', 'relay.same_row(text[], text[])',
    'relay.still_named(regclass, text[])', 'relay.shape(int)', 'relay.columns_of(regclass)', 'relay.type_definition(oid)',
    'relay.is_loose(jsonb)', 'relay.judge_statement(regclass, text)', 'relay.operator_for(oid, text)',
    'relay.filter_condition(regclass, text, text, text[])', 'relay.policy_for(regclass, oid, "char")',
    'relay.policies_for(regclass, oid, "char")', 'relay.is_secured(regclass, oid)', 'relay.policy_parts(regclass, oid, "char")', 'relay.subjects(oid[])', 'relay.policy_tables(oid[])', 'relay.policy_reads(oid[])', 'relay.body_reads(oid)', 'relay.body_candidates(oid[], int[])', 'relay.body_of(oid)', 'relay.bodies_for(regclass, oid, jsonb, "char")', 'relay.missing_grants(regclass, oid, "char")', 'relay.is_constantly_true(pg_node_tree)', 'relay.missing_usage(regclass, oid, text, "char")', 'relay.missing_filter_usage(regclass, text[], text, text)',
    'relay.capture_mode(oid, int)', 'relay.known_kind(oid, oid)', 'relay.known_folding(oid, oid)', 'relay.has_own_casts()',
    'relay.rights(regclass, oid, text, jsonb, "char")', 'relay.access(regclass, oid, text, jsonb, "char")', 'relay.catalog_columns(oid)',
    'relay.topic_table()', 'relay.topic_rules(text[], text, jsonb)', 'relay.topic_blockers(text, text, "char")', 'relay.catalog(text[], text, int[], oid[], jsonb)',
    'relay.catalog_marks(text[], text, oid[])', 'relay.rule_scope(text[], text, oid[])', 'relay.role_versions(text[])', 'relay.relations_now(int)', 'relay.parts_mark(regclass)', 'relay.rules_mark(oid[], oid[], boolean)',
    'relay.subscriber_roles(text[], text)', 'relay.schema_changes_are_logged()', 'relay.note_rules(boolean)', 'relay.name_parts(oid[])', 'relay.trim_changelog()',
    'relay.horizon()', 'relay.current_segment()', 'relay.blockers(text, text, text)', 'relay.row_like(regclass, jsonb)',
    'relay.repair(int[])', 'relay.run_refreshes(int)', 'relay.note_signals()', 'relay.refreshes_due()', 'relay.refresh_mark(oid)', 'relay.open_bookmarks(uuid[], bytea[], text[])',
    'relay.move_bookmarks(uuid[], bytea[], uuid[], text[])', 'relay.drop_bookmarks(uuid[], bytea[], uuid[])',
    'relay.trim_bookmarks(interval, bigint)', 'relay.install_problems()', 'relay.is_excluded(text)',
    'relay.publication_tables()', 'relay.collection_tables()', 'relay.sync_collections()', 'relay.realtime_problems()',
    'relay.trim_messages(int)', 'relay.broadcast_history(text, timestamptz, int)', 'relay.make_partitions()',
    'relay.status_problems()', 'relay.status_begin()', 'relay.status_beat(text)', 'relay.status_end(text)',
    'relay.status_write(text, text[], boolean[], boolean[], boolean[], double precision[])',
    'relay.status_sweep(double precision, double precision, int)', 'relay.status_set(text, boolean)',
    'relay.status_stats(double precision)', 'relay.webhook_work()', 'relay.webhook_held(text)', 'relay.webhook_body(text, text)',
    'relay.webhook_settle(text, text, int, json)',
    'relay.node_write(bigint, int, bigint, bytea[])', 'relay.node_read(bigint[], bigint[], int)', 'relay.node_numbers()',
    'relay.node_incarnations()', 'relay.node_trim()']) f
$$;
comment on function relay.rights_due() is 'owners and rights of the objects in schema relay';

-- relay.install_problems() : deviations from the state that relay install leaves, as text
create or replace function relay.install_problems() returns setof text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp as $$
declare
  due record;
  routine regprocedure;
  is_right boolean;
begin
  for due in select * from relay.rights_due() loop
    routine := case when due.kind in ('owner', 'function') then to_regprocedure(due.object) end;
    is_right := case due.kind
      when 'owner' then (select p.proowner = to_regrole(due.role) from pg_proc p where p.oid = routine)
      when 'schema' then has_schema_privilege(due.role, due.object, due.privilege)
      when 'table' then has_table_privilege(due.role, to_regclass(due.object), due.privilege)
      when 'sequence' then has_sequence_privilege(due.role, to_regclass(due.object), due.privilege)
      when 'column' then has_column_privilege(due.role, to_regclass(due.object), due.privilege, 'select')
      else has_function_privilege(due.role, routine, due.privilege) end;
    if is_right is not true then
      return next case due.kind
        when 'owner' then format('%s does not belong to %s', due.object, due.role)
        when 'column' then format('%s may not select column %s of %s', due.role, due.privilege, due.object)
        else format('%s lacks %s on %s %s', due.role, due.privilege, due.kind, due.object) end;
    end if;
  end loop;
  return query
    select format('PUBLIC may execute %s', p.oid::regprocedure)
    from pg_proc p cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
    where p.pronamespace = 'relay'::regnamespace and a.grantee = 0
    union all
    select format('PUBLIC has %s on %s', lower(a.privilege_type), c.oid::regclass)
    from pg_class c cross join aclexplode(c.relacl) a
    where c.relnamespace = 'relay'::regnamespace and a.grantee = 0
    union all
    select format('PUBLIC has %s on schema relay', lower(a.privilege_type))
    from pg_namespace n cross join aclexplode(n.nspacl) a
    where n.nspname = 'relay' and a.grantee = 0
    union all
    select format('%s has no replica identity, so a publication for all tables refuses its changes', c.oid::regclass)
    from relay.without_identity() t join pg_class c on c.oid = t
    union all
    select 'the sequence of relay.watch_list is behind its rows'
    where (select max(w.id) from relay.watch_list w) > coalesce(pg_sequence_last_value('relay.watch_list_id_seq'), 0)
    union all
    select 'an event trigger of the relay is missing, disabled, or calls another function'
    where exists (select from pg_event_trigger e where e.evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites'))
      and not relay.schema_changes_are_logged();
end
$$;
comment on function relay.install_problems() is 'deviations of the schema relay from the state that relay install leaves';

-- relay.without_identity() : tables of the schema with updates or deletes, and without a replica identity
-- Rows of the changelog are only inserted and truncated.
create or replace function relay.without_identity() returns setof oid
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select c.oid from pg_class c
  where c.relnamespace = 'relay'::regnamespace and c.relkind = 'r' and c.relname !~ '^(log|changes)(_[0-2])?$' and c.relreplident <> 'f'
    and not (c.relreplident = 'd' and exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary))
$$;
comment on function relay.without_identity() is 'tables of the schema relay whose changes a publication for all tables would refuse';
