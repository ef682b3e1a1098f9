//! Policies that look at the row: flags, states, times, ranges, patterns, documents and lists.

use crate::visibility::policy_patterns::all_hold;

#[tokio::test(flavor = "multi_thread")]
async fn flags_states_and_numbers() {
    all_hold(STATES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn times_texts_documents_and_lists() {
    all_hold(PARTS).await;
}

const STATES: &str = r#"
compiled: published | published
compiled: published, spelled out | published = true
compiled: published for sure | published is true
compiled: not refused | published is not false
compiled: undecided | published is null
compiled: not archived | not archived
compiled: not archived, or unknown | archived is not true
compiled: archived is false | archived = false
compiled: coalesced | coalesce(published, false)
compiled: coalesced, spelled out | coalesce(archived, false) = false
compiled: published and not archived | published and not coalesce(archived, false)
compiled: published or one's own | published or owner = auth.uid()
compiled: published or one's own, spelled out | published = true or (select auth.uid()) = owner
compiled: a draft is for its owner | (published is true) or (published is not true and owner = auth.uid())
compiled: not deleted | deleted_at is null
compiled: deleted, for its owner | deleted_at is not null and owner = auth.uid()
compiled: not deleted and published | deleted_at is null and published
compiled: not deleted and one's own or published | deleted_at is null and (owner = auth.uid() or published)
compiled: one state | status = 'published'
compiled: one state, cast | status = 'published'::status
compiled: not that state | status <> 'draft'
compiled: states | status in ('published', 'archived')
compiled: no such state | status not in ('draft', 'review')
compiled: states as an array | status = any ('{published,archived}'::status[])
compiled: states as array of casts | status = any (array['published', 'review']::status[])
compiled: a state as text | status::text = 'review'
compiled: states as text | status::text in ('review', 'draft')
compiled: a state as text in any of | status::text = any (array['review', 'draft'])
inverted: beyond a state | status > 'draft'
inverted: between states | status between 'review' and 'published'
compiled: a state, or one's own | status = 'published' or owner = auth.uid()
compiled: by the state | case status when 'published' then true when 'draft' then owner = auth.uid() else false end
compiled: by the state, with conditions | case when status = 'published' then true when status = 'draft' then owner = auth.uid() else assignee = auth.uid() end
compiled: a word | visibility = 'public'
compiled: words | visibility in ('public', 'unlisted')
compiled: a word in varchar | state = 'open'
compiled: words in varchar | state in ('open', 'closed')
compiled: a word in varchar as text | state::text = 'open'
compiled: words in varchar as text | state::text = any (array['open', 'done'])
compiled: words in varchar as varchar | state = any (array['open'::varchar, 'done'::varchar]::text[])
compiled: a word that is empty | org = ''
compiled: a word that is not empty | org is not null and org <> ''
inverted: no word | nullif(org, '') is null
compiled: a word with an apostrophe | org = 'O''Dd & Co'
compiled: private to its owner, public to all | visibility = 'public' or (visibility = 'private' and owner = auth.uid())
compiled: to anybody who is signed in | visibility = 'public' or (auth.uid() is not null and visibility = 'team')
inverted: a word in any case | lower(visibility) = 'public'
inverted: a word without blanks around | trim(state) = 'open'
compiled: a number | level = 2
compiled: numbers | level in (1, 2, 3)
compiled: at least | level >= 2
compiled: between | level between 1 and 3
compiled: not between | level not between 1 and 3
compiled: more than another column | level > rank
compiled: a large number | size > 9007199254740992
compiled: a small one | rank < 0
compiled: a negative one | level = -1
compiled: no team | team is null or team = 0
inverted: arithmetic | level + rank > 3
inverted: every second | id % 2 = 0
inverted: a price | price > 5
inverted: a price of nothing | price = 0
inverted: a price between | price between 0.01 and 10.00
inverted: a price, or one's own | price = 0 or owner = auth.uid()
inverted: a fraction | score > 0.5
inverted: no fraction | score <> 'NaN'
inverted: rounded | round(price) = 10
inverted: the least of two | least(level, rank) > 0
compiled: one's own while it is open | owner = auth.uid() and state = 'open'
compiled: not one's own draft | not (status = 'draft' and owner = auth.uid())
compiled: null is not true | (owner = auth.uid()) is true
compiled: null counts as false | coalesce(owner = auth.uid(), false)
compiled: null counts as true | coalesce(owner = auth.uid(), true)
compiled: is unknown | (owner = auth.uid()) is unknown
compiled: is not false | (published or owner = auth.uid()) is not false
"#;

const PARTS: &str = r#"
inverted: it has begun | starts <= now()
inverted: it has begun and not ended | starts <= now() and (ends is null or ends > now())
inverted: now is between | now() between starts and ends
inverted: it has begun, or one's own | starts <= now() or owner = auth.uid()
inverted: begun some time ago | starts < now() - interval '1 day'
inverted: created in those years | starts >= '2001-01-01' and starts < '2900-01-01'
inverted: in force, published and not deleted | published and deleted_at is null and starts < now() and ends > now()
inverted: it is due | due <= current_date
inverted: it is due or not dated | due is null or due < current_date
inverted: at that hour or whenever | extract(year from starts) = 2001
inverted: truncated | date_trunc('year', starts) = '2001-01-01'
inverted: in the zone | (starts at time zone 'UTC')::date = '2001-01-01'
inverted: in a range of times | span @> now()
inverted: ranges that overlap | span && tstzrange('2001-01-01', '2002-01-01')
inverted: a range that is empty | isempty(span)
inverted: infinite or past | ends < 'infinity'
inverted: the end of a range | upper(span) > now() or upper_inf(span)
compiled: begins with | title like 'H%'
compiled: ends with | email like '%@acme.org'
compiled: does not | email not like '%@acme.org'
inverted: in any case | email ilike '%@acme.org'
inverted: a pattern | code ~ '^[A-Z]-[0-9]+$'
inverted: a pattern in any case | code ~* '^a-[0-9]$'
one by one (a function that is not known as harmless): similar | code similar to '[AB]-_'
inverted: starts with | starts_with(path, '/acme/')
inverted: its length | length(title) > 5
inverted: before another | title < code
inverted: joined texts | org || '/' || code = 'acme/A-1'
inverted: part of it | substring(path from 2 for 4) = 'acme'
inverted: split | split_part(email, '@', 2) = 'acme.org'
compiled: with an escape | title like '\%'
inverted: a flag in a document | (doc ->> 'public')::boolean
inverted: a flag in a document, as text | doc ->> 'public' = 'true'
inverted: a flag in a document, as json | doc -> 'public' = 'true'
inverted: a flag in json | meta ->> 'public' = 'true'
inverted: a key in a document | doc ? 'tags'
inverted: any of the keys | doc ?| array['tags', 'org']
inverted: all of the keys | doc ?& array['tags', 'public']
inverted: a document within | doc @> '{"public": true}'
inverted: a list within a document | doc @> '{"tags": ["news"]}'
inverted: a text in a list in a document | doc -> 'tags' ? 'news'
inverted: a path of a document | doc #>> '{a,b,1,c}' = 'x'
inverted: a path of jsonpath | jsonb_path_exists(doc, '$.tags[*] ? (@ == "news")')
inverted: an operator of jsonpath | doc @? '$.members'
inverted: the kind of a document | jsonb_typeof(doc) = 'object'
inverted: a number in a document | (doc ->> 'level')::int > 2
inverted: a list in a document, by elements | exists (select from jsonb_array_elements_text(case when jsonb_typeof(doc -> 'tags') = 'array' then doc -> 'tags' end) x where x = 'acme')
one by one (a document of the row and a claim): whom a document lists | doc -> 'members' ? (auth.uid())::text
one by one (a cast to a document may be a user's function): whom a document lists, as a document | doc -> 'members' @> to_jsonb(auth.uid()::text)
inverted: a document as text | doc::text like '%news%'
compiled: among the members | auth.uid() = any (members)
compiled: among the members, asked once | (select auth.uid()) = any (members)
compiled: not among the members | not (auth.uid() = any (members))
compiled: not one of them | auth.uid() <> all (members)
compiled: a member or the owner | owner = auth.uid() or auth.uid() = any (members)
compiled: among the readers as text | auth.uid()::text = any (readers)
compiled: among the readers by email | auth.jwt() ->> 'email' = any (readers)
compiled: among the readers by role | auth.jwt() ->> 'user_role' = any (readers)
compiled: a subject among the readers | (select auth.jwt() ->> 'sub') = any (readers)
compiled: one's role, or public | 'public' = any (readers) or auth.jwt() ->> 'user_role' = any (readers)
compiled: as an array contained | members @> array[auth.uid()]
compiled: as an array that contains | array[auth.uid()] <@ members
compiled: as an array that overlaps | members && array[auth.uid()]
one by one (a function of a claim): position in an array | array_position(members, auth.uid()) is not null
compiled: tagged | 'news' = any (tags)
compiled: not tagged | 'news' <> all (tags)
compiled: tagged with | tags @> array['news']
compiled: tagged with one of | tags && array['news', 'internal']
inverted: no tags | tags = '{}'
inverted: how many tags | cardinality(tags) > 1
inverted: how long | array_length(tags, 1) = 1
inverted: unnested | 'acme' in (select unnest(tags))
compiled: one's organisation among the tags | auth.jwt() ->> 'org' = any (tags)
compiled: a number among numbers | 2 = any (team_ids)
compiled: one's team among the teams | (auth.jwt() -> 'app_metadata' ->> 'team')::int = any (team_ids)
inverted: the first tag | tags[1] = 'acme'
inverted: the first member | members[1] = auth.uid()
inverted: whole rows | items is not null
one by one (a cast to a document may be a user's function): whole row as a document | to_jsonb(items) ->> 'org' = 'acme'
inverted: joined tags | array_to_string(tags, ',') = 'news,acme'
compiled: a text with quotes and a backslash | title = '"quoted" \ back'
compiled: a text of two lines | title = E'two\nlines'
compiled: a backslash at the end | title <> 'a\' and code = 'A-1'
compiled: a text of other letters | title = 'ünï 🦀'
compiled: numbers at the edge | level > -2147483648 and size > -9223372036854775808
inverted: any of the patterns | title like any (array['H%', 'h%'])
inverted: an interval that overlaps | (starts, ends) overlaps (timestamptz '2001-01-01', timestamptz '2002-01-01')
inverted: unnested by a pattern | exists (select 1 from unnest(tags) t where t like 'n%')
inverted: its first letters | left(title, 2) = 'He'
inverted: what a pattern finds in it | substring(code from '^[A-Z]') = 'A'
one by one (a function that is not known as harmless): a range of numbers | level <@ int4range(1, 3)
one by one (a function that is not known as harmless): joined by a function | concat(org, '/', code) = 'acme/A-1'
"#;
