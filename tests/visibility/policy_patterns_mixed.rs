//! Several policies on one table, policies for roles, and functions.

use crate::visibility::policy_patterns::{all_hold, all_hold_with};

#[tokio::test(flavor = "multi_thread")]
async fn several_policies() {
    all_hold(SEVERAL).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn functions() {
    all_hold_with(
        "create function org_by_path() returns text language sql stable set search_path = '' as $$ select auth.jwt() ->> 'org' $$;
         create function org_by_definer() returns text language sql stable security definer as $$ select auth.jwt() ->> 'org' $$;
         create function org_by_return() returns text language sql stable return (auth.jwt() ->> 'org');
         create function org_by_two() returns text language sql stable as $$ select 1; select auth.jwt() ->> 'org' $$;
         create function org_by_where() returns text language sql stable as
           $$ select auth.jwt() ->> 'org' where auth.jwt() ->> 'aal' = 'aal2' $$;
         create function org_with_comment() returns text language sql stable as $$
           -- the organisation
           SELECT /* of the token */ auth.jwt() ->> 'org';
         $$;
         create function orgs_of_claims() returns setof text language sql stable as
           $$ select jsonb_array_elements_text(auth.jwt() -> 'orgs') $$;
         create function my_level() returns int language sql stable as $$ select (auth.jwt() ->> 'level')::int $$;",
        FUNCTIONS,
    )
    .await;
}

const SEVERAL: &str = r#"
compiled: two permit | create policy a on items using (owner = auth.uid()); create policy b on items using (published)
compiled: two permit, one only to write | create policy a on items for select using (owner = auth.uid()); create policy b on items for update using (true)
compiled: one for everything | create policy a on items for all using (owner = auth.uid()) with check (false)
compiled: one for everything, to a role | create policy a on items for all to authenticated using (owner = auth.uid()) with check (owner = auth.uid())
compiled: only to insert, and so nothing | create policy a on items for insert with check (true)
compiled: only restrictive, and so nothing | create policy a on items as restrictive using (true)
compiled: to those who signed in | create policy a on items for select to authenticated using (true)
compiled: to those who did not | create policy a on items for select to anon using (published)
compiled: to both, in two ways | create policy a on items for select to anon using (published); create policy b on items for select to authenticated using (owner = auth.uid())
compiled: to both | create policy a on items for select to anon, authenticated using (published)
compiled: to the public | create policy a on items for select to public using (visibility = 'public')
compiled: to another role, and so nothing | create policy a on items for select to service_role using (true)
compiled: to another role too | create policy a on items for select to service_role using (true); create policy b on items for select to authenticated using (owner = (select auth.uid()))
compiled: a second factor besides | create policy a on items using (owner = auth.uid()); create policy mfa on items as restrictive to authenticated using ((select auth.jwt() ->> 'aal') = 'aal2')
compiled: a second factor for all, in two ways | create policy a on items using (true); create policy mfa on items as restrictive using (auth.jwt() ->> 'aal' = 'aal2' or visibility = 'public')
compiled: a second factor by an array | create policy a on items using (true); create policy mfa on items as restrictive to authenticated using (array[(select auth.jwt() ->> 'aal')] <@ array['aal2'])
compiled: tenants apart | create policy a on items using (published); create policy tenants on items as restrictive using (tenant = (auth.jwt() -> 'app_metadata' ->> 'tenant')::uuid)
compiled: tenants apart, one's own | create policy a on items using (owner = auth.uid()); create policy tenants on items as restrictive to authenticated using (tenant = (select (auth.jwt() -> 'app_metadata' ->> 'tenant')::uuid))
compiled: tenants apart, by a function | create policy a on items using (true); create policy tenants on items as restrictive using (tenant = my_tenant())
inverted: tenants apart, by members | create policy a on items using (true); create policy tenants on items as restrictive using (org in (select o.org from org_members o where o.person = auth.jwt() ->> 'sub'))
compiled: no anonymous accounts | create policy a on items to authenticated using (true); create policy b on items as restrictive to authenticated using ((select (auth.jwt() ->> 'is_anonymous')::boolean) is false)
compiled: nothing that was deleted | create policy a on items using (owner = auth.uid() or published); create policy b on items as restrictive using (deleted_at is null)
compiled: two restrict | create policy a on items using (true); create policy b on items as restrictive using (not archived); create policy c on items as restrictive using (deleted_at is null)
compiled: two restrict and two permit | create policy a on items using (published); create policy b on items using (owner = auth.uid());
  create policy c on items as restrictive using (org = auth.jwt() ->> 'org'); create policy d on items as restrictive using (deleted_at is null)
compiled: restricted to write only | create policy a on items using (published); create policy b on items as restrictive for update using (false)
compiled: restricted for a role | create policy a on items using (true); create policy b on items as restrictive to anon using (visibility = 'public')
inverted: members and the public | create policy a on items using (visibility = 'public'); create policy b on items to authenticated using (team in (select team from members where person = auth.uid()))
inverted: members with a second factor | create policy a on items using (team in (select team from members where person = (select auth.uid())));
  create policy b on items as restrictive using ((select auth.jwt() ->> 'aal') = 'aal2')
inverted: members, owners and admins | create policy a on items using (owner = auth.uid()); create policy b on items using (team in (select team from members where person = auth.uid()));
  create policy c on items using (auth.jwt() ->> 'user_role' = 'admin')
inverted: nobody who is banned | create policy a on items using (published); create policy b on items as restrictive using (not exists (select 1 from profiles p where p.id = auth.uid() and p.banned))
inverted: nothing of whom one blocks | create policy a on items using (true); create policy b on items as restrictive using (not exists (select 1 from blocks b where b.blocker = auth.uid() and b.blocked = items.owner))
inverted: in its time | create policy a on items using (published); create policy b on items as restrictive using (starts <= now() and (ends is null or ends > now()))
inverted: readers see what is out, writers see their own | create policy a on items to anon using (status = 'published' and starts <= now());
  create policy b on items to authenticated using (owner = auth.uid() or (status = 'published' and starts <= now()))
inverted: a store of files | create policy a on items to authenticated using (state = 'open' and (string_to_array(path, '/'))[2] = (select auth.jwt() ->> 'org'))
inverted: a channel of messages | create policy a on items to authenticated using (visibility = 'public' or auth.uid() = any (members) or team in (select team from members where person = auth.uid() and state = 'active'))
inverted: a shop | create policy a on items using (published and price > 0 and deleted_at is null); create policy b on items to authenticated using (owner = (select auth.uid()))
inverted: support may look | create policy a on items using (owner = auth.uid()); create policy b on items using (exists (select 1 from profiles p where p.id = auth.uid() and p.role in ('admin', 'editor')) and status <> 'draft')
compiled: three roles | create policy a on items using (auth.jwt() ->> 'user_role' = 'admin'); create policy b on items using (auth.jwt() ->> 'user_role' = 'editor' and org = auth.jwt() ->> 'org');
  create policy c on items using (auth.jwt() ->> 'user_role' = 'viewer' and published)
inverted: one of them by a function | create policy a on items using (owner = auth.uid()); create policy b on items using (private.is_member(team))
inverted: one that restricts by a function | create policy a on items using (owner = auth.uid()); create policy b on items as restrictive using (private.has_role('admin'))
"#;

const FUNCTIONS: &str = r#"
inverted: a member by a function | private.is_member(team)
inverted: a member by a function, or the owner | owner = auth.uid() or private.is_member(team)
inverted: a role by a function | private.has_role('admin')
inverted: a role by a function, asked once | (select private.has_role('admin'))
inverted: one's teams by a function | team in (select private.my_teams())
inverted: one's teams by a function, named | team in (select t from private.my_teams() t)
inverted: one's teams as an array by a function | team = any (private.my_team_ids())
inverted: one's teams as an array by a function, asked once | team = any ((select private.my_team_ids())::int[])
inverted: an admin by a function | private.is_site_admin() or owner = auth.uid()
inverted: an admin by a function, asked once | (select private.is_site_admin())
one by one (a function of one's own): one's organisation by a function | org = private.my_org()
one by one (a function of one's own): one's organisation by a function, asked once | org = (select private.my_org())
one by one (a function of one's own): a permission by a function | authorize('items.read')
one by one (a function of one's own): a permission by a function, asked once | (select authorize('items.write')) and org = 'acme'
one by one (a function of one's own): a claim by a function that has an argument | org = claim('org') #>> '{}'
compiled: a claim by a function that has an argument, as text | claim('role') = '"admin"'
one by one (a function of one's own): a whole row | can_read(items)
compiled: a function of the row alone | is_public(visibility)
inverted: a boss, by a function without arguments | is_boss()
compiled: the claims by a function | org = my_claims() ->> 'org'
compiled: the claims by a function, asked once | org = (select my_claims()) -> 'app_metadata' ->> 'org'
compiled: the tenant by a function | tenant = my_tenant()
compiled: the tenant by a function, asked once | tenant = (select my_tenant())
compiled: an organisation by a function | org = org_of_claims()
compiled: an organisation by a function or one's own | org = org_of_claims() or owner = me()
compiled: an admin of the claims by a function | is_claims_admin()
compiled: an admin of the claims by a function, or the owner | (select is_claims_admin()) or owner = auth.uid()
compiled: a comparison in a function | is_admin()
compiled: a comparison in a function, or the owner | is_admin() or owner = auth.uid()
inverted: a member by a function for oneself | team in (select team from members where person = me())
inverted: a member by the subject of a function | exists (select 1 from members m where m.team = items.team and m.person = (my_claims() ->> 'sub')::uuid)
inverted: a team of the organisation by a function | team in (select id from teams where org = org_of_claims())
compiled: a function with a comment | org = org_with_comment()
compiled: a number by a function | level <= my_level()
compiled: a function with an empty search path | org = org_by_path()
compiled: a function with its owner's rights | org = org_by_definer()
compiled: a function with a body that is parsed at once | org = org_by_return()
one by one (more than one query): a function that does two things | org = org_by_two()
one by one (more than one expression): a function that may find nothing | org = org_by_where()
compiled: a function that gives several | org in (select orgs_of_claims())
inverted: whether there is a member, asked once | (select exists (select 1 from members m where m.team = items.team and m.person = auth.uid()))
one by one (a text only PostgreSQL writes): a list as text | auth.jwt() ->> 'teams' like '%' || team::text || '%'
one by one (a text only PostgreSQL writes): a fraction in the token | price <= (auth.jwt() ->> 'limit')::numeric
"#;
