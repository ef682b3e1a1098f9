//! A socket to a relay, or to another server of the same protocol: by HTTP or HTTPS, with one channel and heartbeats.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Interval, interval};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::tls;

/// Interval between heartbeats, as of Supabase's clients.
const HEARTBEAT: Duration = Duration::from_secs(25);

/// The address of a server.
#[derive(Debug, Clone)]
pub struct ServerAddress {
    base: String,
    /// Host, port and perhaps a path.
    place: String,
    is_tls: bool,
}

impl ServerAddress {
    /// Parses the URL that `flag` gives.
    ///
    /// # Errors
    /// What is expected instead.
    pub fn parse(flag: &str, url: &str) -> Result<Self, String> {
        let base = url.trim_end_matches('/');
        let after = |schemes: [&str; 2]| schemes.into_iter().find_map(|scheme| base.strip_prefix(scheme));
        let (place, is_tls) = match (after(["http://", "ws://"]), after(["https://", "wss://"])) {
            (Some(place), _) => (place, false),
            (None, Some(place)) => (place, true),
            (None, None) => {
                return Err(format!("{flag} {base}: expected http:// or https:// and the server's address"));
            }
        };
        Ok(Self { base: base.to_owned(), place: place.to_owned(), is_tls })
    }

    /// The URL without a slash at its end.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Host and port to connect to, and the host alone.
    fn endpoint(&self) -> (String, &str) {
        let authority = self.place.split('/').next().unwrap_or_default();
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
        let host =
            if has_port { authority.rsplit_once(':').map_or(authority, |(host, _)| host) } else { authority };
        let default = if self.is_tls { 443 } else { 80 };
        let endpoint = if has_port { authority.to_owned() } else { format!("{authority}:{default}") };
        (endpoint, host.trim_start_matches('[').trim_end_matches(']'))
    }
}

/// Why there is no socket.
#[derive(Debug)]
pub enum ConnectError {
    /// The server answers with a client error.
    Refused {
        /// Its status.
        status: u16,
        /// Its body.
        body: Vec<u8>,
    },
    /// A later attempt may succeed.
    Away(String),
    /// The address or a parameter has characters that are not allowed.
    Invalid(String),
}

impl From<SocketError> for ConnectError {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::Http(answer) if answer.status().is_client_error() => {
                let (status, body) = (answer.status().as_u16(), answer.into_body().unwrap_or_default());
                Self::Refused { status, body }
            }
            SocketError::Http(answer) => Self::Away(format!("it answers {}", answer.status())),
            SocketError::HttpFormat(error) => Self::Invalid(error.to_string()),
            error => Self::Away(error.to_string()),
        }
    }
}

/// Plain or encrypted.
trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<W: AsyncRead + AsyncWrite + Send + Unpin> Wire for W {}

/// The socket.
pub struct RealtimeSocket {
    socket: WebSocketStream<Box<dyn Wire>>,
    heartbeat: Interval,
}

impl RealtimeSocket {
    /// Connects, with these query parameters beside the protocol version.
    ///
    /// # Errors
    /// Why it cannot.
    pub async fn connect(address: &ServerAddress, parameters: &str) -> Result<Self, ConnectError> {
        let scheme = if address.is_tls { "wss" } else { "ws" };
        let url = format!("{scheme}://{}/realtime/v1/websocket?vsn=2.0.0&{parameters}", address.place);
        let away = |error: &dyn std::error::Error| ConnectError::Away(error.to_string());
        let (endpoint, host) = address.endpoint();
        let stream = TcpStream::connect(&endpoint).await.map_err(|error| away(&error))?;
        let stream: Box<dyn Wire> = if address.is_tls {
            let trusted = tls::trusting(None).map_err(|error| away(&error))?;
            let name = ServerName::try_from(host.to_owned())
                .map_err(|error| ConnectError::Invalid(error.to_string()))?;
            let connector = TlsConnector::from(Arc::new(trusted));
            Box::new(connector.connect(name, stream).await.map_err(|error| away(&error))?)
        } else {
            Box::new(stream)
        };
        let (socket, _) = client_async(url, stream).await?;
        Ok(Self { socket, heartbeat: interval(HEARTBEAT) })
    }

    /// Asks to join a channel.
    ///
    /// # Errors
    /// Why the request cannot be sent.
    pub async fn join(&mut self, topic: &str, payload: &Value) -> Result<(), String> {
        let join = json!(["1", "1", topic, "phx_join", payload]);
        self.socket.send(Message::text(join.to_string())).await.map_err(|error| error.to_string())
    }

    /// Returns the next text frame, parsed and as it came; `None` when the connection has ended. Sends heartbeats meanwhile.
    pub async fn next(&mut self) -> Option<(Value, String)> {
        loop {
            let message = tokio::select! {
                _ = self.heartbeat.tick() => {
                    let beat = json!([null, "0", "phoenix", "heartbeat", {}]);
                    self.socket.send(Message::text(beat.to_string())).await.ok()?;
                    continue;
                }
                message = self.socket.next() => message?.ok()?,
            };
            if let Ok(text) = message.to_text()
                && let Ok(frame) = serde_json::from_str(text)
            {
                return Some((frame, text.to_owned()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_port_and_a_host() {
        for (url, endpoint, host) in [
            ("http://127.0.0.1:4000", "127.0.0.1:4000", "127.0.0.1"),
            ("https://project.example/", "project.example:443", "project.example"),
            ("ws://relay/realtime/v1", "relay:80", "relay"),
            ("wss://[::1]:5000", "[::1]:5000", "::1"),
            ("http://[::1]", "[::1]:80", "::1"),
        ] {
            let address = ServerAddress::parse("--url", url).unwrap();
            assert_eq!(address.endpoint(), (endpoint.to_owned(), host), "{url}");
        }
        assert!(ServerAddress::parse("--url", "relay.example").unwrap_err().contains("--url relay.example"));
    }
}
