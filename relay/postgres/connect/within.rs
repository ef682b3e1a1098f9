//! Time limits on answers of PostgreSQL: a connection whose peer is gone may look open for ever.

use std::future::Future;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::timeout;

use crate::postgres::connect::error::Error;

/// Awaits an answer for at most `limit`. `what` is the subject of the error: "the connection to the changelog".
///
/// For answers that are needed. A wait that may as well end without one uses [`timeout`] itself.
///
/// # Errors
/// The answer's own, or [`Error::Late`].
pub fn within<T, E>(
    limit: Duration,
    what: &'static str,
    answer: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, Error>>
where
    Error: From<E>,
{
    // Not an async function, which would hold the answer's future twice.
    timeout(limit, answer).map(move |outcome| match outcome {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::Late { what, limit }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_took_too_long_is_named_with_the_limit() {
        let never = std::future::pending::<Result<(), Error>>();
        let late = within(Duration::from_millis(2), "the connection", never).await.unwrap_err();
        assert_eq!(late.to_string(), "the connection did not answer within 2ms");
        assert!(late.is_transient() && late.code().is_none());
    }
}
