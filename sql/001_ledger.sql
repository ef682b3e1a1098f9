-- The schema, its roles, the ledger of applied files, and the random mark of this history.
--
-- Also run before every later installation: a dump can bring the schema into a cluster without these roles.

create schema if not exists relay;
comment on schema relay is 'change feed: changelog, watched relations, and what the relay reads';

-- Roles belong to the whole cluster, so an installer in another database may create the same role at the same time.
-- Only roles that this installer creates are granted to it: an existing role keeps its members.
do $$
declare
  wanted text;
  created boolean;
  superuser constant boolean := (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user);
begin
  foreach wanted in array array['relay_writer', 'relay_image', 'relay_reader', 'anon', 'authenticated', 'service_role'] loop
    created := false;
    if not exists (select from pg_catalog.pg_roles r where r.rolname = wanted) then
      begin
        execute pg_catalog.format('create role %I nologin', wanted);
        created := true;
      exception when duplicate_object or unique_violation then
        null;
      end;
    end if;
    if created and wanted = 'service_role' then
      begin
        alter role service_role bypassrls;
      exception when insufficient_privilege then
        raise notice 'service_role has no BYPASSRLS: the installer may not grant it'
          using hint = 'As a superuser: alter role service_role bypassrls';
      end;
    end if;
    -- Functions owned by relay_writer and relay_image need membership in these; the relay impersonates the others.
    if not superuser and (created or wanted in ('relay_writer', 'relay_image'))
       and not pg_catalog.pg_has_role(current_user, wanted, 'usage') then
      begin
        execute pg_catalog.format('grant %I to current_user', wanted);
      exception
        when unique_violation then
          null;
        when insufficient_privilege then
          raise exception '% exists already, and % may not become a member of it', wanted, current_user
            using errcode = 'insufficient_privilege',
                  hint = pg_catalog.format('As a superuser: grant %I to %I', wanted, current_user);
      end;
    end if;
  end loop;
end
$$;

create table if not exists relay.ledger (
  file text primary key,
  checksum text not null,
  version text not null,
  applied_at timestamptz not null default pg_catalog.now()
);
comment on table relay.ledger is 'applied files of sql/, with checksum and version';
-- A file that only older versions have; any other unknown file belongs to a newer version.
delete from relay.ledger where file = '006_indexes.sql';

create table if not exists relay.history (
  mark uuid not null
);
comment on table relay.history is 'one row: the random mark of this history, part of the epoch';

insert into relay.history (mark)
select pg_catalog.gen_random_uuid()
where not exists (select from relay.history);
create unique index if not exists history_one_row on relay.history ((true));
-- A publication for all tables refuses updates of a table without a key unless its replica identity is FULL.
do $$
begin
  if (select c.relreplident <> 'f' from pg_catalog.pg_class c where c.oid = 'relay.history'::pg_catalog.regclass) then
    alter table relay.history replica identity full;
  end if;
end
$$;
