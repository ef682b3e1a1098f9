//! Filters with `and` and `or` in any depth mean what the same condition means in PostgreSQL's own WHERE, wherever they are used.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::dice::Dice;
use crate::support::filters::{COMPARISONS, literal};
use crate::support::http::{Events, get};
use crate::support::stage::Stage;
use crate::support::token;

const COLUMNS: &str = "i int, big bigint, n numeric, s text, vc varchar(20), c char(4), u uuid, b bool, at timestamptz, d date, e mood,
    f float8, tags text[], iv interval";

/// Values of each column. All have operators of order but the last two of these.
const VALUES: [(&str, &[&str]); 14] = [
    ("i", &["1", "2", "3"]),
    ("big", &["9007199254740993", "-5", "2"]),
    ("n", &["1", "1.50", "NaN"]),
    ("s", &["a", "B", "a,b", "x (y)", "say \"hi\" \\", "", "o.eq.1"]),
    ("vc", &["a", "b.c", "null"]),
    ("c", &["a", "b)", ""]),
    ("u", &["00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-00000000000A"]),
    ("b", &["true", "false"]),
    ("at", &["2026-01-05 00:00+00", "2026-06-01T12:00:00Z", "infinity"]),
    ("d", &["2026-01-05", "2025-12-31"]),
    ("e", &["sad", "ok", "glad"]),
    ("f", &["1", "-0.5", "NaN"]),
    ("tags", &["{a,b}", "{}", "{\"x y\",NULL}"]),
    ("iv", &["1 day", "24:00:00", "2 mons"]),
];

fn anon() -> String {
    token("anon", None, json!({}))
}

async fn stage() -> Stage {
    Stage::with(
        &format!(
            "create type mood as enum ('sad', 'ok', 'glad'); create table t (id int primary key, {COLUMNS});
             create table later (like t); grant select on t to anon; select relay.watch('t');"
        ),
        |settings, _| settings.judge_timeout_ms = Some(30_000),
    )
    .await
}

fn one_of<T: Copy>(dice: &mut Dice, all: &[T]) -> T {
    all[usize::try_from(dice.below(all.len() as u64)).unwrap()]
}

/// A value or column as PostgREST has it in a group.
fn written(text: &str) -> String {
    match text.is_empty() || text.contains([',', '(', ')', '"', '\\', ' ', '.', ':']) {
        true => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        false => text.to_owned(),
    }
}

/// A random condition: column, operator with its value, and the same as SQL.
fn condition(dice: &mut Dice) -> (String, String, String) {
    let (column, values) = one_of(dice, &VALUES);
    let value = one_of(dice, values);
    let (text, sql) = match dice.below(8) {
        0 => (String::from("is.null"), format!("{column} is null")),
        1 if column == "b" => (String::from("is.unknown"), String::from("b is unknown")),
        1 if column == "s" => (String::from("like.%a%"), String::from("s like '%a%'")),
        1 if column == "vc" => (String::from("imatch.\"^(A|n)\""), String::from("vc ~* '^(A|n)'")),
        2 | 3 => {
            let count = dice.below(values.len() as u64 + 1);
            let list: Vec<&str> = (0..count).map(|_| one_of(dice, values)).collect();
            let items: Vec<String> = list.iter().map(|value| written(value)).collect();
            let literals: Vec<String> = list.iter().map(|value| literal(value)).collect();
            let sql = if list.is_empty() {
                String::from("false")
            } else {
                format!("{column} in ({})", literals.join(", "))
            };
            (format!("in.({})", items.join(",")), sql)
        }
        _ => {
            let (operator, symbol) = one_of(dice, &COMPARISONS);
            (format!("{operator}.{}", written(value)), format!("{column} {symbol} {}", literal(value)))
        }
    };
    match dice.below(4) {
        0 => (column.to_owned(), format!("not.{text}"), format!("(not {sql})")),
        _ => (column.to_owned(), text, format!("({sql})")),
    }
}

/// A random member of a group, and the same as SQL.
fn member(dice: &mut Dice, depth: u64) -> (String, String) {
    if depth == 0 || dice.below(3) == 0 {
        let (column, comparison, sql) = condition(dice);
        return (format!("{column}.{comparison}"), sql);
    }
    group(dice, depth, "")
}

fn group(dice: &mut Dice, depth: u64, between: &str) -> (String, String) {
    let members: Vec<_> = (0..=dice.below(3)).map(|_| member(dice, depth - 1)).collect();
    let name = one_of(dice, &["and", "or", "or"]);
    let (texts, conditions): (Vec<String>, Vec<String>) = members.into_iter().unzip();
    let (text, sql) =
        (format!("{name}{between}({})", texts.join(",")), conditions.join(&format!(" {name} ")));
    match dice.below(4) {
        0 => (format!("not.{text}"), format!("(not ({sql}))")),
        _ => (text, format!("({sql})")),
    }
}

/// A random filter and the condition that it stands for.
fn filter(dice: &mut Dice) -> (String, String) {
    let terms: Vec<_> = (0..=dice.below(2))
        .map(|_| match dice.below(4) {
            0 => {
                let (column, comparison, sql) = condition(dice);
                (format!("{column}={comparison}"), sql)
            }
            _ => group(dice, 3, "="),
        })
        .collect();
    let (texts, conditions): (Vec<String>, Vec<String>) = terms.into_iter().unzip();
    (texts.join(","), conditions.join(" and "))
}

/// Random rows with these ids, of which a third of the values are null.
fn rows(dice: &mut Dice, table: &str, ids: std::ops::Range<u32>) -> String {
    let row = |id| {
        let values = VALUES.map(|(_, values)| match dice.below(3) {
            0 => String::from("null"),
            _ => literal(one_of(dice, values)),
        });
        format!("({id}, {})", values.join(", "))
    };
    let rows: Vec<String> = ids.map(row).collect();
    format!("insert into {table} values {}", rows.join(", "))
}

/// The ids of the rows that match.
async fn found(stage: &Stage, table: &str, condition: &str) -> BTreeSet<u64> {
    let select = format!("select coalesce(json_agg(id), '[]') from {table} where {condition}");
    serde_json::from_str(&stage.database.value(&select).await).unwrap()
}

/// Subscribes to these filters, and returns the client and the ids of its bindings.
async fn subscribe(stage: &Stage, filters: &[(String, String)]) -> (Client, Vec<u64>) {
    let mut client = Client::connect(&stage.relay, &anon()).await;
    let bindings = filters.iter().map(|(filter, _)| json!({"event": "*", "table": "t", "filter": filter}));
    let bindings: Vec<Value> = bindings.chain([json!({"event": "*", "table": "marker"})]).collect();
    client
        .push(Some("1"), "realtime:groups", "phx_join", json!({"config": {"postgres_changes": bindings}}))
        .await;
    let reply = client.frame().await;
    let echo = reply[4]["response"]["postgres_changes"].as_array().unwrap_or_else(|| panic!("{reply}"));
    let ids = echo[..filters.len()].iter().map(|entry| entry["id"].as_u64().unwrap()).collect();
    let answer = client.frame().await;
    assert_eq!(answer[4]["message"], "Subscribed to PostgreSQL", "{answer}");
    (client, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn random_groups_deliver_the_changes_of_rows_that_a_where_would_find() {
    let stage = stage().await;
    let mut dice = Dice(0x0f17_7e25);
    let filters: Vec<(String, String)> = (0..200).map(|_| filter(&mut dice)).collect();
    let (mut clients, mut ids) = (Vec::new(), Vec::new());
    for some in filters.chunks(50) {
        let (client, of_some) = subscribe(&stage, some).await;
        clients.push(client);
        ids.extend(of_some);
    }
    // Each change is delivered by the image that the client gets: the old row of a DELETE, else the new one.
    stage.run(&rows(&mut dice, "t", 1..41)).await;
    stage.run(&rows(&mut dice, "later", 1..41)).await;
    let mut expected: BTreeMap<(u64, &str), BTreeSet<u64>> = BTreeMap::new();
    for ((_, condition), id) in filters.iter().zip(&ids) {
        expected.insert((*id, "INSERT"), found(&stage, "t", condition).await);
        expected.insert((*id, "UPDATE"), found(&stage, "later", condition).await);
        expected.insert((*id, "DELETE"), found(&stage, "later", condition).await);
    }
    let columns = VALUES.map(|(column, _)| format!("{column} = later.{column}")).join(", ");
    stage.run(&format!("update t set {columns} from later where later.id = t.id")).await;
    stage.run("delete from t; insert into marker default values").await;
    let mut told: BTreeMap<(u64, &str), BTreeSet<u64>> = BTreeMap::new();
    for client in &mut clients {
        loop {
            let frame = client.frame().await;
            let data = &frame[4]["data"];
            if data["table"] == "marker" {
                break;
            }
            let kind = ["INSERT", "UPDATE", "DELETE"].into_iter().find(|kind| data["type"] == *kind).unwrap();
            let image = if kind == "DELETE" { "old_record" } else { "record" };
            for id in frame[4]["ids"].as_array().unwrap() {
                let rows = told.entry((id.as_u64().unwrap(), kind)).or_default();
                assert!(rows.insert(data[image]["id"].as_u64().unwrap()), "told twice: {frame}");
            }
        }
    }
    let mut wrong = Vec::new();
    for ((filter, condition), id) in filters.iter().zip(&ids) {
        for kind in ["INSERT", "UPDATE", "DELETE"] {
            let told = told.remove(&(*id, kind)).unwrap_or_default();
            let expected = &expected[&(*id, kind)];
            if told != *expected {
                wrong.push(format!("{filter} as {condition}: {kind} of {told:?} and not {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), filters.len(), wrong.join("\n"));
    let some = expected.values().filter(|rows| !rows.is_empty() && rows.len() < 40).count();
    assert!(some > 300, "only {some} of {} tell rows apart", expected.len());
}

/// A text in a query.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_polls_and_streams_obey_groups_beside_a_filter() {
    let stage = stage().await;
    let mut dice = Dice(0x5eed);
    stage.run(&rows(&mut dice, "t", 1..31)).await;
    // The last change matches whatever the random part says.
    const LAST: u64 = 9999;
    let mut requests = Vec::new();
    for _ in 0..24 {
        let (text, sql) = member(&mut dice, 3);
        let (negated, name) = one_of(&mut dice, &[("", "or"), ("not.", "and")]);
        let (group, condition) = match name {
            "or" => (format!("(id.eq.{LAST},{text})"), format!("(id = {LAST} or {sql})")),
            _ => (format!("(id.neq.{LAST},not.and({text}))"), format!("not (id <> {LAST} and not ({sql}))")),
        };
        let path = format!(
            "/realtime/v1/changes?table=t&apikey={}&filter=id=gt.3&{negated}{name}={}",
            anon(),
            encoded(&group)
        );
        requests.push((path, format!("id > 3 and {condition}")));
    }
    let ids = |rows: &Value| -> Vec<u64> {
        rows.as_array().unwrap().iter().map(|row| row["id"].as_u64().unwrap()).collect()
    };
    let mut begun = Vec::new();
    for (path, condition) in &requests {
        let answer = get(stage.relay.address, path, "").await;
        assert_eq!(answer.status, 200, "{path} {}", answer.body);
        let expected: Vec<u64> = found(&stage, "t", condition).await.into_iter().collect();
        assert_eq!(ids(&answer.body["rows"]), expected, "{condition}");
        let cursor = answer.body["cursor"].as_str().unwrap().to_owned();
        let stream = Events::open(stage.relay.address, &format!("{path}&since={cursor}"), None).await;
        begun.push((cursor, stream));
    }
    stage.run(&rows(&mut dice, "t", 31..71)).await;
    stage.run(&format!("insert into t (id) values ({LAST})")).await;
    for ((path, condition), (mut cursor, mut stream)) in requests.iter().zip(begun) {
        let expected: Vec<u64> =
            found(&stage, "t", &format!("id > 30 and {condition}")).await.into_iter().collect();
        let mut polled = Vec::new();
        while polled.last() != Some(&LAST) {
            let answer = get(stage.relay.address, &format!("{path}&since={cursor}&wait=5"), "").await;
            assert_eq!(answer.status, 200, "{path} {}", answer.body);
            let changes = answer.body["changes"].as_array().unwrap();
            polled.extend(changes.iter().map(|change| change["record"]["id"].as_u64().unwrap()));
            cursor = answer.body["cursor"].as_str().unwrap().to_owned();
        }
        assert_eq!(polled, expected, "{condition}");
        let mut streamed = Vec::new();
        while streamed.last() != Some(&LAST) {
            streamed.push(stream.next().await.unwrap().data["record"]["id"].as_u64().unwrap());
        }
        assert_eq!(streamed, expected, "{condition}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_moves_a_row_into_or_out_of_a_group_is_told_as_for_one_condition() {
    let stage = Stage::new(
        "create table t (id int primary key, v text, w numeric); alter table t replica identity full;
         create table leaving (id int primary key, v text, w numeric); grant select on t, leaving to anon;
         select relay.watch('t'), relay.watch('leaving', true)",
    )
    .await;
    let filter = "or=(v.eq.in,and(w.gt.1.5,w.lt.10))";
    let by = |table: &str| json!([{"event": "*", "schema": "public", "table": table, "filter": filter}]);
    let mut plain = stage.subscribe(&anon(), by("t")).await;
    let mut leaving = stage.subscribe(&anon(), by("leaving")).await;
    for table in ["t", "leaving"] {
        stage.run(&format!("insert into {table} values (1, 'in', null), (2, 'out', 1), (3, null, 5)")).await;
        stage.run(&format!("update {table} set w = 5 where id = 1")).await;
        stage.run(&format!("update {table} set v = 'out' where id = 1")).await;
        stage.run(&format!("update {table} set w = 2 where id = 2")).await;
        stage.run(&format!("update {table} set w = null where id in (1, 3)")).await;
        stage.run(&format!("delete from {table}")).await;
    }
    let told = [
        r#"INSERT {"id":1,"v":"in","w":null}"#,
        r#"INSERT {"id":3,"v":null,"w":5}"#,
        r#"UPDATE {"id":1,"v":"in","w":5} {"id":1,"v":"in","w":null}"#,
        r#"UPDATE {"id":1,"v":"out","w":5} {"id":1,"v":"in","w":5}"#,
        r#"UPDATE {"id":2,"v":"out","w":2} {"id":2}"#,
        r#"DELETE {"id":2,"v":"out","w":2}"#,
    ];
    assert_eq!(stage.told(&mut plain).await, told);
    let told = [
        r#"INSERT {"id":1,"v":"in","w":null}"#,
        r#"INSERT {"id":3,"v":null,"w":5}"#,
        r#"UPDATE {"id":1,"v":"in","w":5} {"id":1}"#,
        r#"UPDATE {"id":1,"v":"out","w":5} {"id":1}"#,
        r#"UPDATE {"id":2,"v":"out","w":2} {"id":2}"#,
        r#"DELETE {"id":1} leave"#,
        r#"DELETE {"id":3} leave"#,
        r#"DELETE {"id":2}"#,
    ];
    assert_eq!(stage.told(&mut leaving).await, told);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_in_a_group_is_told_with_its_place_over_every_transport() {
    let stage = Stage::new(
        "create table t (id int primary key, v text, secret text); grant select (id, v) on t to anon; select relay.watch('t')",
    )
    .await;
    for (group, place, text) in [
        ("or=(id.eq.1,v.foo.2)", "at character 15, \"foo.2)\"", "op is one of eq neq"),
        ("or=(id.eq.1", "at character 1, \"or=(id.eq.1\"", "no closing parenthesis"),
        ("or=(id.eq.1)x", "at character 13, \"x\"", "a comma or the end is expected"),
        ("not.and=(id.eq.1,or())", "at character 21, \"))\"", "column.op.value is expected"),
        ("or=(v.eq.f(x))", "at character 11, \"(x))\"", "stands in double quotes"),
        ("and=(v.is.5)", "at character 11, \"5)\"", "null, true, false or unknown"),
        ("or=(id.in.(1,,2))", "at character 14, \",2))\"", "a value is expected in the list"),
        ("or=(id.eq.x,v.eq.a)", "", "invalid input syntax for type integer: \"x\""),
        ("or=(id.like.x,v.eq.a)", "", "operator does not exist: integer ~~ text"),
        ("or=(v.eq.a,nope.eq.1)", "", "nope"),
        ("or=(v.eq.a,not.and(secret.eq.1))", "", "secret"),
    ] {
        let answer = stage.answer(&anon(), json!({"table": "t", "filter": group})).await;
        assert!(answer.contains(place) && answer.contains(text), "{group}: {answer}");
        let (name, conditions) = group.split_once('=').unwrap();
        let path = format!("/realtime/v1/changes?table=t&apikey={}&{name}={}", anon(), encoded(conditions));
        let answer = get(stage.relay.address, &path, "").await;
        let told = answer.body["error"].as_str().unwrap_or_else(|| panic!("{group}: {}", answer.body));
        assert_eq!(answer.status, 400, "{group}");
        assert!(told.contains(place) && told.contains(text), "{group}: {told}");
    }
    let path = format!("/realtime/v1/changes?table=t&apikey={}&or=id.eq.1", anon());
    let answer = get(stage.relay.address, &path, "").await;
    assert_eq!(
        (answer.status, answer.body["error"].as_str()),
        (400, Some("or: conditions in parentheses are expected, such as or=(id.gt.7,title.eq.a)"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_groups_are_refused_with_the_bound_and_the_socket_lives() {
    let stage = Stage::new(
        "create table t (id int primary key, v text); grant select on t to anon; select relay.watch('t')",
    )
    .await;
    let mut client = Client::connect(&stage.relay, &anon()).await;
    let conditions = |count: usize| vec!["id.eq.1"; count].join(",");
    let list = |count: usize| vec!["1"; count].join(",");
    for (number, (filter, text)) in [
        (format!("or=({}", "or(".repeat(30_000)), "nested too deep. Maximum 20"),
        (format!("or=({}id.eq.1{}", "not.and(".repeat(20), ")".repeat(21)), "nested too deep. Maximum 20"),
        (format!("or={}", "(".repeat(60_000)), "column.op.value is expected"),
        (format!("or=({})", conditions(101)), "too many conditions. Maximum 100"),
        (format!("or=({0}),and=({0})", conditions(51)), "too many conditions. Maximum 100"),
        (format!("or=(id.in.({}))", list(5001)), "too many values for `in` filter. Maximum 5000"),
        (format!("id=in.({})", list(5001)), "too many values for `in` filter. Maximum 5000"),
        (format!("or=(v.eq.\"{}\")", "x".repeat(131_072)), "filter is too long"),
        (format!("or=(v.eq.{})", "\"x\\".repeat(20_000)), "this quote is not closed"),
        (format!("or=(v.eq.a,{})", "\"".repeat(20_001)), "column.op.value is expected"),
    ]
    .into_iter()
    .enumerate()
    {
        let topic = format!("realtime:{number}");
        let binding = json!([{"event": "*", "table": "t", "filter": filter}]);
        let answer = client.try_subscribe(&topic, binding).await;
        let answer = answer["message"].as_str().unwrap();
        assert!(answer.contains(text) && answer.len() < 1000, "{text}: {answer}");
    }
    let nested = format!("or=({}id.eq.7{}", "or(".repeat(19), ")".repeat(20));
    client.subscribe("realtime:last", json!([{"event": "*", "table": "t", "filter": nested}])).await;
    stage.run("insert into t values (6), (7)").await;
    assert_eq!(client.change().await["record"]["id"], 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_thousands_are_decided_and_one_client_may_have_so_many() {
    let stage = Stage::with(
        "create table t (id int primary key, u uuid, n numeric, tags int[], p box);
         create index on t (id); grant select on t to anon; select relay.watch('t')",
        |settings, _| settings.judge_timeout_ms = Some(30_000),
    )
    .await;
    let uuid = |n: u32| format!("00000000-0000-4000-8000-{n:012}");
    let numbers =
        |from: u32, count: u32| (from..from + count).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    let uuids: Vec<String> = (0..3300).map(uuid).collect();
    let boxes: Vec<String> = (0..300).map(|n| format!("\"({n},{n}),(0,0)\"")).collect();
    let arrays: Vec<String> = (0..300).map(|n| format!("\"{{{n}}}\"")).collect();
    for (filter, condition) in [
        (format!("id=in.({})", numbers(3, 5000)), "id between 3 and 5002"),
        (
            format!("or=(id.eq.2,u.in.({}))", uuids.join(",")),
            "id = 2 or u < '00000000-0000-4000-8000-000000003300'",
        ),
        (format!("id=not.in.({})", numbers(3, 5000)), "id not between 3 and 5002"),
        (format!("n=in.({})", numbers(1, 3000)), "n = trunc(n) and n between 1 and 3000"),
        (
            format!("or=(n.not.in.({}),id.eq.1)", numbers(1, 3000)),
            "not (n = trunc(n) and n between 1 and 3000) or id = 1",
        ),
        (format!("tags=in.({})", arrays.join(",")), "tags[1] between 0 and 299 and tags[2] is null"),
        (format!("p=in.({})", boxes.join(",")), "id between 0 and 299"),
    ] {
        stage.run("delete from t").await;
        let mut client =
            stage.subscribe(&anon(), json!([{"event": "INSERT", "table": "t", "filter": filter}])).await;
        stage
            .run(
                "insert into t select n, ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid,
                   case n % 7 when 0 then null when 1 then n + 0.5 else n end, case n % 5 when 0 then array[n, n] else array[n] end,
                   case when n % 11 < 100 then box(point(0, 0), point(n, n)) end
                 from generate_series(1, 5400, 17) n",
            )
            .await;
        let told: BTreeSet<u64> = stage
            .changes(&mut client)
            .await
            .iter()
            .map(|change| change["record"]["id"].as_u64().unwrap())
            .collect();
        assert_eq!(told, found(&stage, "t", condition).await, "{condition}");
        assert!(!told.is_empty(), "{condition}");
    }
    let many =
        |from: u32| json!({"event": "*", "table": "t", "filter": format!("id=in.({})", numbers(from, 5000))});
    let mut client = Client::connect(&stage.relay, &anon()).await;
    let answer = client.try_subscribe("realtime:many", json!([many(1), many(2), many(3), many(4)])).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    let answer = client.try_subscribe("realtime:more", json!([many(5)])).await;
    assert!(answer["message"].as_str().unwrap().contains("may have 20000 values"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_not_closed_takes_in_no_other_parameter() {
    let stage = stage().await;
    stage.run("insert into t (id, i, s) values (1, 1, 'a'), (2, 2, 'b')").await;
    let asked = async |more: &str| {
        let path = format!("/realtime/v1/changes?table=t&apikey={}&filter=i=eq.1{more}", anon());
        get(stage.relay.address, &path, "").await
    };
    for more in [
        "&or=(id.gt.0),s=neq.(zz",
        "&or=(id.gt.0),s=neq.%22zz",
        "&or=(id.gt.0",
        "&or=(id.gt.0)&and=(id.gt.0,s.neq.%22zz",
        "&or=(id.gt.0),or=(id.gt.0)",
        "&or=(id.gt.0)),s=eq.(",
    ] {
        let answer = asked(more).await;
        assert_eq!(answer.status, 400, "{more}: {answer:?}");
    }
    let answer = asked("&or=(id.gt.0,s.eq.a)&and=(id.gt.0)").await;
    assert_eq!(answer.body["rows"].as_array().unwrap().len(), 1, "{answer:?}");
}
