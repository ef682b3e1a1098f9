//! Parsing of a subscription's filter: conditions joined by commas, all of which must hold.

use std::fmt;

/// The protocol's limit for the list of `in`.
const MAX_ITEMS: usize = 100;
/// Maximum number of conditions. Each costs a query at the join.
const MAX_CONDITIONS: usize = 100;
/// Maximum length of a filter in bytes. A hundred quoted values of several hundred characters fit.
const MAX_LENGTH: usize = 64 * 1024;
/// The form of a filter, for error messages.
pub const FORM: &str = "A filter is column=op.value, such as id=gt.7";
/// Maximum number of characters of an invalid condition that an error repeats.
const MAX_ECHO: usize = 200;

/// One comparison of a column.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Condition {
    /// The column as the client wrote it. It may not exist.
    pub column: String,
    /// Whether `not.` stood before the operator.
    pub negated: bool,
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

/// Why a text is not a filter. The message is for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// No column, no operator or an unknown one. Holds the parts found.
    #[error("Error parsing `filter` params: [{}]. {form}", quoted(.0), form = FORM)]
    Unparsable(Vec<String>),
    /// The list of `in` has no parentheses.
    #[error("Error parsing `filter` params: `in` filter value must be wrapped by parentheses")]
    MissingParentheses,
    /// Nothing between two commas.
    #[error("Error parsing `filter` params: filter must not contain empty segments (check for extra commas)")]
    EmptySegment,
    /// An item of an `in` list is empty without quotes, or its quotes are unbalanced.
    #[error("Error parsing `filter` params: malformed list in `in` filter")]
    MalformedList,
    /// More than 100 items in an `in` list.
    #[error("Error parsing `filter` params: too many values for `in` filter. Maximum 100")]
    TooManyItems,
    /// `is` with another value than null, true, false or unknown.
    #[error("Error parsing `filter` params: `is` filter value must be null, true, false or unknown")]
    UnknownState,
    /// Too many conditions.
    #[error("Error parsing `filter` params: too many conditions. Maximum 100")]
    TooManyConditions,
    /// Too long, or with a null character, which PostgreSQL text cannot contain.
    #[error("Error parsing `filter` params: filter is too long or contains a null character")]
    Unacceptable,
}

impl Operator {
    /// Returns the operator with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "eq" => Self::Eq,
            "neq" => Self::Neq,
            "lt" => Self::Lt,
            "lte" => Self::Lte,
            "gt" => Self::Gt,
            "gte" => Self::Gte,
            "in" => Self::In,
            "like" => Self::Like,
            "ilike" => Self::Ilike,
            "is" => Self::Is,
            "match" => Self::Match,
            "imatch" => Self::Imatch,
            "isdistinct" => Self::IsDistinct,
            _ => return None,
        })
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

/// Parses a filter. An empty or blank one has no conditions.
pub fn parse(filter: &str) -> Result<Vec<Condition>, FilterError> {
    if filter.len() > MAX_LENGTH || filter.contains('\0') {
        return Err(FilterError::Unacceptable);
    }
    let filter = filter.trim();
    if filter.is_empty() {
        return Ok(Vec::new());
    }
    let segments = split(filter, Parentheses::Nest);
    if segments.len() > MAX_CONDITIONS {
        return Err(FilterError::TooManyConditions);
    }
    segments.into_iter().map(condition).collect()
}

fn condition(segment: &str) -> Result<Condition, FilterError> {
    let segment = segment.trim();
    if segment.is_empty() {
        return Err(FilterError::EmptySegment);
    }
    let (column, rest) = segment.split_once('=').ok_or_else(|| unparsable(&[segment]))?;
    let (negated, comparison) = match rest.strip_prefix("not.") {
        Some(comparison) => (true, comparison),
        None => (false, rest),
    };
    let (name, value) = comparison.split_once('.').ok_or_else(|| unparsable(&[comparison]))?;
    let operator = Operator::from_name(name).ok_or_else(|| unparsable(&[name, value]))?;
    let values = match operator {
        Operator::In => items(value)?,
        Operator::Is => vec![state(value)?],
        _ => vec![unquoted(value).unwrap_or_else(|| value.to_owned())],
    };
    Ok(Condition { column: column.to_owned(), negated, operator, values })
}

fn items(list: &str) -> Result<Vec<String>, FilterError> {
    let inside = list.strip_prefix('(').and_then(|list| list.strip_suffix(')'));
    let inside = inside.ok_or(FilterError::MissingParentheses)?;
    // Client libraries write `()` for an empty list, which no value is in.
    if inside.trim().is_empty() {
        return Ok(Vec::new());
    }
    let items = split(inside, Parentheses::Plain);
    if items.len() > MAX_ITEMS {
        return Err(FilterError::TooManyItems);
    }
    items.into_iter().map(item).collect()
}

fn item(text: &str) -> Result<String, FilterError> {
    let text = text.trim();
    match unquoted(text) {
        Some(value) => Ok(value),
        None if text.is_empty() || text.starts_with('"') => Err(FilterError::MalformedList),
        None => Ok(text.to_owned()),
    }
}

fn state(value: &str) -> Result<String, FilterError> {
    let word = unquoted(value).unwrap_or_else(|| value.to_owned()).to_ascii_lowercase();
    match word.as_str() {
        "null" | "true" | "false" | "unknown" => Ok(word),
        _ => Err(FilterError::UnknownState),
    }
}

/// Returns the text between quotes, unescaped. `None` if the text is not quoted from end to end.
fn unquoted(text: &str) -> Option<String> {
    let mut value = String::with_capacity(text.len());
    let mut rest = text.strip_prefix('"')?.chars();
    loop {
        match rest.next()? {
            '"' => return rest.as_str().is_empty().then_some(value),
            '\\' => value.push(rest.next()?),
            other => value.push(other),
        }
    }
}

/// Whether commas inside parentheses split.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parentheses {
    Nest,
    Plain,
}

/// Splits at commas that are neither quoted nor in parentheses. A quote opens a quoted text only where a value can begin.
/// Elsewhere it is an ordinary character, as in `height=eq.6'2"`.
fn split(text: &str, parentheses: Parentheses) -> Vec<&str> {
    let mut pieces = Vec::new();
    let (mut start, mut depth, mut quoted) = (0, 0_usize, false);
    // The first item of a list begins after its parenthesis, which was removed.
    let mut before = if parentheses == Parentheses::Plain { '(' } else { ' ' };
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' if quoted => {
                characters.next();
            }
            '"' if quoted => quoted = false,
            _ if quoted => {}
            '"' => quoted = matches!(before, '.' | '(' | ','),
            '(' if parentheses == Parentheses::Nest => depth += 1,
            ')' if parentheses == Parentheses::Nest => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                pieces.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
        // Skip blanks before an item of a list.
        let in_list = depth > 0 || parentheses == Parentheses::Plain;
        if !in_list || !character.is_whitespace() {
            before = character;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

fn unparsable(parts: &[&str]) -> FilterError {
    FilterError::Unparsable(parts.iter().map(|part| part.chars().take(MAX_ECHO).collect()).collect())
}

fn quoted(parts: &[String]) -> impl fmt::Display {
    parts.iter().map(|part| format!("{part:?}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Expects conditions as column, operator with its `not.`, and values.
    fn check(filter: &str, expected: &[(&str, &str, &[&str])]) {
        let found = parse(filter).unwrap();
        let found: Vec<_> = found.iter().map(|condition| (&*condition.column, name(condition))).collect();
        let values: Vec<_> = parse(filter).unwrap().into_iter().map(|condition| condition.values).collect();
        assert_eq!(found.len(), expected.len(), "{filter}");
        for (n, (column, operator, items)) in expected.iter().enumerate() {
            assert_eq!((found[n].0, &*found[n].1), (*column, *operator), "{filter}");
            assert_eq!(values[n], *items, "{filter}");
        }
    }

    fn name(condition: &Condition) -> String {
        format!("{}{}", if condition.negated { "not." } else { "" }, condition.operator.name())
    }

    fn check_error(filter: &str, text: &str) {
        let found = parse(filter).unwrap_err().to_string();
        assert_eq!(found, format!("Error parsing `filter` params: {text}"), "{filter}");
    }

    #[test]
    fn an_empty_filter_has_no_conditions() {
        check("", &[]);
        check(" \t\n", &[]);
    }

    #[test]
    fn conditions_are_joined_by_commas() {
        check("id=eq.7", &[("id", "eq", &["7"])]);
        check("n=gt.3,v=eq.b", &[("n", "gt", &["3"]), ("v", "eq", &["b"])]);
        check(" id=gte.1 , id=not.lt.9 ", &[("id", "gte", &["1"]), ("id", "not.lt", &["9"])]);
        check("a b=eq.x=y.z", &[("a b", "eq", &["x=y.z"])]);
        check("v=eq.", &[("v", "eq", &[""])]);
        check("v=eq.not.5", &[("v", "eq", &["not.5"])]);
    }

    #[test]
    fn each_operator_has_its_name() {
        let operators = "eq neq lt lte gt gte like ilike match imatch isdistinct";
        for operator in operators.split(' ') {
            check(&format!("c=not.{operator}.x"), &[("c", &format!("not.{operator}"), &["x"])]);
        }
        assert_eq!(Operator::from_name("EQ"), None);
    }

    #[test]
    fn quotes_and_parentheses_keep_commas() {
        check(r#"v=eq."a,b",n=eq.1"#, &[("v", "eq", &["a,b"]), ("n", "eq", &["1"])]);
        check(r#"v=eq."say \"hi\", \\ (x""#, &[("v", "eq", &[r#"say "hi", \ (x"#])]);
        check("v=eq.f(a,b),n=eq.1", &[("v", "eq", &["f(a,b)"]), ("n", "eq", &["1"])]);
        check("v=like.a),n=eq.1", &[("v", "like", &["a)"]), ("n", "eq", &["1"])]);
        check("v=eq.\"\"", &[("v", "eq", &[""])]);
    }

    #[test]
    fn quotes_elsewhere_are_ordinary_characters() {
        check(r#"v=eq.6'2",n=eq.1"#, &[("v", "eq", &[r#"6'2""#]), ("n", "eq", &["1"])]);
        check(r#"v=eq."open,n=eq.1"#, &[("v", "eq", &[r#""open,n=eq.1"#])]);
        check(r#"v=eq."a"b"#, &[("v", "eq", &[r#""a"b"#])]);
        check(r#"v=eq.a\,n=eq.1"#, &[("v", "eq", &[r"a\"]), ("n", "eq", &["1"])]);
    }

    #[test]
    fn lists_are_in_parentheses() {
        check("id=in.(1,2, 3)", &[("id", "in", &["1", "2", "3"])]);
        check("id=not.in.(5)", &[("id", "not.in", &["5"])]);
        check(
            r#"v=in.("a,b", "c)","",d e),n=eq.1"#,
            &[("v", "in", &["a,b", "c)", "", "d e"]), ("n", "eq", &["1"])],
        );
        check(r#"v=in.("q\"\\",p(x))"#, &[("v", "in", &[r#"q"\"#, "p(x)"])]);
        check("id=in.()", &[("id", "in", &[])]);
        let hundred = vec!["1"; 100];
        check(&format!("id=in.({})", hundred.join(",")), &[("id", "in", &hundred)]);
        check_error(
            &format!("id=in.({},1)", hundred.join(",")),
            "too many values for `in` filter. Maximum 100",
        );
        check_error("id=in.1,2", "`in` filter value must be wrapped by parentheses");
        check_error("id=in.(", "`in` filter value must be wrapped by parentheses");
        check_error("id=in.(1,,2)", "malformed list in `in` filter");
        check_error("id=in.(1,)", "malformed list in `in` filter");
        check_error(r#"id=in.("a"b)"#, "malformed list in `in` filter");
        check_error(r#"id=in.("a)"#, "malformed list in `in` filter");
    }

    #[test]
    fn is_takes_one_of_four_states() {
        check("v=is.null", &[("v", "is", &["null"])]);
        check("v=not.is.TRUE,w=is.unknown", &[("v", "not.is", &["true"]), ("w", "is", &["unknown"])]);
        check_error("v=is.5", "`is` filter value must be null, true, false or unknown");
    }

    #[test]
    fn an_invalid_condition_is_repeated_in_parts() {
        let check_parts = |filter: &str, parts: &str| check_error(filter, &format!("{parts}. {FORM}"));
        check_parts("wrong", r#"["wrong"]"#);
        check_parts("id=foo.1", r#"["foo", "1"]"#);
        check_parts("v=fts.x", r#"["fts", "x"]"#);
        check_parts("and=(id.gt.1)", r#"["(id", "gt.1)"]"#);
        check_parts("id=eq", r#"["eq"]"#);
        check_parts("id=not.eq", r#"["eq"]"#);
        check_parts("v=a\"b.\u{1b}\\", r#"["a\"b", "\u{1b}\\"]"#);
        check_parts(&"x".repeat(1000), &format!("[\"{}\"]", "x".repeat(200)));
        for filter in ["a=eq.1,,b=eq.2", ",", "a=eq.1,", " ,a=eq.1"] {
            check_error(filter, "filter must not contain empty segments (check for extra commas)");
        }
    }

    #[test]
    fn size_is_limited() {
        check_error(&["a=eq.1"; 101].join(","), "too many conditions. Maximum 100");
        let unacceptable = "filter is too long or contains a null character";
        check_error(&format!("a=eq.{}", "x".repeat(MAX_LENGTH)), unacceptable);
        check_error("a=eq.\0", unacceptable);
    }

    /// Valid and nearly valid filters.
    fn nearly_valid_filter() -> impl Strategy<Value = String> {
        let column = prop_oneof![8 => "[a-z ]{1,3}", 1 => "[a-z.(\",)]{0,3}"];
        let not = prop_oneof![Just(""), Just("not."), Just("not")];
        let names = "eq neq lt lte gt gte in like ilike is match imatch isdistinct fts";
        let operator = proptest::sample::select(names.split(' ').collect::<Vec<_>>());
        let item =
            || prop_oneof!["[a-z0-9 ]{0,4}", "\"([a-z, ()]|\\\\[\"\\\\a]){0,5}\"", "[a(\",.\\\\ )]{0,4}"];
        let list = proptest::collection::vec(item(), 0..4).prop_map(|items| format!("({})", items.join(",")));
        let state = proptest::sample::select(vec!["null", "TRUE", "\"false\"", "unknown", "5"]);
        let value = prop_oneof![item(), list, state.prop_map(str::to_owned)];
        let condition = (column, not, operator, value)
            .prop_map(|(a, not, operator, value)| format!("{a}={not}{operator}.{value}"));
        proptest::collection::vec(condition, 0..4).prop_map(|conditions| conditions.join(","))
    }

    fn written(condition: &Condition) -> String {
        let values = condition.values.iter().map(|value| quote(value)).collect::<Vec<_>>().join(",");
        let values = if condition.operator == Operator::In { format!("({values})") } else { values };
        format!("{}={}.{values}", condition.column, name(condition))
    }

    fn quote(value: &str) -> String {
        format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
    }

    proptest! {
        #[test]
        fn no_text_panics(filter in "\\PC*", near in "[ab=.,()\"\\\\ innotei]{0,40}") {
            let _ = parse(&filter);
            let _ = parse(&near);
        }

        #[test]
        fn a_parsed_filter_is_the_same_when_written_and_parsed_again(filter in nearly_valid_filter()) {
            let found = match parse(&filter) {
                Ok(found) => found,
                Err(refused) => {
                    prop_assert!(refused.to_string().len() < 1000);
                    return Ok(());
                }
            };
            for condition in &found {
                prop_assert_eq!(Operator::from_name(condition.operator.name()), Some(condition.operator));
                prop_assert!(condition.operator == Operator::In || condition.values.len() == 1);
            }
            // A column with characters of the grammar cannot be quoted, so it cannot be written again.
            let plain = |condition: &&Condition| !condition.column.contains(['"', '(', ')', ',']);
            let plain: Vec<Condition> = found.iter().filter(plain).cloned().collect();
            let again = plain.iter().map(written).collect::<Vec<_>>().join(",");
            prop_assert_eq!(parse(&again), Ok(plain));
        }

        #[test]
        fn quoted_values_come_back(values in proptest::collection::vec("[^\0]{0,10}", 1..5), negated: bool) {
            let not = if negated { "not." } else { "" };
            let quoted: Vec<_> = values.iter().map(|value| quote(value)).collect();
            let list = Condition { column: "a".into(), negated, operator: Operator::In, values: values.clone() };
            let mut expected = vec![list];
            let mut filter = format!("a={not}in.({})", quoted.join(", "));
            for (value, quoted) in values.iter().zip(&quoted) {
                filter.push_str(&format!(",b={not}neq.{quoted}"));
                let values = vec![value.clone()];
                expected.push(Condition { column: "b".into(), negated, operator: Operator::Neq, values });
            }
            prop_assert_eq!(parse(&filter), Ok(expected));
        }
    }
}
