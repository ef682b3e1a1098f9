//! The queries by which the catalog is read.

use std::collections::BTreeSet;
use std::sync::Arc;

use deadpool_postgres::Client;
use serde::Deserialize;

use crate::model::catalog::marks::{Marks, Outdated};
use crate::model::catalog::relation::{Catalog, PartNames, Relation, Widening};
use crate::model::catalog::topic_rules::TopicRules;
use crate::model::row::change::RelationId;
use crate::postgres::connect::pool::Error;
use crate::postgres::function_bodies::bodies;

/// Reads the catalog of these roles, with the rights on these partitions.
pub(super) struct CatalogQueries<'c> {
    pub(super) client: &'c Client,
    /// The judging login, if it is not that of the client.
    pub(super) judge: &'c Option<String>,
    pub(super) roles: &'c BTreeSet<String>,
    /// The object ids of partitions that subscribers name.
    pub(super) parts: Vec<u32>,
}

/// The inputs of the mark of a page, by object id: see `relay.rules_mark()`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RuleScope {
    /// The roles of subscribers and of the judging login, and all roles that these are members of.
    pub roles: Vec<u32>,
    /// Watched relations and schemas that one of these roles owns.
    pub owned: Vec<u32>,
}

/// The fingerprint that tells whether the catalog is out of date.
pub(super) struct Fingerprint {
    pub(super) marks: Marks,
    pub(super) scope: RuleScope,
    /// The mark of rules that fire no event trigger.
    pub(super) mark: Option<i64>,
    /// The number of the last widening.
    pub(super) widened: Option<i64>,
}

#[derive(Deserialize)]
struct CatalogRows {
    ordered: bool,
    relations: Vec<Relation>,
}

/// Selects a [`Fingerprint`], for the roles `$1` of subscribers, the judging login `$2` and the partitions `$3`.
const FINGERPRINT: &str = "select k.kinds, k.names, k.marks, s.roles, s.owned, m.mark, (select max(w.number) from relay.widenings w) \
     from (select array_agg(k.kind) as kinds, array_agg(k.name) as names, array_agg(k.mark) as marks \
           from relay.catalog_marks(relay.subscriber_roles($1, $2), $2, $3) k) k, \
          relay.rule_scope($1, $2, $3) s, relay.rules_mark(s.roles, s.owned) m";

/// Selects the mark of the rules, for the inputs `$1` and `$2` of the last [`Fingerprint`].
const MARK: &str = "select m.mark from relay.rules_mark($1, $2) m";

/// The id of the table with the policies of private channels, where those of watched relations are asked for.
const TOPICS: i32 = 0;

/// Selects when rules were widened, and when each role last changed.
const WIDENINGS: &str = "select coalesce(json_agg(w), '[]')::text from ( \
     select number, xid::text::bigint, relation, part::bigint, null as role from relay.widenings \
     union all select null, xid, 0, 0, role from relay.role_versions(relay.subscriber_roles($1, $2))) w";

impl CatalogQueries<'_> {
    /// The mark of the rules that fire no event trigger.
    pub(super) async fn mark(&self, scope: &RuleScope) -> Result<Option<i64>, Error> {
        let mark = self.client.prepare_cached(MARK).await?;
        Ok(self.client.query_one(&mark, &[&scope.roles, &scope.owned]).await?.get(0))
    }

    pub(super) async fn fingerprint(&self) -> Result<Fingerprint, Error> {
        let fingerprint = self.client.prepare_cached(FINGERPRINT).await?;
        let roles = self.role_names();
        let row = self.client.query_one(&fingerprint, &[&roles, self.judge, &self.parts]).await?;
        let (kinds, names, hashes): (Vec<&str>, Vec<String>, Vec<String>) =
            (row.get(0), row.get(1), row.get(2));
        let mut marks = Marks::default();
        for ((kind, name), mark) in kinds.into_iter().zip(names).zip(hashes) {
            marks.add(kind, name, mark);
        }
        let scope = RuleScope { roles: row.get(3), owned: row.get(4) };
        Ok(Fingerprint { marks, scope, mark: row.get(5), widened: row.get(6) })
    }

    /// Records widened rules where no event trigger does, for subscribers that resume later.
    pub(super) async fn note_rules(&self) {
        if let Err(error) = self.client.execute("select relay.note_rules()", &[]).await {
            tracing::warn!(error = %Error::from(error), "widened rules not recorded");
        }
    }

    /// Tells the database which partitions are named, so that widenings of their rules are recorded. A rule that was changed by a
    /// transaction which did not know of that yet is recorded now.
    pub(super) async fn name_parts(&self) -> Result<(), Error> {
        if !self.parts.is_empty() {
            self.client.execute("select relay.name_parts($1)", &[&self.parts]).await?;
            self.note_rules().await;
        }
        Ok(())
    }

    /// Renews the recorded shapes, before the catalog is read, so that they match its columns. If that fails, changes of a
    /// relation without a recorded shape are not delivered. Returns whether the marks may have changed.
    pub(super) async fn repair(&self, outdated: &Outdated) -> bool {
        let relations: Vec<i32> = outdated.relations.iter().copied().collect();
        let which = (!outdated.everything).then_some(&relations);
        if which.is_some_and(Vec::is_empty) {
            return false;
        }
        let repaired = self.client.execute("select relay.repair($1)", &[&which]).await;
        let repaired = repaired.map_err(Error::from);
        if let Err(error) = &repaired {
            tracing::warn!(error = %error, "table shapes not renewed");
        }
        repaired.is_ok()
    }

    /// Returns `known` with what is outdated read anew.
    pub(super) async fn load(&self, known: &Catalog, outdated: &Outdated) -> Result<Catalog, Error> {
        let roles = self.role_names();
        let catalog = match outdated.everything {
            true => {
                let all = self.read(known, &roles, None).await?;
                Catalog::new(all.relations, self.roles.clone(), all.ordered)
            }
            false => self.renewed(known, outdated, &roles).await?,
        };
        let needs_topics = outdated.everything || outdated.topics || !outdated.roles.is_empty();
        let topics = match needs_topics {
            true => self.topic_rules().await?,
            false => known.topics().cloned(),
        };
        let catalog = catalog.with_topics(topics);
        // Read after the rules, so that no rule in the catalog lacks its widening.
        Ok(catalog.with_widenings(self.widenings().await?))
    }

    /// Reads the outdated relations for all roles, and the outdated roles for the other relations.
    async fn renewed(
        &self,
        known: &Catalog,
        outdated: &Outdated,
        roles: &[&String],
    ) -> Result<Catalog, Error> {
        let relations: Vec<i32> = outdated.relations.iter().copied().collect();
        let read = match relations.is_empty() {
            true => Vec::new(),
            false => self.read(known, roles, Some(&relations)).await?.relations,
        };
        let others = match outdated.roles.is_empty() {
            true => Vec::new(),
            false => {
                let roles: Vec<&String> = outdated.roles.iter().collect();
                let ids = known.relations().map(|relation| relation.id().watched);
                let others: Vec<i32> = ids.filter(|id| !outdated.relations.contains(id)).collect();
                self.read(known, &roles, Some(&others)).await?.relations
            }
        };
        let renewed = known.renewed(&outdated.relations, read, &outdated.roles, others);
        Ok(renewed.with_roles(self.roles.clone()))
    }

    /// Reads what these roles may see of these relations and of those of the partitions that are in them; `None` means all
    /// relations. The names of partitions, which may be thousands, are read only where they are not those in `known`.
    async fn read(
        &self,
        known: &Catalog,
        roles: &[&String],
        relations: Option<&Vec<i32>>,
    ) -> Result<CatalogRows, Error> {
        let client = self.client;
        let read = client
            .prepare_cached(
                "select relay.catalog(relay.subscriber_roles($1, $2), $2, $3, $4, $5::text::jsonb)::text",
            )
            .await?;
        let bodies = bodies(client, &self.parts, relations).await?;
        let row = client.query_one(&read, &[&roles, self.judge, &relations, &self.parts, &bodies]).await?;
        let text: String = row.get(0);
        let mut rows: CatalogRows =
            serde_json::from_str(&text).map_err(|error| unexpected("relay.catalog", &error))?;
        for relation in &mut rows.relations {
            if !relation.keep_parts(known) {
                relation.set_parts(self.part_names(relation.id()).await?);
            }
        }
        Ok(rows)
    }

    /// Reads the recorded partitions of a relation. The [`Fingerprint`] tells whether they are those of the catalog that was read just
    /// before.
    async fn part_names(&self, relation: RelationId) -> Result<PartNames, Error> {
        let read = "select part_names::text from relay.known_relations where id = $1";
        let read = self.client.prepare_cached(read).await?;
        let Some(row) = self.client.query_opt(&read, &[&relation.watched]).await? else {
            return Ok(PartNames::default());
        };
        serde_json::from_str(row.get(0))
            .map_err(|error| unexpected("the part_names of relay.known_relations", &error))
    }

    /// Reads what the roles may do in private channels.
    async fn topic_rules(&self) -> Result<Option<Arc<TopicRules>>, Error> {
        let read = "select relay.topic_rules($1, $2, $3::text::jsonb)::text";
        let read = self.client.prepare_cached(read).await?;
        let bodies = bodies(self.client, &[], Some(&vec![TOPICS])).await?;
        let row = self.client.query_opt(&read, &[&self.role_names(), self.judge, &bodies]).await?;
        let Some(text) = row.and_then(|row| row.get::<_, Option<String>>(0)) else { return Ok(None) };
        let rules: TopicRules =
            serde_json::from_str(&text).map_err(|error| unexpected("relay.topic_rules", &error))?;
        Ok(Some(Arc::new(rules.compiled())))
    }

    /// Reads the positions at which rules were widened for the roles.
    pub(super) async fn widenings(&self) -> Result<Vec<Widening>, Error> {
        let query = self.client.prepare_cached(WIDENINGS).await?;
        let text: String = self.client.query_one(&query, &[&self.role_names(), self.judge]).await?.get(0);
        serde_json::from_str(&text).map_err(|error| unexpected("relay.widenings", &error))
    }

    fn role_names(&self) -> Vec<&String> {
        self.roles.iter().collect()
    }
}

/// Returns the error for JSON from the database that this version cannot read.
fn unexpected(source: &str, error: &serde_json::Error) -> Error {
    Error::Unfit(format!("unexpected value of {source}: {error}"))
}
