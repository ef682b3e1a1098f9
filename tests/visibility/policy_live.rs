//! Policies, rights and memberships that change under live subscriptions count within a second, without reconnecting.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep_until};

use crate::support::stage::Stage;
use crate::support::token;

/// A rule that changes: what makes its table and its role, and what gives sight and takes it again.
struct Rule {
    name: &'static str,
    made: &'static str,
    given: &'static str,
    taken: &'static str,
}

/// `T` is the rule's table, `R` the role of its only subscriber, `G` another role. `T` is watched and has row security.
const RULES: [Rule; 14] = [
    Rule {
        name: "policy",
        made: "grant select on T to R",
        given: "create policy p on T using (true)",
        taken: "drop policy p on T",
    },
    Rule {
        name: "text",
        made: "grant select on T to R; create policy p on T using (false)",
        given: "alter policy p on T using (id > 0)",
        taken: "alter policy p on T using (id < 0)",
    },
    Rule {
        name: "roles",
        made: "grant select on T to R; create policy p on T to G using (true)",
        given: "alter policy p on T to R",
        taken: "alter policy p on T to G",
    },
    Rule {
        name: "restrictive",
        made: "grant select on T to R; create policy p on T using (true);
               create policy r on T as restrictive using (false)",
        given: "drop policy r on T",
        taken: "create policy r on T as restrictive using (false)",
    },
    Rule {
        name: "security",
        made: "grant select on T to R",
        given: "alter table T disable row level security",
        taken: "alter table T enable row level security",
    },
    Rule {
        name: "right",
        made: "create policy p on T using (true)",
        given: "grant select on T to R",
        taken: "revoke select on T from R",
    },
    Rule {
        name: "schema",
        made: "create policy p on T using (true); grant select on T to R; create schema S; alter table T set schema S",
        given: "grant usage on schema S to R",
        taken: "revoke usage on schema S from R",
    },
    Rule {
        name: "member",
        made: "grant select on T to R; create policy p on T to G using (true)",
        given: "grant G to R",
        taken: "revoke G from R",
    },
    Rule {
        name: "heir",
        made: "grant select on T to G; create policy p on T using (true)",
        given: "grant G to R",
        taken: "revoke G from R",
    },
    Rule {
        name: "bypass",
        made: "grant select on T to R",
        given: "alter role R bypassrls",
        taken: "alter role R nobypassrls",
    },
    Rule {
        name: "owner",
        made: "grant select on T to R",
        given: "alter table T owner to R",
        taken: "alter table T owner to postgres; grant select on T to R",
    },
    Rule {
        name: "force",
        made: "alter table T owner to R; alter table T force row level security",
        given: "alter table T no force row level security",
        taken: "alter table T force row level security",
    },
    // The policy itself stays; what it asks changes, under a plan that the judging session has kept.
    Rule {
        name: "function",
        made:
            "grant select on T to R; create function F() returns bool language sql stable as 'select false';
               create policy p on T using (F())",
        given: "create or replace function F() returns bool language sql stable as 'select true'",
        taken: "create or replace function F() returns bool language sql stable as 'select false'",
    },
    Rule {
        name: "nested",
        made: "grant select on T to R; create table N (id int); grant select on N to R;
               insert into N select generate_series(1, 9); alter table N enable row level security;
               create policy n on N to G using (true);
               create policy p on T using (exists (select from N where N.id = T.id))",
        given: "grant G to R",
        taken: "revoke G from R",
    },
];

/// The statements with the names of this rule in the place of the single letters.
fn named(rule: &Rule, sql: &str) -> String {
    let words = sql.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let name = |word: &str| {
        let end = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_').len();
        let (word, rest) = word.split_at(end);
        let role = |kind: &str| format!("$DB_{}{kind}", rule.name);
        let word = match word {
            "T" => format!("t_{}", rule.name),
            "R" => role(""),
            "G" => role("_group"),
            "S" => format!("s_{}", rule.name),
            "F" => format!("f_{}", rule.name),
            "N" => format!("n_{}", rule.name),
            other => other.to_owned(),
        };
        word + rest
    };
    words.map(name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_the_rules_counts_within_a_second() {
    let made = |rule: &Rule| {
        let table = "create role R; create role G; create table T (id int primary key);
                     alter table T enable row level security; select relay.watch('T');";
        named(rule, &format!("{table} {};", rule.made))
    };
    let stage = Stage::new(&RULES.iter().map(made).collect::<String>()).await;
    let mut clients = Vec::new();
    for rule in &RULES {
        let token = token(&format!("{}_{}", stage.name, rule.name), None, json!({}));
        clients.push(stage.subscribe(&token, json!([{"event": "*", "schema": "*"}])).await);
    }
    let every = async |change: fn(&Rule) -> &'static str| {
        let all: Vec<String> = RULES.iter().map(|rule| named(rule, change(rule)) + ";").collect();
        stage.run(&all.concat()).await;
        Instant::now()
    };
    let write = async |id: u32| {
        let schema = |rule: &Rule| if rule.name == "schema" { "S." } else { "" };
        let insert = |rule: &Rule| named(rule, &format!("insert into {}T values ({id});", schema(rule)));
        stage.run(&RULES.iter().map(insert).collect::<String>()).await;
    };
    // The first row also makes the judge prepare what it will have to forget.
    write(1).await;
    for (rule, client) in RULES.iter().zip(&mut clients) {
        assert_eq!(stage.told(client).await, [""; 0], "{} before", rule.name);
    }
    let given = every(|rule| rule.given).await;
    // The promise is a time, so time has to pass.
    sleep_until(given + Duration::from_secs(1)).await;
    write(2).await;
    for (rule, client) in RULES.iter().zip(&mut clients) {
        assert_eq!(stage.told(client).await, [r#"INSERT {"id":2}"#], "{} given", rule.name);
    }
    let taken = every(|rule| rule.taken).await;
    sleep_until(taken + Duration::from_secs(1)).await;
    write(3).await;
    for (rule, client) in RULES.iter().zip(&mut clients) {
        assert_eq!(stage.told(client).await, [""; 0], "{} taken", rule.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_is_revoked_is_gone_from_changes_and_ends_the_filters_that_read_it() {
    let stage = Stage::new(
        "create role $DB_r; create table t (id int primary key, v text, w text); alter table t replica identity full;
         grant select on t to $DB_r; select relay.watch('t')",
    )
    .await;
    let token = token(&format!("{}_r", stage.name), None, json!({}));
    let by = |filter: &str| json!([{"event": "*", "schema": "public", "table": "t", "filter": filter}]);
    let mut open = stage.join(&token).await;
    let mut by_v = stage.subscribe(&token, by("v=eq.a")).await;
    // Null or not is an oracle too, and so is a condition that holds for every row.
    let mut by_null = stage.subscribe(&token, by("id=gt.0,v=not.is.null")).await;
    let mut by_w = stage.subscribe(&token, by("w=eq.b")).await;
    let selected = json!([{"event": "*", "schema": "public", "table": "t", "select": ["v"]}]);
    let mut selected = stage.subscribe(&token, selected).await;
    stage.run("insert into t values (1, 'a', 'b')").await;
    for client in [&mut open, &mut by_v, &mut by_null, &mut by_w] {
        assert_eq!(stage.told(client).await, [r#"INSERT {"id":1,"v":"a","w":"b"}"#]);
    }
    assert_eq!(stage.told(&mut selected).await, [r#"INSERT {"id":1,"v":"a"}"#]);
    stage.run("revoke select on t from $DB_r; grant select (id, w) on t to $DB_r").await;
    let revoked = Instant::now();
    sleep_until(revoked + Duration::from_secs(1)).await;
    stage.run("insert into t values (2, 'a', 'b'); delete from t where id = 1").await;
    for client in [&mut open, &mut by_w] {
        let rest = [r#"INSERT {"id":2,"w":"b"}"#, r#"DELETE {"id":1,"w":"b"}"#];
        assert_eq!(stage.told(client).await, rest);
    }
    for client in [&mut by_v, &mut by_null] {
        assert_eq!(stage.told(client).await, [""; 0]);
    }
    assert_eq!(stage.told(&mut selected).await, [r#"INSERT {"id":2}"#, r#"DELETE {"id":1}"#]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_made_anew_reaches_those_who_join_after_it() {
    let made =
        "create table t (id int primary key); grant select on t to authenticated; select relay.watch('t');";
    let stage = Stage::new(made).await;
    let binding = json!([{"event": "*", "schema": "public", "table": "t"}]);
    let token = token("authenticated", None, json!({}));
    let mut before = stage.subscribe(&token, binding.clone()).await;
    stage.run("insert into t values (1)").await;
    assert_eq!(stage.told(&mut before).await, [r#"INSERT {"id":1}"#]);
    stage.run(&format!("drop table t; {made}")).await;
    sleep_until(Instant::now() + Duration::from_secs(1)).await;
    // The same topic, claims and bindings as the one that still stands for the old table.
    let mut after = stage.subscribe(&token, binding).await;
    stage.run("insert into t values (2)").await;
    assert_eq!(stage.told(&mut after).await, [r#"INSERT {"id":2}"#]);
}
