//! A subscription's filter, typed by its columns: evaluated here where that is exact, else by PostgreSQL.

use std::sync::Arc;

use crate::model::catalog::relation::{Access, Relation};
use crate::model::catalog::shape::Labels;
use crate::model::policy::claim_expr::ClaimValue;
use crate::model::policy::index_key::IndexKeys;
use crate::model::policy::predicate::{Comparison, List, NoAnswers, Predicate, Scalar};
use crate::model::row::column::ColumnKind;
use crate::model::row::datum::{Kind, Read};
use crate::model::row::image::Image;
use crate::model::row::pattern::{Folding, Pattern};
use crate::model::row::truth::Truth;
use crate::model::subscription::filter::{Condition, Operator};

/// A filter whose values PostgreSQL has parsed with the types of its columns.
#[derive(Debug)]
pub struct TypedFilter {
    relation: (String, String),
    conditions: Vec<TypedCondition>,
    /// For each condition, the enum labels that its values name.
    labels: Vec<Labels>,
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
    /// The condition.
    pub condition: Condition,
    /// The column's type (`pg_type.typname`).
    pub kind: String,
    /// The kind of its values when it was bound. A change of the collation does not change the type's name.
    pub shape: ColumnKind,
    /// The case folding of the column's texts when it was bound.
    pub folding: Option<Folding>,
    /// The values as printed by `value::type::text`.
    pub values: Vec<String>,
}

impl TypedFilter {
    /// Creates the filter of a relation from its typed conditions, SQL condition and statement.
    pub fn new(
        relation: &Relation,
        conditions: Vec<TypedCondition>,
        condition: String,
        statement: Arc<str>,
    ) -> Self {
        let mut constants = Vec::new();
        let predicates = conditions.iter().map(|typed| typed.predicate(relation, &mut constants)).collect();
        let name = (relation.schema.clone(), relation.table.clone());
        Self {
            relation: name,
            labels: conditions.iter().map(|typed| typed.labels(relation)).collect(),
            conditions,
            predicate: Predicate::And(predicates),
            constants,
            condition,
            statement,
        }
    }

    /// Whether both filters have the same conditions.
    pub fn has_same_conditions(&self, other: &Self) -> bool {
        let conditions =
            |filter: &Self| filter.conditions.iter().map(|typed| typed.condition.clone()).collect::<Vec<_>>();
        conditions(self) == conditions(other)
    }

    /// Whether the relation, the columns and the named enum labels still have the names and types with which the filter was bound.
    pub fn fits(&self, relation: &Relation) -> bool {
        let has_labels = |(typed, labels): (&TypedCondition, &Labels)| {
            let now = || relation.shapes().labels(&typed.condition.column);
            labels.is_empty()
                || now()
                    .is_some_and(|now| labels.iter().all(|(number, label)| now.get(number) == Some(label)))
        };
        let same = |typed: &TypedCondition| {
            let now = relation.column(&typed.condition.column);
            now.is_some_and(|now| {
                (&now.kind, now.shape(), now.folding) == (&typed.kind, typed.shape, typed.folding)
            })
        };
        (&self.relation.0, &self.relation.1) == (&relation.schema, &relation.table)
            && self.conditions.iter().all(same)
            && self.conditions.iter().zip(&self.labels).all(has_labels)
    }

    /// Whether it fits and reads only columns that may be read.
    pub fn is_usable(&self, relation: &Relation, access: &Access) -> bool {
        self.fits(relation) && self.columns().all(|column| access.sees(column))
    }

    /// Returns the columns that the filter reads.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.conditions.iter().map(|typed| typed.condition.column.as_str())
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
        self.conditions.iter().map(|typed| typed.values.len().max(1)).sum()
    }

    /// Returns the index keys of matching rows.
    pub fn index_keys(&self) -> IndexKeys {
        self.predicate.index_keys(&self.constants)
    }
}

impl TypedCondition {
    /// Returns the enum labels that its values may name.
    fn labels(&self, relation: &Relation) -> Labels {
        let is_named = |label: &str| self.values.iter().any(|value| value.contains(label));
        let labels = relation.shapes().labels(&self.condition.column).into_iter().flatten();
        labels
            .filter(|(_, label)| is_named(label))
            .map(|(number, label)| (number.clone(), label.clone()))
            .collect()
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
        match found {
            Some(predicate) if self.condition.negated => Predicate::Not(Box::new(predicate)),
            Some(predicate) => predicate,
            None => Predicate::Opaque,
        }
    }

    /// Returns the comparison of a column as a predicate; `None` if only PostgreSQL can evaluate it.
    fn comparison(&self, column: usize, kind: Kind, constants: &mut Vec<ClaimValue>) -> Option<Predicate> {
        let mut constant = |text: &String| match kind.read(text) {
            Read::Value(datum) => {
                constants.push(ClaimValue::One(datum));
                Some(Scalar::Claim(constants.len() - 1))
            }
            Read::Error | Read::Undecided => None,
        };
        let comparison = match self.condition.operator {
            Operator::Eq => Comparison::Equal,
            Operator::Neq => Comparison::NotEqual,
            Operator::Lt => Comparison::Less,
            Operator::Lte => Comparison::LessOrEqual,
            Operator::Gt => Comparison::Greater,
            Operator::Gte => Comparison::GreaterOrEqual,
            Operator::In => {
                let list = self.values.iter().map(constant).collect::<Option<Vec<_>>>()?;
                return Some(Predicate::Among(Scalar::Column(column), List::Of(list)));
            }
            Operator::IsDistinct => {
                let value = constant(self.values.first()?)?;
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
        let value = constant(self.values.first()?)?;
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
        let conditions = filter::parse(filter).unwrap();
        let typed = conditions.into_iter().map(|condition| {
            let values = condition.values.clone();
            TypedCondition {
                condition,
                kind: relation.columns[0].kind.clone(),
                shape: relation.columns[0].shape(),
                folding: relation.columns[0].folding,
                values,
            }
        });
        TypedFilter::new(relation, typed.collect(), String::new(), "".into())
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
    fn a_filter_fits_while_its_columns_have_the_types_it_was_bound_with() {
        let (big, small) = (one_column("int8", Some("int8")), one_column("int4", Some("int4")));
        let filter = bound("c=eq.5,c=gt.1", &big);
        assert!(filter.fits(&big));
        assert!(!filter.fits(&small));
        assert!(!filter.fits(&todos(false, false)));
        assert_eq!(filter.columns().collect::<Vec<_>>(), ["c", "c"]);
    }
}
