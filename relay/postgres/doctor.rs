//! Checks of the database side, each with its remedy.

use std::time::Duration;

use tokio_postgres::Client;

use crate::model::catalog::relation::Catalog;
use crate::model::catalog::topic_rules::TopicAct;
use crate::model::policy::plan::PlanKind;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::changelog::doorbell::Doorbell;
use crate::postgres::connect::pool::{Error, Server};
use crate::postgres::install;
use crate::postgres::locks::Lock;

/// The result of a check.
pub enum Finding {
    /// No problem.
    Good(String),
    /// Works, with a caveat for the operator.
    Note(String),
    /// Does not work; the text has the remedy.
    Fault(String),
}

use Finding::{Fault, Good, Note};

/// Statement timeout of the checks.
const LIMIT: Duration = Duration::from_secs(10);

impl Finding {
    /// Returns its kind, `good`, `note` or `fault`, and its text.
    pub fn parts(&self) -> (&'static str, &str) {
        match self {
            Good(text) => ("good", text),
            Note(text) => ("note", text),
            Fault(text) => ("fault", text),
        }
    }
}

/// Checks the database; what keeps it from being checked is a fault, too. `judge` is the server that evaluates policies, usually the
/// same as `server`.
pub async fn findings(server: &Server, judge: &Server) -> Vec<Finding> {
    examine(server, judge).await.unwrap_or_else(|error| vec![Fault(error.to_string())])
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
    findings.push(Good(format!("the schema relay is of version {}", env!("CARGO_PKG_VERSION"))));
    findings.extend(rights(&client).await?);
    findings.extend(realtime(&client).await?);
    findings.push(bell(server, &client).await?);
    let (foreign, locks) = locks(&client).await?;
    findings.push(relays(&client, &foreign).await?);
    findings.extend(locks);
    findings.push(prepared_transactions(&client).await?);
    findings.push(queue(&client).await?);
    findings.push(numbers(&client).await?);
    findings.push(writable_schemas(&client).await?);
    findings.extend(roles(&judging).await?);
    findings.push(power(&judging).await?);
    findings.push(temporary_tables(&judging).await?);
    findings.extend(relations(&client).await?);
    findings.extend(collections(&client).await?);
    findings.extend(policies(server, judge).await?);
    findings.extend(refreshes(&client).await?);
    findings.extend(status(&client).await?);
    findings.extend(webhooks(&client).await?);
    findings.push(retention(&client).await?);
    Ok(findings)
}

/// Checks owners, rights and the rest of what an installation sets.
async fn rights(client: &Client) -> Result<Vec<Finding>, Error> {
    let problems = client.query("select p from relay.install_problems() p", &[]).await?;
    let fault = |row: tokio_postgres::Row| {
        Fault(format!("{}: run `relay install` as the owner of the schema relay", row.get::<_, String>(0)))
    };
    Ok(match problems.is_empty() {
        true => vec![Good(String::from("owners and rights in the schema relay are as installed"))],
        false => problems.into_iter().map(fault).collect(),
    })
}

/// Checks that broadcasts can be sent from the database. Who only watches tables does not need them.
async fn realtime(client: &Client) -> Result<Vec<Finding>, Error> {
    let problems = client.query("select p from relay.realtime_problems() p", &[]).await?;
    let note = |row: tokio_postgres::Row| Note(format!("broadcasts from SQL: {}", row.get::<_, String>(0)));
    Ok(match problems.is_empty() {
        true => vec![Good(String::from("broadcasts are sent from SQL: select realtime.send(…)"))],
        false => problems.into_iter().map(note).collect(),
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
    // Releases in which a cached plan does not outlive a revoked role membership (CVE-2026-14666).
    let fixed = match major {
        ..=13 => return Ok(Fault(format!("PostgreSQL {name} is too old: 14 or newer is needed"))),
        15 => minor >= 19,
        _ => true,
    };
    Ok(if fixed {
        Good(format!("PostgreSQL {name}"))
    } else {
        Note(format!(
            "PostgreSQL {name} keeps plans of revoked role memberships (CVE-2026-14666); the relay discards them, other programs may \
             not: update PostgreSQL"
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

/// Checks the encryption of the connection, which carries a password and all rows.
async fn encryption(server: &Server, client: &Client) -> Result<Finding, Error> {
    let encrypted = "select coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false), inet_server_addr() is null \
         or inet_client_addr() = inet_server_addr()";
    let row = client.query_one(encrypted, &[]).await?;
    Ok(match (row.get(0), row.get(1)) {
        (_, true) => Good(String::from("the connection does not leave this machine")),
        (true, _) if server.is_verified() => {
            Good(String::from("the connection is encrypted, and the server is verified"))
        }
        (true, _) => Note(String::from(
            "the connection is encrypted, but the server is not verified: use sslmode=verify-full (with sslrootcert=FILE if the \
             authority is not one of the system's)",
        )),
        (false, _) => Note(String::from(
            "the connection leaves this machine without encryption: use sslmode=verify-full, with TLS at the server",
        )),
    })
}

async fn bell(server: &Server, client: &Client) -> Result<Finding, Error> {
    let mut doorbell = Doorbell::connect(server).await?;
    if doorbell.is_off().await? {
        return Ok(Note(String::from("relay.doorbell is off: writers do not notify, the relay polls")));
    }
    Ok(if doorbell.is_heard(client).await? {
        Good(String::from("notifications arrive"))
    } else {
        Note(String::from(
            "notifications do not arrive, probably because of a pooler: give `serve` a direct --doorbell-url, else it polls",
        ))
    })
}

/// Reports the relays that read the changelog; `foreign` backends are not counted.
async fn relays(client: &Client, foreign: &[i32]) -> Result<Finding, Error> {
    let row = client.query_one("select leader, followers from relay.health", &[]).await?;
    let leader = row.get::<_, Option<i32>>(0).filter(|leader| !foreign.contains(leader));
    Ok(match (leader, row.get::<_, i64>(1)) {
        (Some(leader), 0) => Good(format!("a relay reads the changelog (its doorbell is backend {leader})")),
        (Some(leader), others) => Good(format!(
            "a relay leads (its doorbell is backend {leader}), others on this database: {others}"
        )),
        (None, _) => Note(String::from(
            "no relay with a working doorbell runs on this database now: changes are logged, and delivered once one \
             starts (relay serve)",
        )),
    })
}

/// The locks that a session may hold for long, and what does not work while it does.
const LOCK_HARM: [(Lock, &str); 9] = [
    (Lock::Doorbell, "writers notify without need, or no relay can sleep"),
    (Lock::Install, "no installation can run"),
    (Lock::Trim, "the changelog is not trimmed"),
    (Lock::Leader, "no relay leads, and all poll"),
    (Lock::Followers, "the leader notifies without need"),
    (Lock::Collections, "tables of publications and schemas are neither watched nor unwatched"),
    (Lock::Signals, "no view is refreshed on change"),
    (Lock::Status, "silent users and those of dead relays stay online"),
    (Lock::Webhooks, "no webhook is delivered"),
];

/// Finds sessions that hold a lock of the relays and are none: any login may take these locks. A session counts as a relay by
/// its application name and its right to read the changelog. Writers hold the doorbell's lock shared until their transaction ends.
async fn locks(client: &Client) -> Result<(Vec<i32>, Vec<Finding>), Error> {
    let numbers: Vec<i32> = LOCK_HARM.iter().map(|(lock, _)| *lock as i32).collect();
    let foreign = format!(
        "select l.objid::int, a.pid, coalesce(a.usename::text, ''), coalesce(a.application_name, '') \
         from pg_locks l join pg_stat_activity a using (pid) \
         where {} and l.objid::int = any ($1) and not (({}) and l.mode = 'ShareLock' and l.virtualtransaction not like '%/0') \
         and not (a.application_name like 'relay%' \
         and coalesce(has_table_privilege(a.usesysid, 'relay.log', 'select'), false)) order by 1, 2",
        Lock::any_is_held(),
        Lock::Doorbell.is_held()
    );
    let rows = client.query(&foreign, &[&numbers]).await?;
    let foreign = rows.iter().map(|row| row.get(1)).collect();
    let note = |row: tokio_postgres::Row| {
        let (key, backend): (i32, i32) = (row.get(0), row.get(1));
        let (login, application): (String, String) = (row.get(2), row.get(3));
        let (lock, harm) = LOCK_HARM.into_iter().find(|(lock, _)| *lock as i32 == key)?;
        Some(Note(format!(
            "backend {backend} (login {login}, application {application:?}) holds the advisory lock ({lock}) of the \
             relays and does not look like a relay, so {harm}. If it is none: select pg_terminate_backend({backend})"
        )))
    };
    Ok((foreign, rows.into_iter().filter_map(note).collect()))
}

async fn prepared_transactions(client: &Client) -> Result<Finding, Error> {
    let row = client
        .query_one(
            "select current_setting('max_prepared_transactions')::int, \
             coalesce(current_setting('relay.doorbell', true), '') = 'off'",
            &[],
        )
        .await?;
    let (max_prepared, is_off): (i32, bool) = (row.get(0), row.get(1));
    Ok(if max_prepared > 0 && !is_off {
        Note(String::from(
            "max_prepared_transactions > 0: PREPARE TRANSACTION fails after a NOTIFY. If you use it, set \
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
            "the NOTIFY queue is {percent:.0} % full: a session of this cluster listens but does not read; find it in \
             pg_stat_activity before commits fail"
        ))
    } else {
        Good(format!("the NOTIFY queue is {percent:.1} % full"))
    })
}

/// Checks the sequence of changes: with a cache, each session takes numbers in advance, out of the order of writes.
async fn numbers(client: &Client) -> Result<Finding, Error> {
    let cached = "select seqcache > 1 or seqincrement < 1 from pg_sequence where seqrelid = 'relay.change_number'::regclass";
    Ok(if client.query_one(cached, &[]).await?.get(0) {
        Fault(String::from(
            "the sequence relay.change_number was altered, so changes of one row may come in the wrong order: \
             alter sequence relay.change_number increment 1 cache 1",
        ))
    } else {
        Good(String::from("changes are numbered in the order of their writes"))
    })
}

/// Checks who may create objects on the search path: a policy would call a better-matching function placed there.
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
        Good(String::from("PUBLIC may not create objects on the search path"))
    } else {
        Fault(format!(
            "every login may create objects in {open}, which is on the search path: a function there can replace one that a policy \
             calls. revoke create on schema {open} from public"
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

/// Checks what the judging login may do: a policy can reset its role, and then acts as that login.
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
        (true, _) => "is a superuser, so any author of a policy of a watched table has its rights",
        (false, true) => "may read the changelog, so any author of a policy of a watched table may, too",
        (false, false) => {
            return Ok(Good(String::from("policies cannot reach the relay's tables as the judging login")));
        }
    };
    Ok(Note(format!(
        "the login that evaluates policies {risk}. If not all authors of policies are trusted with that, give `serve` a \
         --judge-url with a login of its own: create role relay_judge login noinherit in role anon, authenticated, service_role"
    )))
}

/// Checks the right to temporary tables, in which the set-based evaluator keeps connected subscribers.
async fn temporary_tables(judging: &Client) -> Result<Finding, Error> {
    let may_create = "select has_database_privilege(current_database(), 'temporary'), current_user::text, current_database()::text";
    let row = judging.query_one(may_create, &[]).await?;
    Ok(if row.get(0) {
        Good(String::from("the login that evaluates policies may create temporary tables"))
    } else {
        Note(format!(
            "the login that evaluates policies may not create temporary tables, so policies that read other tables are evaluated for each \
             subscriber: grant temporary on database {} to {}",
            row.get::<_, String>(2),
            row.get::<_, String>(1)
        ))
    })
}

/// Reports policies that are evaluated per subscriber, each a statement of PostgreSQL.
async fn policies(server: &Server, judge: &Server) -> Result<Vec<Finding>, Error> {
    let login = judge.login().map(str::to_owned);
    let cache = CatalogCache::new(server.pool(1, LIMIT)?, login);
    cache.with_role("anon").await?;
    let catalog = cache.with_role("authenticated").await?;
    let mut findings: Vec<Finding> = catalog.missing_grants().map(Fault).collect();
    findings.extend(private_channels(&catalog));
    for relation in catalog.relations() {
        for role in ["authenticated", "anon"] {
            let Some(plan) = relation.access(role).map(|access| &access.plan) else { continue };
            if let (PlanKind::PerIdentity, Some(obstacle)) = (plan.kind, plan.obstacles.first()) {
                let name = format!("{}.{}", relation.schema, relation.table);
                findings.push(Note(format!(
                    "{name}: for {role}, each subscriber costs a statement a page, because {}. For many subscribers: compare claims \
                     with columns in the policy itself, and query membership tables by `exists (select from … where … = auth.uid())` \
                     instead of by a function. Details: relay explain {name} --role {role}",
                    obstacle.why
                )));
                break;
            }
        }
    }
    Ok(findings)
}

/// Reports what keeps all tokens of a role from private channels, and rules that cost a statement for each join.
fn private_channels(catalog: &Catalog) -> Vec<Finding> {
    // Its absence is reported with the broadcasts from SQL.
    let Some(rules) = catalog.topics() else { return Vec::new() };
    let mut findings = Vec::new();
    for (act, what) in [(TopicAct::Read, "join"), (TopicAct::Write, "send to")] {
        for role in ["authenticated", "anon"] {
            match rules.access(act, role) {
                Err(why) => findings.push(Note(format!("private channels: {role} may {what} none: {why}"))),
                Ok(access) if access.policy.is_some() && !access.rights.policies.iter().any(|policy| policy.permissive) => {
                    let command = if act == TopicAct::Read { "select … using" } else { "insert … with check" };
                    findings.push(Note(format!(
                        "private channels: {role} may {what} none: no policy of realtime.messages allows it. To allow some: create policy … \
                         on realtime.messages for {command} (realtime.topic() = …)"
                    )));
                }
                Ok(access) => findings.extend(access.plan.obstacles.first().map(|obstacle| {
                    Note(format!(
                        "private channels: to {what} one costs each {role} a query, because {}. For many clients: \
                         compare realtime.topic() with claims, or query membership tables by `exists (select from … where … = auth.uid())`",
                        obstacle.why
                    ))
                })),
            }
        }
    }
    if findings.is_empty() {
        findings.push(Good(String::from(
            "private channels: policies of realtime.messages decide who may join and send",
        )));
    }
    findings
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
                "{name}: its trigger functions are outdated or altered, so changes may be lost or wrong: run `relay install`, or \
                 select relay.watch('{name}')"
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

/// Reports tables of followed publications and schemas that are not watched.
async fn collections(client: &Client) -> Result<Vec<Finding>, Error> {
    let unwatched = "select coalesce(relation::text, collection), state, why from relay.collected where state <> 'watched' order by 1";
    let rows = client.query(unwatched, &[]).await?;
    let finding = |row: tokio_postgres::Row| {
        let (name, state, why): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let text = format!("{name} is {state}: {why}");
        if state == "pending" { Note(text) } else { Fault(text) }
    };
    Ok(rows.into_iter().map(finding).collect())
}

/// Checks that the changelog is trimmed.
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
            "the changelog has {size} and is not trimmed (retention: {kept}): no relay runs, or a transaction is held open; \
             select * from pg_stat_activity order by xact_start"
        ))
    } else {
        Good(format!("the changelog has {size}; retention: {kept} (select relay.retain(…) changes that)"))
    })
}

/// Reports materialized views whose refresh fails or cannot be told, and sources of views whose changes are not noticed.
async fn refreshes(client: &Client) -> Result<Vec<Finding>, Error> {
    let failing = "select relation::text, error, null from relay.refreshes where error is not null \
         union all select relation::text, null, u from relay.refresh_jobs cross join unnest(unheard) u order by 1, 2, 3";
    let rows = client.query(failing, &[]).await?;
    let fault = |row: tokio_postgres::Row| {
        let (view, error, unheard): (String, Option<String>, Option<String>) =
            (row.get(0), row.get(1), row.get(2));
        Fault(match error {
            Some(error) => format!("the refresh of {view} fails: {error}"),
            None => format!("{view} misses changes: {}", unheard.unwrap_or_default()),
        })
    };
    Ok(rows.into_iter().map(fault).collect())
}

/// Reports what keeps the status of users from being written.
async fn status(client: &Client) -> Result<Vec<Finding>, Error> {
    let problems = client.query("select p from relay.status_problems() p", &[]).await?;
    if !problems.is_empty() {
        return Ok(problems.into_iter().map(|row| Fault(row.get(0))).collect());
    }
    let table = client.query_opt("select t.relation::text from relay.status_table t", &[]).await?;
    let good = |row: tokio_postgres::Row| {
        Good(format!("{} has the status of users (relay.status_on)", row.get::<_, String>(0)))
    };
    Ok(table.map(good).into_iter().collect())
}

/// Reports webhooks that do not deliver, and dead letters.
async fn webhooks(client: &Client) -> Result<Vec<Finding>, Error> {
    let held = Lock::Webhooks.is_held();
    let query = format!(
        "select w.name, w.relation::text, w.state, w.error, w.waiting, w.dead_letters, quote_literal(w.name), \
         w.lag > interval '1 minute', exists (select from pg_locks l where {held}), \
         (select h.leader is not null from relay.health h) \
         from relay.webhooks w order by 1"
    );
    let rows = client.query(&query, &[]).await?;
    Ok(rows.iter().flat_map(webhook).collect())
}

fn webhook(row: &tokio_postgres::Row) -> Vec<Finding> {
    let (name, relation, state): (String, String, String) = (row.get(0), row.get(1), row.get(2));
    let (error, waiting, dead): (Option<String>, i64, i64) = (row.get(3), row.get(4), row.get(5));
    let (literal, is_late, is_delivered, has_leader): (String, bool, bool, bool) =
        (row.get(6), row.get(7), row.get(8), row.get(9));
    let error = error.unwrap_or_default();
    let mut findings = Vec::new();
    if dead > 0 {
        findings.push(Fault(format!(
            "the webhook {name} has {dead} dead letters (select * from relay.dead_letters): select relay.retry_dead_letters({literal}), or \
             select relay.discard_dead_letters({literal})"
        )));
    }
    findings.push(match state.as_str() {
        "dropped" => Fault(format!(
            "the table of the webhook {name} was dropped: select relay.drop_webhook({literal})"
        )),
        "disabled" => Fault(format!("the webhook {name} sends nothing: {error}")),
        "failing" => {
            Note(format!("the webhook {name} of {relation} fails, {waiting} deliveries wait: {error}"))
        }
        "paused" => Note(format!("the webhook {name} of {relation} is paused by its receiver: {error}")),
        _ if !is_delivered && (is_late || !has_leader) => {
            Note(format!("the webhook {name} is not delivered, because no relay runs: relay serve"))
        }
        _ => Good(format!("the webhook {name} delivers changes of {relation}")),
    });
    findings
}
