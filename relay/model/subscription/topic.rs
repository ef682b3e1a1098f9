//! The topic whose broadcasts from the database a subscription follows.

use std::sync::Arc;

/// A topic. A public and a private one of the same name are different topics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TopicScope {
    /// Its name, as SQL and HTTP have it: without what precedes it on the wire.
    pub name: Arc<str>,
    /// Whether it is private.
    pub is_private: bool,
}
