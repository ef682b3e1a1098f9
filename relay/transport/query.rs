//! Query parameters of a request, and the token in its headers.

use std::collections::HashSet;

use hyper::header::HeaderMap;

/// Whether the query has this parameter and its value is not valid UTF-8.
pub fn is_unreadable(query: &str, name: &str) -> bool {
    pairs(query).any(|(known, value)| decoded(known) == name.as_bytes() && value.is_some())
        && parameter(query, name).is_none()
}

/// Returns a parameter of the query, percent-decoded; `None` if it is missing, has no value or is not UTF-8.
pub fn parameter(query: &str, name: &str) -> Option<String> {
    let value =
        pairs(query).find_map(|(known, value)| value.filter(|_| decoded(known) == name.as_bytes()))?;
    String::from_utf8(decoded(value)).ok()
}

/// Returns the names of all parameters, percent-decoded.
pub fn names(query: &str) -> impl Iterator<Item = String> {
    pairs(query).map(|(name, _)| String::from_utf8_lossy(&decoded(name)).into_owned())
}

/// Returns the name of a parameter that the query has more than once. Such a query is ambiguous, and one value may allow what
/// another does not.
pub fn repeated(query: &str) -> Option<String> {
    let mut seen = HashSet::new();
    names(query).find(|name| !seen.insert(name.clone()))
}

/// Whether the query names a private channel.
///
/// # Errors
/// If it does not say so clearly.
pub fn is_private_by(query: &str) -> Result<bool, &'static str> {
    match parameter(query, "private").as_deref() {
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        None if !names(query).any(|name| name == "private") => Ok(false),
        _ => Err("private is true or false"),
    }
}

/// Returns names and values, not decoded. A parameter without `=` has no value.
fn pairs(query: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| match pair.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (pair, None),
    })
}

/// Returns a segment of a path, percent-decoded; `None` if it is not UTF-8.
pub fn path_segment(text: &str) -> Option<String> {
    // Unlike in a query, a plus stands for itself.
    String::from_utf8(decoded(&text.replace('+', "%2B"))).ok()
}

fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = (*first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|pair| std::str::from_utf8(pair).ok());
        match hex.and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(if *first == b'+' { b' ' } else { *first });
                rest = after;
            }
        }
    }
    bytes
}

/// Returns the token of an `Authorization: Bearer` header, else the API key of `apikey` or `x-api-key`. An empty one is none.
pub fn bearer(headers: &HeaderMap) -> Option<String> {
    let is_token = |text: &&str| !text.trim().is_empty();
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).filter(is_token);
    let bearer = text("authorization").and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token).filter(is_token)
    });
    bearer.or_else(|| text("apikey")).or_else(|| text("x-api-key")).map(str::to_owned)
}

/// Returns the error for a parameter that a request has more than once.
pub fn repeated_error(name: &str) -> String {
    let name: String = name.chars().take(40).collect();
    format!("{name}: this parameter is there more than once, give it once")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_whole_and_decoded() {
        let query = "xapikey=no&apikey=a%2Eb+c%zz&vsn=2.0.0&flag";
        assert_eq!(parameter(query, "apikey").as_deref(), Some("a.b c%zz"));
        assert_eq!(parameter(query, "vsn").as_deref(), Some("2.0.0"));
        assert_eq!(parameter(query, "flag"), None);
        assert_eq!(parameter("apikey=%ff", "apikey"), None);
        assert_eq!(parameter("%61pikey=a", "apikey").as_deref(), Some("a"));
    }

    #[test]
    fn a_path_segment_is_decoded_and_keeps_its_plus() {
        assert_eq!(path_segment("a%2Fb+c%20%C3%A9").as_deref(), Some("a/b+c é"));
        assert_eq!(path_segment("%ff"), None);
    }

    #[test]
    fn an_empty_authorization_falls_back_on_the_key() {
        for (authorization, expected) in [
            ("Bearer t", "t"),
            ("bearer t", "t"),
            ("", "k"),
            ("Bearer", "k"),
            ("Bearer ", "k"),
            ("Basic x", "k"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", authorization.parse().unwrap());
            headers.insert("apikey", "k".parse().unwrap());
            assert_eq!(bearer(&headers).as_deref(), Some(expected), "{authorization}");
        }
    }

    #[test]
    fn a_repeated_parameter_is_found_in_any_encoding() {
        for query in [
            "filter=a&filter=b",
            "filter=a&x=1&%66ilter=b",
            "filter&filter=b",
            "filter=a&&filter=a",
            "filter=%ff&f%69lter=",
        ] {
            assert_eq!(repeated(query).as_deref(), Some("filter"), "{query}");
        }
        for query in ["", "a=1&b=1", "a=1&A=1", "a=1&a%3D1=2"] {
            assert_eq!(repeated(query), None, "{query}");
        }
    }
}
