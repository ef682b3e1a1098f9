//! Whoever changes who may see and a row in one transaction shows that row to nobody who may not see it any more, also where
//! PostgreSQL fires no event trigger for the change, or somebody keeps it from firing.

use serde_json::json;

use crate::support::client::Client;
use crate::support::database::JUDGE;
use crate::support::stage::Stage;
use crate::support::token;

/// What makes a table and its readers, and what takes the sight of it. `T` is the table, with row security and a key `id`;
/// `R` the role of its reader, `G` and `H` other roles.
struct Case {
    name: &'static str,
    made: &'static str,
    taken: &'static str,
    /// Writes the row with the id that stands for `1`.
    write: &'static str,
}

const WRITE: &str = "insert into T values (1)";

const fn case(name: &'static str, made: &'static str, taken: &'static str) -> Case {
    Case { name, made, taken, write: WRITE }
}

const OPEN: &str = "grant select on T to R; create policy p on T using (true)";

const CASES: [Case; 13] = [
    case(
        "replica",
        OPEN,
        "set local session_replication_role = replica; drop policy p on T; create policy p on T using (false);
         set local session_replication_role = origin",
    ),
    case("quiet", OPEN, "set local relay.quiet = 'on'; alter policy p on T using (false)"),
    case("bypass", "grant select on T to R; alter role R bypassrls", "alter role R nobypassrls"),
    case(
        "member",
        "grant select on T to R; create policy p on T to G using (true); grant G to R",
        "revoke G from R",
    ),
    case(
        "between",
        "grant select on T to R; create policy p on T to G using (true); grant G to H; grant H to R",
        "drop role H",
    ),
    case("right", "grant select on T to G; create policy p on T using (true); grant G to R", "revoke G from R"),
    case(
        "heir",
        "grant select on T to R; create policy p on T to G using (true); grant G to R",
        // Since PostgreSQL 16 each membership says so itself.
        "do $$ begin
           if current_setting('server_version_num')::int < 160000 then alter role R noinherit;
           else execute 'grant G to R with inherit false'; end if;
         end $$",
    ),
    case(
        "restrictive",
        "grant select on T to R; create policy p on T using (true);
         create policy r on T as restrictive to G using (false)",
        "grant G to R",
    ),
    case("renamed", OPEN, "drop role H; alter role R rename to H; create role R"),
    case("login", OPEN, "revoke R from JUDGE"),
    case("owner", "alter table T owner to R", "reassign owned by R to postgres"),
    case(
        "database",
        "grant select on T to pg_database_owner; create policy p on T using (true); alter database D owner to R",
        "alter database D owner to postgres",
    ),
    Case {
        name: "view",
        made: "drop table T; create table base_T (id int primary key);
               create materialized view T as select * from base_T; create unique index on T (id);
               grant select on T to R; select relay.watch('T'), relay.allow('T', 'true')",
        taken: "select relay.allow('T', 'id < 0')",
        write: "insert into base_T values (1); select relay.refresh('T')",
    },
];

/// The same while the event trigger is away, which is everybody's affair: each in a database of its own.
const TRIGGERS: [Case; 3] = [
    case(
        "disabled",
        OPEN,
        "alter event trigger relay_schema_changes disable; alter policy p on T using (false);
         alter event trigger relay_schema_changes enable always",
    ),
    case("dropped", OPEN, "drop event trigger relay_schema_changes; alter policy p on T using (false)"),
    case(
        "replaced",
        OPEN,
        "alter event trigger relay_schema_changes disable; drop policy p on T;
         drop event trigger relay_schema_changes;
         create event trigger relay_schema_changes on ddl_command_end execute function relay.log_schema_change();
         alter event trigger relay_schema_changes enable always",
    ),
];

/// The statements with the names of this case in the place of the single letters.
fn named(case: &Case, sql: &str) -> String {
    let words = sql.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let name = |word: &str| {
        let end = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_').len();
        let (word, rest) = word.split_at(end);
        let word = match word {
            "T" => format!("t_{}", case.name),
            "base_T" => format!("base_{}", case.name),
            "R" | "G" | "H" => format!("$DB_{}_{}", case.name, word.to_lowercase()),
            "D" => String::from("$DB"),
            "JUDGE" => String::from(JUDGE),
            other => other.to_owned(),
        };
        word + rest
    };
    words.map(name).collect()
}

fn made(case: &Case) -> String {
    let table = "create role R; create role G; create role H; create table T (id int primary key);
                 alter table T enable row level security; select relay.watch('T');";
    named(case, &format!("{table} {};", case.made))
}

async fn reader(stage: &Stage, case: &Case) -> Client {
    let token = token(&format!("{}_{}_r", stage.name, case.name), None, json!({}));
    stage.subscribe(&token, json!([{"event": "*", "schema": "*"}])).await
}

async fn check(stage: &Stage, case: &Case, client: &mut Client) {
    let write = |id: u32| named(case, &case.write.replace("(1)", &format!("({id})")));
    // The look at the catalog that this makes is as young as can be when the rule changes.
    stage.run(&write(1)).await;
    assert_eq!(stage.told(client).await, [r#"INSERT {"id":1}"#], "{} before", case.name);
    let mut observer = stage.join(&token("authenticated", None, json!({}))).await;
    stage.run(&format!("begin; {}; {}; {}; commit", write(2), named(case, case.taken), write(3))).await;
    stage.told(&mut observer).await;
    // A role that does not count any more would not even see the marker.
    stage.database.let_judge().await;
    assert_eq!(stage.told(client).await, [""; 0], "{} taken", case.name);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_changes_with_a_row_counts_for_it_whatever_fires_for_the_rule() {
    let stage = Stage::new(&CASES.iter().map(made).collect::<String>()).await;
    for case in &CASES {
        let mut client = reader(&stage, case).await;
        check(&stage, case, &mut client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_changes_with_a_row_counts_for_it_while_the_event_trigger_is_away() {
    for case in &TRIGGERS {
        let stage = Stage::new(&made(case)).await;
        let mut client = reader(&stage, case).await;
        check(&stage, case, &mut client).await;
    }
}
