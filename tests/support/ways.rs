//! One policy asked every way: of the table itself under the reader's role, one by one, and as the relay decides it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use relay::feed::authorize::gate::{Gate, GroupReader, Verdict};
use relay::feed::authorize::subscriber_index::SubscriberIndexes;
use relay::model::catalog::relation::{Catalog, Relation};
use relay::model::identity::claims::Claims;
use relay::model::policy::claim_expr::ClaimValue;
use relay::model::policy::plan::{Plan, PlanKind};
use relay::model::policy::visibility::Identity;
use relay::model::row::change::{Change, ImageState, Operation};
use relay::model::subscription::binding::Subscription;
use relay::model::subscription::request::Request;
use relay::observe::Observe;
use relay::postgres::catalog::CatalogCache;
use relay::postgres::connect::pool::Server;
use relay::postgres::evaluate::per_identity::{IdentityEvaluator, IdentityQuery, reading};
use relay::postgres::evaluate::set_based::SetEvaluator;
use serde_json::{Map, Value, json};

use super::database::Database;

/// A database in which a table can be asked.
pub struct Ways {
    /// The database, as its superuser.
    pub database: Database,
    keeper: CatalogCache,
    gate: Gate,
    judge: IdentityEvaluator,
}

/// What it took to decide a page.
#[derive(Debug)]
pub struct Cost {
    /// Readers that were looked at, change by change.
    pub candidates: usize,
    /// Statements that PostgreSQL was asked.
    pub statements: usize,
}

/// What one reader may see of the rows, by id: none where PostgreSQL raises.
pub type Seen = BTreeMap<i64, Option<bool>>;

/// What came of asking every way.
pub struct Compared {
    /// How the relay decides for the role of the first reader.
    pub plan: Plan,
    /// How many answers were compared.
    pub answers: usize,
    /// How many of them were yes.
    pub yes: usize,
    /// How many statements the relay needed.
    pub statements: usize,
    /// Answers that are not PostgreSQL's, each in words.
    pub wrong: Vec<String>,
}

impl Ways {
    /// Runs `sql` in a database of its own.
    pub async fn new(sql: &str) -> Self {
        let database = Database::new().await;
        database.run(sql).await;
        let server = Server::parse(&database.url, "relay", None).unwrap();
        let pool = || server.pool(2, Duration::from_secs(30)).unwrap();
        let limit = Duration::from_secs(5);
        let keeper = CatalogCache::new(pool(), None);
        let judge = || IdentityEvaluator::new(server.clone(), limit);
        let gate =
            Gate::new(judge(), SetEvaluator::new(server.clone(), limit), None, Arc::new(Observe::new()));
        for role in ["authenticated", "anon"] {
            keeper.with_role(role).await.unwrap();
        }
        Self { database, keeper, gate, judge: judge() }
    }

    /// Looks at the catalog anew.
    pub async fn catalog(&self) -> Arc<Catalog> {
        let catalog = self.keeper.reload().await.unwrap();
        self.gate.forget().await;
        catalog
    }

    /// The images of all rows of a table, by id, as the trigger logs them.
    pub async fn images(&self, table: &str) -> BTreeMap<i64, String> {
        self.database
            .run(
                "set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'; \
                 set bytea_output = 'hex'; set extra_float_digits = 1",
            )
            .await;
        let images = format!("select id::bigint, to_json(t)::text from {table} t");
        let rows = self.database.client.query(&images, &[]);
        rows.await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// What the table shows to a reader with these claims, and whether `claims_raise()`: both it and `sees_TABLE(id)` have
    /// to be there.
    pub async fn shown(&self, table: &str, claims: &Value) -> (Seen, bool) {
        let client = &self.database.client;
        let (sub, role) = (claims["sub"].as_str().unwrap_or_default(), role(claims));
        let become_reader = format!(
            "begin; select set_config('request.jwt.claims', $claims${claims}$claims$, true),
                    set_config('request.jwt.claim.sub', $sub${sub}$sub$, true),
                    set_config('request.jwt.claim.role', '{role}', true); set local role {role}"
        );
        client.batch_execute(&become_reader).await.unwrap();
        let ids = format!("select id::bigint, sees_{table}(id) from ids_{table}");
        let rows = client.query(&ids, &[]).await.unwrap();
        let raise: bool = client.query_one("select claims_raise()", &[]).await.unwrap().get(0);
        client.batch_execute("rollback").await.unwrap();
        (rows.iter().map(|row| (row.get(0), row.get(1))).collect(), raise)
    }

    /// The same, reader by reader, on the images.
    pub async fn one_by_one(
        &self,
        relation: &Relation,
        images: &BTreeMap<i64, String>,
        claims: &Value,
    ) -> Seen {
        let access = relation.access(role(claims)).unwrap();
        let Some(statement) = &access.judge else {
            return images.keys().map(|id| (*id, Some(access.policy.is_none()))).collect();
        };
        let texts: Vec<String> = images.values().cloned().collect();
        let question = IdentityQuery {
            identity: identity(claims),
            statement: Arc::clone(statement),
            images: &texts,
            reading: reading(relation).into(),
            with_path: true,
            topic: None,
        };
        let verdict = self.judge.judge(&[question]).await.unwrap().remove(0);
        images.keys().copied().zip(verdict.allowed.into_iter().map(Some)).collect()
    }

    /// What the relay shows to each of these readers, and what that took.
    pub async fn ours(
        &self,
        catalog: &Catalog,
        relation: &Arc<Relation>,
        images: &BTreeMap<i64, String>,
        readers: &[Value],
    ) -> (Vec<Seen>, Cost) {
        let entry: Map<String, Value> =
            json!({"event": "*", "schema": "public", "table": relation.table}).as_object().unwrap().clone();
        let request = [Request::parse(&entry).unwrap()];
        let subscription =
            |claims: &Value| Subscription::bind(identity(claims), catalog, &request, vec![Ok(None)]);
        let subscriptions: Vec<Subscription> = readers.iter().map(subscription).collect();
        let mut subscriber_indexes = SubscriberIndexes::default();
        subscriber_indexes.prepare(relation, subscriptions.iter().enumerate());
        let change = |image: &String| Change {
            number: 1,
            xid: 1,
            committed: time::OffsetDateTime::UNIX_EPOCH,
            relation: relation.id(),
            leaf: None,
            shape: None,
            began: None,
            image_state: ImageState::default(),
            operation: Operation::Insert,
            oversize: false,
            before: None,
            after: Some(image.clone()),
        };
        let changes: Vec<Change> = images.values().map(change).collect();
        let reader = |reader| GroupReader { subscription: &subscriptions[reader], session: 0 };
        let judged = Box::pin(self.gate.verdicts(catalog, &changes, &subscriber_indexes, reader));
        let verdicts = judged.await.unwrap();
        let ids: Vec<i64> = images.keys().copied().collect();
        let mut seen: Vec<Seen> =
            readers.iter().map(|_| ids.iter().map(|id| (*id, Some(false))).collect()).collect();
        for candidate in &verdicts.candidates {
            let Verdict::Visibility(sight) = verdicts.policy(candidate) else { panic!("lost") };
            seen[candidate.group].insert(ids[candidate.change], Some(sight.after));
        }
        (seen, Cost { candidates: verdicts.considered, statements: verdicts.statements })
    }

    /// Asks every way and compares.
    pub async fn compare(&self, table: &str, readers: &[Value]) -> Compared {
        let catalog = self.catalog().await;
        let relation = catalog.named("public", table).unwrap();
        let images = self.images(table).await;
        let (ours, cost) = self.ours(&catalog, relation, &images, readers).await;
        let plan = relation.access(role(&readers[0])).unwrap().plan.clone();
        let answers = readers.len() * images.len();
        let mut compared = Compared { plan, answers, yes: 0, statements: cost.statements, wrong: Vec::new() };
        for (claims, ours) in readers.iter().zip(&ours) {
            let (shown, raise) = self.shown(table, claims).await;
            let asked = self.one_by_one(relation, &images, claims).await;
            let access = relation.access(role(claims)).unwrap();
            let terms = access.plan.values(identity(claims).claims());
            let left_to_postgresql = terms.contains(&ClaimValue::Error);
            for (id, ours) in ours {
                let answers = [shown[id].unwrap_or(false), asked[id].unwrap()];
                let ours = ours.unwrap();
                compared.yes += usize::from(ours);
                // When something raises depends on PostgreSQL's plan, which may put off what decides, or look at a claim
                // while it plans. Then no is never wrong, and yes must be what one of its plans says; where a claim raises that the
                // policy reads, it was PostgreSQL that said so.
                // While a role lacks a grant, the answer is no, also where PostgreSQL would leave out what needs it.
                let lacks = relation.missing_grants(role(claims)).is_some();
                let undecided = raise || shown[id].is_none() || answers[0] != answers[1] || lacks;
                if left_to_postgresql {
                    continue;
                }
                if if undecided { ours && !answers.contains(&true) } else { ours != answers[0] } {
                    compared.wrong.push(format!(
                        "row {} to {claims}: {ours}, but the table says {:?}, one by one {:?}",
                        images[id], shown[id], asked[id],
                    ));
                }
            }
        }
        compared
    }

    /// Asks every way, and fails where one differs; returns how the relay decides it and how many answers were compared.
    pub async fn check(&self, table: &str, readers: &[Value], context: &str) -> (PlanKind, usize) {
        let compared = self.compare(table, readers).await;
        let wrong = compared.wrong.first();
        assert!(wrong.is_none(), "{}\n{context}\n{:?}", wrong.map_or("", String::as_str), compared.plan);
        (compared.plan.kind, compared.answers)
    }
}

fn identity(claims: &Value) -> Identity {
    Identity::new(Claims::from_verified_payload(&claims.to_string()).unwrap())
}

fn role(claims: &Value) -> &str {
    claims["role"].as_str().unwrap_or("authenticated")
}
