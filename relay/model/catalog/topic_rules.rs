//! Who may use which private channel: the policies of `realtime.messages`, as `relay.topic_rules()` describes them.
//!
//! PostgreSQL is asked about rows that could stand in that table: one for each extension, with the channel as their topic. A
//! token that may see such a row may receive messages of that extension. A token that may insert it may send them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::catalog::relation::{Access, Relation};

/// The rules of private channels.
#[derive(Debug, Deserialize)]
pub struct TopicRules {
    read: RulesOfAct,
    write: RulesOfAct,
    /// The tables that the policies look into, by OID.
    tables: BTreeSet<u32>,
}

/// The rules of reading or of writing.
#[derive(Debug, Deserialize)]
struct RulesOfAct {
    #[serde(rename = "rules")]
    relation: Arc<Relation>,
    /// Why a role may do nothing, with remedies.
    blockers: BTreeMap<String, Vec<String>>,
}

/// What a member does in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TopicAct {
    /// It receives.
    Read,
    /// It sends.
    Write,
}

/// What an identity may do in a private channel by one [`TopicAct`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TopicRights {
    /// Broadcasts.
    pub broadcast: bool,
    /// Presence.
    pub presence: bool,
}

/// The values of the column `extension` that stand for the fields of [`TopicRights`], in order.
pub const EXTENSIONS: [&str; 2] = ["broadcast", "presence"];

impl TopicRights {
    /// Everything.
    pub const ALL: Self = Self { broadcast: true, presence: true };

    /// Whether there is any.
    pub fn any(self) -> bool {
        self.broadcast || self.presence
    }

    /// Returns the rights for these answers, in the order of [`EXTENSIONS`].
    pub fn of([broadcast, presence]: [bool; 2]) -> Self {
        Self { broadcast, presence }
    }
}

impl TopicRules {
    /// Compiles the policies.
    #[must_use]
    pub fn compiled(self) -> Self {
        let compiled = |rules: RulesOfAct| {
            let relation =
                Arc::into_inner(rules.relation).map(|relation| Arc::new(relation.compiled_for_topics()));
            RulesOfAct { relation: relation.unwrap_or_default(), ..rules }
        };
        Self { read: compiled(self.read), write: compiled(self.write), ..self }
    }

    /// Returns the table with the policies for this act.
    pub fn relation(&self, act: TopicAct) -> &Arc<Relation> {
        &self.rules(act).relation
    }

    /// Returns the access of a role.
    ///
    /// # Errors
    /// Why the role may do nothing, and what to do.
    pub fn access(&self, act: TopicAct, role: &str) -> Result<&Access, String> {
        let rules = self.rules(act);
        match (rules.blockers.get(role).map(Vec::as_slice), rules.relation.access(role)) {
            (None | Some([]), Some(access)) => rules.relation.missing_grants(role).map_or(Ok(access), Err),
            (Some([why, ..]), _) => Err(why.clone()),
            (None | Some([]), None) => Err(format!("the role {role} may not use it")),
        }
    }

    /// Whether what these roles may do is known.
    pub fn know(&self, roles: &BTreeSet<String>) -> bool {
        roles.iter().all(|role| self.read.blockers.contains_key(role))
    }

    /// Whether policies could not be read, because a table was locked.
    pub fn is_pending(&self) -> bool {
        [&self.read, &self.write].into_iter().any(|rules| rules.relation.is_pending())
    }

    /// Returns the tables that the policies look into, by OID.
    pub fn tables(&self) -> &BTreeSet<u32> {
        &self.tables
    }

    fn rules(&self, act: TopicAct) -> &RulesOfAct {
        match act {
            TopicAct::Read => &self.read,
            TopicAct::Write => &self.write,
        }
    }
}

/// Returns the rows that are asked about, in the order of [`EXTENSIONS`], each as an INSERT of topic and extension alone would leave
/// it. `now` is a timestamp in SQL's form.
pub fn images(relation: &Relation, channel: &str, now: &str) -> [String; 2] {
    EXTENSIONS.map(|extension| {
        let value = |name: &str| match name {
            "topic" => Value::from(channel),
            "extension" => Value::from(extension),
            "private" => Value::Bool(false),
            "inserted_at" | "updated_at" => Value::from(now),
            _ => Value::Null,
        };
        let fields = relation.columns.iter().map(|column| (column.name.clone(), value(&column.name)));
        Value::Object(fields.collect::<Map<_, _>>()).to_string()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::policy::plan::PlanKind;

    /// The rules with one policy for `authenticated`, in PostgreSQL's own text.
    fn rules(policy: &str) -> TopicRules {
        let body =
            "\n  select nullif(pg_catalog.current_setting('realtime.topic', true), '')::pg_catalog.text\n";
        let jwt = "select nullif(current_setting('request.jwt.claims', true), '')::jsonb";
        let column = |name: &str| json!({"name": name, "type": "text", "known": "text", "folding": "ascii"});
        let side = json!({
            "blockers": {"authenticated": []},
            "rules": {
                "id": 0, "schema": "realtime", "table": "messages", "kind": "r", "leave_events": false, "full": false, "key": [],
                "columns": [column("topic"), column("extension")],
                "access": {"authenticated": {
                    "columns": ["topic", "extension"],
                    "policy": policy,
                    "judge": "select",
                    "rights": {
                        "name": "realtime.messages",
                        "tables": ["public.messages", "members"],
                        "helpers": {
                            "realtime.topic": {"returns": "text", "body": body},
                            "auth.jwt": {"returns": "jsonb", "body": jwt},
                            "auth.uid": {"returns": "uuid", "body": "select nullif(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')::uuid"},
                        },
                    },
                }},
            },
        });
        let rules: TopicRules =
            serde_json::from_value(json!({"read": side, "write": side, "tables": []})).unwrap();
        rules.compiled()
    }

    #[test]
    fn policies_of_the_topic_and_claims_are_decided_without_postgresql() {
        for (policy, kind) in [
            ("(realtime.topic() = 'a'::text)", PlanKind::Compiled),
            ("(( SELECT realtime.topic() AS topic) = ANY (ARRAY['a'::text, 'b'::text]))", PlanKind::Compiled),
            ("(extension = ANY (ARRAY['broadcast'::text, 'presence'::text]))", PlanKind::Compiled),
            ("(realtime.topic() = (auth.uid())::text)", PlanKind::Compiled),
            (
                "(current_setting('realtime.topic'::text, true) = (auth.jwt() ->> 'room'::text))",
                PlanKind::Compiled,
            ),
            ("((realtime.topic() ~~ 'room:%'::text) AND (auth.uid() IS NOT NULL))", PlanKind::Compiled),
            ("(realtime.topic() = ('room:'::text || (auth.uid())::text))", PlanKind::Compiled),
            (
                "(EXISTS ( SELECT 1 FROM members m WHERE ((m.user_id = auth.uid()) AND (m.room = realtime.topic()))))",
                PlanKind::Inverted,
            ),
            // The name of the column would mean the one of another table.
            (
                "(EXISTS ( SELECT 1 FROM public.messages WHERE (messages.topic = realtime.topic())))",
                PlanKind::PerIdentity,
            ),
            ("(current_setting('realtime.topic'::text) = 'a'::text)", PlanKind::PerIdentity),
            ("(other.topic() = 'a'::text)", PlanKind::PerIdentity),
        ] {
            let rules = rules(policy);
            let access = rules.access(TopicAct::Read, "authenticated").unwrap();
            assert_eq!(access.plan.kind, kind, "{policy}: {:?}", access.plan);
        }
    }

    #[test]
    fn a_role_of_which_nothing_is_known_may_do_nothing() {
        let rules = rules("true");
        assert!(rules.access(TopicAct::Write, "anon").is_err());
        let role = |name: &str| BTreeSet::from([name.to_owned()]);
        assert!(rules.know(&role("authenticated")) && !rules.know(&role("anon")));
    }

    #[test]
    fn the_rows_that_are_asked_about_have_the_topic_and_an_extension() {
        let rules = rules("true");
        let images = images(rules.relation(TopicAct::Read), "a\"b", "2026-01-01");
        assert_eq!(images[0], r#"{"topic":"a\"b","extension":"broadcast"}"#);
        assert_eq!(images[1], r#"{"topic":"a\"b","extension":"presence"}"#);
    }
}
