//! The files load alone, twice and together, and leave nothing open.

use super::{ANA, SUPABASE, admin, bearer, file, join, told, user};
use crate::support::database::Database;
use crate::support::program::output;
use crate::support::stage::Stage;

pub const FILES: [&str; 5] =
    ["agent_access.sql", "user_status.sql", "status_history.sql", "admin_metrics.sql", "chat.sql"];

/// Rights of the roles that any token may have, beyond those that the files say, and tables without row security.
const OPEN: &str = "select coalesce(string_agg(what, ', '), '') from (
    select c.relname || ' has no row security' as what from pg_class c
    where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and not c.relrowsecurity
    union all
    select format('%s may %s %s', r, p, c.relname) from pg_class c, unnest(array['anon', 'authenticated']) r,
      unnest(array['truncate', 'references', 'trigger']) p
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'm') and has_table_privilege(r, c.oid, p)
    union all
    select format('anon may %s %s', p, c.relname) from pg_class c, unnest(array['select', 'insert', 'update', 'delete']) p
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'm') and has_table_privilege('anon', c.oid, p)
      and (p <> 'select' or c.relname not in ('user_status', 'user_online_periods', 'conversation_members', 'conversation_participants'))
      and (p <> 'delete' or c.relname <> 'conversation_members')
    union all
    select format('%s may call %s', r, f.oid::regprocedure) from pg_proc f, unnest(array['anon', 'authenticated']) r
    where f.pronamespace = 'public'::regnamespace and f.prosecdef and f.prorettype <> 'trigger'::regtype
      and has_function_privilege(r, f.oid, 'execute')
      and f.proname not in ('heartbeat', 'send_chat_message', 'end_chat_session')
    union all
    select f.proname || ' has the rights of its owner and a search path of its caller' from pg_proc f
    where f.pronamespace = 'public'::regnamespace and f.prosecdef and f.proconfig is distinct from array['search_path=\"\"']
  ) as found";

/// A database like Supabase's, in which the relay is installed.
async fn bare() -> Database {
    let database = Database::new().await;
    // Before PostgreSQL 15 every role may create there, which doctor reports as a fault.
    database.run("revoke create on schema public from public").await;
    database.run(SUPABASE).await;
    database
}

/// How many rows each table has.
async fn contents(database: &Database) -> String {
    let tables = "select string_agg(format('select %L, count(*) from %s', c.oid::regclass, c.oid::regclass), ' union all ' order by c.relname)
                  from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'm')";
    let counts = database.value(tables).await;
    database.value(&format!("select string_agg(t::text, ' ' order by t) from ({counts}) as t")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_system_loads_alone_and_again_and_leaves_nothing_open() {
    for name in FILES {
        let database = bare().await;
        database.run(&file(name)).await;
        let first = contents(&database).await;
        database.run(&file(name)).await;
        assert_eq!(contents(&database).await, first, "{name}");
        assert_eq!(database.value(OPEN).await, "", "{name}");
        let (code, said, _) = output(&["doctor", "--database-url", &database.url]).await;
        assert!(code == 0 && !said.contains("FAULT"), "{name}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_systems_load_into_one_database_in_any_order() {
    for backwards in [false, true] {
        let database = bare().await;
        let mut files = FILES.to_vec();
        if backwards {
            files.reverse();
        }
        for name in files.iter().chain(&files) {
            database.run(&file(name)).await;
        }
        assert_eq!(database.value(OPEN).await, "");
        assert_eq!(database.value("select count(*) from relay.watched where not intact").await, "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_that_is_loaded_again_takes_nothing_from_the_connected() {
    let stage = Stage::new(&format!("{SUPABASE} {}", file("agent_access.sql"))).await;
    let (mut ana, mut edda) = (join(&stage, &user(ANA)).await, join(&stage, &admin()).await);
    let off = |agent: &str| {
        format!("update agent_access set enabled = false where agent = '{agent}' and user_id = '{ANA}'")
    };
    stage.run(&off("web")).await;
    stage.run(&file("agent_access.sql")).await;
    stage.run(&off("x")).await;
    for client in [&mut ana, &mut edda] {
        let lines = told(&stage, client, "agent_access", &["agent", "enabled"]).await;
        assert_eq!(lines, ["UPDATE web false (web true)", "UPDATE x false (x true)"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_of_users_are_decided_without_asking_for_each_reader() {
    let database = bare().await;
    for name in FILES {
        database.run(&file(name)).await;
    }
    for (way, tables) in [
        (
            "compiled",
            vec!["agent_access", "agent_access_audit", "conversation_members", "user_online_periods"],
        ),
        ("compiled", vec!["system_logs", "system_alerts", "chat_participants"]),
        ("compiled", vec!["admin_metrics_view", "admin_metrics_by_day"]),
        ("inverted", vec!["user_status", "conversation_participants", "chat_sessions", "chat_messages"]),
    ] {
        for table in tables {
            let token = bearer(&admin());
            let arguments = ["explain", table, "--json", "--database-url", &database.url, "--token", &token];
            let (_, said, error) = output(&arguments).await;
            let said: serde_json::Value =
                serde_json::from_str(&said).unwrap_or_else(|_| panic!("{table}: {error}"));
            assert_eq!(said["way"], way, "{table}: {said}");
        }
    }
}
