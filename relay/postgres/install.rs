//! Installs and upgrades the database side (`sql/`): idempotent, safe to run concurrently, never a downgrade.

use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tokio::time::sleep;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::postgres::connect::advice::not_reader;
use crate::postgres::connect::pool::Error;
use crate::postgres::locks::Lock;

/// The files of `sql/`, in the order in which they are applied.
const FILES: &[(&str, &str)] = &[
    LEDGER,
    ("002_changelog.sql", include_str!("../../sql/002_changelog.sql")),
    ("003_watch_list.sql", include_str!("../../sql/003_watch_list.sql")),
    ("004_retention.sql", include_str!("../../sql/004_retention.sql")),
    ("005_bookmarks.sql", include_str!("../../sql/005_bookmarks.sql")),
    ("007_shapes.sql", include_str!("../../sql/007_shapes.sql")),
    ("008_widenings.sql", include_str!("../../sql/008_widenings.sql")),
    ("009_known_relations.sql", include_str!("../../sql/009_known_relations.sql")),
    ("010_log.sql", include_str!("../../sql/010_log.sql")),
    ("011_partitions.sql", include_str!("../../sql/011_partitions.sql")),
    ("012_collections.sql", include_str!("../../sql/012_collections.sql")),
    ("013_told.sql", include_str!("../../sql/013_told.sql")),
    ("014_status.sql", include_str!("../../sql/014_status.sql")),
    ("015_ignored.sql", include_str!("../../sql/015_ignored.sql")),
    ("016_webhooks.sql", include_str!("../../sql/016_webhooks.sql")),
    ("017_nodes.sql", include_str!("../../sql/017_nodes.sql")),
    ("100_ignored.sql", include_str!("../../sql/100_ignored.sql")),
    ("100_locks.sql", include_str!("../../sql/100_locks.sql")),
    ("100_shapes.sql", include_str!("../../sql/100_shapes.sql")),
    ("101_capture.sql", include_str!("../../sql/101_capture.sql")),
    ("101_grants.sql", include_str!("../../sql/101_grants.sql")),
    ("102_watch.sql", include_str!("../../sql/102_watch.sql")),
    ("103_page.sql", include_str!("../../sql/103_page.sql")),
    ("104_judge.sql", include_str!("../../sql/104_judge.sql")),
    ("105_catalog.sql", include_str!("../../sql/105_catalog.sql")),
    ("106_refresh.sql", include_str!("../../sql/106_refresh.sql")),
    ("106_refresh_on_change.sql", include_str!("../../sql/106_refresh_on_change.sql")),
    ("107_auth.sql", include_str!("../../sql/107_auth.sql")),
    ("107_collections.sql", include_str!("../../sql/107_collections.sql")),
    ("107_topics.sql", include_str!("../../sql/107_topics.sql")),
    ("108_schema_changes.sql", include_str!("../../sql/108_schema_changes.sql")),
    ("109_explain.sql", include_str!("../../sql/109_explain.sql")),
    ("110_retention.sql", include_str!("../../sql/110_retention.sql")),
    ("111_bookmarks.sql", include_str!("../../sql/111_bookmarks.sql")),
    ("111_transaction_ends.sql", include_str!("../../sql/111_transaction_ends.sql")),
    RIGHTS_DUE,
    ("113_realtime.sql", include_str!("../../sql/113_realtime.sql")),
    ("114_broadcasts.sql", include_str!("../../sql/114_broadcasts.sql")),
    ("115_watch_query.sql", include_str!("../../sql/115_watch_query.sql")),
    ("116_status.sql", include_str!("../../sql/116_status.sql")),
    ("117_webhooks.sql", include_str!("../../sql/117_webhooks.sql")),
    ("118_nodes.sql", include_str!("../../sql/118_nodes.sql")),
    ("900_realtime.sql", include_str!("../../sql/900_realtime.sql")),
    RIGHTS,
    ("902_history.sql", include_str!("../../sql/902_history.sql")),
    ("903_event_trigger.sql", include_str!("../../sql/903_event_trigger.sql")),
];

const LEDGER: (&str, &str) = ("001_ledger.sql", include_str!("../../sql/001_ledger.sql"));
const RIGHTS_DUE: (&str, &str) = ("112_rights_due.sql", include_str!("../../sql/112_rights_due.sql"));
const RIGHTS: (&str, &str) = ("901_rights.sql", include_str!("../../sql/901_rights.sql"));

/// Applies the files that are missing or changed; returns their names.
///
/// `0NN` files are structure, applied once. `1NN` files are behaviour, applied when their text changed, unless a newer relay
/// wrote them: one of a later version, or of a build that knows more structure. `9NN` files are rights, applied every time.
/// Each file and its row in the ledger are one transaction.
///
/// # Errors
/// When PostgreSQL refuses a file; what was applied before it stays.
pub async fn install(client: &mut Client) -> Result<Vec<&'static str>, Error> {
    lock(client).await?;
    let applied = apply(client).await;
    client.batch_execute(&format!("select pg_advisory_unlock({})", Lock::Install)).await?;
    applied
}

/// Pause between two attempts to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Interval between log lines about the holder of the lock.
const LOG_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum wait. An installation takes seconds, so a session that holds the lock for longer is no installer.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Waits for other installers, and logs which session holds the lock.
async fn lock(client: &Client) -> Result<(), Error> {
    let started = Instant::now();
    let mut logged = None::<Instant>;
    let take = format!("select pg_try_advisory_lock({})", Lock::Install);
    while !client.query_one(&take, &[]).await?.get::<_, bool>(0) {
        let waited = started.elapsed();
        let is_log_due =
            waited > LOCK_PAUSE * 5 && logged.is_none_or(|logged| logged.elapsed() >= LOG_INTERVAL);
        if is_log_due || waited > MAX_WAIT {
            logged = Some(Instant::now());
            let holder = holder(client).await?;
            if waited > MAX_WAIT {
                return Err(Error::Unfit(format!(
                    "another session holds the installer lock: {holder}. End that session, then try again"
                )));
            }
            tracing::info!(waited_s = waited.as_secs(), "waiting for the installer lock, held by {holder}");
        }
        sleep(LOCK_PAUSE).await;
    }
    Ok(())
}

/// Describes the session that holds the installer lock.
async fn holder(client: &Client) -> Result<String, Error> {
    let query = format!(
        "select pg_catalog.format('process %s of %s', l.pid, coalesce(a.usename::text, 'another login'))
           || coalesce(', ' || nullif(a.application_name, ''), '')
           || coalesce(' (since ' || pg_catalog.date_trunc('second', a.state_change)::text || ' ' || a.state || ')', '')
         from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a using (pid)
         where {}",
        Lock::Install.is_held()
    );
    let holder = client.query_opt(&query, &[]).await?;
    Ok(holder.map_or_else(|| String::from("a session that has just ended"), |holder| holder.get(0)))
}

async fn apply(client: &mut Client) -> Result<Vec<&'static str>, Error> {
    repair_existing(client).await?;
    let mut applied = Vec::new();
    for (name, text) in FILES {
        if !is_due(client, name, text).await? {
            continue;
        }
        let transaction = client.transaction().await?;
        transaction.batch_execute(text).await.map_err(|error| named(name, &error))?;
        transaction
            .execute(
                "insert into relay.ledger (file, checksum, version) values ($1, $2, $3) on conflict (file) \
                 do update set checksum = excluded.checksum, version = excluded.version, applied_at = now()",
                &[name, &checksum(text), &env!("CARGO_PKG_VERSION")],
            )
            .await?;
        transaction.commit().await?;
        applied.push(*name);
    }
    renew_triggers(client).await?;
    warn_about_service_role(client).await?;
    Ok(applied)
}

/// Disables the event triggers within the transaction that grants their rights: without these rights they would fail, and
/// refuse the grants.
const DISABLE_TRIGGERS: &str = "do $$ declare name text; begin
     for name in select evtname from pg_event_trigger where evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites') loop
       execute format('alter event trigger %I disable', name);
     end loop;
   exception when insufficient_privilege then null; end $$";
const ENABLE_TRIGGERS: &str = "do $$ declare name text; begin
     for name in select evtname from pg_event_trigger
                 where evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites') and evtenabled = 'D' loop
       execute format('alter event trigger %I enable always', name);
     end loop;
   exception when insufficient_privilege then null; end $$";

/// Repairs roles, owners and rights of an existing schema, whatever its state (a restored dump, for example). The other
/// files cannot be applied without them.
async fn repair_existing(client: &mut Client) -> Result<(), Error> {
    let existing = "select to_regclass('relay.history') is not null, to_regprocedure('relay.rights_due()') is not null, \
         to_regproc('relay.renew_shapes') is not null";
    let existing = client.query_one(existing, &[]).await?;
    let (has_schema, has_rights, has_shapes): (bool, bool, bool) =
        (existing.get(0), existing.get(1), existing.get(2));
    if !has_schema {
        return Ok(());
    }
    let transaction = client.transaction().await?;
    transaction.batch_execute(DISABLE_TRIGGERS).await?;
    for (name, text) in [LEDGER, RIGHTS_DUE, RIGHTS] {
        if name != RIGHTS_DUE.0 || !has_rights {
            transaction.batch_execute(text).await.map_err(|error| named(name, &error))?;
        }
    }
    if has_shapes {
        transaction
            .batch_execute("select relay.renew_shapes()")
            .await
            .map_err(|error| named(RIGHTS.0, &error))?;
    }
    transaction.batch_execute(ENABLE_TRIGGERS).await?;
    transaction.commit().await?;
    Ok(())
}

/// Logs that `service_role` does not see all rows: an installer that is no superuser may not grant BYPASSRLS.
async fn warn_about_service_role(client: &Client) -> Result<(), Error> {
    let is_limited = "select exists (select from pg_roles where rolname = 'service_role' and not (rolbypassrls or rolsuper))";
    if client.query_one(is_limited, &[]).await?.get(0) {
        tracing::info!("{SERVICE_ROLE}");
    }
    Ok(())
}

/// The warning about a `service_role` without BYPASSRLS, with its remedy.
pub const SERVICE_ROLE: &str = "service_role has no BYPASSRLS, so policies hide rows from it, too. As a superuser: \
     alter role service_role bypassrls";

/// Maximum number of attempts to lock one table. Each is short: while an open transaction has written to the table, a
/// waiting lock request would block other writers.
const MAX_LOCK_ATTEMPTS: u32 = 120;
/// Pause between two attempts to lock a table.
const TABLE_PAUSE: Duration = Duration::from_millis(500);

/// Recreates trigger functions of watched tables whose text or owner differs, and triggers that are missing, disabled or
/// outdated. Tables of owners whose role the installer does not have are left as they are, with a warning.
async fn renew_triggers(client: &mut Client) -> Result<(), Error> {
    drop_redirected(client).await?;
    client.execute("select relay.repair()", &[]).await?;
    let broken = "select w.relation::text, pg_catalog.format('select relay.set_triggers(%s, %s)', w.relation::oid, w.id) \
         from relay.watch_list w join pg_class c on c.oid = w.relation \
         where c.relkind <> 'm' and not relay.triggers_intact(w.relation, w.id, true)";
    for row in client.query(broken, &[]).await? {
        if let Some(error) = alter_table(client, row.get(1)).await? {
            let table: String = row.get(0);
            tracing::warn!(table, %error, "triggers not renewed, changes are lost until the table's owner calls relay.watch");
        }
    }
    // A schema-only dump restores triggers without the watch list. They would log changes under the number of a table that
    // is watched later.
    let stray = "select t.tgrelid::regclass::text, pg_catalog.format('drop trigger %I on %s', t.tgname, t.tgrelid::regclass) \
         from pg_trigger t where t.tgparentid = 0 and t.tgname ~ '^00_relay_(capture|truncate)_[0-9]+' \
         and t.tgfoid in (select p.oid from pg_proc p where p.pronamespace = 'relay'::regnamespace) \
         and not exists (select from relay.watch_list w where w.id::text = pg_catalog.split_part(t.tgname, '_', 4) \
         and t.tgrelid in (select relay.parts(w.relation)))";
    for row in client.query(stray, &[]).await? {
        let table: String = row.get(0);
        match alter_table(client, row.get(1)).await? {
            Some(error) => {
                tracing::warn!(table, %error, "relay triggers on a table that is not watched, not dropped");
            }
            None => tracing::warn!(
                table,
                "dropped relay triggers from a table that is not watched: to watch it, its owner calls relay.watch"
            ),
        }
    }
    // Functions that only triggers of older versions call.
    client
        .batch_execute(
            "do $$ begin
               if not exists (select from pg_trigger t where t.tgfoid = to_regprocedure('relay.capture()')) then
                 drop function if exists relay.capture(), relay.capture_whole(anyelement, anyelement, int, \"char\"),
                   relay.log_change(int, \"char\", boolean, json, json), relay.needs_care(regclass);
               end if;
             end $$",
        )
        .await?;
    Ok(())
}

/// Drops the tables of an older version's changelog (see `010_log.sql`), an hour after the last trigger function that
/// writes there was replaced.
async fn drop_redirected(client: &Client) -> Result<(), Error> {
    let drop = "do $$ begin
         if to_regclass('relay.changes_0') is not null
            and exists (select from relay.ledger where file = '010_log.sql' and applied_at < now() - interval '1 hour')
            and not exists (select from pg_proc p where p.pronamespace = 'relay'::regnamespace and p.prosrc ~ 'into relay\\.changes_') then
           perform set_config('lock_timeout', '50ms', true);
           drop table relay.changes_0, relay.changes_1, relay.changes_2;
           drop function relay.redirect();
         end if;
       exception when lock_not_available then
         null;
       end $$";
    client.batch_execute(drop).await?;
    Ok(())
}

/// Runs a statement that locks a table, when no writer has to wait for it. Returns PostgreSQL's error if it refuses the
/// statement.
async fn alter_table(client: &mut Client, statement: &str) -> Result<Option<Error>, Error> {
    let mut attempts = 0;
    loop {
        let transaction = client.transaction().await?;
        transaction.batch_execute("set local lock_timeout = '50ms'").await?;
        let altered = transaction.batch_execute(statement).await;
        attempts += 1;
        match altered {
            Ok(()) => {
                transaction.commit().await?;
                return Ok(None);
            }
            Err(error)
                if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) && attempts < MAX_LOCK_ATTEMPTS =>
            {
                transaction.rollback().await?;
                sleep(TABLE_PAUSE).await;
            }
            Err(error) => {
                let _ = transaction.rollback().await;
                return Ok(Some(error.into()));
            }
        }
    }
}

/// The remedy when PostgreSQL itself gives no hint.
const ADVICE: &str = "The login needs to own the database and have CREATEROLE, or be a superuser";

fn named(name: &str, error: &tokio_postgres::Error) -> Error {
    let why = error
        .as_db_error()
        .map_or_else(|| error.to_string(), |db| format!("{}. {}", db.message(), db.hint().unwrap_or(ADVICE)));
    Error::Unfit(format!("the database side could not be installed ({name}): {why}"))
}

async fn is_due(client: &Client, name: &str, text: &str) -> Result<bool, Error> {
    let ledger = client.query_one("select to_regclass('relay.ledger') is not null", &[]).await?;
    if !ledger.get::<_, bool>(0) || name.starts_with('9') {
        return Ok(true);
    }
    let known: Vec<&str> = FILES.iter().map(|(file, _)| *file).collect();
    let row = "select checksum, version, exists (select from relay.ledger where file like '0%' and file <> all ($2)) \
         from relay.ledger where file = $1";
    let Some(row) = client.query_opt(row, &[&name, &known]).await? else { return Ok(true) };
    let (applied, version, has_unknown): (String, String, bool) = (row.get(0), row.get(1), row.get(2));
    let is_newer = has_unknown || is_newer(&version, env!("CARGO_PKG_VERSION"));
    Ok(name.starts_with('1') && applied != checksum(text) && !is_newer)
}

/// Checks that the database side fits this version.
///
/// # Errors
/// With the remedy when the schema is missing, older or not readable; else as the connection.
pub async fn check(client: &Client) -> Result<(), Error> {
    match is_as_needed(client).await {
        Err(error) if error.code() == Some("42501") => {
            let login = "select quote_ident(current_user), exists (select from pg_roles where rolname = 'relay_reader' \
                 and pg_has_role(oid, 'usage'))";
            let login = client.query_one(login, &[]).await?;
            let (name, is_reader): (&str, bool) = (login.get(0), login.get(1));
            Err(match is_reader {
                true => Error::Unfit(format!(
                    "{error}: rights in the schema `relay` are missing: run `relay install --database-url …` as its owner"
                )),
                false => Error::Unfit(format!("{error}: {}", not_reader(name))),
            })
        }
        result => result,
    }
}

async fn is_as_needed(client: &Client) -> Result<(), Error> {
    let ledger = client.query_one("select to_regclass('relay.ledger') is not null", &[]).await?;
    if !ledger.get::<_, bool>(0) {
        return Err(Error::Unfit(String::from(
            "the schema `relay` is not in this database: run `relay install --database-url …` or serve with --install",
        )));
    }
    for (name, text) in FILES {
        if !name.starts_with('9') && is_due(client, name, text).await? {
            return Err(Error::Unfit(format!(
                "the schema `relay` is older than this relay (sql/{name}): run `relay install --database-url …`"
            )));
        }
    }
    Ok(())
}

fn checksum(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_newer(applied: &str, ours: &str) -> bool {
    let parts =
        |version: &str| version.split('.').map(|part| part.parse::<u64>().unwrap_or(0)).collect::<Vec<_>>();
    parts(applied) > parts(ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(is_newer("0.10.0", "0.9.9"));
        assert!(!is_newer("0.1.0", "0.1.0"));
        assert!(!is_newer("0.1.0", "1.0.0"));
    }

    #[test]
    fn files_are_in_order_and_numbered_by_kind() {
        let names: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
        assert!(names.is_sorted());
        let mut in_folder: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/sql"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        in_folder.sort();
        assert_eq!(names, in_folder);
        assert!(names.iter().all(|name| matches!(name.as_bytes()[0], b'0' | b'1' | b'9')));
    }
}
