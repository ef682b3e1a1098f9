-- Rights: nothing for everybody; relay_writer may only log, relay_reader is the group of the relay's login.

-- First what the event trigger calls, which fires for each of the statements below: a new function is everybody's until then.
grant usage on schema relay to relay_writer, relay_reader;
-- What the trigger functions do as their owner: log. It may read nothing but which shape is the newest.
grant insert on relay.changes_0, relay.changes_1, relay.changes_2 to relay_writer;
grant usage on sequence relay.change_number to relay_writer;
grant select (relation, shape) on relay.shapes to relay_writer;
grant insert on relay.widenings, relay.shape_doubts to relay_writer;
grant select (id, named_by, named_at) on relay.known_relations to relay_reader;
grant execute on function relay.note_relations() to relay_writer;
grant execute on function relay.note_rules(boolean) to relay_writer, relay_reader;
grant execute on function relay.may_concern(oid, oid) to relay_writer;
grant select on relay.widenings, relay.shape_doubts to relay_reader;
grant execute on function relay.log_change(int, int, "char", boolean, json, json, oid, xid8), relay.ring(text, text), relay.key(regclass),
  relay.image(record), relay.shorten(json, text[]), relay.sizes_query(oid), relay.short_query(oid, int[], boolean),
  relay.capture_carefully(anyelement, anyelement, oid, int, int, "char", oid, boolean),
  relay.current_segment(), relay.renew_shapes(boolean) to relay_writer;

revoke all on schema relay from public;
revoke all on all tables in schema relay from public;
revoke all on all sequences in schema relay from public;
revoke all on all functions in schema relay from public;

grant select on relay.ledger, relay.history, relay.changes, relay.watch_list, relay.watched, relay.read_policies,
  relay.refresh_jobs, relay.retention, relay.segments, relay.health, relay.shapes to relay_reader;
grant execute on function relay.epoch(), relay.cursor(), relay.page(pg_snapshot, pg_snapshot, bigint, boolean),
  relay.page_slice(pg_snapshot, pg_snapshot, bigint, bigint), relay.page_counts(pg_snapshot, pg_snapshot, bigint),
  relay.summarize(), relay.flush(),
  relay.key(regclass), relay.notes(regclass), relay.parts(regclass), relay.triggers_intact(regclass, int, boolean),
  relay.functions_intact(regclass, int), relay.operations(), relay.capture_function(int, text), relay.capture_trigger(int, text),
  relay.capture_body(regclass, int, int, text), relay.image_needs(regclass), relay.shape(int), relay.columns_of(regclass), relay.relations_now(int),
  relay.type_definition(oid), relay.is_loose(jsonb),
  relay.judge_statement(regclass, text), relay.operator_for(oid, text), relay.filter_condition(regclass, text, text, text[]),
  relay.policy_for(regclass, oid), relay.policies_for(regclass, oid), relay.is_secured(regclass, oid),
  relay.policy_parts(regclass, oid),
  relay.capture_mode(oid, int), relay.known_kind(oid, oid), relay.known_folding(oid, oid), relay.has_own_casts(), relay.rights(regclass, oid), relay.access(regclass, oid), relay.catalog(text[]), relay.catalog_fingerprint(text[]), relay.rule_scope(text[], text), relay.role_versions(text[]), relay.rules_mark(oid[], oid[]),
  relay.subscriber_roles(text[], text), relay.schema_changes_are_logged(),
  relay.tend(), relay.horizon(), relay.current_segment(), relay.hindrances(text, text, text), relay.row_like(regclass, jsonb),
  relay.repair(), relay.run_refreshes(), relay.open_bookmarks(uuid[], bytea[], text[]), relay.move_bookmarks(uuid[], bytea[], uuid[], text[]),
  relay.drop_bookmarks(uuid[], bytea[], uuid[]), relay.trim_bookmarks(interval, bigint) to relay_reader;
