//! Sub-selects whose list counts, unfolds or thins out what it finds, conditions that guard others, and tables that may not be read.

use crate::visibility::policy_patterns::all_hold;

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_are_more_than_columns() {
    all_hold(LISTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_that_raises_where_it_is_not_evaluated_costs_nothing() {
    all_hold(GUARDED).await;
}

const LISTS: &str = r#"
one by one: unnested | auth.jwt() ->> 'org' in (select unnest(tags))
one by one: unnested of another table | team in (select unnest(array[m.team, 4]) from members m where m.person = auth.uid())
one by one: unnested, to see whether there is any | exists (select unnest(items.tags) from members m where m.person = auth.uid())
one by one: the largest | team in (select max(m.team) from members m where m.person = auth.uid())
one by one: the largest within | team in (select t.id from teams t where t.id in (select max(m.team) from members m where m.person = auth.uid()))
one by one: counted, and so everything | exists (select count(*) from members m where m.team = items.team and m.person = auth.uid())
one by one: counted, and so nothing | not exists (select count(*) from members m where m.team = items.team and m.person = auth.uid())
one by one: one of each | team in (select distinct on (m.person) m.team from members m where m.person = auth.uid() order by m.person, m.team)
one by one: numbered | id in (select row_number() over (order by m.team) from members m where m.person = auth.uid())
"#;

const GUARDED: &str = r#"
inverted: a number behind a look at its kind | jsonb_typeof(doc -> 'level') = 'number' and (doc ->> 'level')::int > 1
inverted: a number behind a look at its kind, by case | case when code ~ '^[0-9]+$' then code::int > 0 else published end
inverted: a uuid behind a look at its text | author ~ '^[0-9a-f-]{36}$' and author::uuid = owner
compiled: a table that may not be read, and so nothing | auth.uid() in (select id from admins)
"#;
