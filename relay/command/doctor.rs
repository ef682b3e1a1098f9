//! `relay doctor`: checks the database and says what to do.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use tokio_postgres::Client;

use crate::model::policy::plan::PlanKind;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::changelog::doorbell::Doorbell;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::install;

/// What a check found.
enum Finding {
    /// As it should be.
    Good(String),
    /// It works, but somebody should know.
    Note(String),
    /// It does not work; what to do.
    Fault(String),
}

use Finding::{Fault, Good, Note};

/// How long one question may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Prints a line per finding; the exit code is 1 when there is a fault.
///
/// `judge` is where policies are evaluated; as a rule the same as `server`.
pub async fn run(server: &Server, judge: &Server) -> ExitCode {
    let findings = match examine(server, judge).await {
        Ok(findings) => findings,
        Err(error) => vec![Fault(error.to_string())],
    };
    let mut faults = 0;
    for finding in &findings {
        let (mark, text) = match finding {
            Good(text) => ("ok   ", text),
            Note(text) => ("note ", text),
            Fault(text) => {
                faults += 1;
                ("FAULT", text)
            }
        };
        let _ = writeln!(std::io::stdout(), "{mark} {text}");
    }
    if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn examine(server: &Server, judge: &Server) -> Result<Vec<Finding>, Error> {
    server.check_sessions().await?;
    judge.check_sessions().await?;
    let client = server.connect().await?;
    let judging = judge.connect().await?;
    let mut findings = vec![version(&client).await?, primary(&client).await?];
    findings.push(encryption(server, &client).await?);
    if let Err(error) = install::check(&client).await {
        findings.push(Fault(error.to_string()));
        return Ok(findings);
    }
    findings.push(Good(format!("the schema relay is that of version {}", env!("CARGO_PKG_VERSION"))));
    findings.extend(rights(&client).await?);
    findings.push(bell(server, &client).await?);
    let (strangers, locks) = locks(&client).await?;
    findings.push(relays(&client, &strangers).await?);
    findings.extend(locks);
    findings.push(prepared_transactions(&client).await?);
    findings.push(queue(&client).await?);
    findings.push(numbers(&client).await?);
    findings.push(writable_schemas(&client).await?);
    findings.extend(roles(&judging).await?);
    findings.push(power(&judging).await?);
    findings.push(temporary_tables(&judging).await?);
    findings.extend(relations(&client).await?);
    findings.extend(policies(server, judge).await?);
    findings.extend(refreshes(&client).await?);
    findings.push(retention(&client).await?);
    Ok(findings)
}

/// Owners, rights and the rest that an installation asserts.
async fn rights(client: &Client) -> Result<Vec<Finding>, Error> {
    let amiss = client.query("select a from relay.install_problems() a", &[]).await?;
    let told = |row: tokio_postgres::Row| {
        Fault(format!("{}: run `relay install` as the owner of the schema relay", row.get::<_, String>(0)))
    };
    Ok(match amiss.is_empty() {
        true => vec![Good(String::from("owners and rights in the schema relay are as they should be"))],
        false => amiss.into_iter().map(told).collect(),
    })
}

async fn version(client: &Client) -> Result<Finding, Error> {
    let row = client
        .query_one(
            "select current_setting('server_version_num')::int, current_setting('server_version')",
            &[],
        )
        .await?;
    let (number, name): (i32, String) = (row.get(0), row.get(1));
    let (major, minor) = (number / 10_000, number % 10_000);
    // The releases in which a cached plan no longer outlives a revoked role membership (CVE-2026-14666).
    let fixed = match major {
        ..=13 => return Ok(Fault(format!("PostgreSQL {name} is too old: 14 or newer is needed"))),
        15 => minor >= 19,
        _ => true,
    };
    Ok(if fixed {
        Good(format!("PostgreSQL {name}"))
    } else {
        Note(format!(
            "PostgreSQL {name} keeps plans of revoked role memberships (CVE-2026-14666); the relay discards them, other programs may not: update"
        ))
    })
}

async fn primary(client: &Client) -> Result<Finding, Error> {
    let standby: bool = client.query_one("select pg_is_in_recovery()", &[]).await?.get(0);
    Ok(if standby {
        Fault(String::from("this is a standby: give the relay the primary's URL"))
    } else {
        Good(String::from("this is the primary"))
    })
}

/// What travels to the database are all rows, and a password at the start.
async fn encryption(server: &Server, client: &Client) -> Result<Finding, Error> {
    let how = "select coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false), inet_server_addr() is null \
         or inet_client_addr() = inet_server_addr()";
    let row = client.query_one(how, &[]).await?;
    Ok(match (row.get(0), row.get(1)) {
        (_, true) => Good(String::from("the connection does not leave this machine")),
        (true, _) if server.is_verified() => {
            Good(String::from("the connection is encrypted, and the server is verified"))
        }
        (true, _) => Note(String::from(
            "the connection is encrypted, but anybody may stand in for the server: sslmode=verify-full (with sslrootcert=FILE \
             where the authority is not one of the system's) verifies it",
        )),
        (false, _) => Note(String::from(
            "the connection leaves this machine without encryption: sslmode=verify-full, with TLS at the server, encrypts it",
        )),
    })
}

async fn bell(server: &Server, client: &Client) -> Result<Finding, Error> {
    let mut doorbell = Doorbell::connect(server).await?;
    if doorbell.is_off().await? {
        return Ok(Note(String::from("relay.doorbell is off: writers do not ring, the relay polls")));
    }
    Ok(if doorbell.is_heard(client).await? {
        Good(String::from("NOTIFY is heard"))
    } else {
        Note(String::from(
            "NOTIFY is not heard, probably because of a pooler: give `serve` a direct --doorbell-url, else it polls",
        ))
    })
}

/// Who reads the changelog now, strangers apart.
async fn relays(client: &Client, strangers: &[i32]) -> Result<Finding, Error> {
    let row = client.query_one("select leader, deputies from relay.health", &[]).await?;
    let leader = row.get::<_, Option<i32>>(0).filter(|leader| !strangers.contains(leader));
    Ok(Good(match (leader, row.get::<_, i64>(1)) {
        (Some(leader), 0) => format!("a relay reads the changelog (its doorbell is backend {leader})"),
        (Some(leader), others) => {
            format!("a relay leads (its doorbell is backend {leader}), others on this database: {others}")
        }
        (None, _) => String::from("no relay that hears the doorbell runs on this database now"),
    }))
}

/// Everybody in the database may take the locks of the relays. Those who do not look like one are named: they have another
/// name, or a login that may not read the changelog. Writers share lock 1 as long as their transactions last.
async fn locks(client: &Client) -> Result<(Vec<i32>, Vec<Finding>), Error> {
    let strange = "select l.objid::int, a.pid, coalesce(a.usename::text, ''), coalesce(a.application_name, '') \
         from pg_locks l join pg_stat_activity a using (pid) \
         where l.locktype = 'advisory' and (l.classid, l.objsubid) = (1919249009, 2) and l.objid between 1 and 6 and l.granted \
         and l.database = (select oid from pg_database where datname = current_database()) \
         and not (l.objid = 1 and l.mode = 'ShareLock' and l.virtualtransaction not like '%/0') \
         and not (a.application_name like 'relay%' \
         and coalesce(has_table_privilege(a.usesysid, 'relay.log', 'select'), false)) order by 1, 2";
    let rows = client.query(strange, &[]).await?;
    let strangers = rows.iter().map(|row| row.get(1)).collect();
    let told = |row: tokio_postgres::Row| {
        let (key, backend): (i32, i32) = (row.get(0), row.get(1));
        let (login, application): (String, String) = (row.get(2), row.get(3));
        let harm = match key {
            1 => "writers ring for nobody, or no relay can sleep",
            3 => "nothing can be installed",
            4 => "the changelog is not trimmed",
            5 => "no relay leads, and all look for changes again and again",
            _ => "relays ring for nobody",
        };
        Note(format!(
            "backend {backend} (login {login}, application {application:?}) holds the advisory lock (1919249009, {key}) of the \
             relays and does not look like one, so that {harm}. If it is none: select pg_terminate_backend({backend})"
        ))
    };
    Ok((strangers, rows.into_iter().map(told).collect()))
}

async fn prepared_transactions(client: &Client) -> Result<Finding, Error> {
    let row = client
        .query_one(
            "select current_setting('max_prepared_transactions')::int, \
             coalesce(current_setting('relay.doorbell', true), '') = 'off'",
            &[],
        )
        .await?;
    let (most, silent): (i32, bool) = (row.get(0), row.get(1));
    Ok(if most > 0 && !silent {
        Note(String::from(
            "max_prepared_transactions > 0: PREPARE TRANSACTION fails after a NOTIFY. Where you use it, set \
             `alter database … set relay.doorbell = 'off'` (or for a role); the relay polls then",
        ))
    } else {
        Good(String::from("no prepared transactions, or the doorbell is off"))
    })
}

async fn queue(client: &Client) -> Result<Finding, Error> {
    let usage: f64 = client.query_one("select pg_notification_queue_usage()", &[]).await?.get(0);
    let percent = usage * 100.0;
    Ok(if usage > 0.5 {
        Fault(format!(
            "the NOTIFY queue is {percent:.0} % full: some session of this cluster listens but does not read; find it in \
             pg_stat_activity before commits fail"
        ))
    } else {
        Good(format!("the NOTIFY queue is {percent:.1} % full"))
    })
}

/// Each session takes numbers in advance when the sequence has a cache, and then not in the order of its writes.
async fn numbers(client: &Client) -> Result<Finding, Error> {
    let cached = "select seqcache > 1 or seqincrement < 1 from pg_sequence where seqrelid = 'relay.change_number'::regclass";
    Ok(if client.query_one(cached, &[]).await?.get(0) {
        Fault(String::from(
            "the sequence relay.change_number was altered, so that changes of one row may come in the wrong order: \
             alter sequence relay.change_number increment 1 cache 1",
        ))
    } else {
        Good(String::from("changes are numbered in the order of their writes"))
    })
}

/// Policies are evaluated under the search path, so whoever may create in it may put a better-matching function there.
async fn writable_schemas(client: &Client) -> Result<Finding, Error> {
    let open: String = client
        .query_one(
            "select coalesce(string_agg(n.nspname, ', '), '') from pg_namespace n, aclexplode(n.nspacl) a \
             where a.grantee = 0 and a.privilege_type = 'CREATE' and n.nspname = any (current_schemas(false))",
            &[],
        )
        .await?
        .get(0);
    Ok(if open.is_empty() {
        Good(String::from("nobody but its owner creates in a schema of the search path"))
    } else {
        Fault(format!(
            "everybody may create objects in {open}, which is on the search path: a function there can get between a \
             policy and the one it means. revoke create on schema {open} from public"
        ))
    })
}

async fn roles(client: &Client) -> Result<Vec<Finding>, Error> {
    let rows = client
        .query(
            "select r.name, p.oid is not null, coalesce(pg_has_role(current_user, p.oid, 'member'), false), \
             r.name = 'service_role' and not (p.rolbypassrls or p.rolsuper) \
             from unnest(array['anon', 'authenticated', 'service_role']) r(name) left join pg_roles p on p.rolname = r.name",
            &[],
        )
        .await?;
    let login: String = client.query_one("select current_user::text", &[]).await?.get(0);
    let mut findings = Vec::new();
    for row in rows {
        let (name, exists, member): (String, bool, bool) = (row.get(0), row.get(1), row.get(2));
        if row.get::<_, Option<bool>>(3) == Some(true) {
            findings.push(Note(install::SERVICE_ROLE.to_owned()));
        }
        findings.push(match (exists, member) {
            (false, _) => Note(format!("the role {name} does not exist: tokens of this role see nothing")),
            (true, false) => Fault(format!(
                "this login cannot act as {name}: grant {name} to {login} (or give `serve` a --judge-url whose login may)"
            )),
            (true, true) => Good(format!("this login can act as {name}")),
        });
    }
    Ok(findings)
}

/// A policy can give back the role that it is judged as, and then acts as the login.
async fn power(client: &Client) -> Result<Finding, Error> {
    let row = client
        .query_one(
            "select (select rolsuper from pg_roles where rolname = current_user), \
             exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace \
             where n.nspname = 'relay' and c.relname = 'changes' and has_table_privilege(c.oid, 'select'))",
            &[],
        )
        .await?;
    let (superuser, reads): (bool, bool) = (row.get(0), row.get(1));
    let risk = match (superuser, reads) {
        (true, _) => "is a superuser, so whoever may write a policy of a watched table may do anything",
        (false, true) => "may read the changelog, so whoever may write a policy of a watched table may too",
        (false, false) => {
            return Ok(Good(String::from("policies judged as this login can reach nothing of the relay")));
        }
    };
    Ok(Note(format!(
        "the login that judges policies {risk}. If not everybody who may do that is trusted so far, give `serve` a \
         --judge-url with a login of its own: create role relay_judge login noinherit in role anon, authenticated, service_role"
    )))
}

/// Readers who are connected stand in temporary tables when PostgreSQL is asked who may see a row.
async fn temporary_tables(judging: &Client) -> Result<Finding, Error> {
    let may = "select has_database_privilege(current_database(), 'temporary'), current_user::text, current_database()::text";
    let row = judging.query_one(may, &[]).await?;
    Ok(if row.get(0) {
        Good(String::from("the login that judges may keep temporary tables"))
    } else {
        Note(format!(
            "the login that judges may not keep temporary tables, so policies that look into other tables are asked reader by \
             reader: grant temporary on database {} to {}",
            row.get::<_, String>(2),
            row.get::<_, String>(1)
        ))
    })
}

/// Policies that are asked reader by reader cost PostgreSQL a statement for each.
async fn policies(server: &Server, judge: &Server) -> Result<Vec<Finding>, Error> {
    let login = judge.login().map(str::to_owned);
    let keeper = CatalogCache::new(server.pool(1, LIMIT)?, server.pool(1, LIMIT)?, login);
    keeper.with_role("anon").await?;
    let catalog = keeper.with_role("authenticated").await?;
    let mut findings: Vec<Finding> = catalog.missing_grants().map(Fault).collect();
    for relation in catalog.relations() {
        for role in ["authenticated", "anon"] {
            let Some(plan) = relation.access(role).map(|access| &access.plan) else { continue };
            if let (PlanKind::PerIdentity, Some(obstacle)) = (plan.kind, plan.obstacles.first()) {
                let name = format!("{}.{}", relation.schema, relation.table);
                findings.push(Note(format!(
                    "{name}: for {role}, each reader costs a statement a page, because {}. Where many read it: compare claims \
                     with columns in the policy itself, look into membership tables by `exists (select from … where … = auth.uid())` \
                     instead of by a function, and keep row security off those tables. More by: relay explain {name} --role {role}",
                    obstacle.why
                )));
                break;
            }
        }
    }
    Ok(findings)
}

async fn relations(client: &Client) -> Result<Vec<Finding>, Error> {
    let watched = "select w.relation::text, w.intact, relay.notes(w.relation), \
         w.kind = 'materialized view' or relay.functions_intact(w.relation, w.id) from relay.watched w order by 1";
    let rows = client.query(watched, &[]).await?;
    if rows.is_empty() {
        return Ok(vec![Note(String::from(
            "nothing is watched yet: select relay.watch('public.your_table')",
        ))]);
    }
    let mut findings = Vec::new();
    for row in rows {
        let (name, intact, notes): (String, bool, Vec<String>) = (row.get(0), row.get(1), row.get(2));
        let has_functions: bool = row.get(3);
        if !has_functions {
            findings.push(Fault(format!(
                "{name}: its trigger functions are not as they should be, so changes may be lost or told wrongly: run `relay install`, \
                 or select relay.watch('{name}')"
            )));
        } else if !intact {
            findings.push(Fault(format!(
                "{name}: its triggers are missing or disabled, changes are lost: select relay.watch('{name}')"
            )));
        } else if notes.is_empty() {
            findings.push(Good(format!("{name} is watched")));
        }
        findings.extend(notes.into_iter().map(|note| Note(format!("{name}: {note}"))));
    }
    Ok(findings)
}

/// Whether the changelog is trimmed as it should be.
async fn retention(client: &Client) -> Result<Finding, Error> {
    let row = client
        .query_one(
            "select pg_size_pretty(bytes), coalesce(oldest > 2 * kept_for, false), bytes > 2 * kept_bytes, kept_for::text \
             from relay.health",
            &[],
        )
        .await?;
    let (size, is_old, is_large, kept): (String, bool, bool, String) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    Ok(if is_old || is_large {
        Note(format!(
            "the changelog has {size} and is not trimmed (kept are {kept}): no relay runs, or a transaction is held open; \
             select * from pg_stat_activity order by xact_start"
        ))
    } else {
        Good(format!("the changelog has {size}; kept are {kept} (select relay.retain(…) changes that)"))
    })
}

async fn refreshes(client: &Client) -> Result<Vec<Finding>, Error> {
    let failing = "select relation::text, error from relay.refresh_jobs where error is not null";
    let rows = client.query(failing, &[]).await?;
    let told = |row: tokio_postgres::Row| {
        Fault(format!("the refresh of {} fails: {}", row.get::<_, String>(0), row.get::<_, String>(1)))
    };
    Ok(rows.into_iter().map(told).collect())
}
