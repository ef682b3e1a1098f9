//! A bound on the depth of an expression tree, computed from its tokens before the tree is built.

use sqlparser::tokenizer::Token;

/// The maximum depth, far above that of real policies in PostgreSQL's own text.
///
/// Visitors of the tree, and its drop, recurse one level for each link of a chain (`a and b and c`, `x::text::text`). The parser
/// follows chains in a loop and does not count them. A thread's stack has room for several times as many levels.
const MAX_TREE_DEPTH: usize = 700;

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
        if outer.len() > MAX_TREE_DEPTH || level.depth() > MAX_TREE_DEPTH {
            return true;
        }
    }
    false
}

/// The tokens between two parentheses.
#[derive(Default)]
struct Level {
    /// The tokens since the last comma: each may be a link of a chain.
    links: usize,
    /// The maximum depth nested since the last comma.
    inside: usize,
    /// The maximum depth of the items before the last comma.
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
