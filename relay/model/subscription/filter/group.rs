//! Groups of conditions as PostgREST writes them: `or=(a.eq.1,and(b.gt.2,not.or(c.is.null,d.in.(x,"y,z"))))`.

use super::grammar::unquoted_start;
use super::{Condition, Filter, FilterError, MAX_CONDITIONS, MAX_DEPTH, MAX_ITEMS, Operator, Place};

/// Maximum number of characters that an error repeats.
const MAX_ECHO: usize = 40;
/// How a value is written that has characters of the grammar, for error messages.
const QUOTING: &str = "a value with commas, parentheses or blanks at its ends stands in double quotes, with \\\" and \\\\ in it";

/// Reads the groups of a filter.
pub(super) struct Groups<'t> {
    /// The whole filter.
    text: &'t str,
    /// Where the rest begins, in bytes.
    at: usize,
    /// The number of conditions so far.
    conditions: usize,
}

/// The start of a group, up to its parenthesis.
struct GroupStart {
    is_negated: bool,
    is_any: bool,
    /// Where it is, in bytes.
    at: usize,
}

impl<'t> Groups<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, at: 0, conditions: 0 }
    }

    /// Returns what is left to read.
    pub(super) fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    /// Skips so many bytes.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.at += bytes;
    }

    pub(super) fn skip_blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    /// Counts a condition.
    pub(super) fn count(&mut self) -> Result<(), FilterError> {
        self.conditions += 1;
        if self.conditions > MAX_CONDITIONS { Err(FilterError::TooManyConditions) } else { Ok(()) }
    }

    /// Reads a term that is a group, such as `or=(…)`, up to the comma or the end; `None` if the next term is none.
    pub(super) fn term(&mut self) -> Result<Option<Filter>, FilterError> {
        let Some(start) = self.start("=") else { return Ok(None) };
        let group = self.group(&start, 1)?;
        self.skip_blanks();
        match self.rest().chars().next() {
            None | Some(',') => Ok(Some(group)),
            Some(_) => {
                Err(self.expected(&format!("a comma or the end is expected after a group; {QUOTING}")))
            }
        }
    }

    /// Takes the start of a group: `and` or `or`, perhaps with `not.` before it, then `between` and a parenthesis.
    fn start(&mut self, between: &str) -> Option<GroupStart> {
        let (rest, at) = (self.rest(), self.at);
        let (is_negated, name) = rest.strip_prefix("not.").map_or((false, rest), |name| (true, name));
        let (is_any, rest) = match name.strip_prefix("or") {
            Some(rest) => (true, rest),
            None => (false, name.strip_prefix("and")?),
        };
        let inside = rest.strip_prefix(between)?.trim_start().strip_prefix('(')?;
        self.at = self.text.len() - inside.len();
        Some(GroupStart { is_negated, is_any, at })
    }

    /// Reads the conditions of a group and its closing parenthesis.
    fn group(&mut self, start: &GroupStart, depth: usize) -> Result<Filter, FilterError> {
        if depth > MAX_DEPTH {
            return Err(
                self.expected_at(start.at, &format!("groups are nested too deep. Maximum {MAX_DEPTH}"))
            );
        }
        let mut members = Vec::new();
        loop {
            self.skip_blanks();
            members.push(match self.start("") {
                Some(inner) => self.group(&inner, depth + 1)?,
                None => self.condition()?,
            });
            self.skip_blanks();
            let next = self.rest().chars().next();
            match next {
                Some(',') => self.skip(1),
                Some(')') => break,
                Some(_) => return Err(self.expected(&format!("a comma or ) is expected; {QUOTING}"))),
                None => return Err(self.expected_at(start.at, "this group has no closing parenthesis")),
            }
        }
        self.skip(1);
        let group = if start.is_any { Filter::Or(members) } else { Filter::And(members) };
        Ok(group.not_if(start.is_negated))
    }

    /// Reads `column.op.value`, perhaps with `not.` before the operator.
    fn condition(&mut self) -> Result<Filter, FilterError> {
        self.count()?;
        let column = self.column()?;
        let is_negated = self.rest().starts_with("not.");
        if is_negated {
            self.skip("not.".len());
        }
        let name = self.rest().split(['.', ',', '(', ')']).next().unwrap_or_default();
        let operator = Operator::from_name(name).filter(|_| self.rest()[name.len()..].starts_with('.'));
        let Some(operator) = operator else {
            let names = Operator::names();
            return Err(self.expected(&format!(
                "an operator and a dot are expected, such as eq. or not.eq. (op is one of {names})"
            )));
        };
        self.skip(name.len() + 1);
        let values = match operator {
            Operator::In => self.list()?,
            Operator::Is => vec![self.state()?],
            _ => vec![self.value()?],
        };
        Ok(Filter::One(Condition { column, operator, values }).not_if(is_negated))
    }

    /// Reads a column and the dot behind it.
    fn column(&mut self) -> Result<String, FilterError> {
        const FORM: &str = "column.op.value is expected here, such as id.gt.7, or a group such as and(…); a column with a dot, \
                            comma, parenthesis or = in it stands in double quotes";
        let rest = self.rest();
        let (column, length) = match rest.starts_with('"') {
            true => self.quoted()?,
            false => {
                let length = rest.find(['.', ',', '(', ')', '"', '=']).unwrap_or(rest.len());
                (rest[..length].to_owned(), length)
            }
        };
        if length == 0 || !rest[length..].starts_with('.') {
            self.skip(length);
            return Err(self.expected(FORM));
        }
        self.skip(length + 1);
        Ok(column)
    }

    /// Reads a value up to a comma or a parenthesis: in quotes, an array in braces, or as it is.
    fn value(&mut self) -> Result<String, FilterError> {
        let rest = self.rest();
        let (value, length) = match rest.starts_with('"') {
            true => self.quoted()?,
            false => {
                let plain = rest.find([',', '(', ')']).unwrap_or(rest.len());
                let length = array_length(rest).unwrap_or(plain);
                (rest[..length].trim_end().to_owned(), length)
            }
        };
        self.skip(length);
        Ok(value)
    }

    fn state(&mut self) -> Result<String, FilterError> {
        let at = self.at;
        let word = self.value()?.to_ascii_lowercase();
        match is_state(&word) {
            true => Ok(word),
            false => Err(self.expected_at(at, "null, true, false or unknown is expected after is.")),
        }
    }

    /// Reads the list of `in`.
    fn list(&mut self) -> Result<Vec<String>, FilterError> {
        if !self.rest().starts_with('(') {
            return Err(self.expected("the list of in. stands in parentheses, such as in.(1,2)"));
        }
        let opening = self.at;
        self.skip(1);
        self.skip_blanks();
        let mut items = Vec::new();
        if self.rest().starts_with(')') {
            self.skip(1);
            return Ok(items);
        }
        loop {
            self.skip_blanks();
            if self.rest().starts_with([',', ')']) {
                return Err(self.expected("a value is expected in the list; an empty text is written \"\""));
            }
            if items.len() == MAX_ITEMS {
                return Err(FilterError::TooManyItems);
            }
            items.push(self.value()?);
            self.skip_blanks();
            let next = self.rest().chars().next();
            match next {
                Some(',') => self.skip(1),
                Some(')') => break,
                Some(_) => {
                    return Err(self.expected(&format!("a comma or ) is expected in the list; {QUOTING}")));
                }
                None => return Err(self.expected_at(opening, "this list has no closing parenthesis")),
            }
        }
        self.skip(1);
        Ok(items)
    }

    /// Returns the quoted text that begins here, and its length with the quotes.
    fn quoted(&self) -> Result<(String, usize), FilterError> {
        unquoted_start(self.rest()).ok_or_else(|| self.expected("this quote is not closed"))
    }

    fn expected(&self, expected: &str) -> FilterError {
        self.expected_at(self.at, expected)
    }

    fn expected_at(&self, at: usize, expected: &str) -> FilterError {
        let (before, rest) = self.text.split_at(at);
        let place =
            Place { character: before.chars().count() + 1, text: rest.chars().take(MAX_ECHO).collect() };
        FilterError::InGroup { place, expected: expected.to_owned() }
    }
}

/// Whether `is` takes this word, which is in lower case.
pub(super) fn is_state(word: &str) -> bool {
    matches!(word, "null" | "true" | "false" | "unknown")
}

/// Returns the length of an array in braces without others inside, such as `{a,b}`, if a value ends behind it.
fn array_length(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('{')?;
    let end = inside.find(['{', '}']).filter(|end| inside[*end..].starts_with('}'))?;
    let length = end + 2;
    text[length..].trim_start().starts_with([',', ')']).then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::subscription::filter::parse;
    use crate::model::subscription::filter::tests::{and, not, one, or};

    #[track_caller]
    fn check(filter: &str, expected: Filter) {
        assert_eq!(parse(filter), Ok(Filter::And(vec![expected])), "{filter}");
    }

    #[track_caller]
    fn check_error(filter: &str, place: &str, expected: &str) {
        let found = parse(filter).unwrap_err().to_string();
        let rest = found.strip_prefix(&format!("at character {place}"));
        assert!(rest.is_some_and(|rest| rest.contains(expected)), "{filter}: {found}");
    }

    #[test]
    fn groups_nest_as_postgrest_writes_them() {
        let (a, b) = (|| one("a", "eq", &["1"]), || one("b", "gt", &["2"]));
        check("or=(a.eq.1,b.gt.2)", or([a(), b()]));
        check("and=(a.eq.1,b.gt.2)", and([a(), b()]));
        check("not.or=(a.eq.1,b.gt.2)", not(or([a(), b()])));
        check("not.and=(a.eq.1)", not(and([a()])));
        check("or=(a.not.eq.1,not.and(b.gt.2,a.eq.1))", or([not(a()), not(and([b(), a()]))]));
        check(
            "or=(and(a.eq.1,or(b.gt.2,not.or(a.eq.1))),b.gt.2)",
            or([and([a(), or([b(), not(or([a()]))])]), b()]),
        );
        check(" or= ( a.eq.1 , and ( b.gt.2 ) ) ", or([a(), and([b()])]));
        let several = parse("a=eq.1,or=(a.eq.1,b.gt.2),b=gt.2,not.and=(b.gt.2)").unwrap();
        assert_eq!(several, and([a(), or([a(), b()]), b(), not(and([b()]))]));
    }

    #[test]
    fn values_in_groups_keep_what_stands_in_quotes_and_braces() {
        check(r#"or=(v.eq."a,b).(",w.eq.x)"#, or([one("v", "eq", &["a,b).("]), one("w", "eq", &["x"])]));
        check(
            r#"or=(v.eq."say \"hi\" \\ ü",w.eq."")"#,
            or([one("v", "eq", &["say \"hi\" \\ ü"]), one("w", "eq", &[""])]),
        );
        check(
            "or=(v.eq.a.b:c=d,w.eq.,x.eq.6'2\")",
            or([one("v", "eq", &["a.b:c=d"]), one("w", "eq", &[""]), one("x", "eq", &["6'2\""])]),
        );
        check("or=(t.eq.{a,b},u.eq.{x)", or([one("t", "eq", &["{a,b}"]), one("u", "eq", &["{x"])]));
        check(
            r#"or=("a.b, (c)".eq.1,"q\"".is.null)"#,
            or([one("a.b, (c)", "eq", &["1"]), one("q\"", "is", &["null"])]),
        );
        check(
            r#"or=(v.in.(1, 2 ,"x,)",""),v.not.in.(),t.in.({a,b},c))"#,
            or([
                one("v", "in", &["1", "2", "x,)", ""]),
                not(one("v", "in", &[])),
                one("t", "in", &["{a,b}", "c"]),
            ]),
        );
        check(
            "or=(v.is.TRUE,not.is.unknown,v.not.is.\"null\")",
            or([one("v", "is", &["true"]), one("not", "is", &["unknown"]), not(one("v", "is", &["null"]))]),
        );
    }

    #[test]
    fn columns_may_have_the_names_of_groups() {
        check("or=eq.1", one("or", "eq", &["1"]));
        check(
            "and=(or.eq.1,and.not.eq.2,order.eq.3)",
            and([one("or", "eq", &["1"]), not(one("and", "eq", &["2"])), one("order", "eq", &["3"])]),
        );
        check(r#""or"=eq.(1"#, one("or", "eq", &["(1"]));
    }

    #[test]
    fn a_mistake_is_told_with_its_place() {
        for (filter, place, expected) in [
            ("or=()", "5, \")\"", "column.op.value is expected"),
            ("or=(a.eq.1,)", "12, \")\"", "column.op.value is expected"),
            ("or=(,a.eq.1)", "5, \",a.eq.1)\"", "column.op.value is expected"),
            ("or=(a.eq.1", "1, \"or=(a.eq.1\"", "no closing parenthesis"),
            ("or=(a.eq.1,and(b.eq.2)", "1, ", "no closing parenthesis"),
            ("or=(a.eq.1,and(b.eq.2", "12, \"and(b.eq.2\"", "no closing parenthesis"),
            ("or=(a=eq.1)", "6, \"=eq.1)\"", "column.op.value is expected"),
            ("or=(a)", "6, \")\"", "column.op.value is expected"),
            ("or=(ü.foo.1)", "7, \"foo.1)\"", "op is one of eq neq"),
            ("or=(a.not.1)", "11, \"1)\"", "op is one of eq neq"),
            ("or=(a.eq)", "7, \"eq)\"", "op is one of eq neq"),
            ("or=(a.cs.{x})", "7, ", "op is one of eq neq"),
            ("or=(a.eq.f(x),b.eq.1)", "11, \"(x),b.eq.1)\"", "stands in double quotes"),
            ("or=(a.eq.1)b.eq.1", "12, \"b.eq.1\"", "a comma or the end is expected"),
            ("or=(a.eq.1))", "12, \")\"", "a comma or the end is expected"),
            (r#"or=(a.eq."x)"#, r#"10, "\"x)""#, "not closed"),
            (r#"or=(a.eq."x"y)"#, "13, \"y)\"", "a comma or ) is expected"),
            (r#"or=("a.eq.1)"#, "5, ", "not closed"),
            ("or=(a.in.1)", "10, \"1)\"", "stands in parentheses"),
            ("or=(a.in.(1,,2))", "13, ", "a value is expected in the list"),
            ("or=(a.in.(1,2)", "1, ", "no closing parenthesis"),
            ("or=(a.in.(1,2", "10, \"(1,2\"", "this list has no closing parenthesis"),
            (r#"or=(a.in.("1"2))"#, "14, \"2))\"", "expected in the list"),
            ("or=(a.is.5)", "10, \"5)\"", "null, true, false or unknown"),
            ("or=(", "5, the end", "column.op.value is expected"),
        ] {
            check_error(filter, place, expected);
        }
    }

    #[test]
    fn nesting_lists_and_conditions_are_bounded() {
        let nested = |depth: usize| format!("or=({}a.eq.1{}", "or(".repeat(depth - 1), ")".repeat(depth));
        assert!(parse(&nested(MAX_DEPTH)).is_ok());
        check_error(&nested(MAX_DEPTH + 1), "62, ", "nested too deep. Maximum 20");
        check_error(&format!("or={}", "(".repeat(100_000)), "5, ", "column.op.value is expected");
        check_error(&format!("or=({}", "not.and(".repeat(15_000)), "157, ", "nested too deep");
        let group = |count: usize| format!("or=({})", vec!["a.eq.1"; count].join(","));
        assert!(parse(&group(MAX_CONDITIONS)).is_ok());
        for many in [group(MAX_CONDITIONS + 1), format!("{},a=eq.1", group(MAX_CONDITIONS))] {
            assert_eq!(parse(&many), Err(FilterError::TooManyConditions));
        }
        let list = |count: usize| format!("or=(a.in.({}))", vec!["1"; count].join(","));
        assert!(parse(&list(MAX_ITEMS)).is_ok());
        assert_eq!(parse(&list(MAX_ITEMS + 1)), Err(FilterError::TooManyItems));
    }
}
