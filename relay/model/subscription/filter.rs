//! A subscription's filter: conditions on columns, joined by `and` and `or`.

mod grammar;
mod group;

use std::fmt;

pub use grammar::parse;

/// Maximum number of values in the list of `in`.
pub const MAX_ITEMS: usize = 5_000;
/// Maximum number of conditions. Each costs a query at the join.
pub const MAX_CONDITIONS: usize = 100;
/// Maximum number of groups within each other.
pub const MAX_DEPTH: usize = 20;
/// Maximum length of a filter in bytes: half of a join. A list of 3,300 uuids fits.
pub const MAX_LENGTH: usize = 128 * 1024;
/// The form of a filter, for error messages.
pub const FORM: &str = "A filter is column=op.value, such as id=gt.7";

/// Conditions joined by `and` and `or`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Tree<C> {
    /// One condition.
    One(C),
    /// The opposite; null stays null.
    Not(Box<Self>),
    /// All of these; true without any.
    And(Vec<Self>),
    /// At least one of these; false without any.
    Or(Vec<Self>),
}

/// A filter as the client wrote it: an `and` of its terms.
pub type Filter = Tree<Condition>;

/// One comparison of a column.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Condition {
    /// The column as the client wrote it. It may not exist.
    pub column: String,
    /// The comparison.
    pub operator: Operator,
    /// The values to compare with: one, or any number for [`Operator::In`].
    pub values: Vec<String>,
}

/// The comparisons of the grammar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// `eq`: equal.
    Eq,
    /// `neq`: not equal.
    Neq,
    /// `lt`: less.
    Lt,
    /// `lte`: less or equal.
    Lte,
    /// `gt`: greater.
    Gt,
    /// `gte`: greater or equal.
    Gte,
    /// `in`: equal to one of a list.
    In,
    /// `like`: matches an SQL pattern.
    Like,
    /// `ilike`: matches an SQL pattern in any case.
    Ilike,
    /// `is`: is null, true, false or unknown.
    Is,
    /// `match`: matches a regular expression.
    Match,
    /// `imatch`: matches a regular expression in any case.
    Imatch,
    /// `isdistinct`: not equal, with null as an ordinary value.
    IsDistinct,
}

/// Why a text is not a filter. The message is for the client, after the start of [`SubscribeError::Filter`].
///
/// [`SubscribeError::Filter`]: crate::model::subscription::error::SubscribeError::Filter
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// No column, no operator or an unknown one. Holds the parts found.
    #[error("[{}]. {form}", quoted(.0), form = FORM)]
    Unparsable(Vec<String>),
    /// The list of `in` has no parentheses.
    #[error("`in` filter value must be wrapped by parentheses")]
    MissingParentheses,
    /// Nothing between two commas.
    #[error("filter must not contain empty segments (check for extra commas)")]
    EmptySegment,
    /// An item of an `in` list is empty without quotes, or its quotes are unbalanced.
    #[error("malformed list in `in` filter")]
    MalformedList,
    /// Too many items in an `in` list.
    #[error("too many values for `in` filter. Maximum {max}", max = MAX_ITEMS)]
    TooManyItems,
    /// `is` with another value than null, true, false or unknown.
    #[error("`is` filter value must be null, true, false or unknown")]
    UnknownState,
    /// Too many conditions.
    #[error("too many conditions. Maximum {max}", max = MAX_CONDITIONS)]
    TooManyConditions,
    /// Too long, or with a null character, which PostgreSQL text cannot contain.
    #[error(
        "filter is too long or contains a null character. Maximum {max} bytes",
        max = MAX_LENGTH
    )]
    Unacceptable,
    /// A mistake in a group.
    #[error("at {place}: {expected}")]
    InGroup {
        /// Where it is.
        place: Place,
        /// What should stand there.
        expected: String,
    },
}

/// A place in a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The number of the character, from 1.
    pub character: usize,
    /// The beginning of what stands there; nothing at the end of the filter.
    pub text: String,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text.as_str() {
            "" => write!(out, "character {}, the end", self.character),
            text => write!(out, "character {}, {text:?}", self.character),
        }
    }
}

impl<C> Tree<C> {
    /// Whether it has no conditions, so that every row matches.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::And(all) if all.is_empty())
    }

    /// Returns its conditions, in order.
    pub fn conditions(&self) -> Vec<&C> {
        fn collect<'t, C>(tree: &'t Tree<C>, found: &mut Vec<&'t C>) {
            match tree {
                Tree::One(condition) => found.push(condition),
                Tree::Not(inner) => collect(inner, found),
                Tree::And(all) | Tree::Or(all) => all.iter().for_each(|one| collect(one, found)),
            }
        }
        let mut found = Vec::new();
        collect(self, &mut found);
        found
    }

    /// Returns the tree with other conditions in the same places. `change` gets the conditions in order.
    pub fn map<'t, D>(&'t self, change: &mut impl FnMut(&'t C) -> D) -> Tree<D> {
        match self {
            Self::One(condition) => Tree::One(change(condition)),
            Self::Not(inner) => Tree::Not(Box::new(inner.map(change))),
            Self::And(all) => Tree::And(all.iter().map(|one| one.map(change)).collect()),
            Self::Or(all) => Tree::Or(all.iter().map(|one| one.map(change)).collect()),
        }
    }

    /// Returns the opposite if `negated`.
    fn not_if(self, negated: bool) -> Self {
        if negated { Self::Not(Box::new(self)) } else { self }
    }
}

impl Operator {
    /// All of them, in the order in which messages list them.
    pub const ALL: [Self; 13] = [
        Self::Eq,
        Self::Neq,
        Self::Lt,
        Self::Lte,
        Self::Gt,
        Self::Gte,
        Self::In,
        Self::Like,
        Self::Ilike,
        Self::Match,
        Self::Imatch,
        Self::Is,
        Self::IsDistinct,
    ];

    /// Returns the operator with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operator| operator.name() == name)
    }

    /// Returns the names of all, for messages.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(" ")
    }

    /// Returns its name in the grammar.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eq => "eq",
            Self::Neq => "neq",
            Self::Lt => "lt",
            Self::Lte => "lte",
            Self::Gt => "gt",
            Self::Gte => "gte",
            Self::In => "in",
            Self::Like => "like",
            Self::Ilike => "ilike",
            Self::Is => "is",
            Self::Match => "match",
            Self::Imatch => "imatch",
            Self::IsDistinct => "isdistinct",
        }
    }
}

fn quoted(parts: &[String]) -> impl fmt::Display {
    parts.iter().map(|part| format!("{part:?}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A condition.
    pub(crate) fn one(column: &str, operator: &str, values: &[&str]) -> Filter {
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        Filter::One(Condition {
            column: column.to_owned(),
            operator: Operator::from_name(operator).unwrap(),
            values,
        })
    }

    /// The opposite.
    pub(crate) fn not(inner: Filter) -> Filter {
        inner.not_if(true)
    }

    /// All of these.
    pub(crate) fn and<const N: usize>(all: [Filter; N]) -> Filter {
        Filter::And(all.into())
    }

    /// One of these.
    pub(crate) fn or<const N: usize>(any: [Filter; N]) -> Filter {
        Filter::Or(any.into())
    }

    /// Quotes a text, as a value or a column.
    pub(crate) fn quote(text: &str) -> String {
        format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
    }

    /// Writes a filter that was parsed.
    pub(crate) fn written(filter: &Filter) -> String {
        let Filter::And(terms) = filter else { panic!("a filter is an and of its terms") };
        terms.iter().map(|term| member(term, "=")).collect::<Vec<_>>().join(",")
    }

    fn member(tree: &Filter, between: &str) -> String {
        let (not, tree) = match tree {
            Filter::Not(inner) => ("not.", &**inner),
            tree => ("", tree),
        };
        let group = |name: &str, members: &[Filter]| {
            let members: Vec<String> = members.iter().map(|one| member(one, "")).collect();
            format!("{not}{name}{between}({})", members.join(","))
        };
        match tree {
            Filter::And(members) => group("and", members),
            Filter::Or(members) => group("or", members),
            Filter::Not(_) => panic!("not.not. is not in the grammar"),
            Filter::One(condition) => {
                let values: Vec<String> = condition.values.iter().map(|value| quote(value)).collect();
                let values = values.join(",");
                let values = if condition.operator == Operator::In { format!("({values})") } else { values };
                let then = if between.is_empty() { "." } else { between };
                format!("{}{then}{not}{}.{values}", quote(&condition.column), condition.operator.name())
            }
        }
    }

    fn trees() -> impl Strategy<Value = Filter> {
        let text = || "[a-z0-9 ,.()=\"\\\\{}ü]{0,5}";
        let names = "eq neq lt lte gt gte like ilike match imatch isdistinct";
        let operator = proptest::sample::select(names.split(' ').collect::<Vec<_>>());
        let column = || "[a-z ,.()=\"\\\\]{1,4}";
        let simple =
            (column(), operator, text()).prop_map(|(a, operator, value)| one(&a, operator, &[&value]));
        let list = (column(), proptest::collection::vec(text(), 0..4))
            .prop_map(|(column, values)| Filter::One(Condition { column, operator: Operator::In, values }));
        let is = column().prop_map(|column| one(&column, "is", &["unknown"]));
        let leaf = (prop_oneof![4 => simple, 1 => list, 1 => is], any::<bool>());
        let leaf = leaf.prop_map(|(leaf, negated)| leaf.not_if(negated));
        leaf.prop_recursive(4, 20, 4, |inner| {
            (proptest::collection::vec(inner, 1..4), any::<bool>(), any::<bool>()).prop_map(
                |(members, is_any, negated)| {
                    let group = if is_any { Filter::Or(members) } else { Filter::And(members) };
                    group.not_if(negated)
                },
            )
        })
    }

    proptest! {
        #[test]
        fn any_tree_is_the_same_when_written_and_parsed(terms in proptest::collection::vec(trees(), 1..4)) {
            let filter = Filter::And(terms);
            let text = written(&filter);
            prop_assert_eq!(parse(&text), Ok(filter), "{}", text);
        }
    }

    #[test]
    fn each_operator_has_its_name_and_the_reference_lists_them_all() {
        for operator in Operator::ALL {
            assert_eq!(Operator::from_name(operator.name()), Some(operator));
        }
        assert_eq!(Operator::from_name("cs"), None);
        let reference: Vec<&str> = include_str!("../../REFERENCE.md").split_whitespace().collect();
        assert!(reference.join(" ").contains(&format!("The operators are `{}`", Operator::names())));
    }

    #[test]
    fn size_is_limited() {
        assert_eq!(parse(&["a=eq.1"; 101].join(",")), Err(FilterError::TooManyConditions));
        assert_eq!(parse("a=eq.\0"), Err(FilterError::Unacceptable));
        let long = parse(&format!("a=eq.{}", "x".repeat(MAX_LENGTH))).unwrap_err().to_string();
        let told = "filter is too long or contains a null character. Maximum 131072 bytes";
        assert_eq!(long, told);
    }

    #[test]
    fn a_tree_keeps_its_form_and_order_when_its_conditions_are_changed() {
        let tree =
            and([one("a", "eq", &["1"]), not(or([one("b", "lt", &["2"]), one("c", "is", &["null"])]))]);
        let columns =
            |tree: &Filter| tree.conditions().iter().map(|one| one.column.clone()).collect::<Vec<_>>();
        assert_eq!(columns(&tree), ["a", "b", "c"]);
        let mut numbers = 0..;
        let numbered = tree.map(&mut |_| numbers.next().unwrap());
        let expected =
            Tree::And(vec![Tree::One(0), Tree::Not(Box::new(Tree::Or(vec![Tree::One(1), Tree::One(2)])))]);
        assert_eq!(numbered, expected);
        assert!(parse(" ").unwrap().is_empty() && !tree.is_empty());
    }
}
