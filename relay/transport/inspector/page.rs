//! The files of the page, which are part of the program.

use hyper::StatusCode;
use hyper::header::{self, HeaderValue};

use crate::transport::response::{Answer, text};

/// What the page may do: run its own scripts and ask its own address. Nothing else is loaded, embedded or sent anywhere.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The files: path, type, text.
const FILES: [(&str, &str, &str); 13] = [
    ("/inspector", "text/html; charset=utf-8", include_str!("page/inspector.html")),
    ("/inspector/inspector.css", "text/css; charset=utf-8", include_str!("page/inspector.css")),
    ("/inspector/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
    ("/inspector/app.js", SCRIPT, include_str!("page/app.js")),
    ("/inspector/api.js", SCRIPT, include_str!("page/api.js")),
    ("/inspector/elements.js", SCRIPT, include_str!("page/elements.js")),
    ("/inspector/why.js", SCRIPT, include_str!("page/why.js")),
    ("/inspector/clients.js", SCRIPT, include_str!("page/clients.js")),
    ("/inspector/changes.js", SCRIPT, include_str!("page/changes.js")),
    ("/inspector/console.js", SCRIPT, include_str!("page/console.js")),
    ("/inspector/policies.js", SCRIPT, include_str!("page/policies.js")),
    ("/inspector/database.js", SCRIPT, include_str!("page/database.js")),
    ("/inspector/charts.js", SCRIPT, include_str!("page/charts.js")),
];
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Answers a request for a file; `None` for another path.
pub(super) fn answer(path: &str) -> Option<Answer> {
    let (_, kind, content) = FILES.iter().find(|(known, ..)| *known == path)?;
    let mut answer = text(StatusCode::OK, *content);
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_POLICY));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_that_its_policy_forbids_and_nothing_from_elsewhere() {
        for (path, kind, content) in FILES {
            // The namespace of SVG is a name, not an address.
            let content = content.replace("http://www.w3.org/2000/svg", "");
            for forbidden in
                ["http://", "https://", "style=\"", "onclick=", "eval(", "innerHTML", "localStorage"]
            {
                assert!(!content.contains(forbidden), "{path}: {forbidden}");
            }
            if kind.starts_with("text/html") {
                assert!(!content.contains("<style") && !content.contains("<script>"), "{path}");
            }
        }
    }

    #[test]
    fn each_module_that_a_file_of_the_page_imports_is_served() {
        let mut count = 0;
        for (path, _, content) in FILES {
            for tail in content.split("from './").skip(1) {
                let name = format!("/inspector/{}", tail.split('\'').next().unwrap());
                assert!(answer(&name).is_some(), "{path} imports {name}");
                count += 1;
            }
        }
        assert!(count > 10, "where are they?");
    }
}
