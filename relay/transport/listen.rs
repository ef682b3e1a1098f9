//! Parsing of the address to listen on.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};

/// Parses a listen setting: an address with a port, a host name with a port, or a port alone. Default: the loopback address
/// with port 4000.
///
/// # Errors
/// A message that names the expected form.
pub fn address(setting: Option<&str>) -> Result<SocketAddr, String> {
    named("--listen", setting.unwrap_or("127.0.0.1:4000"))
}

/// Parses an address as [`address`], from the setting `flag`.
///
/// # Errors
/// A message that names the flag and the expected form.
pub fn named(flag: &str, text: &str) -> Result<SocketAddr, String> {
    parse(text).ok_or_else(|| {
        format!("{flag} {text}: an address and a port are expected, such as 127.0.0.1:4000 or :4000 (all addresses)")
    })
}

/// Resolves the setting. IPv4 is preferred if a name has several addresses.
fn parse(text: &str) -> Option<SocketAddr> {
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let Some((host, port)) = text.rsplit_once(':') else { return text.parse().ok().map(local) };
    let port: u16 = port.parse().ok()?;
    if matches!(host, "" | "*") {
        return Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
    }
    let found: Vec<_> = (host.trim_matches(['[', ']']), port).to_socket_addrs().ok()?.collect();
    found.iter().find(|address| address.is_ipv4()).or(found.first()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_settings_are_parsed() {
        for (text, read) in [
            ("127.0.0.1:4000", Some("127.0.0.1:4000")),
            ("localhost:4000", Some("127.0.0.1:4000")),
            (":4000", Some("0.0.0.0:4000")),
            ("*:4000", Some("0.0.0.0:4000")),
            ("4000", Some("127.0.0.1:4000")),
            ("[::1]:4000", Some("[::1]:4000")),
            ("here", None),
            ("127.0.0.1:", None),
            ("127.0.0.1:99999", None),
            ("http://127.0.0.1:4000", None),
            ("", None),
        ] {
            assert_eq!(address(Some(text)).ok(), read.map(|read| read.parse().unwrap()), "{text}");
        }
    }
}
