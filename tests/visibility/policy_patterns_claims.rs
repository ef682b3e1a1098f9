//! Policies that look into the token: metadata, roles, levels, lists, and how people sign in.

use crate::visibility::policy_patterns::all_hold;

#[tokio::test(flavor = "multi_thread")]
async fn claims_by_name() {
    all_hold(CLAIMS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_claims() {
    all_hold(LISTS).await;
}

const CLAIMS: &str = r#"
compiled: one's organisation | org = auth.jwt() ->> 'org'
compiled: one's organisation, asked once | org = (select auth.jwt() ->> 'org')
compiled: one's organisation in the metadata | org = auth.jwt() -> 'app_metadata' ->> 'org'
compiled: the same with parentheses | org = ((auth.jwt() -> 'app_metadata') ->> 'org')
compiled: the same, asked once | org = (select ((auth.jwt() -> 'app_metadata') ->> 'org'))
compiled: the same, the token asked once | org = ((select auth.jwt()) -> 'app_metadata' ->> 'org')
compiled: the same by a path | org = auth.jwt() #>> '{app_metadata,org}'
compiled: the same by a function | org = jsonb_extract_path_text(auth.jwt(), 'app_metadata', 'org')
compiled: the same by the setting | org = current_setting('request.jwt.claims', true)::json -> 'app_metadata' ->> 'org'
compiled: the same by the setting as jsonb | org = current_setting('request.jwt.claims', true)::jsonb #>> '{app_metadata,org}'
compiled: the same by subscript | org = (auth.jwt())['app_metadata'] ->> 'org'
compiled: the same, cast | org = (auth.jwt() -> 'app_metadata' ->> 'org')::text
compiled: the same, cast to varchar | code = (auth.jwt() ->> 'org')::varchar or org = (auth.jwt() ->> 'org')::varchar
compiled: what anybody may write of himself | org = auth.jwt() -> 'user_metadata' ->> 'org'
compiled: a claim with a web address for a name | org = auth.jwt() -> 'https://example.org/claims' ->> 'org'
compiled: an organisation of another provider | org = coalesce(auth.jwt() ->> 'org_id', auth.jwt() -> 'o' ->> 'id')
compiled: an organisation or one's own | org = coalesce(auth.jwt() ->> 'org_id', auth.jwt() ->> 'sub')
compiled: an organisation of another provider, asked once | ((select auth.jwt() -> 'o') ->> 'id') = org
compiled: one's tenant | tenant = (auth.jwt() -> 'app_metadata' ->> 'tenant')::uuid
compiled: one's tenant, asked once | tenant = (select (auth.jwt() -> 'app_metadata' ->> 'tenant')::uuid)
compiled: one's tenant as text | tenant::text = auth.jwt() ->> 'tenant_id'
compiled: one's tenant, if any | tenant = nullif(auth.jwt() ->> 'tenant_id', '')::uuid
compiled: one's tenant by the setting | tenant = nullif(current_setting('request.jwt.claims', true)::json ->> 'tenant_id', '')::uuid
compiled: one's team | team = (auth.jwt() -> 'app_metadata' ->> 'team')::int
compiled: one's team by the document | team::text = auth.jwt() -> 'app_metadata' ->> 'team'
compiled: one's team as a document | to_jsonb(team) = auth.jwt() -> 'app_metadata' -> 'team'
compiled: one's team as bigint | size = (auth.jwt() -> 'app_metadata' ->> 'team')::bigint
compiled: a number of the token, cast | team = (auth.jwt() -> 'app_metadata' -> 'team')::int
compiled: an admin | auth.jwt() -> 'app_metadata' ->> 'role' = 'admin'
compiled: an admin, asked once | (select auth.jwt() -> 'app_metadata' ->> 'role') = 'admin'
compiled: an admin as a document | auth.jwt() -> 'app_metadata' -> 'role' = '"admin"'
compiled: an admin by containment | auth.jwt() -> 'app_metadata' @> '{"role": "admin"}'
compiled: an admin or the owner | owner = auth.uid() or auth.jwt() ->> 'user_role' = 'admin'
compiled: an admin or the owner, asked once | (select auth.uid()) = owner or (select auth.jwt() ->> 'user_role') = 'admin'
compiled: roles in a list | auth.jwt() ->> 'user_role' in ('admin', 'editor')
compiled: roles in an array | (auth.jwt() ->> 'user_role') = any (array['admin', 'editor'])
compiled: not that role | auth.jwt() ->> 'user_role' <> 'viewer'
compiled: not that role, null included | auth.jwt() ->> 'user_role' is distinct from 'viewer'
compiled: by the role | case auth.jwt() ->> 'user_role' when 'admin' then true when 'editor' then status <> 'archived' else published end
compiled: a flag | (auth.jwt() ->> 'admin')::boolean
compiled: a flag, spelled out | (auth.jwt() ->> 'admin')::boolean = true
compiled: a flag or not | coalesce((auth.jwt() ->> 'admin')::boolean, false)
compiled: a flag or not, asked once | (select coalesce((auth.jwt() ->> 'admin')::boolean, false))
compiled: a flag of the metadata | coalesce((auth.jwt() -> 'app_metadata' ->> 'admin')::bool, false) or owner = auth.uid()
compiled: a flag as a document | (auth.jwt() -> 'app_metadata' -> 'admin')::boolean
compiled: a flag as text | auth.jwt() ->> 'admin' = 'true'
compiled: a flag as a document that is true | auth.jwt() -> 'app_metadata' -> 'admin' = 'true'
compiled: a flag that is true | (auth.jwt() ->> 'admin')::boolean is true
compiled: a permanent account | (auth.jwt() ->> 'is_anonymous')::boolean is false
compiled: a permanent account, asked once | (select (auth.jwt() ->> 'is_anonymous')::boolean) is false
compiled: no anonymous account | not coalesce((auth.jwt() ->> 'is_anonymous')::boolean, false)
compiled: anonymous accounts see what is public | (auth.jwt() ->> 'is_anonymous')::boolean is not true or visibility = 'public'
compiled: a confirmed email | (auth.jwt() ->> 'email_verified')::boolean and email = auth.jwt() ->> 'email'
compiled: signed in with a second factor | auth.jwt() ->> 'aal' = 'aal2'
compiled: signed in with a second factor, asked once | (select auth.jwt() ->> 'aal') = 'aal2' and owner = auth.uid()
compiled: a second factor by an array | array[(select auth.jwt() ->> 'aal')] <@ array['aal2']
compiled: a second factor for what is private | visibility <> 'private' or (select auth.jwt() ->> 'aal') = 'aal2'
compiled: signed in by another provider | auth.jwt() -> 'app_metadata' ->> 'provider' = 'google'
compiled: signed in by an own provider's method | auth.jwt() #>> '{amr,0,method}' = 'totp'
compiled: signed in by method, by steps | auth.jwt() -> 'amr' -> 0 ->> 'method' = 'password'
compiled: one's plan | auth.jwt() -> 'app_metadata' ->> 'plan' = 'pro' or price is null
inverted: one's plan or it is free | auth.jwt() -> 'app_metadata' ->> 'plan' = 'pro' or price = 0
compiled: of age | (auth.jwt() -> 'user_metadata' ->> 'over_18')::boolean or level < 5
compiled: one's level | level <= (auth.jwt() ->> 'level')::int
compiled: one's level, or none | level <= coalesce((auth.jwt() ->> 'level')::int, 0)
compiled: one's level of the metadata | rank <= (auth.jwt() -> 'app_metadata' ->> 'level')::int
one by one (a cast that is not known here): one's level as a number | level <= (auth.jwt() ->> 'level')::numeric
compiled: at least that level | (auth.jwt() -> 'app_metadata' ->> 'level')::int >= 2 and published
compiled: between levels | (auth.jwt() ->> 'level')::int between rank and level
compiled: a claim is there | auth.jwt() ? 'email'
compiled: a claim is there and set | auth.jwt() ->> 'email' is not null
compiled: a claim is not set | auth.jwt() -> 'app_metadata' ->> 'admin' is null
compiled: a document is there | auth.jwt() -> 'app_metadata' is not null
compiled: a token at all | auth.jwt() is not null and published
compiled: a key of the metadata | auth.jwt() -> 'app_metadata' ? 'admin'
compiled: this application's token | auth.jwt() ->> 'aud' = 'authenticated' and owner = auth.uid()
compiled: not ended, and so everything | (auth.jwt() ->> 'exp')::bigint > 1000
compiled: an email of the house | split_part(auth.jwt() ->> 'email', '@', 2) = 'acme.org'
compiled: an email like those of the house | auth.jwt() ->> 'email' like '%@acme.org'
compiled: an email of the house by its end | right(auth.email(), 9) = '@acme.org' and published
inverted: an email of the organisation | split_part(auth.email(), '@', 1) = org or split_part(auth.email(), '.', 1) = 'ann@' || org
one by one (a pattern and a claim): an email by a pattern | auth.jwt() ->> 'email' ~ '@(acme\.org|beta\.io)$'
compiled: a word of the scope | 'items:write' = any (string_to_array(auth.jwt() ->> 'scope', ' '))
compiled: a word of the scope by position | position('items:read' in auth.jwt() ->> 'scope') > 0
compiled: a word of the scope, like | auth.jwt() ->> 'scope' like '%items:read%'
compiled: its prefix is one's organisation | path like '/' || (auth.jwt() ->> 'org') || '/%'
compiled: two claims | org = auth.jwt() ->> 'org' and level <= (auth.jwt() ->> 'level')::int
compiled: two claims, either | org = auth.jwt() ->> 'org' or email = auth.jwt() ->> 'email'
compiled: one's organisation, published, or one's own | (org = auth.jwt() -> 'app_metadata' ->> 'org' and published) or owner = auth.uid()
compiled: two claims agree | auth.jwt() ->> 'org' = auth.jwt() -> 'app_metadata' ->> 'org' and published
compiled: two claims differ | auth.jwt() -> 'user_metadata' ->> 'org' <> auth.jwt() -> 'app_metadata' ->> 'org'
one by one (a setting of the session): a setting nobody sets, and so nothing | current_setting('app.tenant', true) = 'acme'
"#;

const LISTS: &str = r#"
compiled: one of one's organisations | org = any (array(select jsonb_array_elements_text(auth.jwt() -> 'orgs')))
compiled: one of one's organisations, the list asked once | org in (select jsonb_array_elements_text(auth.jwt() -> 'orgs'))
compiled: the same from a table of them | org in (select x from jsonb_array_elements_text(auth.jwt() -> 'orgs') x)
compiled: the same with a name of its own | org in (select value from jsonb_array_elements_text(auth.jwt() -> 'orgs'))
compiled: the same with names | org in (select o.name from jsonb_array_elements_text(auth.jwt() -> 'orgs') as o (name))
compiled: the same of the setting | org in (select json_array_elements_text(current_setting('request.jwt.claims', true)::json -> 'orgs'))
compiled: the same as a key | auth.jwt() -> 'orgs' ? org
compiled: the same as a key, asked once | (select auth.jwt() -> 'orgs') ? org
compiled: the same as a document | auth.jwt() -> 'orgs' @> to_jsonb(org)
compiled: the same by any that exists | exists (select from jsonb_array_elements_text(auth.jwt() -> 'orgs') o where o = org)
compiled: the same, or an empty list | org in (select jsonb_array_elements_text(coalesce(auth.jwt() -> 'orgs', '[]')))
compiled: the same, or an empty list of the type | org in (select jsonb_array_elements_text(coalesce(auth.jwt() -> 'orgs', '[]'::jsonb)))
compiled: one of one's teams | team in (select jsonb_array_elements_text(auth.jwt() -> 'teams')::int)
compiled: one of one's teams in the metadata | team = any (array(select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'teams')::int))
compiled: one of one's teams, the array cast | team = any (array(select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'team_ids'))::int[])
compiled: one of one's teams, as text | team::text in (select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'team_ids'))
compiled: one of one's teams as a key | auth.jwt() -> 'app_metadata' -> 'team_ids' ? team::text
compiled: one of one's teams as a document | auth.jwt() -> 'app_metadata' -> 'teams' @> to_jsonb(team)
compiled: one of one's teams, cast outside | team in (select x::int from jsonb_array_elements_text(auth.jwt() -> 'teams') x)
compiled: one of one's teams as documents | team in (select x::int from jsonb_array_elements(auth.jwt() -> 'teams') x)
compiled: one of one's tenants | tenant in (select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'tenants')::uuid)
compiled: one of one's tenants as text | tenant::text in (select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'tenants'))
compiled: one of one's tenants, an array | tenant = any (array(select (jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'tenants'))::uuid))
compiled: one of the people in the token | owner in (select jsonb_array_elements_text(auth.jwt() -> 'ids')::uuid)
compiled: one of the people in the token, an array | owner = any (array(select jsonb_array_elements_text(auth.jwt() -> 'ids'))::uuid[])
compiled: in a group | auth.jwt() -> 'groups' ? 'admin'
compiled: in a group, by containment | auth.jwt() -> 'groups' @> '["admin"]'
compiled: in a group, by the list | 'editor' in (select jsonb_array_elements_text(auth.jwt() -> 'groups'))
compiled: in a group, by an array | 'editor' = any (array(select jsonb_array_elements_text(auth.jwt() -> 'groups')))
compiled: in one of the groups | auth.jwt() -> 'groups' ?| array['admin', 'owner']
compiled: in all of the groups | auth.jwt() -> 'groups' ?& array['admin', 'editor']
compiled: in one of the row's groups | auth.jwt() -> 'groups' ?| readers
compiled: groups that overlap | readers && array(select jsonb_array_elements_text(auth.jwt() -> 'groups'))
compiled: roles that overlap | readers && array(select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'roles'))
compiled: teams that overlap | team_ids && array(select jsonb_array_elements_text(auth.jwt() -> 'teams')::int)
compiled: a role of the metadata | auth.jwt() -> 'app_metadata' -> 'roles' ? 'editor'
compiled: a role of the metadata, by path | auth.jwt() #> '{app_metadata,roles}' ? 'editor'
compiled: a role under a web address | auth.jwt() -> 'https://example.org/claims' -> 'roles' ? 'admin'
compiled: a role, or the owner | owner = auth.uid() or auth.jwt() -> 'app_metadata' -> 'roles' ? 'admin'
compiled: a permission | 'items.read' in (select jsonb_array_elements_text(auth.jwt() -> 'permissions'))
compiled: a permission as a key | auth.jwt() -> 'permissions' ? 'items.write' and org = auth.jwt() ->> 'org'
compiled: a permission as a key, coalesced | coalesce(auth.jwt() -> 'permissions' ? 'items.write', false)
one by one (an operator on a claim): a permission of the row | auth.jwt() -> 'permissions' ? ('items.' || case when published then 'read' else 'write' end)
compiled: a method of signing in | auth.jwt() -> 'amr_methods' ? 'totp'
compiled: a method in documents | auth.jwt() -> 'amr' @> '[{"method": "totp"}]'
compiled: a method in documents, by elements | exists (select from jsonb_array_elements(auth.jwt() -> 'amr') m where m ->> 'method' = 'totp')
one by one (a number in a path): a method in documents, by a jsonpath | jsonb_path_exists((select auth.jwt()), '$.amr[*].method ? (@ == "totp")')
compiled: a method in documents, all of them | 'totp' = any (select x ->> 'method' from jsonb_array_elements(auth.jwt() -> 'amr') x)
compiled: a provider | auth.jwt() -> 'app_metadata' -> 'providers' ? 'google'
compiled: no such provider | not (auth.jwt() -> 'app_metadata' -> 'providers' ? 'google')
compiled: how many teams | jsonb_array_length(auth.jwt() -> 'teams') > 0 and published
compiled: a list that is empty | auth.jwt() -> 'orgs' = '[]'
compiled: what one hides | not (coalesce(auth.jwt() -> 'user_metadata' -> 'hidden', '[]'::jsonb) ? org)
compiled: none of one's teams | team not in (select jsonb_array_elements_text(auth.jwt() -> 'teams')::int)
compiled: none of one's teams, an array | team <> all (array(select jsonb_array_elements_text(auth.jwt() -> 'teams')::int))
compiled: the first of one's organisations | org = auth.jwt() -> 'orgs' ->> 0
compiled: the last of one's organisations | org = auth.jwt() -> 'orgs' ->> -1
compiled: an organisation by path | org = auth.jwt() #>> '{orgs,0}'
compiled: a list of the row and the token | 'public' = any (readers) or auth.jwt() -> 'groups' ? 'admin'
"#;
