//! Content negotiation: JSON, or an event stream if the client asks for it.

use hyper::header::{ACCEPT, HeaderMap};

const EVENT_STREAM: &str = "text/event-stream";
const JSON: &str = "application/json";

/// Whether `Accept` names `text/event-stream` with a weight at least that of JSON. Wildcards do not count.
pub fn wants_stream(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT);
    let ranges: Vec<_> = values
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|range| {
            let mut parts = range.split(';').map(str::trim);
            (parts.next().unwrap_or_default(), parts.find_map(weight).unwrap_or(1.0))
        })
        .collect();
    let weight_of = |name: &str| {
        let named = ranges.iter().filter(|(range, _)| range.eq_ignore_ascii_case(name));
        named.map(|(_, weight)| *weight).reduce(f32::max)
    };
    weight_of(EVENT_STREAM).is_some_and(|stream| stream > 0.0 && stream >= weight_of(JSON).unwrap_or(0.0))
}

/// Returns the value of a `q=` parameter; `None` for other parameters and unreadable values.
fn weight(parameter: &str) -> Option<f32> {
    let (name, value) = parameter.split_once('=')?;
    name.trim().eq_ignore_ascii_case("q").then(|| value.trim().parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn a_stream_is_chosen_only_if_accept_names_it() {
        for (accept, wanted) in [
            ("", false),
            ("*/*", false),
            ("text/*", false),
            ("application/json", false),
            ("text/event-stream", true),
            ("Text/Event-Stream", true),
            ("text/event-stream, */*;q=0.1", true),
            ("application/json;q=0.5, text/event-stream", true),
            ("application/json, text/event-stream", true),
            ("application/json, text/event-stream;q=0.9", false),
            ("text/event-stream;q=0", false),
            ("text/event-stream; q=0.000", false),
            ("text/event-stream;charset=utf-8;Q=0", false),
            ("text/event-stream-of-mine", false),
            ("application/x; y=text/event-stream", false),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(wants_stream(&headers), wanted, "{accept}");
        }
        let mut several = HeaderMap::new();
        several.append(ACCEPT, HeaderValue::from_static("application/json;q=0.1"));
        several.append(ACCEPT, HeaderValue::from_static("text/event-stream"));
        assert!(wants_stream(&several));
    }
}
