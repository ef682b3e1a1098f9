//! Policies on claims of a shape that nobody expects: a text where a list should be, a claim that is missing, an empty one.

use serde_json::{Value, json};

use crate::support::ANN;
use crate::support::ways::Ways;

const SCHEMA: &str = "
    create table t (id int primary key, team text, n numeric, code varchar);
    insert into t values (1, 'acme', 1.6, 'abcd'), (2, 'a', 2, 'abc'), (3, null, null, null), (4, 'cme', 1, 'ab');
    create table members (n numeric, code varchar); insert into members values (1.6, 'abcd'), (2, 'ab');
    alter table t enable row level security; grant select on t, members to authenticated; select relay.watch('t');
    create table ids_t (id int); grant select on ids_t to authenticated; insert into ids_t select generate_series(1, 5);
    create function sees_t(wanted int) returns bool language plpgsql stable as $$
      begin return exists (select from t where id = wanted); exception when others then return null; end $$;
    create function claims_raise() returns bool language sql stable as 'select false'";

/// Each condition is shown alone, below `not`, and below `coalesce`, which shows what is null.
const CONDITIONS: [&str; 14] = [
    "(auth.jwt() -> 'orgs' ->> 0) is null",
    "(auth.jwt() -> 'orgs' -> -1) is null",
    "(auth.jwt() -> 'orgs' ->> 1) is null",
    "team = (auth.jwt() -> 'orgs' ->> 0)",
    "team is distinct from (auth.jwt() -> 'orgs' ->> 0)",
    "(auth.jwt() -> 'orgs' -> 0 ->> 0) is null",
    "nullif(coalesce(current_setting('request.jwt.claim.org', true), auth.jwt() ->> 'org'), '') is null",
    "team = nullif(coalesce(current_setting('request.jwt.claim.org', true), auth.jwt() ->> 'org'), '')",
    "team = any (string_to_array(auth.jwt() ->> 'org', auth.jwt() ->> 'by'))",
    "string_to_array(auth.jwt() ->> 'org', auth.jwt() ->> 'by') is null",
    "n = any ((select array_agg(m.n)::int[] from members m where auth.uid() is not null)::numeric[])",
    "code = any ((select array_agg(m.code)::varchar(3)[] from members m where auth.uid() is not null)::varchar[])",
    "n = any (array(select m.n::int from members m where auth.uid() is not null)::numeric[])",
    "team = any (array(select jsonb_array_elements_text(case when jsonb_typeof(auth.jwt() -> 'orgs') = 'array' then auth.jwt() -> 'orgs' else '[]' end)))",
];

fn readers() -> Vec<Value> {
    let orgs = [
        json!("acme"),
        json!(5),
        json!(true),
        json!(null),
        json!(["acme"]),
        json!([]),
        json!({"0": "acme"}),
        json!([["acme"]]),
    ];
    let mut readers: Vec<Value> = orgs.into_iter().map(|orgs| json!({"orgs": orgs})).collect();
    readers.extend([
        json!({}),
        json!({"org": "acme"}),
        json!({"org": ""}),
        json!({"org": "acme", "by": ","}),
        json!({"org": "acme", "by": null}),
        json!({"org": "a,cme", "by": ","}),
        json!({"org": "acme", "by": ""}),
    ]);
    for reader in &mut readers {
        reader["role"] = json!("authenticated");
        reader["sub"] = json!(ANN);
        reader["exp"] = json!(4_000_000_000_u64);
    }
    readers
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_of_an_unexpected_shape_show_what_postgresql_shows() {
    let ways = Ways::new(SCHEMA).await;
    let mut found = Vec::new();
    for condition in CONDITIONS {
        for condition in [
            condition.to_owned(),
            format!("not ({condition})"),
            format!("coalesce({condition}, true)"),
            format!("coalesce(not ({condition}), true)"),
        ] {
            ways.database
                .run(&format!("drop policy if exists p on t; create policy p on t using ({condition})"))
                .await;
            let compared = Box::pin(ways.compare("t", &readers())).await;
            found.extend(compared.wrong.iter().map(|wrong| format!("{condition}: {wrong}")));
        }
    }
    assert!(found.is_empty(), "{}\n{} findings", found.join("\n"), found.len());
}
