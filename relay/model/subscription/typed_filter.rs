//! A subscription's filter, typed by its columns: evaluated here where that is exact, else by PostgreSQL.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::catalog::shape::Labels;
use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::predicate::{Comparison, List, NoAnswers, Predicate, Scalar};
use crate::model::row::column::{Column, ColumnKind};
use crate::model::row::datum::{Kind, Read};
use crate::model::row::image::Image;
use crate::model::row::pattern::{Folding, Pattern};
use crate::model::row::truth::Truth;
use crate::model::subscription::filter::{Condition, Operator, Tree};

/// A filter whose values PostgreSQL has parsed with the types of its columns.
#[derive(Debug)]
pub struct TypedFilter {
    relation: (String, String),
    tree: Tree<TypedCondition>,
    /// The columns that it reads, each once.
    columns: BTreeSet<String>,
    /// The filter as a predicate. Conditions that only PostgreSQL can evaluate are opaque.
    predicate: Predicate,
    constants: Vec<ClaimValue>,
    /// The filter as an SQL condition.
    pub condition: String,
    /// The statement with which PostgreSQL evaluates row images against this filter.
    pub statement: Arc<str>,
}

/// One condition of a filter, with its values as PostgreSQL prints them.
#[derive(Debug)]
pub struct TypedCondition {
    condition: Condition,
    /// The column's type (`pg_type.typname`).
    kind: String,
    /// The kind of its values when it was bound. A change of the collation does not change the type's name.
    shape: ColumnKind,
    /// The case folding of the column's texts when it was bound.
    folding: Option<Folding>,
    /// The values as printed by `value::type::text`.
    values: Vec<String>,
    /// The enum labels that its values name.
    labels: Labels,
}

impl TypedFilter {
    /// Creates the filter of a relation from its typed conditions, SQL condition and statement.
    pub fn new(
        relation: &Relation,
        tree: Tree<TypedCondition>,
        condition: String,
        statement: Arc<str>,
    ) -> Self {
        let mut constants = Vec::new();
        let predicate = predicate(&tree, relation, &mut constants);
        let name = (relation.schema.clone(), relation.table.clone());
        let columns = tree.conditions().into_iter().map(|typed| typed.condition.column.clone()).collect();
        Self { relation: name, tree, columns, predicate, constants, condition, statement }
    }

    /// Whether both filters have the same conditions.
    pub fn has_same_conditions(&self, other: &Self) -> bool {
        fn conditions(filter: &TypedFilter) -> Tree<&Condition> {
            filter.tree.map(&mut |typed| &typed.condition)
        }
        conditions(self) == conditions(other)
    }

    /// Whether the relation, the columns and the named enum labels still have the names and types with which the filter was bound.
    pub fn fits(&self, relation: &Relation) -> bool {
        (&self.relation.0, &self.relation.1) == (&relation.schema, &relation.table)
            && self.tree.conditions().into_iter().all(|typed| typed.fits(relation))
    }

    /// Whether it fits and reads only columns that may be read.
    pub fn is_usable(&self, relation: &Relation, access: &Access) -> bool {
        self.fits(relation) && self.columns().all(|column| access.sees(column))
    }

    /// Returns the columns that the filter reads.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(String::as_str)
    }

    /// Returns whether the row matches; undecided if only PostgreSQL can tell.
    pub fn truth(&self, image: &Image<'_>) -> Truth {
        self.predicate.truth(image, &self.constants, &NoAnswers, true)
    }

    /// Whether PostgreSQL may have to evaluate the filter.
    pub fn asks(&self) -> bool {
        self.predicate.needs_postgres()
    }

    /// Returns the maximum number of values that a row is compared with.
    pub fn value_count(&self) -> usize {
        self.tree.conditions().into_iter().map(|typed| typed.values.len().max(1)).sum()
    }

    /// Returns the index keys of matching rows.
    pub fn index_keys(&self) -> IndexKeys {
        self.predicate.index_keys(&self.constants)
    }
}

/// Returns a tree of conditions as a predicate, and adds its values to `constants`.
fn predicate(tree: &Tree<TypedCondition>, relation: &Relation, constants: &mut Vec<ClaimValue>) -> Predicate {
    let mut of = |tree| predicate(tree, relation, constants);
    match tree {
        Tree::Not(inner) => Predicate::Not(Box::new(of(inner))),
        Tree::And(all) => Predicate::And(all.iter().map(of).collect()),
        Tree::Or(all) => Predicate::Or(all.iter().map(of).collect()),
        Tree::One(typed) => typed.predicate(relation, constants),
    }
}

impl TypedCondition {
    /// Types a condition by its column of the relation. `values` are as printed by `value::type::text`.
    pub fn new(relation: &Relation, condition: Condition, values: Vec<String>) -> Self {
        let column = relation.column(&condition.column);
        let is_named = |label: &str| values.iter().any(|value| value.contains(label));
        let labels = relation.shapes().labels(&condition.column).into_iter().flatten();
        let labels = labels
            .filter(|(_, label)| is_named(label))
            .map(|(number, label)| (number.clone(), label.clone()))
            .collect();
        Self {
            kind: column.map(|column| column.kind.clone()).unwrap_or_default(),
            shape: column.map_or(ColumnKind::Foreign, Column::shape),
            folding: column.and_then(|column| column.folding),
            condition,
            values,
            labels,
        }
    }

    /// Whether the column and the named enum labels still have the names and types with which the condition was bound.
    fn fits(&self, relation: &Relation) -> bool {
        let now = relation.column(&self.condition.column);
        let labels = || relation.shapes().labels(&self.condition.column);
        now.is_some_and(|now| (&now.kind, now.shape(), now.folding) == (&self.kind, self.shape, self.folding))
            && (self.labels.is_empty()
                || labels().is_some_and(|now| {
                    self.labels.iter().all(|(number, label)| now.get(number) == Some(label))
                }))
    }

    /// Returns the condition as a predicate, and adds its values to `constants`.
    fn predicate(&self, relation: &Relation, constants: &mut Vec<ClaimValue>) -> Predicate {
        let found = relation.columns.iter().position(|column| column.name == self.condition.column);
        let asks_for_null = self.condition.operator == Operator::Is && self.values == ["null"];
        let found = found.and_then(|column| match relation.columns[column].shape() {
            _ if asks_for_null => {
                relation.columns[column].plain.then_some(Predicate::IsNull(Scalar::Column(column)))
            }
            _ if matches!(self.condition.operator, Operator::Like | Operator::Ilike) => {
                let folding = relation.columns[column].folding?;
                let folds = (self.condition.operator == Operator::Ilike).then_some(folding);
                Some(Predicate::Matches(column, Pattern::new(self.values.first()?, folds)?))
            }
            ColumnKind::One(kind) => self.comparison(column, kind, constants),
            ColumnKind::Many(_) | ColumnKind::Padded | ColumnKind::Foreign => None,
        });
        found.unwrap_or(Predicate::Opaque)
    }

    /// Returns the comparison of a column as a predicate; `None` if only PostgreSQL can evaluate it.
    fn comparison(&self, column: usize, kind: Kind, constants: &mut Vec<ClaimValue>) -> Option<Predicate> {
        let read = |text: &String| match kind.read(text) {
            Read::Value(datum) => Some(datum),
            Read::Error | Read::Undecided => None,
        };
        let mut constant = |value| {
            constants.push(value);
            constants.len() - 1
        };
        let mut one = |text| Some(Scalar::Claim(constant(ClaimValue::One(read(text)?))));
        let comparison = match self.condition.operator {
            Operator::Eq => Comparison::Equal,
            Operator::Neq => Comparison::NotEqual,
            Operator::Lt => Comparison::Less,
            Operator::Lte => Comparison::LessOrEqual,
            Operator::Gt => Comparison::Greater,
            Operator::Gte => Comparison::GreaterOrEqual,
            Operator::In => {
                let list = self.values.iter().map(read).collect::<Option<_>>()?;
                return Some(Predicate::Among(
                    Scalar::Column(column),
                    List::Claim(constant(ClaimValue::list(list))),
                ));
            }
            Operator::IsDistinct => {
                let value = one(self.values.first()?)?;
                return Some(Predicate::Not(Box::new(Predicate::Same(Scalar::Column(column), value))));
            }
            Operator::Is => {
                let truth = || Box::new(Predicate::Truth(Scalar::Column(column)));
                return match self.values.first()?.as_str() {
                    "true" if kind == Kind::Bool => Some(Predicate::Is(truth(), true)),
                    "false" if kind == Kind::Bool => Some(Predicate::Is(truth(), false)),
                    "unknown" if kind == Kind::Bool => Some(Predicate::IsUnknown(truth())),
                    _ => None,
                };
            }
            Operator::Like | Operator::Ilike | Operator::Match | Operator::Imatch => return None,
        };
        let value = one(self.values.first()?)?;
        comparison.is_known_for(kind).then_some(Predicate::Compare(Scalar::Column(column), comparison, value))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::catalog::relation::tests::{one_column, todos};
    use crate::model::subscription::filter;

    /// A filter bound to a relation with one column.
    pub(crate) fn bound(filter: &str, relation: &Relation) -> TypedFilter {
        let mut typed = |condition: &Condition| {
            TypedCondition::new(relation, condition.clone(), condition.values.clone())
        };
        TypedFilter::new(relation, filter::parse(filter).unwrap().map(&mut typed), String::new(), "".into())
    }

    /// `None` means that only PostgreSQL can decide.
    #[track_caller]
    fn check(filter: &str, kind: &str, value: &str, expected: Option<bool>) {
        let known = ["int4", "int8", "bool", "uuid", "text"].contains(&kind);
        let relation = one_column(kind, known.then_some(kind));
        let image = format!(r#"{{"c":{value}}}"#);
        let image = Image::parse(&image, &relation.columns).unwrap();
        let found = match bound(filter, &relation).truth(&image) {
            Truth::Undecided => None,
            truth => Some(truth == Truth::True),
        };
        assert_eq!(found, expected, "{filter} on {value} of {kind}");
    }

    #[test]
    fn a_filter_is_evaluated_here_only_where_equal_values_have_equal_texts() {
        for (filter, value, expected) in [
            ("c=eq.5", "5", true),
            ("c=eq.5", "-5", false),
            ("c=neq.5", "6", true),
            ("c=lt.10", "9", true),
            ("c=gt.-10", "-9", true),
            ("c=lte.9223372036854775807", "9223372036854775807", true),
            ("c=gte.5", "4", false),
            ("c=in.(1,5)", "5", true),
            ("c=not.in.(1,5)", "5", false),
            ("c=gt.1,c=not.eq.5", "6", true),
            ("c=gt.1,c=not.eq.5", "5", false),
        ] {
            check(filter, "int8", value, Some(expected));
        }
        check("c=eq.a\"b", "text", r#""a\"b""#, Some(true));
        check("c=eq.ü", "text", r#""\u00fc""#, Some(true));
        check("c=in.(x,\"\")", "text", r#""""#, Some(true));
        check("c=eq.true", "bool", "true", Some(true));
        check("c=neq.true", "bool", "false", Some(true));
        for (filter, kind, value) in [
            ("c=lt.b", "text", r#""a""#),
            ("c=like.a%", "text", r#""a""#),
            ("c=eq.5", "numeric", "5.0"),
            ("c=eq.a", "bpchar", r#""a  ""#),
            ("c=eq.2026-01-05", "date", r#""2026-01-05""#),
            ("c=lt.true", "bool", "false"),
        ] {
            check(filter, kind, value, None);
        }
        check("c=in.()", "int4", "5", Some(false));
    }

    #[test]
    fn null_is_neither_equal_nor_different_but_distinct() {
        let uuid = "0a000000-0000-4000-8000-00000000000a";
        for (kind, value) in [("int4", "5"), ("text", "5"), ("uuid", uuid), ("bool", "true")] {
            for filter in
                ["c=eq.V", "c=neq.V", "c=not.eq.V", "c=in.(V)", "c=not.in.(V)", "c=not.is.null", "c=in.()"]
            {
                check(&filter.replace('V', value), kind, "null", Some(false));
            }
            for filter in ["c=is.null", "c=isdistinct.V", "c=not.in.()"] {
                check(&filter.replace('V', value), kind, "null", Some(true));
            }
        }
        check("c=lt.5", "int4", "null", Some(false));
        check("c=not.gte.5", "int4", "null", Some(false));
    }

    #[test]
    fn groups_have_the_three_truth_values_of_sql_and_what_decides_them_here_is_enough() {
        for (filter, value, expected) in [
            ("or=(c.eq.1,c.eq.5)", "5", Some(true)),
            ("or=(c.eq.1,c.eq.5)", "6", Some(false)),
            ("or=(c.eq.1,c.is.null)", "null", Some(true)),
            // Null or false is null, and so is its opposite.
            ("not.or=(c.eq.1,c.in.())", "null", Some(false)),
            ("not.and=(c.eq.1,c.in.())", "null", Some(true)),
            ("or=(c.gt.1,not.and(c.lt.9,c.neq.5)),c=lt.7", "6", Some(true)),
            ("or=(c.eq.5,c.match.x)", "5", Some(true)),
            ("or=(c.match.x,c.eq.5)", "5", None),
            ("or=(c.eq.1,c.match.x)", "5", None),
            ("c=eq.1,or=(c.eq.1,c.match.x)", "5", Some(false)),
            ("not.or=(c.eq.1,c.match.x)", "5", None),
        ] {
            check(filter, "int8", value, expected);
        }
    }

    #[test]
    fn an_index_leads_to_a_group_whose_every_condition_has_a_key() {
        let relation = one_column("int4", Some("int4"));
        let keys = |filter: &str| match bound(filter, &relation).index_keys() {
            IndexKeys::Any => None,
            IndexKeys::OneOf(keys) => Some(keys.len()),
        };
        assert_eq!(keys("or=(c.eq.1,c.in.(2,3),c.gt.9)"), Some(4));
        assert_eq!(keys("or=(c.eq.1,c.neq.2)"), None);
        assert_eq!(keys("or=(c.eq.1,c.neq.2),c=lt.5"), Some(1));
    }

    #[test]
    fn a_filter_fits_while_its_columns_have_the_types_it_was_bound_with() {
        let (big, small) = (one_column("int8", Some("int8")), one_column("int4", Some("int4")));
        let filter = bound("c=eq.5,c=gt.1", &big);
        assert!(filter.fits(&big));
        assert!(!filter.fits(&small));
        assert!(!filter.fits(&todos(false, false)));
        assert_eq!(filter.columns().collect::<Vec<_>>(), ["c"]);
    }
}
