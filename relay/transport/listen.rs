//! Where to listen, as people write it.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};

/// The address of a setting: one with a port, a name with a port, or a port alone. By default this machine alone is
/// listened to.
///
/// # Errors
/// What is expected instead.
pub fn address(setting: Option<&str>) -> Result<SocketAddr, String> {
    let text = setting.unwrap_or("127.0.0.1:4000");
    read(text).ok_or_else(|| {
        format!("--listen {text}: an address and a port are expected, such as 127.0.0.1:4000 or :4000 (all addresses)")
    })
}

/// Of a name's addresses one of version 4 is preferred.
fn read(text: &str) -> Option<SocketAddr> {
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
    fn addresses_to_listen_at_are_read_as_people_write_them() {
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
