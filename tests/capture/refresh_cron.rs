//! Where pg_cron is installed, it runs the schedules of whole minutes.
#![allow(clippy::print_stdout, reason = "what is not run is said")]

use crate::delivery::crash::Cluster;
use crate::support::database::{Database, connect};
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread")]
async fn pg_cron_runs_whole_minutes_and_the_relay_the_rest_and_what_is_overdue() {
    let server = Database::bare().await;
    let is_here = "select exists (select from pg_available_extensions where name = 'pg_cron')";
    if server.value(is_here).await == "f" {
        println!("not run: the server has no pg_cron (Debian: apt install postgresql-15-cron)");
        return;
    }
    let cluster = Cluster::start(&["-c", "fsync=off", "-c", "shared_preload_libraries=pg_cron"]).await;
    let mut session = connect(&cluster.url).await;
    relay::postgres::install::install(&mut session).await.unwrap();
    let value = async |sql: &str| -> String {
        let found = session.query_one(&format!("select coalesce(({sql})::text, '-')"), &[]).await.unwrap();
        found.get(0)
    };
    let run = async |sql: &str| session.batch_execute(sql).await.unwrap();
    // What comes before pg_cron's turn has to fit into a minute.
    eventually("the minute is young", || async {
        (value("select extract(second from clock_timestamp()) between 2 and 35").await == "true")
            .then_some(())
    })
    .await;
    run("create extension pg_cron;
         create table source (id int primary key, v int); insert into source values (1, 0);
         create materialized view m as select id, v from source; create unique index on m (id);
         create materialized view n as select id, v from source; create unique index on n (id);
         select relay.watch('m'), relay.watch('n'), relay.refresh_every('m', '1 minute'), relay.refresh_every('n', '90 seconds')")
    .await;
    let jobs = "select string_agg(schedule || ' ' || command, ', ') from cron.job";
    assert_eq!(value(jobs).await, "*/1 * * * * select relay.run_refresh(1)");
    assert_eq!(
        value("select string_agg(concat(relation, cron_job is not null), ' ') from relay.refresh_jobs").await,
        "mt nf"
    );
    // Both are due at once, by the relay.
    run("select relay.run_refreshes()").await;
    assert_eq!(value("select count(last_run) from relay.refresh_jobs").await, "2");
    // At the next minute, with no relay at all.
    run("update source set v = 1; update relay.refresh_schedule set last_run = null").await;
    assert_eq!(value("select relay.run_refreshes() > '10 seconds'").await, "true");
    eventually("the minute is over", || async {
        (value("select extract(second from clock_timestamp()) < 10").await == "true").then_some(())
    })
    .await;
    eventually("pg_cron has run it", || async {
        (value("select last_run from relay.refresh_jobs where relation = 'm'::regclass").await != "-")
            .then_some(())
    })
    .await;
    let told = "select string_agg(concat(operation, after), ' ') from relay.changes where operation in ('I', 'U', 'D', 'G')";
    assert_eq!(value(told).await, r#"U{"id":1,"v":1}"#);
    assert_eq!(value("select count(*) from relay.refresh_jobs where last_run is not null").await, "1");
    // pg_cron does not run it any more: the relay does, half a minute later.
    run("update cron.job set active = false; update source set v = 2;
         update relay.refresh_schedule set next_run = clock_timestamp() - interval '31 seconds' where relation = 'm'::regclass;
         select relay.run_refreshes()")
    .await;
    assert_eq!(value(told).await, r#"U{"id":1,"v":1} U{"id":1,"v":2}"#);
    for (statement, expected) in [
        ("select relay.refresh_every('n', '6 hours')", "*/1 * * * *, 0 */6 * * *"),
        ("select relay.refresh_every('n', '1 day')", "*/1 * * * *, 0 0 * * *"),
        ("select relay.refresh_every('n', '7 minutes')", "*/1 * * * *"),
        ("select relay.refresh_every('m', '100 milliseconds')", "-"),
        ("select relay.refresh_every('m', '30 minutes')", "*/30 * * * *"),
        ("select relay.refresh_stop('m')", "-"),
    ] {
        run(statement).await;
        let schedules = "select string_agg(schedule, ', ' order by jobid) from cron.job";
        assert_eq!(value(schedules).await, expected, "{statement}");
    }
}
