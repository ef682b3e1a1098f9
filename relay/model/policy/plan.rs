//! The plan of a policy for one role: what the relay decides, and what PostgreSQL evaluates for which readers.

use crate::model::identity::claims::Claims;
use crate::model::policy::claim_expr::{ClaimExpr, ClaimValue};
use crate::model::policy::predicate::Predicate;
use crate::model::row::datum::Kind;

/// The kinds of plans, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlanKind {
    /// The relay decides alone.
    Compiled,
    /// PostgreSQL names the readers of a page's rows, once for all readers.
    Inverted,
    /// PostgreSQL evaluates the policy for each distinct set of the claims that it reads.
    PerIdentity,
}

/// A compiled policy. Made by [`compile`](crate::model::policy::compile::compile).
#[derive(Debug, Clone)]
pub struct Plan {
    /// The kind.
    pub kind: PlanKind,
    /// The condition as far as the relay knows it; complete unless the kind is per identity.
    pub predicate: Predicate,
    /// The claims that the policy reads. Identities with equal values are evaluated together.
    pub claim_exprs: Vec<ClaimExpr>,
    /// Whether the policy may read any claim, or the claims that it reads are unknown.
    pub reads_all: bool,
    /// The queries to PostgreSQL for each page.
    pub queries: Vec<ServerQuery>,
    /// The role that runs the queries: the row security of the tables that they look into applies to the subscriber's role and not
    /// to this one, and the queries contain its conditions. `None`: the subscriber's role.
    pub reads_as: Option<String>,
    /// The reasons against a cheaper kind.
    pub obstacles: Vec<Obstacle>,
    /// A condition on claims alone, for PostgreSQL: it holds unless the claims make the policy raise.
    pub probe: Option<String>,
}

/// A part of a policy that the relay cannot decide, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The part as SQL.
    pub part: String,
    /// The reason.
    pub why: String,
}

/// A query about row images with one result for all readers. Expressions name the relation's columns, unqualified or by the
/// relation's name, and the reader's values by [`READER`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerQuery {
    /// A condition that does not depend on the reader.
    Fact {
        /// The condition.
        expression: String,
    },
    /// The readers for whom a query finds the row. Their claim values are the columns `v0`, `v1`, … of [`READER`].
    Found {
        /// The query; it returns a row for each match.
        query: String,
        /// The indexes and types of the claim expressions that identify a reader.
        by: Vec<(usize, Kind)>,
    },
    /// The readers whose claim equals a value of the row.
    Equals {
        /// The value.
        expression: String,
        /// The index and type of the claim expression.
        by: (usize, Kind),
    },
}

/// The alias of the reader's claim values in a query.
pub const READER: &str = "relay reader";

impl ServerQuery {
    /// Returns the claim expressions that identify readers; none for a fact.
    pub fn by(&self) -> &[(usize, Kind)] {
        match self {
            Self::Fact { .. } => &[],
            Self::Found { by, .. } => by,
            Self::Equals { by, .. } => std::slice::from_ref(by),
        }
    }
}

impl PlanKind {
    /// Returns the display name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compiled => "compiled",
            Self::Inverted => "inverted",
            Self::PerIdentity => "one by one",
        }
    }
}

impl Plan {
    /// Returns the plan that allows every row.
    pub fn allow_all() -> Self {
        Self::compiled(Predicate::Constant(Some(true)))
    }

    /// Returns the plan of a condition that the relay decides alone.
    pub fn compiled(predicate: Predicate) -> Self {
        Self {
            kind: PlanKind::Compiled,
            predicate,
            claim_exprs: Vec::new(),
            reads_all: false,
            queries: Vec::new(),
            reads_as: None,
            obstacles: Vec::new(),
            probe: None,
        }
    }

    /// Returns the plan of a policy that only PostgreSQL can evaluate.
    pub fn opaque(obstacle: Obstacle) -> Self {
        Self {
            kind: PlanKind::PerIdentity,
            reads_all: true,
            obstacles: vec![obstacle],
            ..Self::compiled(Predicate::Opaque)
        }
    }

    /// Returns the plan of a policy that is not known yet: nothing can be decided or queried.
    pub fn pending() -> Self {
        let why = String::from("a table that it reads is locked, so PostgreSQL cannot show it");
        let obstacles = vec![Obstacle { part: String::from("the policy"), why }];
        Self { kind: PlanKind::PerIdentity, obstacles, ..Self::compiled(Predicate::Pending) }
    }

    /// Whether these claims make the policy raise for every row, as far as the relay knows. Then PostgreSQL shows nothing.
    pub fn raises(&self, values: &[ClaimValue]) -> bool {
        !self.needs_probe(values) && self.predicate.raises(values)
    }

    /// Whether PostgreSQL has to check whether these claims make the policy raise, before anything is shown.
    pub fn needs_probe(&self, values: &[ClaimValue]) -> bool {
        self.probe.is_some()
            && (self.kind == PlanKind::PerIdentity || values.contains(&ClaimValue::Undecided))
    }

    /// Whether a query to PostgreSQL may name an object of this schema, which is quoted as in SQL.
    pub fn may_name_schema(&self, schema: &str) -> bool {
        let named = format!("{schema}.");
        self.kind == PlanKind::PerIdentity
            || self.queries.iter().any(|query| match query {
                ServerQuery::Fact { expression } | ServerQuery::Equals { expression, .. } => {
                    expression.contains(&named)
                }
                ServerQuery::Found { query, .. } => query.contains(&named),
            })
    }

    /// Evaluates the claim expressions for these claims.
    pub fn values(&self, claims: &Claims) -> Vec<ClaimValue> {
        self.claim_exprs.iter().map(|expr| expr.value(claims)).collect()
    }
}
