//! Tables that show a role no row, whatever its claims: row security is on, and no policy lets the role read.

use crate::model::catalog::relation::Relation;
use crate::model::subscription::error::identifier;

/// Returns why the relation shows the role no row, and what to do; `None` when it may show it rows.
///
/// A policy that depends on claims may show rows. A relation whose policies are not known yet may, too.
pub fn hidden_from(relation: &Relation, role: &str) -> Option<String> {
    let access = relation.access(role)?;
    let is_secured = access.policy.is_some() && !matches!(relation.kind.as_str(), "m" | "f");
    if !is_secured || access.rights.policies.iter().any(|policy| policy.permissive) {
        return None;
    }
    let [schema, table, role] = [&relation.schema, &relation.table, role].map(identifier);
    Some(match role.as_str() {
        "service_role" => format!(
            "{schema}.{table}: service_role has no BYPASSRLS, and no row-level policy lets it read a row: alter role service_role \
             bypassrls"
        ),
        _ => format!(
            "{schema}.{table}: no row-level policy lets {role} read a row: create policy ... on {schema}.{table} for select to {role} \
             using (...)"
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::model::catalog::relation::Catalog;
    use crate::model::row::change::RelationId;

    fn hidden(role: &str, kind: &str, access: &Value) -> Option<String> {
        let relation = serde_json::from_value(json!({
            "id": 7, "schema": "public", "table": "To do", "kind": kind, "leave_events": false, "full": false, "key": [],
            "columns": [{"name": "id", "type": "int8", "known": "int8"}], "access": {role: access},
        }));
        let catalog = Catalog::new(vec![relation.unwrap()], BTreeSet::from([role.to_owned()]), true);
        hidden_from(catalog.relation(RelationId::whole(7)).unwrap(), role)
    }

    #[test]
    fn a_table_is_hidden_where_no_permissive_policy_applies() {
        let with = |policy: Value, policies: Value| json!({"columns": ["id"], "policy": policy, "judge": "select", "rights": {"policies": policies}});
        let policy = |permissive: bool| json!({"name": "p", "permissive": permissive, "condition": "false"});
        let told = "public.\"To do\": no row-level policy lets anon read a row: create policy ... on public.\"To do\" for select to anon \
                    using (...)";
        for (access, is_hidden) in [
            (with(json!("false"), json!([])), true),
            (with(json!("false"), json!([policy(false)])), true),
            (with(json!("(false)"), json!([policy(true)])), false),
            (with(json!("x"), json!([policy(false), policy(true)])), false),
            (with(Value::Null, json!([])), false),
            (json!({"columns": ["id"], "pending": true}), false),
            (json!({"columns": [], "policy": "false"}), false),
        ] {
            assert_eq!(hidden("anon", "r", &access).as_deref(), is_hidden.then_some(told), "{access}");
        }
        let nothing = with(json!("false"), json!([]));
        assert!(
            hidden("service_role", "p", &nothing).unwrap().ends_with(": alter role service_role bypassrls")
        );
        // Their condition is from relay.allow.
        assert_eq!(hidden("anon", "m", &nothing), None);
    }
}
