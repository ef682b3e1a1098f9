//! S1 to S5: what a change costs that only a few of many subscribers may see, by the kind of the policy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, sleep_until};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::ledger::{IsFor, Ledger};
use crate::machine;
use crate::process::Server;
use crate::report::{Report, Target, percentile};
use crate::support::database::Database;
use crate::swarm::{Peer, Swarm, sub};

const TABLE: &str = "bench_policies";
/// Users of a team.
const TEAM: usize = 10;
/// Rows of a transaction, and so of a page.
const PAGE: u64 = 100;
/// Single rows a second.
const RATE: f64 = 200.0;

/// A kind of policy.
struct Kind {
    name: &'static str,
    policy: &'static str,
    /// Who sees a row depends on the number of subscribers, which is one of these.
    is_for: [IsFor; 3],
    readers: usize,
    sizes: &'static [usize],
}

const SIZES: [usize; 3] = [100, 1000, 10_000];

const OWN: [IsFor; 3] = [
    |user, row| row as usize % 100 == user,
    |user, row| row as usize % 1000 == user,
    |user, row| row as usize % 10_000 == user,
];
const OF_TEAM: [IsFor; 3] = [
    |user, row| row as usize % 10 == user / TEAM,
    |user, row| row as usize % 100 == user / TEAM,
    |user, row| row as usize % 1000 == user / TEAM,
];

const KINDS: [Kind; 5] = [
    Kind { name: "ownership", policy: "owner = (select auth.uid())", is_for: OWN, readers: 1, sizes: &SIZES },
    Kind {
        name: "JWT claim",
        policy: "org = (auth.jwt() ->> 'org')",
        is_for: OWN,
        readers: 1,
        sizes: &SIZES,
    },
    Kind {
        name: "membership",
        policy: "exists (select from members m where m.team = bench_policies.team and m.member = (select auth.uid()))",
        is_for: OF_TEAM,
        readers: TEAM,
        sizes: &SIZES,
    },
    Kind {
        name: "membership with row security",
        policy: "exists (select from own_members m where m.team = bench_policies.team and m.member = (select auth.uid()))",
        is_for: OF_TEAM,
        readers: TEAM,
        sizes: &[1000],
    },
    Kind { name: "opaque", policy: "may_see(owner)", is_for: OWN, readers: 1, sizes: &[100, 1000] },
];

/// What one change cost, in microseconds of processor time.
#[derive(Clone, Copy, Default)]
struct Cost {
    relay: f64,
    postgres: f64,
    statements: f64,
}

impl Cost {
    fn whole(self) -> f64 {
        self.relay + self.postgres
    }
}

pub async fn run(report: &mut Report) {
    report.section("policies");
    let most = if report.quick || machine::file_limit() < 11_000 { 1000 } else { 10_000 };
    for kind in &KINDS {
        let mut costs = Vec::new();
        let mut loops = Vec::new();
        for (place, size) in
            SIZES.into_iter().enumerate().filter(|(_, size)| kind.sizes.contains(size) && *size <= most)
        {
            let is_for = kind.is_for[place];
            let mut crowd = Crowd::gather(kind, size, is_for).await;
            let (pages, single) = crowd.measure(report, kind, size).await;
            loops.push(crowd.asked_one_by_one(size, report.quick).await);
            costs.push((size, pages, single));
            crowd.leave(report, kind, size);
        }
        tell(report, kind, &costs, &loops);
    }
}

fn tell(report: &mut Report, kind: &Kind, costs: &[(usize, Cost, Cost)], loops: &[f64]) {
    let name = kind.name;
    for ((size, pages, single), one_by_one) in costs.iter().zip(loops) {
        let mut figure = |what: &str, value: f64, unit: &str, target: Target, how: &str| {
            report.figure(&format!("   {name}, {size}: {what}"), value, unit, &target, how);
        };
        let how = format!(
            "relay {:.1} + PostgreSQL {:.1}, {:.2} statements",
            pages.relay, pages.postgres, pages.statements
        );
        figure("per change, in pages of 100", pages.whole(), "µs", Target::None, &how);
        let how = format!(
            "relay {:.1} + PostgreSQL {:.1}, {:.2} statements",
            single.relay, single.postgres, single.statements
        );
        figure("per change, one at a time", single.whole(), "µs", Target::None, &how);
        let how = "PostgreSQL alone: claims and role set, the row selected by its key, for each subscriber";
        figure("a query for each subscriber", *one_by_one, "µs", Target::None, how);
    }
    let (Some((least, _, first)), Some((size, pages, last))) = (costs.first(), costs.last()) else { return };
    let how = format!("processor time per change of {size} subscribers over {least}, one change at a time");
    let ratio = last.whole() / first.whole();
    match name {
        "opaque" => {
            let how =
                format!("{size} subscribers, one statement for each and page; processor time of PostgreSQL");
            let saved = pages.postgres / loops.last().copied().unwrap_or(f64::NAN);
            report.figure("S5 opaque, against a query for each", saved, "", &Target::AtMost(0.2), &how);
            let each = pages.statements * PAGE as f64 / *size as f64;
            report.figure(
                "S5 opaque, statements per subscriber and page",
                each,
                "",
                &Target::AtMost(1.05),
                &how,
            );
        }
        "membership" => {
            report.figure("S3 membership, growth", ratio, "", &Target::AtMost(1.5), &how);
            let how = format!(
                "{size} subscribers, {TEAM} of them see the row; PostgreSQL alone, in pages of {PAGE}"
            );
            report.figure(
                "S4 membership, PostgreSQL per change",
                pages.postgres,
                "µs",
                &Target::AtMost(100.0),
                &how,
            );
        }
        "membership with row security" => {
            let how = format!(
                "{size} subscribers, {TEAM} of them see the row; the members have row security of their own; PostgreSQL alone, in pages of {PAGE}"
            );
            let target = Target::AtMost(60.0);
            report.figure(
                "S4 membership with row security, PostgreSQL per change",
                pages.postgres,
                "µs",
                &target,
                &how,
            );
        }
        _ => {
            report.figure(&format!("S1 {name}, growth"), ratio, "", &Target::AtMost(1.3), &how);
            let asked = pages.statements.max(last.statements);
            let how = "judging statements per change";
            report.figure(&format!("S1 {name}, questions"), asked, "", &Target::AtMost(0.0), how);
        }
    }
}

/// A relay, its subscribers, each another user, and a writer.
struct Crowd {
    database: Database,
    server: Server,
    writer: Client,
    ledger: Arc<Ledger>,
    swarm: Swarm,
    rows: u64,
    size: usize,
}

impl Crowd {
    async fn gather(kind: &Kind, size: usize, is_for: IsFor) -> Self {
        let database = Database::bare().await;
        let server = Server::relay(&database.url).await;
        database
            .run(&format!(
                "create function user_id(n bigint) returns uuid language sql immutable as
                   $$ select ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid $$;
                 create function may_see(owner uuid) returns bool language plpgsql stable as
                   $$ begin return owner = auth.uid(); end $$;
                 create table members (team int, member uuid, primary key (team, member));
                 create index on members (member);
                 insert into members select n / {TEAM}, user_id(n) from generate_series(0, {size} - 1) n;
                 create table own_members (like members including all); insert into own_members select * from members;
                 alter table own_members enable row level security; analyze own_members;
                 create policy own on own_members using (member = (select auth.uid())); grant select on own_members to authenticated;
                 create table {TABLE} (id bigint primary key, owner uuid, org text, team int, body text);
                 alter table {TABLE} enable row level security; create policy p on {TABLE} using ({});
                 grant select on {TABLE}, members to authenticated; analyze members; select relay.watch('{TABLE}')",
                kind.policy
            ))
            .await;
        let ledger = Arc::new(Ledger::selective(kind.readers, 40_000, is_for));
        let swarm = Swarm::connect(Peer::Relay { table: TABLE }, server.address, &ledger, 0..size).await;
        let writer = database.connect().await;
        Self { database, server, writer, ledger, swarm, rows: 0, size }
    }

    /// The rows from one number on, in one transaction.
    async fn write(&mut self, rows: u64) {
        let (first, size) = (self.rows + 1, self.size);
        self.rows += rows;
        (first..=self.rows).for_each(|id| self.ledger.sent(id));
        let insert = format!(
            "insert into {TABLE} select n, user_id(n % {size}), 'org ' || n % {size}, n % ({size} / {TEAM}), repeat('x', 150)
             from generate_series({first}, {}) n",
            self.rows
        );
        self.writer.batch_execute(&insert).await.unwrap();
    }

    async fn measure(&mut self, report: &mut Report, kind: &Kind, size: usize) -> (Cost, Cost) {
        let opaque = kind.name == "opaque";
        // Plans are made, and the readers known.
        for _ in 0..5 {
            self.write(PAGE).await;
        }
        self.ledger.settle(self.rows).await;
        let pages = match (opaque, report.quick) {
            (true, _) => 10,
            (false, true) => 40,
            (false, false) => 100,
        };
        let pages = self
            .stretch(pages * PAGE, async |crowd| {
                for _ in 0..pages {
                    crowd.write(PAGE).await;
                    crowd.ledger.settle(crowd.rows).await;
                }
            })
            .await;
        self.ledger.take_latencies();
        let (rows, rate) = match (opaque, report.quick) {
            (true, _) => (20, 5.0),
            (false, true) => (600, RATE),
            (false, false) => (2000, RATE),
        };
        let single = self
            .stretch(rows, async |crowd| {
                let started = tokio::time::Instant::now();
                for row in 0..rows {
                    sleep_until(started + Duration::from_secs_f64(row as f64 / rate)).await;
                    crowd.write(1).await;
                }
                crowd.ledger.settle(crowd.rows).await;
            })
            .await;
        let mut latencies = self.ledger.take_latencies();
        let how = format!(
            "{rows} rows at {rate}/s, {} of {size} see each; INSERT sent to frame read",
            kind.readers
        );
        for (what, part) in [("p50", 0.5), ("p99", 0.99)] {
            let name = format!("   {}, {size}: to the client, {what}", kind.name);
            report.figure(&name, percentile(&mut latencies, part), "ms", &Target::None, &how);
        }
        (pages, single)
    }

    /// What a change costs while `work` writes so many; what the subscribers cost in idleness is taken off.
    async fn stretch(&mut self, changes: u64, work: impl AsyncFnOnce(&mut Self)) -> Cost {
        const IDLE: Duration = Duration::from_secs(3);
        let before = self.spent().await;
        sleep(IDLE).await;
        let idle = self.spent().await;
        let started = Instant::now();
        work(self).await;
        let (after, took) = (self.spent().await, started.elapsed().as_secs_f64() / IDLE.as_secs_f64());
        let each = |at: usize| (after[at] - idle[at] - (idle[at] - before[at]) * took) / changes as f64;
        Cost {
            relay: each(0) * 1e6,
            postgres: each(1) * 1e6,
            statements: (after[2] - idle[2]) / changes as f64,
        }
    }

    /// Processor seconds of the relay and of its connections to PostgreSQL, and what it asked there.
    async fn spent(&self) -> [f64; 3] {
        let sessions = "select pid from pg_stat_activity where application_name like 'relay%' and datname = current_database()";
        let rows = self.database.client.query(sessions, &[]).await.unwrap();
        let postgres: Duration =
            rows.iter().map(|row| machine::cpu(row.get::<_, i32>(0).cast_unsigned())).sum();
        let asked = self.server.metric("relay_judgements_total").await;
        [self.server.cpu().as_secs_f64(), postgres.as_secs_f64(), asked]
    }

    /// The processor time of PostgreSQL per change when each subscriber is asked for by a query of its own.
    async fn asked_one_by_one(&self, size: usize, quick: bool) -> f64 {
        let client = self.database.connect().await;
        let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
        client.batch_execute("set role authenticated").await.unwrap();
        let set = client.prepare("select set_config('request.jwt.claims', $1, false)").await.unwrap();
        let sees =
            client.prepare(&format!("select exists (select from {TABLE} where id = $1)")).await.unwrap();
        let changes = (if quick { 1000 } else { 10_000 }) / size;
        let before = machine::cpu(pid.cast_unsigned());
        for change in 0..changes.max(1) {
            for user in 0..size {
                let claims =
                    format!(r#"{{"sub":"{}","org":"org {user}","role":"authenticated"}}"#, sub(user));
                let id = change as i64 + 1;
                let (claims, id): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) = ([&claims], [&id]);
                let (set, seen) = tokio::join!(client.query_one(&set, &claims), client.query_one(&sees, &id));
                set.unwrap();
                seen.unwrap();
            }
        }
        (machine::cpu(pid.cast_unsigned()) - before).as_secs_f64() * 1e6 / changes.max(1) as f64
    }

    fn leave(self, report: &mut Report, kind: &Kind, size: usize) {
        let Self { ledger, swarm, rows, .. } = self;
        swarm.leave();
        report.faults(&format!("   {}, {size}: {rows} rows", kind.name), &ledger.faults(rows));
    }
}
