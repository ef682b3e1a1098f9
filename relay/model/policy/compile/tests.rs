//! The compiler on policies of any form, without PostgreSQL.

#[cfg(test)]
use proptest::prelude::*;

use super::*;
use crate::model::catalog::relation::tests::todos;
use crate::model::identity::claims::Claims;
use crate::model::policy::predicate::{Answers, NoAnswers};
use crate::model::row::image::Image;
use crate::model::row::truth::Truth;

fn rights() -> Rights {
    let jwt = "select nullif(current_setting('request.jwt.claims', true), '')::jsonb";
    serde_json::from_value(serde_json::json!({
        "helpers": {
            "auth.jwt": {"returns": "jsonb", "body": jwt},
            "auth.uid": {"returns": "uuid", "body": format!("{jwt} ->> 'sub'")},
            "again": {"returns": "uuid", "body": "select again()"},
        },
        "tables": ["members"],
    }))
    .unwrap()
}

/// Compiles on a thread with as little stack as the program's own threads.
#[track_caller]
fn kind_of(policy: String) -> PlanKind {
    let todos = todos(false, false);
    let compiled = move || compile(&policy, &todos.table, &todos.columns, &rights()).kind;
    std::thread::Builder::new().stack_size(2 << 20).spawn(compiled).unwrap().join().unwrap()
}

#[test]
fn deep_and_long_policies_compile_without_overflow() {
    for deep in [10, 100, 190, 340, 3000] {
        for (open, inner, close) in [
            ("(", "(id = 1)", ")"),
            ("(NOT ", "(id = 1)", ")"),
            ("((id = 1) AND ", "(id = 2)", ")"),
            ("((id = 1) IS TRUE) = (", "(id = 2)", ")"),
            ("CASE WHEN (id = 1) THEN true ELSE ", "false", " END"),
            ("CASE WHEN ", "true", " THEN true END"),
            ("COALESCE(", "title", ", ''::text)"),
            ("(EXISTS ( SELECT 1 FROM members m WHERE ", "(m.id = 1)", "))"),
            ("(id IN ( SELECT m.id FROM members m WHERE ", "(m.id = 1)", "))"),
            ("(auth.jwt() -> ", "'a'::text", ")"),
            ("lower(", "title", ")"),
            ("btrim(", "(auth.jwt() ->> 'a'::text)", ")"),
            ("CASE ", "title", " WHEN title THEN title END"),
            ("ARRAY[", "1", "]"),
            ("- ", "1", ""),
            ("", "'x'", "::text"),
            ("id = ANY (ARRAY[", "1", "])"),
            ("( SELECT ", "1", ")"),
        ] {
            let _ = kind_of(format!("{}{inner}{}", open.repeat(deep), close.repeat(deep)));
        }
        for link in [" AND (id = 1)", " OR (id = 1)", " = 1", " || 'x'::text", " -> 'a'::text", " + 1"] {
            let _ = kind_of(format!("(id = 1){}", link.repeat(deep)));
        }
        let _ = kind_of(format!("id = ANY (ARRAY[1{}])", ", 1".repeat(deep)));
    }
}

/// Fixed answers by the index of the query.
struct FixedAnswers(usize);

impl Answers for FixedAnswers {
    fn fact(&self, query: usize) -> Truth {
        [Truth::True, Truth::False, Truth::Null, Truth::Error][(query + self.0) % 4]
    }

    fn reads(&self, query: usize) -> Truth {
        [Truth::True, Truth::False][(query + self.0) % 2]
    }
}

/// Policies in PostgreSQL's form, or close to it.
fn any_policy() -> impl Strategy<Value = String> {
    let value = proptest::sample::select(vec![
        "id",
        "owner",
        "title",
        "raw",
        "todos.title",
        "missing",
        "5",
        "1.5",
        "'a'::text",
        "NULL::text",
        "'open'::public.state",
        "auth.uid()",
        "(auth.jwt() ->> 'org'::text)",
        "(auth.jwt() -> 'roles'::text)",
        "again()",
        "own.secret()",
        "now()",
        "length(title)",
        "COALESCE(title, ''::text)",
        "(owner)::text",
        "ARRAY[1, 2]",
        "current_setting('request.jwt.claims'::text, true)",
    ]);
    let operator = proptest::sample::select(vec![
        "=",
        "<>",
        "<",
        ">=",
        "IS DISTINCT FROM",
        "IS NOT DISTINCT FROM",
        "~~",
        "?",
        "->",
        "= ANY",
        "@>",
    ]);
    let condition = prop_oneof![
        4 => (value.clone(), operator, value.clone()).prop_map(|(a, op, b)| match op {
            "= ANY" => format!("({a} = ANY (ARRAY[{b}, {b}]))"),
            _ => format!("({a} {op} {b})"),
        }),
        1 => value.clone().prop_map(|a| format!("({a} IS NOT NULL)")),
        1 => Just("true".to_owned()),
        1 => Just("NULL::boolean".to_owned()),
        1 => (value.clone(), value).prop_map(|(a, b)| format!(
            "(EXISTS ( SELECT 1 FROM members m WHERE ((m.id = {a}) AND (m.who = {b}))))"
        )),
        1 => Just("(id IN ( SELECT m.todo FROM members m WHERE (m.who = auth.uid())))".to_owned()),
    ];
    condition.prop_recursive(5, 24, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} AND {b})")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} OR {b})")),
            inner.clone().prop_map(|a| format!("(NOT {a})")),
            inner.clone().prop_map(|a| format!("({a} IS NOT TRUE)")),
            inner.clone().prop_map(|a| format!("({a} IS UNKNOWN)")),
            (inner.clone(), inner.clone(), inner)
                .prop_map(|(a, b, c)| format!("CASE WHEN {a} THEN {b} ELSE {c} END")),
        ]
    })
}

proptest! {
    #[test]
    fn no_policy_panics(noise in "\\PC{0,60}", near in "[a-z()'\"= ]{0,60}") {
        for policy in [noise, near] {
            let todos = todos(false, false);
            let _ = compile(&policy, &todos.table, &todos.columns, &rights());
        }
    }

    /// Strict and lenient evaluation agree on true, and what is decided without answers is decided alike with them.
    #[test]
    fn a_plan_is_consistent(policy in any_policy()) {
        let relation = todos(false, false);
        let plan = compile(&policy, &relation.table, &relation.columns, &rights());
        prop_assert_eq!(plan.kind == PlanKind::PerIdentity, !plan.obstacles.is_empty(), "{}", policy);
        prop_assert_eq!(plan.kind == PlanKind::Inverted, !plan.queries.is_empty(), "{}", policy);
        let uid = "0a1b2c3d-0000-4000-8000-00000000000f";
        let claims = format!(r#"{{"role":"a","exp":1,"sub":"{uid}","org":"a","roles":["a"]}}"#);
        let claims = Claims::from_verified_payload(&claims).unwrap();
        let claims = plan.values(&claims);
        for row in [
            format!(r#"{{"id":1,"owner":"{uid}","title":"a","raw":"\\x00"}}"#),
            r#"{"id":5,"owner":null,"title":null,"raw":null}"#.to_owned(),
            r#"{"id":7}"#.to_owned(),
        ] {
            let image = Image::parse(&row, &relation.columns).unwrap();
            let before = plan.predicate.truth(&image, &claims, &NoAnswers, false);
            for seed in 0..4 {
                let strict = plan.predicate.truth(&image, &claims, &FixedAnswers(seed), false);
                let lenient = plan.predicate.truth(&image, &claims, &FixedAnswers(seed), true);
                let alike = (strict == Truth::True) == (lenient == Truth::True);
                prop_assert!(alike, "{policy} {row} {strict:?} {lenient:?}");
                prop_assert!(before == Truth::Undecided || before == strict, "{policy} {row} {before:?} {strict:?}");
            }
        }
    }
}
