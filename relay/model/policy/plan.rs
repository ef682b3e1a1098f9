//! How a relation's policy is decided for one role: what is told here, what PostgreSQL is asked, and for whom at once.

use crate::model::identity::claims::Claims;
use crate::model::policy::claim_expr::{ClaimExpr, ClaimValue};
use crate::model::policy::predicate::Predicate;
use crate::model::row::datum::Kind;

/// The three ways to a verdict, cheapest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlanKind {
    /// Decided here, without a question to PostgreSQL.
    Compiled,
    /// PostgreSQL is asked once who may see the rows of a page, not once for each who might.
    Inverted,
    /// PostgreSQL is asked for each distinct set of the claims that the policy reads.
    PerIdentity,
}

/// A policy, ready to be decided. Made by [`compile`](crate::model::policy::compile::compile).
#[derive(Debug, Clone)]
pub struct Plan {
    /// How it is decided.
    pub kind: PlanKind,
    /// What is known of it here; all of it unless the way is one by one.
    pub predicate: Predicate,
    /// What it reads of the claims. Who agrees in these is judged together.
    pub claim_exprs: Vec<ClaimExpr>,
    /// It may read any claim, or nobody knows which.
    pub reads_all: bool,
    /// What PostgreSQL is asked per page.
    pub queries: Vec<ServerQuery>,
    /// What keeps it from a cheaper way.
    pub obstacles: Vec<Obstacle>,
    /// A condition of the claims alone that holds unless the claims make the policy raise, for PostgreSQL.
    pub probe: Option<String>,
}

/// A part of a policy that cannot be decided here, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The part as SQL.
    pub part: String,
    /// What about it.
    pub why: String,
}

/// A question about row images that has one answer for all readers. Expressions name the relation's columns, bare or
/// by the relation's name, and what they need of a reader by [`READER`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerQuery {
    /// A condition that does not depend on the reader.
    Fact {
        /// The condition.
        expression: String,
    },
    /// Who finds a row in a query. The reader's terms are columns `v0`, `v1`, … of [`READER`].
    Found {
        /// The query; it gives a row for each finding.
        query: String,
        /// What a reader is known by: numbers of terms and their types.
        by: Vec<(usize, Kind)>,
    },
    /// Whose term equals a value of the row.
    Equals {
        /// The value.
        expression: String,
        /// The number of the term and its type.
        by: (usize, Kind),
    },
}

/// The name under which a leaf's query knows the reader.
pub const READER: &str = "relay reader";

impl ServerQuery {
    /// The terms by which readers are known; none for a fact.
    pub fn by(&self) -> &[(usize, Kind)] {
        match self {
            Self::Fact { .. } => &[],
            Self::Found { by, .. } => by,
            Self::Equals { by, .. } => std::slice::from_ref(by),
        }
    }
}

impl PlanKind {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compiled => "compiled",
            Self::Inverted => "inverted",
            Self::PerIdentity => "one by one",
        }
    }
}

impl Plan {
    /// Every row.
    pub fn allow_all() -> Self {
        Self::compiled(Predicate::Constant(Some(true)))
    }

    /// A condition that needs nobody's help.
    pub fn compiled(predicate: Predicate) -> Self {
        Self {
            kind: PlanKind::Compiled,
            predicate,
            claim_exprs: Vec::new(),
            reads_all: false,
            queries: Vec::new(),
            obstacles: Vec::new(),
            probe: None,
        }
    }

    /// Nothing is known of it but that PostgreSQL can judge it.
    pub fn opaque(obstacle: Obstacle) -> Self {
        Self {
            kind: PlanKind::PerIdentity,
            reads_all: true,
            obstacles: vec![obstacle],
            ..Self::compiled(Predicate::Opaque)
        }
    }

    /// Nothing is known of it yet, and nobody can be asked: what it would decide cannot be told.
    pub fn pending() -> Self {
        let why = String::from("a table that it reads is locked, so that it cannot be read itself");
        let obstacles = vec![Obstacle { part: String::from("the policy"), why }];
        Self { kind: PlanKind::PerIdentity, obstacles, ..Self::compiled(Predicate::Pending) }
    }

    /// Whether these claims make it raise, whatever the row is, as far as that is known here. Then PostgreSQL shows nothing.
    pub fn raises(&self, values: &[ClaimValue]) -> bool {
        !self.is_probed(values) && self.predicate.raises(values)
    }

    /// Whether PostgreSQL has to be asked whether these claims make it raise, before anything is shown.
    pub fn is_probed(&self, values: &[ClaimValue]) -> bool {
        self.probe.is_some()
            && (self.kind == PlanKind::PerIdentity || values.contains(&ClaimValue::Undecided))
    }

    /// Whether PostgreSQL is asked what may name something in this schema, which is written as in SQL.
    pub fn names(&self, schema: &str) -> bool {
        let named = format!("{schema}.");
        self.kind == PlanKind::PerIdentity
            || self.queries.iter().any(|query| match query {
                ServerQuery::Fact { expression } | ServerQuery::Equals { expression, .. } => {
                    expression.contains(&named)
                }
                ServerQuery::Found { query, .. } => query.contains(&named),
            })
    }

    /// What the terms come to for these claims.
    pub fn values(&self, claims: &Claims) -> Vec<ClaimValue> {
        self.claim_exprs.iter().map(|expr| expr.value(claims)).collect()
    }
}
