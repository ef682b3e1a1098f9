//! Policies: whatever the text, a plan comes of it that is whole, not much larger than the text, and gives the same answer
//! whether it is read strictly or for "true" alone, before PostgreSQL was asked or after.
//!
//! The input is the policy; after lines with `---` come the claims and the row.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use relay::model::identity::claims::Claims;
use relay::model::policy::compile::compile;
use relay::model::row::image::Image;
use relay::model::policy::plan::{Plan, PlanKind};
use relay::model::policy::predicate::{Answers, List, Predicate, Scalar, NoAnswers};
use relay::model::row::truth::Truth;
use relay::model::catalog::relation::Relation;
use relay::model::policy::rights::Rights;
use serde_json::json;

static RELATION: LazyLock<Relation> = LazyLock::new(|| {
    serde_json::from_value(json!({
        "id": 7, "schema": "public", "table": "todos", "kind": "r", "leave_events": true, "full": false, "key": ["id"],
        "columns": [
            {"name": "id", "type": "int8", "readable_type": "bigint", "known": "int8", "plain": true},
            {"name": "owner", "type": "uuid", "readable_type": "uuid", "known": "uuid", "plain": true},
            {"name": "title", "type": "text", "readable_type": "text", "known": "text", "plain": true},
            {"name": "n", "type": "int4", "readable_type": "integer", "known": "int4", "plain": true},
            {"name": "done", "type": "bool", "readable_type": "boolean", "known": "bool", "plain": true},
            {"name": "state", "type": "state", "readable_type": "public.state", "known": "enum", "plain": true},
            {"name": "tags", "type": "_text", "readable_type": "text[]", "known": "text", "many": true, "plain": true},
            {"name": "price", "type": "numeric", "readable_type": "numeric", "plain": true},
        ],
        "access": {},
    }))
    .unwrap()
});

static RIGHTS: LazyLock<Rights> = LazyLock::new(|| {
    let jwt = "select nullif(current_setting('request.jwt.claims', true), '')::jsonb";
    serde_json::from_value(json!({
        "helpers": {
            "auth.uid": {"returns": "uuid", "body": "select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid"},
            "auth.role": {"returns": "text", "body": "select current_setting('request.jwt.claim.role', true)"},
            "auth.jwt": {"returns": "jsonb", "body": jwt},
            "again": {"returns": "uuid", "body": "select again()"},
        },
        "tables": ["members", "teams"],
    }))
    .unwrap()
});

const CLAIMS: &str = r#"{"role":"authenticated","exp":2000,"sub":"0a1b2c3d-0000-4000-8000-00000000000f","org":"a","roles":["x"]}"#;
const ROW: &str = r#"{"id":1,"owner":"0a1b2c3d-0000-4000-8000-00000000000f","title":"a","n":5,"done":true,"state":"open","tags":["x"],"price":1.50}"#;

/// Answers by the number of the leaf.
struct Said(usize);

impl Answers for Said {
    fn fact(&self, leaf: usize) -> Truth {
        [Truth::True, Truth::False, Truth::Null, Truth::Error][(leaf + self.0) % 4]
    }

    fn reads(&self, leaf: usize) -> Truth {
        [Truth::True, Truth::False][(leaf + self.0) % 2]
    }
}

fuzz_target!(|text: &str| {
    let mut parts = text.split("\n---\n");
    let policy = parts.next().unwrap_or_default();
    let claims = parts.next().and_then(|claims| Claims::from_verified_payload(claims).ok());
    let claims = claims.unwrap_or_else(|| Claims::from_verified_payload(CLAIMS).unwrap());
    let row = parts.next().and_then(|row| Image::parse(row, &RELATION.columns).ok());
    let row = row.unwrap_or_else(|| Image::parse(ROW, &RELATION.columns).unwrap());

    let plan = compile(policy, &RELATION, &RIGHTS);
    is_whole(&plan);
    let questions: usize = plan.queries.iter().map(|leaf| format!("{leaf:?}").len()).sum();
    assert!(questions < 2_000 * (policy.len() + 100), "{questions} bytes of questions");
    plan.claim_exprs.iter().for_each(|term| drop(term.to_string()));

    let terms = plan.values(&claims);
    let before = plan.predicate.truth(&row, &terms, &NoAnswers, false);
    for said in 0..4 {
        let strict = plan.predicate.truth(&row, &terms, &Said(said), false);
        let lenient = plan.predicate.truth(&row, &terms, &Said(said), true);
        assert_eq!(strict == Truth::True, lenient == Truth::True, "{strict:?} {lenient:?}");
        assert!(before == Truth::Undecided || before == strict, "{before:?} {strict:?}");
    }
});

/// What the predicate names is there, and is what its way allows.
fn is_whole(plan: &Plan) {
    match plan.kind {
        PlanKind::Compiled => assert!(plan.queries.is_empty() && plan.obstacles.is_empty()),
        PlanKind::Inverted => assert!(!plan.queries.is_empty() && plan.obstacles.is_empty()),
        PlanKind::PerIdentity => assert!(plan.queries.is_empty() && !plan.obstacles.is_empty()),
    }
    let mut open = vec![&plan.predicate];
    while let Some(predicate) = open.pop() {
        match predicate {
            Predicate::Constant(_) => {}
            Predicate::Truth(one) | Predicate::IsNull(one) => names(plan, one),
            Predicate::Compare(one, _, other) | Predicate::Same(one, other) => {
                names(plan, one);
                names(plan, other);
            }
            Predicate::Among(one, list) => {
                names(plan, one);
                match list {
                    List::Of(list) => list.iter().for_each(|one| names(plan, one)),
                    List::Claim(term) | List::ClaimKeys(term) => assert!(*term < plan.claim_exprs.len()),
                    List::Column(column) => assert!(*column < RELATION.columns.len()),
                }
            }
            Predicate::Is(inner, _) | Predicate::IsUnknown(inner) | Predicate::Not(inner) => open.push(inner),
            Predicate::And(list) | Predicate::Or(list) => open.extend(list),
            Predicate::Case(branches, otherwise) => {
                open.extend(branches.iter().flat_map(|(one, then)| [one, then]));
                open.push(otherwise);
            }
            Predicate::Fact(leaf) => assert!(plan.queries[*leaf].by().is_empty()),
            Predicate::Readers { query: leaf, by } => {
                let known: Vec<usize> = plan.queries[*leaf].by().iter().map(|(term, _)| *term).collect();
                assert_eq!(*by, known);
                assert!(by.iter().all(|term| *term < plan.claim_exprs.len()));
            }
            Predicate::Opaque => assert_eq!(plan.kind, PlanKind::PerIdentity),
        }
    }
}

fn names(plan: &Plan, scalar: &Scalar) {
    match scalar {
        Scalar::Column(column) | Scalar::ColumnText(column) => assert!(*column < RELATION.columns.len()),
        Scalar::Claim(term) => assert!(*term < plan.claim_exprs.len()),
        Scalar::Coalesce(scalars) => scalars.iter().for_each(|one| names(plan, one)),
    }
}
