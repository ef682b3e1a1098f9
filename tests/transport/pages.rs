//! Rows in pages: in the order that is asked for, each once, and no more of a table read than is given.

use serde_json::{Value, json};

use crate::support::http::{Answer, get};
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, eventually, token};

/// `t` with all kinds of values, of which each other row is Ann's.
async fn stage() -> Stage {
    Stage::new(&format!(
        "create type mood as enum ('low', 'high');
         create table t (id int, part text, owner uuid, v text collate \"C\", n numeric, f float8, at timestamptz, mood mood,
                         d date, b bool, secret int, tags text[], doc json, primary key (part, id));
         alter table t enable row level security; create policy own on t using (owner = auth.uid());
         grant select (id, part, owner, v, n, f, at, mood, d, b, tags, doc) on t to authenticated;
         insert into t select i, 'p' || i % 3, case i % 2 when 0 then '{ANN}' else '{BOB}' end::uuid,
           case when i % 5 > 0 then chr(97 + i % 7) || '\"\\,é' end, case when i % 4 > 0 then i % 6 + 0.50 end,
           case i % 6 when 0 then 'NaN' when 2 then '-Infinity' else i / 7.0 end::float8,
           case when i % 10 > 0 then '2026-01-01 00:00:00.000001+02'::timestamptz + i % 4 * interval '1 day' end,
           case i % 8 when 0 then null when 2 then 'low' else 'high' end::mood, '2026-01-01'::date + i % 3, i % 3 = 1, i
           from generate_series(1, 60) i;
         create table bare (id int); grant select on bare to authenticated; insert into bare values (1), (2);
         select relay.watch('t'), relay.watch('bare')"
    ))
    .await
}

async fn ask(stage: &Stage, more: &str) -> Answer {
    let path = format!("/realtime/v1/changes?apikey={}{more}", token("authenticated", Some(ANN), json!({})));
    get(stage.relay.address, &path, "").await
}

/// All rows, page by page, as they are told.
async fn paged(stage: &Stage, limit: usize, more: &str) -> Vec<Value> {
    let (mut rows, mut after) = (Vec::new(), String::new());
    loop {
        let answer = ask(stage, &format!("&table=t&limit={limit}{more}{after}")).await;
        assert_eq!(answer.status, 200, "{more}: {answer:?}");
        let page = answer.body["rows"].as_array().unwrap();
        assert!(page.len() <= limit && answer.body["cursor"].is_string(), "{answer:?}");
        rows.extend(page.iter().cloned());
        if answer.body["more"] == false {
            assert_eq!(answer.body.get("after"), None, "{answer:?}");
            return rows;
        }
        assert_eq!((page.len(), &answer.body["more"]), (limit, &json!(true)), "{answer:?}");
        after = format!("&after={}", answer.body["after"].as_str().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_in_any_order_are_the_rows_that_postgresql_gives_in_it() {
    let stage = stage().await;
    for (order, sql) in [
        ("", "part, id"),
        ("id", "id, part"),
        ("id.desc", "id desc, part"),
        ("part.desc,id.desc", "part desc, id desc"),
        ("v", "v, part, id"),
        ("v.desc", "v desc, part, id"),
        ("v.nullsfirst,id.desc", "v nulls first, id desc, part"),
        ("v.desc.nullslast,n.desc", "v desc nulls last, n desc, part, id"),
        ("n.asc", "n, part, id"),
        ("f", "f, part, id"),
        ("f.desc", "f desc, part, id"),
        ("at.desc,mood", "at desc, mood, part, id"),
        ("mood.desc.nullslast,at", "mood desc nulls last, at, part, id"),
        ("d,b.desc", "d, b desc, part, id"),
    ] {
        for (filter, condition, limits) in [("", "true", [4, 100]), ("&filter=id=gt.11", "id > 11", [7, 24])]
        {
            let select = format!("select part || id from t where {condition} order by {sql}");
            let expected = stage.selected("authenticated", &json!({"sub": ANN}), &select).await;
            let order = if order.is_empty() { String::new() } else { format!("&order={order}") };
            for limit in limits {
                let rows = paged(&stage, limit, &format!("{order}{filter}")).await;
                let rows: Vec<String> = rows
                    .iter()
                    .map(|row| format!("{}{}", row["part"].as_str().unwrap(), row["id"]))
                    .collect();
                assert_eq!(rows, expected, "{order} {filter} {limit}");
            }
        }
    }
    // Columns that order need not be told.
    let rows = paged(&stage, 10, "&order=at.desc&select=b").await;
    assert_eq!(rows.len(), 30);
    assert!(rows[0].get("at").is_none() && rows[0].get("b").is_some(), "{}", rows[0]);
    // All rows at once say that there are no more.
    let all = ask(&stage, "&table=t").await;
    assert_eq!((all.body["rows"].as_array().unwrap().len(), &all.body["more"]), (30, &json!(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_cannot_be_given_is_refused_with_what_is_expected() {
    let stage = stage().await;
    let first = ask(&stage, "&table=t&limit=1").await;
    let after = first.body["after"].as_str().unwrap();
    for (more, told) in [
        ("&table=t&limit=0", "limit: a number of rows from 1 to 10000 is expected"),
        ("&table=t&limit=-1", "limit: a number"),
        ("&table=t&limit=many", "limit: a number"),
        ("&table=t&limit=10001", "limit: a number"),
        ("&table=t&order=", "order: column.asc or column.desc is expected"),
        ("&table=t&order=id,,v", "order: column.asc or column.desc is expected"),
        (
            "&table=t&order=nowhere",
            "order: public.t has no column nowhere that the role authenticated may read",
        ),
        ("&table=t&order=secret.desc", "order: public.t has no column secret"),
        ("&table=t&order=id.down", "order: public.t has no column id.down"),
        ("&table=t&order=tags", "order: tags is an array"),
        ("&table=t&order=doc", "order: a column that it names has a type without an order"),
        ("&table=t&after=7", "after: this value is not from an answer"),
        ("&table=t&after=", "after: this value is not from an answer"),
        (&format!("&table=t&order=v&after={after}"), "after: it is of another order"),
        (&format!("&table=bare&after={after}"), "after: it is of another order"),
        // ["part.asc.nullslast,id.asc.nullslast",["p0","x"]]
        (
            "&table=t&after=WyJwYXJ0LmFzYy5udWxsc2xhc3QsaWQuYXNjLm51bGxzbGFzdCIsWyJwMCIsIngiXV0",
            "after: this value is not from an answer",
        ),
        ("&table=t&since=A&limit=1", "since:"),
        (
            &format!("&table=t&since={}&limit=1", first.body["cursor"].as_str().unwrap()),
            "limit: it is for rows",
        ),
        (
            &format!("&table=t&since={}&order=id", first.body["cursor"].as_str().unwrap()),
            "order: it is for rows",
        ),
        ("&table=t&limit=1&limit=2", "limit: this parameter is there more than once"),
        ("&table=t&offset=1", "offset: there is no such parameter"),
    ] {
        let answer = ask(&stage, more).await;
        let error = answer.body["error"].as_str().unwrap_or_default();
        assert!(answer.status == 400 && error.starts_with(told), "{more}: {answer:?}");
    }
    // Without a key pages have no seam, and none is told.
    let bare = ask(&stage, "&table=bare&limit=1").await;
    assert_eq!((&bare.body["more"], bare.body.get("after")), (&json!(true), None), "{bare:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_costs_what_it_gives_and_not_what_the_table_has() {
    let stage = Stage::new(
        "do $$ begin execute format('alter database %I set track_functions = pl', current_database()); end $$;
         create function shows(owner uuid) returns bool language plpgsql stable leakproof as $$ begin return owner = auth.uid(); end $$;
         create table t (id int primary key, owner uuid, at timestamptz not null); alter table t enable row level security;
         create policy own on t using (shows(owner)); grant select on t to authenticated; select relay.watch('t')",
    )
    .await;
    stage
        .run(&format!(
            "alter table t disable trigger all;
             insert into t select i, '{ANN}', now() - i * interval '1 second' from generate_series(1, 20000) i;
             create index on t (at desc); analyze t; alter table t enable trigger all; select relay.watch('t')"
        ))
        .await;
    for order in ["", "&order=id.desc", "&order=at.desc"] {
        let mut after = String::new();
        for _ in 0..20 {
            let answer = ask(&stage, &format!("&table=t&limit=50{order}{after}")).await;
            assert_eq!(answer.body["rows"].as_array().map(Vec::len), Some(50), "{answer:?}");
            after = format!("&after={}", answer.body["after"].as_str().unwrap());
        }
    }
    let Stage { relay, database, .. } = stage;
    relay.stop().await;
    let count = "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname = 'shows'";
    let calls = eventually("the calls are counted", || async {
        let calls: u64 = database.value(count).await.parse().unwrap();
        (calls >= 3000).then_some(calls)
    })
    .await;
    assert!(calls < 3 * 20 * 120, "{calls} rows were looked at for 3000");
}
