//! Parsing of a filter: terms joined by commas, all of which must hold. A term is `column=op.value` or a group.

use super::group::{Groups, is_state};
use super::{Condition, Filter, FilterError, MAX_ITEMS, MAX_LENGTH, Operator};

/// Maximum number of characters of an invalid condition that an error repeats.
const MAX_ECHO: usize = 200;

/// Parses a filter. An empty or blank one has no conditions.
///
/// # Errors
/// What is wrong, in the protocol's words where it has some; in a group, with the place.
pub fn parse(filter: &str) -> Result<Filter, FilterError> {
    if filter.len() > MAX_LENGTH || filter.contains('\0') {
        return Err(FilterError::Unacceptable);
    }
    let filter = filter.trim();
    let mut terms = Vec::new();
    if filter.is_empty() {
        return Ok(Filter::And(terms));
    }
    let mut groups = Groups::new(filter);
    loop {
        groups.skip_blanks();
        let group = groups.term()?;
        terms.push(match group {
            Some(group) => group,
            None => {
                groups.count()?;
                let term = first_piece(groups.rest(), Parentheses::Nest);
                groups.skip(term.len());
                condition(term)?
            }
        });
        if groups.rest().is_empty() {
            return Ok(Filter::And(terms));
        }
        groups.skip(1);
    }
}

fn condition(term: &str) -> Result<Filter, FilterError> {
    let term = term.trim();
    if term.is_empty() {
        return Err(FilterError::EmptySegment);
    }
    let in_quotes =
        unquoted_start(term).and_then(|(column, length)| Some((column, term[length..].strip_prefix('=')?)));
    let as_written = || term.split_once('=').map(|(column, rest)| (column.to_owned(), rest));
    let (column, rest) = in_quotes.or_else(as_written).ok_or_else(|| unparsable(&[term]))?;
    let (is_negated, comparison) = match rest.strip_prefix("not.") {
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
    Ok(Filter::One(Condition { column, operator, values }).not_if(is_negated))
}

fn items(list: &str) -> Result<Vec<String>, FilterError> {
    let inside = list.strip_prefix('(').and_then(|list| list.strip_suffix(')'));
    let inside = inside.ok_or(FilterError::MissingParentheses)?;
    let mut items = Vec::new();
    // Client libraries write `()` for an empty list, which no value is in.
    if inside.trim().is_empty() {
        return Ok(items);
    }
    let mut rest = Some(inside);
    while let Some(text) = rest {
        if items.len() == MAX_ITEMS {
            return Err(FilterError::TooManyItems);
        }
        let piece = first_piece(text, Parentheses::Plain);
        rest = text[piece.len()..].strip_prefix(',');
        items.push(item(piece)?);
    }
    Ok(items)
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
    if is_state(&word) { Ok(word) } else { Err(FilterError::UnknownState) }
}

/// Returns the text between quotes, unescaped. `None` if the text is not quoted from end to end.
fn unquoted(text: &str) -> Option<String> {
    unquoted_start(text).filter(|(_, length)| *length == text.len()).map(|(value, _)| value)
}

/// Returns the quoted text at the start, unescaped, and its length with the quotes. `None` if there is no closing quote.
pub(super) fn unquoted_start(text: &str) -> Option<(String, usize)> {
    let mut value = String::new();
    let mut rest = text.strip_prefix('"')?.chars();
    loop {
        match rest.next()? {
            '"' => return Some((value, text.len() - rest.as_str().len())),
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

/// Returns the text up to the first comma that is neither quoted nor in parentheses. A quote opens a quoted text only where a
/// column or value can begin. Elsewhere it is an ordinary character, as in `height=eq.6'2"`.
fn first_piece(text: &str, parentheses: Parentheses) -> &str {
    let (mut depth, mut quoted) = (0_usize, false);
    let mut before = ',';
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
            ',' if depth == 0 => return &text[..at],
            _ => {}
        }
        // Skip blanks before an item of a list.
        let in_list = depth > 0 || parentheses == Parentheses::Plain;
        if !in_list || !character.is_whitespace() {
            before = character;
        }
    }
    text
}

fn unparsable(parts: &[&str]) -> FilterError {
    FilterError::Unparsable(parts.iter().map(|part| part.chars().take(MAX_ECHO).collect()).collect())
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::*;
    use crate::model::subscription::filter::FORM;
    use crate::model::subscription::filter::tests::{not, one, quote, written};

    /// Expects conditions as column, operator with its `not.`, and values.
    #[track_caller]
    fn check(filter: &str, expected: &[(&str, &str, &[&str])]) {
        let term = |(column, operator, values): &(&str, &str, &[&str])| match operator.strip_prefix("not.") {
            Some(operator) => not(one(column, operator, values)),
            None => one(column, operator, values),
        };
        assert_eq!(parse(filter), Ok(Filter::And(expected.iter().map(term).collect())), "{filter}");
    }

    fn check_error(filter: &str, text: &str) {
        let found = parse(filter).unwrap_err().to_string();
        assert_eq!(found, text, "{filter}");
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
        check(r#""a,b=c"=eq.1,"q\""=eq.2"#, &[("a,b=c", "eq", &["1"]), ("q\"", "eq", &["2"])]);
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
        let many = vec!["1"; MAX_ITEMS];
        check(&format!("id=in.({})", many.join(",")), &[("id", "in", &many)]);
        check_error(
            &format!("id=in.({},1)", many.join(",")),
            "too many values for `in` filter. Maximum 5000",
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
        check_parts("id=eq", r#"["eq"]"#);
        check_parts("id=not.eq", r#"["eq"]"#);
        check_parts("v=a\"b.\u{1b}\\", r#"["a\"b", "\u{1b}\\"]"#);
        check_parts(&"x".repeat(1000), &format!("[\"{}\"]", "x".repeat(200)));
        for filter in ["a=eq.1,,b=eq.2", ",", "a=eq.1,", " ,a=eq.1"] {
            check_error(filter, "filter must not contain empty segments (check for extra commas)");
        }
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
        let group = (
            "(not.)?(and|or)=?",
            proptest::collection::vec("[a-b]\\.(not\\.)?(eq|in|is|no)\\.[a(\",.\\\\ )]{0,4}", 0..4),
        )
            .prop_map(|(start, members)| format!("{start}({})", members.join(",")));
        let term = prop_oneof![3 => condition, 1 => group];
        proptest::collection::vec(term, 0..4).prop_map(|terms| terms.join(","))
    }

    proptest! {
        #[test]
        fn no_text_panics(filter in "\\PC*", near in "((or|and|not|in|is|eq|[ab=.,()\"\\\\ ])){0,40}") {
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
            for condition in found.conditions() {
                prop_assert_eq!(Operator::from_name(condition.operator.name()), Some(condition.operator));
                prop_assert!(condition.operator == Operator::In || condition.values.len() == 1);
            }
            let text = written(&found);
            prop_assert_eq!(parse(&text), Ok(found), "{}", text);
        }

        #[test]
        fn quoted_values_come_back(values in proptest::collection::vec("[^\0]{0,10}", 1..5), negated: bool) {
            let not = if negated { "not." } else { "" };
            let quoted: Vec<_> = values.iter().map(|value| quote(value)).collect();
            let condition = |column: &str, operator, values| {
                Filter::One(Condition { column: column.to_owned(), operator, values }).not_if(negated)
            };
            let mut expected = vec![condition("a", Operator::In, values.clone())];
            let mut filter = format!("a={not}in.({})", quoted.join(", "));
            for (value, quoted) in values.iter().zip(&quoted) {
                filter.push_str(&format!(",b={not}neq.{quoted}"));
                expected.push(condition("b", Operator::Neq, vec![value.clone()]));
            }
            prop_assert_eq!(parse(&filter), Ok(Filter::And(expected)));
        }
    }
}
