-- Who may use which private channel: by the policies of realtime.messages.

-- relay.topic_blockers(role, login, command) : why no token of this role may use any private channel, each with its remedy
create or replace function relay.topic_blockers(role text, login text, command "char") returns text[]
language plpgsql stable
set search_path = ''
set jit = off as $$
declare
  judge constant text := coalesce(login, current_user);
  privilege constant text := case command when 'a' then 'insert' else 'select' end;
  relation constant oid := (select m.relation from relay.topic_table() m);
  subscriber constant oid := (select r.oid from pg_catalog.pg_roles r where r.rolname = role);
  reasons text[] := '{}';
begin
  if relation is null then
    return array['the table realtime.messages, whose policies say who may use which private channel, is missing: relay install'];
  elsif subscriber is null then
    return array[pg_catalog.format('the role %I does not exist', role)];
  elsif (select r.rolsuper from pg_catalog.pg_roles r where r.oid = subscriber) then
    return array[pg_catalog.format('%I is a superuser, and tokens with a superuser role may use no private channel', role)];
  elsif not coalesce(pg_catalog.pg_has_role((select r.oid from pg_catalog.pg_roles r where r.rolname = judge), subscriber, 'member'), false) then
    return array[pg_catalog.format('the login that evaluates policies may not act as it: grant %I to %I', role, judge)];
  end if;
  if not pg_catalog.has_schema_privilege(subscriber, (select c.relnamespace from pg_catalog.pg_class c where c.oid = relation), 'usage') then
    reasons := reasons || pg_catalog.format('%I may not use the schema realtime: grant usage on schema realtime to %1$I', role);
  end if;
  if not pg_catalog.has_any_column_privilege(subscriber, relation, privilege) then
    reasons := reasons || pg_catalog.format('%I has no right to %s: grant %2$s on realtime.messages to %1$I', role, privilege);
  end if;
  return reasons || array(
    select pg_catalog.format('its policies read what %I may not: %s', role, g)
    from pg_catalog.unnest(relay.missing_grants(relation, subscriber, command)) g);
end
$$;
comment on function relay.topic_blockers(text, text, "char") is 'why a role may use no private channel, with remedies';

-- relay.topic_rules(roles, login, bodies) -> {"read": {"rules", "blockers"}, "write": {...}}: who may use which private channel; null without the table
-- "bodies" are those of relay.catalog(), of what the policies of the table call. "rules" are as an entry of relay.catalog(), with the policies by which the roles may read rows of the table, or add them.
-- "blockers" are the reasons why a role may do nothing, with remedies; "tables" are the tables that the policies look into.
drop function if exists relay.topic_rules(text[], text);
create or replace function relay.topic_rules(roles text[], login text default null, bodies jsonb default null) returns jsonb
language sql stable
set search_path = ''
set lock_timeout = '20ms'
set jit = off as $$
  select pg_catalog.jsonb_build_object('tables', (
      select coalesce(pg_catalog.jsonb_agg(t."table"::bigint order by t."table"), '[]')
      from relay.policy_tables('{}') t where t.relation = 0 and t."table" <> t.subject))
    || pg_catalog.jsonb_object_agg(case o.command when 'a' then 'write' else 'read' end, pg_catalog.jsonb_build_object(
    'rules', pg_catalog.jsonb_build_object(
      'id', 0, 'oid', c.oid::bigint, 'schema', n.nspname, 'table', c.relname, 'kind', c.relkind,
      'leave_events', false, 'full', false, 'key', '[]'::jsonb,
      'columns', relay.catalog_columns(c.oid),
      'access', (
        select coalesce(pg_catalog.jsonb_object_agg(seen.rolname, seen.access), '{}')
        from (select r.rolname, relay.access(c.oid, r.oid, $2, $3, o.command) as access
              from pg_catalog.pg_roles r where r.rolname = any (relay.subscriber_roles($1, $2))) seen
        where seen.access is not null)),
    'blockers', (
      select coalesce(pg_catalog.jsonb_object_agg(r.role, relay.topic_blockers(r.role, $2, o.command)), '{}')
      from pg_catalog.unnest($1) r (role))))
  from relay.topic_table() m
  join pg_catalog.pg_class c on c.oid = m.relation
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  cross join (values ('r'::"char"), ('a')) o (command)
  having pg_catalog.count(*) > 0
$$;
comment on function relay.topic_rules(text[], text, jsonb) is 'who may use which private channel';
