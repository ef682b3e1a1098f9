//! Claims that make a policy raise show nothing of its table, as in PostgreSQL, whatever stands around the expression; the
//! reader is told so, once.

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::stage::Stage;
use crate::support::{ANN, BOB, token};
use crate::visibility::policy_leaks::{TEAMS, run, stage, table};

/// Conditions, of which each raises for [`bad`] once a row needs the claim.
const CONDITIONS: &[&str] = &[
    "not (team = 1 and owner = auth.uid())",
    "team = 2 or owner = auth.uid()",
    "team = 2 or owner = (select auth.uid())",
    "coalesce(team = 2, false) or coalesce(owner = auth.uid(), true)",
    "case when team = 2 then true else (auth.jwt() ->> 'level')::int = team end",
    "team = 2 or (auth.jwt() ->> 'level')::smallint > team",
    "(team = 1 and (auth.jwt() ->> 'admin')::bool) is not true",
    "not (team = 1 and (auth.jwt() -> 'admin')::bool)",
    "not (team = 1 and at > (auth.jwt() ->> 'since')::timestamptz)",
    "team = 2 or price < (auth.jwt() ->> 'price')::numeric",
    "team = 2 or (auth.jwt() #>> '{a,b}')::int = team",
    "team = 2 or team = any (array(select jsonb_array_elements_text(auth.jwt() -> 'teams')::int))",
    "team = 2 or exists (select from members m where m.team = TABLE.team and m.member = auth.uid())",
    "lower(name) = 'x' and (team = 2 or owner = auth.uid())",
    "case when lower(name) = 'x' and team = 2 then true else at < (auth.jwt() ->> 'since')::date end",
];

/// A policy's author may rely on a guard of claims.
const GUARDED: &[&str] = &[
    "case when auth.jwt() ->> 'level' = '1' then (auth.jwt() ->> 'level')::int = team else team = 2 end",
    "case when (auth.jwt() ->> 'level') ~ '^[0-9]+$' then (auth.jwt() ->> 'level')::int = team else team = 2 end",
    "case when auth.jwt() ->> 'since' like '2%' then at > (auth.jwt() ->> 'since')::timestamptz else team = 2 end",
];

fn bad() -> Value {
    json!({"role": "authenticated", "sub": "no uuid", "level": "x", "admin": "perhaps", "since": "never ever", "price": "dear",
           "a": {"b": "x"}, "teams": ["x"]})
}

fn good() -> Value {
    json!({"role": "authenticated", "sub": ANN, "level": "1", "admin": false, "since": "2020-01-01", "price": "7",
           "a": {"b": "1"}, "teams": ["1"]})
}

fn token_of(claims: &Value) -> String {
    token("authenticated", claims["sub"].as_str(), claims.clone())
}

/// The ids of a table that its own row security shows; none where that raises.
async fn shown(stage: &Stage, claims: &Value, name: &str) -> Option<Vec<String>> {
    let client = stage.database.connect().await;
    let become_reader = format!(
        "begin; select set_config('request.jwt.claims', $claims${claims}$claims$, true),
                set_config('request.jwt.claim.sub', '{}', true); set local role authenticated",
        claims["sub"].as_str().unwrap()
    );
    client.batch_execute(&become_reader).await.unwrap();
    let rows = client.query(&format!("select id::text from {name} order by id"), &[]).await.ok()?;
    Some(rows.iter().map(|row| format!("{name} {}", row.get::<_, String>(0))).collect())
}

/// What is told up to now: rows, and the tables of which it is said that the claims make them raise.
async fn told(stage: &Stage, client: &mut Client) -> (Vec<String>, Vec<String>) {
    let marker: i64 =
        stage.database.value("insert into marker default values returning id").await.parse().unwrap();
    let (mut rows, mut raising) = (Vec::new(), Vec::new());
    loop {
        let frame = client.frame().await;
        let (data, message) = (&frame[4]["data"], frame[4]["message"].as_str().unwrap_or_default());
        if frame[3] == "system" && message.contains("raises an error") {
            raising.push(message.split("public.").nth(1).unwrap().split(' ').next().unwrap().to_owned());
        } else if frame[3] == "postgres_changes" && data["table"] == "marker" {
            if data["record"]["id"] == marker {
                return (rows, raising);
            }
        } else if frame[3] == "postgres_changes" {
            rows.push(format!("{} {}", data["table"].as_str().unwrap(), data["record"]["id"]));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_that_make_a_policy_raise_show_nothing_of_its_table_and_that_is_said_once() {
    let conditions: Vec<&str> = CONDITIONS.iter().chain(GUARDED).copied().collect();
    let columns = "team int, owner uuid, name text, at timestamptz, price numeric";
    let tables: String = conditions
        .iter()
        .enumerate()
        .map(|(number, condition)| table(&format!("t{number}"), columns, condition))
        .collect();
    let stage = stage(&format!("{TEAMS} {tables}")).await;
    let (mut of_bad, mut of_good) =
        (stage.join(&token_of(&bad())).await, stage.join(&token_of(&good())).await);
    let mut said = Vec::new();
    for page in [1, 11] {
        for number in 0..conditions.len() {
            let rows = [(page, 1, ANN), (page + 1, 2, BOB), (page + 2, 1, BOB), (page + 3, 2, ANN)];
            let rows =
                rows.map(|(id, team, owner)| format!("({id}, {team}, '{owner}', 'X', '2026-01-01', 5)"));
            run(&stage, &format!("insert into t{number} values {}", rows.join(", "))).await;
        }
        let of_page = |row: &String| {
            let id: i32 = row.split(' ').nth(1).unwrap().parse().unwrap();
            (page..page + 4).contains(&id)
        };
        let (mut expected, mut expected_good) = (Vec::new(), Vec::new());
        for (number, condition) in conditions.iter().enumerate() {
            let name = format!("t{number}");
            let (of_bad, of_good) = (shown(&stage, &bad(), &name).await, shown(&stage, &good(), &name).await);
            assert_eq!(of_bad.is_some(), GUARDED.contains(condition), "PostgreSQL itself: {condition}");
            expected.extend(of_bad.unwrap_or_default().into_iter().filter(of_page));
            expected_good.extend(of_good.expect(condition).into_iter().filter(of_page));
        }
        let (rows, raising) = told(&stage, &mut of_bad).await;
        assert_eq!(rows, expected);
        said.extend(raising);
        assert_eq!(told(&stage, &mut of_good).await, (expected_good, vec![]));
    }
    said.sort();
    let mut raising: Vec<String> = (0..CONDITIONS.len()).map(|number| format!("t{number}")).collect();
    raising.sort();
    assert_eq!(said, raising);
}
