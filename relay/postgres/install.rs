//! Brings the database side (`sql/`) to this version: idempotent, safe when many run at once, never backwards.

use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tokio::time::sleep;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::postgres::connect::advice::not_reader;
use crate::postgres::connect::pool::Error;

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
    ("100_shapes.sql", include_str!("../../sql/100_shapes.sql")),
    ("101_capture.sql", include_str!("../../sql/101_capture.sql")),
    ("101_grants.sql", include_str!("../../sql/101_grants.sql")),
    ("102_watch.sql", include_str!("../../sql/102_watch.sql")),
    ("103_page.sql", include_str!("../../sql/103_page.sql")),
    ("104_judge.sql", include_str!("../../sql/104_judge.sql")),
    ("105_catalog.sql", include_str!("../../sql/105_catalog.sql")),
    ("106_refresh.sql", include_str!("../../sql/106_refresh.sql")),
    ("107_auth.sql", include_str!("../../sql/107_auth.sql")),
    ("108_schema_changes.sql", include_str!("../../sql/108_schema_changes.sql")),
    ("109_explain.sql", include_str!("../../sql/109_explain.sql")),
    ("110_retention.sql", include_str!("../../sql/110_retention.sql")),
    ("111_bookmarks.sql", include_str!("../../sql/111_bookmarks.sql")),
    ("111_transaction_ends.sql", include_str!("../../sql/111_transaction_ends.sql")),
    RIGHTS_DUE,
    RIGHTS,
    ("902_history.sql", include_str!("../../sql/902_history.sql")),
    ("903_event_trigger.sql", include_str!("../../sql/903_event_trigger.sql")),
];

const LEDGER: (&str, &str) = ("001_ledger.sql", include_str!("../../sql/001_ledger.sql"));
const RIGHTS_DUE: (&str, &str) = ("112_rights_due.sql", include_str!("../../sql/112_rights_due.sql"));
const RIGHTS: (&str, &str) = ("901_rights.sql", include_str!("../../sql/901_rights.sql"));

/// The advisory lock that makes installers queue.
const LOCK: &str = "select pg_try_advisory_lock(1919249009, 3)";
const UNLOCK: &str = "select pg_advisory_unlock(1919249009, 3)";

/// Applies what is missing or changed; returns the names of the files that were applied.
///
/// `0NN` files are structure, applied once. `1NN` are behaviour, applied when their text changed, unless a newer relay
/// wrote it: one of a later version, or of a build that knows more structure. `9NN` are rights, applied every time. Each file is one transaction together with its line in the ledger.
///
/// # Errors
/// When PostgreSQL refuses a file; what was applied before it stays.
pub async fn install(client: &mut Client) -> Result<Vec<&'static str>, Error> {
    lock(client).await?;
    let applied = apply(client).await;
    client.batch_execute(UNLOCK).await?;
    applied
}

/// Between two tries to get the lock.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two words about who has it.
const WORD: Duration = Duration::from_secs(5);
/// An installation takes seconds. Who has the lock for so long is none.
const LONGEST: Duration = Duration::from_secs(120);

/// Waits for other installers, and says for whom.
async fn lock(client: &Client) -> Result<(), Error> {
    let started = Instant::now();
    let mut told = None::<Instant>;
    while !client.query_one(LOCK, &[]).await?.get::<_, bool>(0) {
        let waited = started.elapsed();
        if waited > PAUSE * 5 && told.is_none_or(|told| told.elapsed() >= WORD) || waited > LONGEST {
            told = Some(Instant::now());
            let holder = holder(client).await?;
            if waited > LONGEST {
                return Err(Error::Unfit(format!(
                    "another session keeps the lock of installers: {holder}. End it, then try again"
                )));
            }
            tracing::info!(
                waited_s = waited.as_secs(),
                "waiting for the lock of installers: {holder} has it"
            );
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Who has the lock of installers.
async fn holder(client: &Client) -> Result<String, Error> {
    let asked = "select pg_catalog.format('process %s of %s', l.pid, coalesce(a.usename::text, 'another login'))
           || coalesce(', ' || nullif(a.application_name, ''), '')
           || coalesce(' (since ' || pg_catalog.date_trunc('second', a.state_change)::text || ' ' || a.state || ')', '')
         from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a using (pid)
         where l.locktype = 'advisory' and l.classid = 1919249009 and l.objid = 3 and l.objsubid = 2 and l.granted
           and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())";
    let holder = client.query_opt(asked, &[]).await?;
    Ok(holder.map_or_else(|| String::from("a session that has just ended"), |holder| holder.get(0)))
}

async fn apply(client: &mut Client) -> Result<Vec<&'static str>, Error> {
    set_right(client).await?;
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
    renew(client).await?;
    tell_of_service_role(client).await?;
    Ok(applied)
}

/// Before the event triggers can run they need their rights, and before that they would refuse to let them be granted: for the length of
/// this transaction, which nobody else sees, they are off.
const OFF: &str = "do $$ declare name text; begin
     for name in select evtname from pg_event_trigger where evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites') loop
       execute format('alter event trigger %I disable', name);
     end loop;
   exception when insufficient_privilege then null; end $$";
const ON: &str = "do $$ declare name text; begin
     for name in select evtname from pg_event_trigger
                 where evtname in ('relay_schema_changes', 'relay_schema_drops', 'relay_rewrites') and evtenabled = 'D' loop
       execute format('alter event trigger %I enable always', name);
     end loop;
   exception when insufficient_privilege then null; end $$";

/// Makes whole what is there already, in whatever state it came: roles, owners and rights, without which not even the other files could
/// be applied.
async fn set_right(client: &mut Client) -> Result<(), Error> {
    let there = "select to_regclass('relay.history') is not null, to_regprocedure('relay.rights_due()') is not null, \
         to_regproc('relay.renew_shapes') is not null";
    let there = client.query_one(there, &[]).await?;
    if !there.get::<_, bool>(0) {
        return Ok(());
    }
    let transaction = client.transaction().await?;
    transaction.batch_execute(OFF).await?;
    for (name, text) in [LEDGER, RIGHTS_DUE, RIGHTS] {
        if name != RIGHTS_DUE.0 || !there.get::<_, bool>(1) {
            transaction.batch_execute(text).await.map_err(|error| named(name, &error))?;
        }
    }
    if there.get(2) {
        transaction
            .batch_execute("select relay.renew_shapes()")
            .await
            .map_err(|error| named(RIGHTS.0, &error))?;
    }
    transaction.batch_execute(ON).await?;
    transaction.commit().await?;
    Ok(())
}

/// A plain owner may not give what lets `service_role` see all rows.
async fn tell_of_service_role(client: &Client) -> Result<(), Error> {
    let lacks = "select exists (select from pg_roles where rolname = 'service_role' and not (rolbypassrls or rolsuper))";
    if client.query_one(lacks, &[]).await?.get(0) {
        tracing::info!("{SERVICE_ROLE}");
    }
    Ok(())
}

/// What a `service_role` that a plain owner made cannot do, and how it can.
pub const SERVICE_ROLE: &str = "service_role has no BYPASSRLS, so that policies keep rows back from it, too. As a superuser: \
     alter role service_role bypassrls";

/// How long one table is asked for, with a pause between two tries: a transaction that wrote to it and stays open must not make other
/// writers wait behind us.
const TRIES: u32 = 120;
const TABLE_PAUSE: Duration = Duration::from_millis(500);

/// Writes the trigger functions of watched tables anew where their text or owner is another, and the triggers that are missing, disabled
/// or of an older version. Of what belongs to somebody else the installer leaves what is there.
async fn renew(client: &mut Client) -> Result<(), Error> {
    drop_redirected(client).await?;
    client.execute("select relay.repair()", &[]).await?;
    let broken = "select w.relation::text, pg_catalog.format('select relay.set_triggers(%s, %s)', w.relation::oid, w.id) \
         from relay.watch_list w join pg_class c on c.oid = w.relation \
         where c.relkind <> 'm' and not relay.triggers_intact(w.relation, w.id, true)";
    for row in client.query(broken, &[]).await? {
        if let Some(why) = alter_table(client, row.get(1)).await? {
            tracing::warn!(table = row.get::<_, String>(0), error = %why, "its changes are not told until its owner calls relay.watch");
        }
    }
    // A dump of the schema alone brings triggers without the list of what is watched: what they log would be another table's, once that
    // has their number.
    let stray = "select t.tgrelid::regclass::text, pg_catalog.format('drop trigger %I on %s', t.tgname, t.tgrelid::regclass) \
         from pg_trigger t where t.tgparentid = 0 and t.tgname ~ '^00_relay_(capture|truncate)_[0-9]+' \
         and t.tgfoid in (select p.oid from pg_proc p where p.pronamespace = 'relay'::regnamespace) \
         and not exists (select from relay.watch_list w where w.id::text = pg_catalog.split_part(t.tgname, '_', 4) \
         and t.tgrelid in (select relay.parts(w.relation)))";
    for row in client.query(stray, &[]).await? {
        let table: String = row.get(0);
        match alter_table(client, row.get(1)).await? {
            Some(why) => {
                tracing::warn!(table, error = %why, "it has triggers of the relay and is not watched");
            }
            None => tracing::warn!(
                table,
                "it had triggers of the relay and is not watched: its owner may call relay.watch"
            ),
        }
    }
    // What older triggers called, once there are none.
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

/// Drops the tables that an older version logged to (see `010_log.sql`), an hour after nothing was made to write there any more.
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

/// Runs a statement that locks a table, as soon as that makes nobody wait; gives why it was refused.
async fn alter_table(client: &mut Client, statement: &str) -> Result<Option<Error>, Error> {
    let mut tries = 0;
    loop {
        let transaction = client.transaction().await?;
        transaction.batch_execute("set local lock_timeout = '50ms'").await?;
        let altered = transaction.batch_execute(statement).await;
        tries += 1;
        match altered {
            Ok(()) => {
                transaction.commit().await?;
                return Ok(None);
            }
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) && tries < TRIES => {
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

/// What helps when PostgreSQL itself has no hint.
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
    let line = "select checksum, version, exists (select from relay.ledger where file like '0%' and file <> all ($2)) \
         from relay.ledger where file = $1";
    let Some(line) = client.query_opt(line, &[&name, &known]).await? else { return Ok(true) };
    let (written, version, has_more): (String, String, bool) = (line.get(0), line.get(1), line.get(2));
    let is_newer = has_more || is_newer(&version, env!("CARGO_PKG_VERSION"));
    Ok(name.starts_with('1') && written != checksum(text) && !is_newer)
}

/// Whether the database side is what this version needs.
///
/// # Errors
/// Says what to do when it is missing or older; fails as the connection does.
pub async fn check(client: &Client) -> Result<(), Error> {
    match is_as_needed(client).await {
        Err(error) if error.code() == Some("42501") => {
            let reads = "select quote_ident(current_user), exists (select from pg_roles where rolname = 'relay_reader' \
                 and pg_has_role(oid, 'usage'))";
            let who = client.query_one(reads, &[]).await?;
            Err(match who.get(1) {
                true => Error::Unfit(format!(
                    "{error}: the rights in the schema `relay` are not as they should be: run `relay install --database-url …` as its owner"
                )),
                false => Error::Unfit(format!("{error}: {}", not_reader(who.get(0)))),
            })
        }
        checked => checked,
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

fn is_newer(written: &str, ours: &str) -> bool {
    let parts =
        |version: &str| version.split('.').map(|part| part.parse::<u64>().unwrap_or(0)).collect::<Vec<_>>();
    parts(written) > parts(ours)
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
    fn files_are_in_order_and_numbered_by_nature() {
        let names: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
        assert!(names.is_sorted());
        let mut there: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/sql"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        there.sort();
        assert_eq!(names, there);
        assert!(names.iter().all(|name| matches!(name.as_bytes()[0], b'0' | b'1' | b'9')));
    }
}
