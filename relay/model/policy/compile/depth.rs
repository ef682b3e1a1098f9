//! How deep the tree of an expression may become, told from its tokens before anything is built that deep.

use sqlparser::tokenizer::Token;

/// Of a sane policy in PostgreSQL's own text it stays far below.
///
/// What walks through the tree, and drops it, goes one level deeper for each link of a chain (`a and b and c`,
/// `x::text::text`), which the parser follows in a loop and so does not count itself. So many levels fit on a thread's stack
/// several times.
const MAX_DEPTH: usize = 700;

/// Whether the tree of these tokens may become too deep.
pub(super) fn is_too_deep(tokens: &[Token]) -> bool {
    let mut outer: Vec<Level> = Vec::new();
    let mut level = Level::default();
    for token in tokens {
        match token {
            Token::Whitespace(_) => continue,
            Token::Comma => level.end_item(),
            Token::LParen | Token::LBracket | Token::LBrace => outer.push(std::mem::take(&mut level)),
            Token::RParen | Token::RBracket | Token::RBrace => {
                level.end_item();
                let inner = level.deepest;
                level = outer.pop().unwrap_or_default();
                level.links += 1;
                level.inside = level.inside.max(inner);
            }
            _ => level.links += 1,
        }
        if outer.len() > MAX_DEPTH || level.depth() > MAX_DEPTH {
            return true;
        }
    }
    false
}

/// What stands between two parentheses.
#[derive(Default)]
struct Level {
    /// The tokens since the last comma: each may be a link of a chain.
    links: usize,
    /// The deepest of what is nested since the last comma.
    inside: usize,
    /// The deepest between commas so far.
    deepest: usize,
}

impl Level {
    fn depth(&self) -> usize {
        self.deepest.max(self.links + self.inside)
    }

    fn end_item(&mut self) {
        *self = Self { deepest: self.depth(), ..Self::default() };
    }
}
