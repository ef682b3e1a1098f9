//! Filters mean what the same condition means in PostgreSQL's own WHERE, on every kind of column.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::filters::{COMPARISONS, literal};
use crate::support::stage::Stage;
use crate::support::token;

const TABLE: &str = "create type mood as enum ('sad', 'ok', 'glad');
    create table t (id int primary key, i int, big bigint, small smallint, n numeric, s text, vc varchar(20), c char(4),
      u uuid, b bool, at timestamptz, ts timestamp, d date, e mood, f float8, tags text[], doc jsonb);
    grant select on t to anon; select relay.watch('t');";

/// Rows that differ in what comparisons trip over: nulls, signs, case, accents, spellings of one value.
const ROWS: &str = "
    (1, 5, 5, 5, 5, 'five', 'five', 'five', '00000000-0000-4000-8000-000000000005', true, '2026-01-05 00:00+00', '2026-01-05',
      '2026-01-05', 'sad', 5, '{a,b}', '{\"a\": 1}'),
    (2, -7, 9007199254740993, -7, 5.00, 'Five', 'FIVE', 'five ', '00000000-0000-4000-8000-00000000000A', false,
      '2026-01-05 01:00+01', '2026-01-04 23:59:59.999', '2025-12-31', 'ok', 5.5, '{}', '[]'),
    (3, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null),
    (4, 10, -9223372036854775808, 32767, 'NaN', '', '', '', 'ffffffff-ffff-4fff-8fff-ffffffffffff', null, 'infinity', '-infinity',
      'infinity', 'glad', 'NaN', '{null}', '[null]'),
    (5, 9, 10, 9, 0.1, 'a,b', 'a%b', 'a_b', null, true, '2026-06-01 12:00+00', '2026-06-01 12:00', '2026-06-01', 'ok', -0.0,
      '{\"a,b\"}', '\"five\"'),
    (6, 100, 5, 100, 1e10, 'say \"hi\" \\\\ ünï 🦀', 'O''Neill; --', '(x)', '00000000-0000-4000-8000-000000000005', true, '2026-01-05',
      '2026-01-05', '2026-01-05', 'sad', 1e300, null, '{}'),
    (7, 5, 5, 5, -5, 'null', 'true', 'null', null, false, null, null, null, null, 'Infinity', '{five}', '5')";

/// Values to compare each column with.
const VALUES: [(&str, &[&str]); 14] = [
    ("i", &["5", " 9 ", "-7", "005", "2147483647"]),
    ("big", &["9007199254740993", "9007199254740992", "-9223372036854775808", "10"]),
    ("small", &["5", "32767"]),
    ("n", &["5", "5.0", "1e10", "NaN", "0.10", "-5"]),
    ("s", &["five", "FIVE", "", "a,b", "null", "say \"hi\" \\ ünï 🦀"]),
    ("vc", &["five", "O'Neill; --", "a%b", ""]),
    ("c", &["five", "five  ", "a_b", ""]),
    ("u", &["00000000-0000-4000-8000-000000000005", "{0000000000004000800000000000000A}"]),
    ("b", &["true", "f", "1", "no"]),
    ("at", &["2026-01-05", "2026-01-05T01:00:00+01:00", "infinity"]),
    ("ts", &["2026-01-05 00:00", "-infinity"]),
    ("d", &["2026-01-05", "infinity", "20260105"]),
    ("e", &["sad", "ok", "glad"]),
    ("f", &["5", "5.5", "0", "NaN", "1e300"]),
];

fn anon() -> String {
    token("anon", None, json!({}))
}

/// A value as the clients' filter builder writes it.
fn written(value: &str) -> String {
    if value.chars().any(|c| ",()\"\\ ".contains(c)) || value.is_empty() {
        format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
    } else {
        value.to_owned()
    }
}

/// Filters, each with the condition that it stands for.
fn all_filters() -> Vec<(String, String)> {
    let mut filters = Vec::new();
    for (column, values) in VALUES {
        for value in values {
            for (operator, symbol) in COMPARISONS {
                filters.push((
                    format!("{column}={operator}.{}", written(value)),
                    format!("{column} {symbol} {}", literal(value)),
                ));
            }
        }
        let list: Vec<String> = values.iter().map(|value| written(value)).collect();
        let literals: Vec<String> = values.iter().map(|value| literal(value)).collect();
        filters.push((
            format!("{column}=in.({})", list.join(",")),
            format!("{column} in ({})", literals.join(", ")),
        ));
        filters.push((format!("{column}=is.null"), format!("{column} is null")));
    }
    for column in ["s", "vc", "c"] {
        for pattern in ["f%", "F_ve", "%\\%b", "%,%", "%", "_", "%e "] {
            for (operator, symbol) in [("like", "like"), ("ilike", "ilike")] {
                filters.push((
                    format!("{column}={operator}.{}", written(pattern)),
                    format!("{column} {symbol} {}", literal(pattern)),
                ));
            }
        }
    }
    for column in ["s", "vc", "c"] {
        for pattern in ["^f", "F.ve$", "(a|b),", "[[:upper:]]", "", "e\\s", "\\d+", "(?n)^.$"] {
            for (operator, symbol) in [("match", "~"), ("imatch", "~*")] {
                filters.push((
                    format!("{column}={operator}.{}", written(pattern)),
                    format!("{column} {symbol} {}", literal(pattern)),
                ));
            }
        }
    }
    for state in ["true", "false", "unknown"] {
        filters.push((format!("b=is.{state}"), format!("b is {state}")));
    }
    for (filter, condition) in [
        ("tags=eq.\"{a,b}\"", "tags = '{a,b}'"),
        ("tags=neq.{}", "tags <> '{}'"),
        ("doc=eq.\"{\\\"a\\\":  1}\"", "doc = '{\"a\": 1}'"),
        ("i=in.()", "false"),
        ("i=gt.4,i=lte.10,s=neq.Five", "i > 4 and i <= 10 and s <> 'Five'"),
        ("b=is.true,n=gte.0,u=not.is.null", "b is true and n >= 0 and u is not null"),
        ("s=not.in.(five,\"a,b\"),s=not.like.f%", "not (s in ('five', 'a,b')) and not (s like 'f%')"),
    ] {
        filters.push((filter.to_owned(), condition.to_owned()));
    }
    let negated: Vec<(String, String)> = filters
        .iter()
        .filter(|(filter, _)| !filter.contains("=not.") && !filter.contains(",i=") && !filter.contains(",n="))
        .map(|(filter, condition)| (filter.replacen('=', "=not.", 1), format!("not ({condition})")))
        .collect();
    filters.extend(negated);
    filters
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_match_the_rows_that_a_where_would_find() {
    // Hundreds of filters at once, on a machine that may be busy: it is not their time that counts here.
    let stage = Stage::with(TABLE, |settings, _| settings.judge_timeout_ms = Some(30_000)).await;
    let filters = all_filters();
    // As many clients as it takes: one may have so many filters that PostgreSQL decides and no more.
    let mut clients = Vec::new();
    let mut ids: Vec<u64> = Vec::new();
    for some in filters.chunks(50) {
        let mut client = Client::connect(&stage.relay, &anon()).await;
        let bindings = some.iter().map(|(filter, _)| json!({"event": "*", "table": "t", "filter": filter}));
        let bindings: Vec<Value> = bindings.chain([json!({"event": "*", "table": "marker"})]).collect();
        let payload = json!({"config": {"postgres_changes": bindings}});
        client.push(Some("1"), "realtime:filters", "phx_join", payload).await;
        let reply = client.frame().await;
        let echo = reply[4]["response"]["postgres_changes"].as_array().unwrap_or_else(|| panic!("{reply}"));
        ids.extend(echo[..some.len()].iter().map(|entry| entry["id"].as_u64().unwrap()));
        assert_eq!(client.frame().await[4]["message"], "Subscribed to PostgreSQL");
        clients.push(client);
    }
    stage.run(&format!("insert into t values {ROWS}")).await;
    // Alone in its transaction: then nothing but this row's nulls decides how it is judged.
    stage.run("insert into t (id) values (8)").await;
    stage.run("insert into t (id, i) values (9, 5)").await;
    let mut expected: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for ((_, condition), id) in filters.iter().zip(&ids) {
        let found = stage
            .database
            .value(&format!("select coalesce(json_agg(id), '[]') from t where {condition}"))
            .await;
        expected.entry(*id).or_default().extend(serde_json::from_str::<Vec<u64>>(&found).unwrap());
    }
    stage.run("delete from t; insert into marker default values").await;
    let mut told: BTreeMap<(u64, &str), BTreeSet<u64>> = BTreeMap::new();
    let mut frames = Vec::new();
    for client in &mut clients {
        loop {
            let frame = client.frame().await;
            match &frame[4]["data"]["table"] {
                table if table == "marker" => break,
                _ => frames.push(frame),
            }
        }
    }
    for frame in frames {
        let data = &frame[4]["data"];
        let (kind, image) =
            if data["type"] == "INSERT" { ("INSERT", "record") } else { ("DELETE", "old_record") };
        for id in frame[4]["ids"].as_array().unwrap() {
            let fresh = told
                .entry((id.as_u64().unwrap(), kind))
                .or_default()
                .insert(data[image]["id"].as_u64().unwrap());
            assert!(fresh, "told twice: {frame}");
        }
    }
    let mut wrong = Vec::new();
    for ((filter, condition), id) in filters.iter().zip(&ids) {
        for kind in ["INSERT", "DELETE"] {
            let told = told.get(&(*id, kind)).cloned().unwrap_or_default();
            if told != expected[id] {
                wrong.push(format!("{filter} as {condition}: {kind} of {told:?} and not {:?}", expected[id]));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), filters.len(), wrong.join("\n"));
    assert!(filters.len() > 700, "{} filters", filters.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_told_by_both_images_and_a_delete_by_any_column() {
    let stage = Stage::new(
        "create table t (id int primary key, v text, w int); alter table t replica identity full;
         create table leaving (id int primary key, v text, w int); grant select on t, leaving to anon;
         select relay.watch('t'), relay.watch('leaving', true)",
    )
    .await;
    let by = |table: &str| json!([{"event": "*", "schema": "public", "table": table, "filter": "v=eq.in,w=lt.10"}]);
    let mut plain = stage.subscribe(&anon(), by("t")).await;
    let mut leaving = stage.subscribe(&anon(), by("leaving")).await;
    for table in ["t", "leaving"] {
        stage
            .run(&format!(
                "insert into {table} values (1, 'in', 1), (2, 'out', 2), (3, 'in', 30), (4, 'in', null)"
            ))
            .await;
        stage.run(&format!("update {table} set w = 5 where id = 1")).await;
        stage.run(&format!("update {table} set v = 'in' where id = 2")).await;
        stage.run(&format!("update {table} set w = 11 where id = 1")).await;
        stage.run(&format!("update {table} set w = 12 where id = 1")).await;
        stage.run(&format!("delete from {table}")).await;
    }
    let told = [
        r#"INSERT {"id":1,"v":"in","w":1}"#,
        r#"UPDATE {"id":1,"v":"in","w":5} {"id":1,"v":"in","w":1}"#,
        r#"UPDATE {"id":2,"v":"in","w":2} {"id":2}"#,
        r#"DELETE {"id":2,"v":"in","w":2}"#,
    ];
    assert_eq!(stage.told(&mut plain).await, told);
    let told = [
        r#"INSERT {"id":1,"v":"in","w":1}"#,
        r#"UPDATE {"id":1,"v":"in","w":5} {"id":1}"#,
        r#"UPDATE {"id":2,"v":"in","w":2} {"id":2}"#,
        r#"DELETE {"id":1} leave"#,
        r#"DELETE {"id":2}"#,
    ];
    assert_eq!(stage.told(&mut leaving).await, told);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_that_cannot_be_is_refused_with_the_words_of_the_protocol() {
    let stage = Stage::new(TABLE).await;
    let parsing = |rest: &str| format!("Error parsing `filter` params: {rest}");
    let most = vec!["5"; 5000].join(",");
    for (filter, text) in [
        ("wrong", parsing(r#"["wrong"]. A filter is column=op.value, such as id=gt.7"#)),
        ("id=foo.1", parsing(r#"["foo", "1"]. A filter is column=op.value, such as id=gt.7"#)),
        ("id=in.1,2", parsing("`in` filter value must be wrapped by parentheses")),
        ("id=eq.1,,i=eq.2", parsing("filter must not contain empty segments (check for extra commas)")),
        (&format!("i=in.({most},5)"), parsing("too many values for `in` filter. Maximum 5000")),
        ("s=is.5", parsing("`is` filter value must be null, true, false or unknown")),
    ] {
        assert_eq!(stage.answer(&anon(), json!({"table": "t", "filter": filter})).await, text);
    }
    let described = |event: &str| {
        format!(
            "Unable to subscribe to changes with given parameters. An exception happened so please check your connect \
             parameters: [event: {event}, schema: public, table: t, filters: ["
        )
    };
    for (filter, text) in [
        ("nope=eq.1", "ERROR P0001 (raise_exception) invalid column for filter nope"),
        ("ID=eq.1", "ERROR P0001 (raise_exception) invalid column for filter ID; there is id"),
        ("tableoid=eq.1", "ERROR P0001 (raise_exception) invalid column for filter tableoid"),
        (
            "i=eq.hey",
            r#"ERROR 22P02 (invalid_text_representation) invalid input syntax for type integer: "hey""#,
        ),
        ("i=eq.", r#"ERROR 22P02 (invalid_text_representation) invalid input syntax for type integer: """#),
        (
            "i=eq.1; drop table t",
            r#"ERROR 22P02 (invalid_text_representation) invalid input syntax for type integer: "1; drop table t""#,
        ),
        (
            "i=in.(1,x)",
            r#"ERROR 22P02 (invalid_text_representation) invalid input syntax for type integer: "x""#,
        ),
        (
            "e=eq.angry",
            r#"ERROR 22P02 (invalid_text_representation) invalid input value for enum public.mood: "angry""#,
        ),
        (
            "small=gt.99999",
            r#"ERROR 22003 (numeric_value_out_of_range) value "99999" is out of range for type smallint"#,
        ),
        (
            "at=gt.soon",
            r#"ERROR 22007 (invalid_datetime_format) invalid input syntax for type timestamp with time zone: "soon""#,
        ),
        ("i=like.5%", "ERROR 42883 (undefined_function) operator does not exist: integer ~~ text"),
        ("s=is.true", "argument of IS TRUE must be type boolean, not type text"),
    ] {
        let answer = stage.answer(&anon(), json!({"event": "INSERT", "table": "t", "filter": filter})).await;
        assert!(answer.starts_with(&described("INSERT")), "{answer}");
        assert!(answer.ends_with(text), "{filter}: {answer}");
    }
    for filter in ["", "  ", &format!("i=in.({most})")] {
        let answer = stage.answer(&anon(), json!({"table": "t", "filter": filter})).await;
        assert_eq!(answer, "Subscribed to PostgreSQL");
    }
    // A filter that is no text must not turn into none.
    for filter in [json!(5), json!({"id": 1}), json!(["id=eq.1"]), json!(true)] {
        let answer = stage.answer(&anon(), json!({"table": "t", "filter": filter})).await;
        assert!(answer.starts_with("Error parsing `filter` params: "), "{answer}");
    }
    for target in [json!({"schema": "public"}), json!({"schema": "*"})] {
        let mut binding = target;
        binding["filter"] = json!("id=eq.1");
        let answer = stage.answer(&anon(), binding).await;
        assert!(answer.contains("A filter needs one table"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_ends_when_its_column_gets_another_type_and_joining_again_reads_it_anew() {
    let stage = Stage::new(
        "create table t (id int primary key, v int); grant select on t to anon; select relay.watch('t')",
    )
    .await;
    let by = || json!([{"event": "*", "schema": "public", "table": "t", "filter": "v=lt.10"}]);
    let mut before = stage.subscribe(&anon(), by()).await;
    stage.run("insert into t values (1, 9)").await;
    assert_eq!(stage.told(&mut before).await, [r#"INSERT {"id":1,"v":9}"#]);
    stage.run("alter table t alter column v type text").await;
    // 9 is less than 10 as a number and not as a text.
    let mut after = stage.subscribe(&anon(), by()).await;
    stage.run("insert into t values (2, '9'), (3, '1')").await;
    assert_eq!(stage.told(&mut after).await, [r#"INSERT {"id":3,"v":"1"}"#]);
}
