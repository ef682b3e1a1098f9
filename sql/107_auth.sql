-- Creates auth.uid(), auth.role(), auth.jwt(), auth.email() where they are missing, so that policies written for Supabase or
-- PostgREST run unchanged. Existing functions are never replaced.

do $$
declare
  helper record;
begin
  if not exists (select from pg_catalog.pg_namespace n where n.nspname = 'auth') then
    create schema auth;
    grant usage on schema auth to anon, authenticated, service_role;
  end if;
  for helper in
    select * from (values
      ('jwt', 'jsonb', $f$ select nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb $f$,
       'the claims of the caller''s token'),
      ('uid', 'uuid', $f$ select nullif(nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')::uuid $f$,
       'the caller: the claim sub'),
      ('role', 'text', $f$ select nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'role' $f$,
       'the claim role'),
      ('email', 'text', $f$ select nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'email' $f$,
       'the claim email')) h (name, type, body, description)
  loop
    if not exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
                   where n.nspname = 'auth' and p.proname = helper.name and p.pronargs = 0) then
      begin
        execute pg_catalog.format('create function auth.%I() returns %s language sql stable as %L', helper.name, helper.type, helper.body);
        execute pg_catalog.format('comment on function auth.%I() is %L', helper.name, helper.description);
      exception when insufficient_privilege then
        raise notice 'auth.%() is missing, and the installer may not create it in schema auth', helper.name;
      end;
    end if;
  end loop;
end
$$;
