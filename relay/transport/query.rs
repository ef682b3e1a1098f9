//! The parameters of a request.

/// Whether the query has this parameter and it is no text.
pub fn is_unreadable(query: &str, name: &str) -> bool {
    let is_it = |pair: &str| pair.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
    query.split('&').any(is_it) && parameter(query, name).is_none()
}

/// A parameter of the query, percent-decoded.
pub fn parameter(query: &str, name: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
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
    String::from_utf8(bytes).ok()
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
    }
}
