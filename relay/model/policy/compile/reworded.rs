//! Spellings of PostgreSQL that the parser does not read, as others of the same meaning.

use sqlparser::tokenizer::Token;

/// Functions whose last arguments may be written as `VARIADIC ARRAY[…]`, with the same meaning as one by one.
const VARIADIC_FUNCTIONS: &[&str] =
    &["json_extract_path", "json_extract_path_text", "jsonb_extract_path", "jsonb_extract_path_text"];

/// Rewrites `TRIM(BOTH FROM x)` to `btrim(x)`, and `f(x, VARIADIC ARRAY[a, b])` to `f(x, a, b)`.
pub(super) fn reworded(tokens: Vec<Token>) -> Vec<Token> {
    let mut tokens: Vec<Token> =
        tokens.into_iter().filter(|token| !matches!(token, Token::Whitespace(_))).collect();
    let mut at = 0;
    while at < tokens.len() {
        let is_trim = matches!(&tokens[at..], [trim, Token::LParen, side, from, ..]
            if is_word(trim, "trim") && side_of(side).is_some() && is_word(from, "from"));
        if is_trim && let Some(name) = side_of(&tokens[at + 2]) {
            tokens[at] = Token::make_word(name, None);
            tokens.drain(at + 2..at + 4);
        }
        at += 1;
    }
    at = 0;
    while at < tokens.len() {
        let is_list = matches!(&tokens[at..], [variadic, array, Token::LBracket, ..]
            if is_word(variadic, "variadic") && is_word(array, "array"));
        if is_list
            && let Some(end) = closing(&tokens, at + 2)
            && tokens.get(end + 1) == Some(&Token::RParen)
            && end > at + 3
            && called(&tokens, at)
                .is_some_and(|name| VARIADIC_FUNCTIONS.iter().any(|known| is_word(name, known)))
        {
            tokens.remove(end);
            tokens.drain(at..at + 3);
        }
        at += 1;
    }
    tokens
}

fn is_word(token: &Token, text: &str) -> bool {
    matches!(token, Token::Word(word) if word.quote_style.is_none() && word.value.eq_ignore_ascii_case(text))
}

fn side_of(token: &Token) -> Option<&'static str> {
    let sides = [("both", "btrim"), ("leading", "ltrim"), ("trailing", "rtrim")];
    sides.into_iter().find(|(side, _)| is_word(token, side)).map(|(_, name)| name)
}

/// Returns the index of the bracket that closes the one at this index.
fn closing(tokens: &[Token], open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token {
            Token::LBracket => depth += 1,
            Token::RBracket if depth == 1 => return Some(at),
            Token::RBracket => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Returns the name of the function among whose arguments the token at this index is.
fn called(tokens: &[Token], at: usize) -> Option<&Token> {
    let mut depth = 0_usize;
    for open in (0..at).rev() {
        match tokens[open] {
            Token::RParen => depth += 1,
            Token::LParen if depth == 0 => return tokens.get(open.checked_sub(1)?),
            Token::LParen => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use sqlparser::dialect::PostgreSqlDialect;
    use sqlparser::tokenizer::Tokenizer;

    use super::*;

    #[test]
    fn only_the_spelling_changes() {
        for (sql, expected) in [
            ("TRIM(BOTH FROM a) = trim( leading from b )", "btrim(a)=ltrim(b)"),
            ("TRIM(BOTH 'x' FROM a)", "TRIM(BOTH'x'FROM a)"),
            ("\"trim\"(BOTH FROM a)", "\"trim\"(BOTH FROM a)"),
            ("jsonb_extract_path_text(d, VARIADIC ARRAY['a', e[1]])", "jsonb_extract_path_text(d,'a',e[1])"),
            (
                "jsonb_extract_path(f(d), VARIADIC ARRAY[]::text[])",
                "jsonb_extract_path(f(d),VARIADIC ARRAY[]::text[])",
            ),
            ("own(d, VARIADIC ARRAY['a'])", "own(d,VARIADIC ARRAY['a'])"),
            ("TRIM(BOTH FROM", "btrim("),
            ("jsonb_extract_path(d, VARIADIC ARRAY['a'", "jsonb_extract_path(d,VARIADIC ARRAY['a'"),
        ] {
            let tokens = |sql: &str| {
                let tokens = Tokenizer::new(&PostgreSqlDialect {}, sql).tokenize().unwrap();
                tokens.into_iter().filter(|token| !matches!(token, Token::Whitespace(_))).collect::<Vec<_>>()
            };
            assert_eq!(reworded(tokens(sql)), tokens(expected), "{sql}");
        }
    }
}
