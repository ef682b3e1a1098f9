//! One address (`--upstream`): what is not the relay's reaches the server behind it and comes back as it is.

use std::net::SocketAddr;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

use crate::program::cli::line_with;
use crate::support::client::Client;
use crate::support::database::Database;
use crate::support::http::{get, request};
use crate::support::issuer::{Behaviour, Issuer};
use crate::support::program;
use crate::support::relay::Relay;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, SECRET, eventually, token};

/// A server that answers each request on a connection of its own.
struct Behind {
    address: SocketAddr,
    /// Each request: its head, and the connection, from which its body is read and to which it is answered.
    requests: UnboundedReceiver<(String, TcpStream)>,
}

impl Behind {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = unbounded_channel();
        tokio::spawn(accept(listener, sender));
        Self { address, requests }
    }

    async fn next(&mut self) -> (String, TcpStream) {
        timeout(PATIENCE, self.requests.recv()).await.expect("no request came").unwrap()
    }

    /// Answers all requests with this.
    fn answering(mut self, answer: &'static str) {
        tokio::spawn(async move {
            while let Some((_, mut stream)) = self.requests.recv().await {
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
    }
}

async fn accept(listener: TcpListener, requests: UnboundedSender<(String, TcpStream)>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let requests = requests.clone();
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { return };
                head.push(byte);
            }
            let _ = requests.send((String::from_utf8(head).unwrap(), stream));
        });
    }
}

async fn before(address: SocketAddr) -> Stage {
    let url = format!("http://{address}/base");
    Stage::with("", move |settings, _| settings.upstream = Some(url)).await
}

/// The lines of a head, in lower case where they are headers.
fn lines(head: &str) -> Vec<String> {
    let mut lines = head.trim_end().split("\r\n");
    let first = lines.next().unwrap().to_owned();
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(':').unwrap();
        format!("{}:{value}", name.to_lowercase())
    });
    [first].into_iter().chain(headers).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_another_path_and_its_answer_are_passed_on_as_they_are() {
    let mut behind = Behind::start().await;
    let stage = before(behind.address).await;
    for (method, body) in [("POST", "{\"title\":\"é\"}"), ("OPTIONS", ""), ("PATCH", "x"), ("DELETE", "")] {
        let address = stage.relay.address;
        let asked = tokio::spawn(async move {
            let headers = "authorization: Bearer a.b.c\r\nx-forwarded-for: 192.0.2.7\r\nte: trailers\r\nx-one: 1\r\n\
                           keep-alive: 5\r\nprefer: return=representation\r\n";
            request(address, method, "/rest/v1/todos?id=eq.1&a=%C3%A9", headers, body.as_bytes()).await
        });
        let (head, mut stream) = behind.next().await;
        let head = lines(&head);
        assert_eq!(head[0], format!("{method} /base/rest/v1/todos?id=eq.1&a=%C3%A9 HTTP/1.1"));
        for kept in [
            format!("host: {}", behind.address),
            String::from("x-forwarded-host: relay"),
            String::from("x-forwarded-proto: http"),
            String::from("x-forwarded-for: 192.0.2.7, 127.0.0.1"),
            String::from("via: 1.1 relay"),
            String::from("authorization: Bearer a.b.c"),
            String::from("x-one: 1"),
            String::from("prefer: return=representation"),
        ] {
            assert!(head.contains(&kept), "{method}: no {kept} in {head:?}");
        }
        let of_connection = |line: &&String| {
            ["te:", "keep-alive:", "connection: close"].iter().any(|name| line.starts_with(name))
        };
        assert_eq!(head.iter().find(of_connection), None, "{method}: {head:?}");
        let mut read = vec![0; body.len()];
        stream.read_exact(&mut read).await.unwrap();
        assert_eq!(read, body.as_bytes());
        let answer = "HTTP/1.1 207 Multi-Status\r\ncontent-type: application/json\r\ncontent-range: 0-0/*\r\nx-drop: 1\r\n\
                      access-control-allow-origin: https://app.example\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n\
                      connection: close, x-drop\r\ncontent-length: 11\r\n\r\n{\"id\": 1.0}";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let answer = asked.await.unwrap();
        assert_eq!((answer.status, &answer.body), (207, &json!({"id": 1.0})), "{method}");
        let head = lines(&answer.head);
        for kept in [
            "content-range: 0-0/*",
            "access-control-allow-origin: https://app.example",
            "set-cookie: a=1",
            "set-cookie: b=2",
        ] {
            assert!(head.iter().any(|line| line == kept), "{method}: no {kept} in {head:?}");
        }
        assert!(!answer.head.contains("x-drop"), "{}", answer.head);
    }
    assert_eq!(stage.relay.figure("relay_upstream_requests_total"), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_relays_own_paths_never_leave_it() {
    let behind = Behind::start().await;
    let stage = before(behind.address).await;
    behind.answering("HTTP/1.1 200 OK\r\ncontent-length: 8\r\nconnection: close\r\n\r\n\"behind\"");
    for (path, of_behind) in [
        ("/livez", false),
        ("/readyz", false),
        ("/metrics", false),
        ("/healthcheck", false),
        ("/realtime/v1", false),
        ("/realtime/v1/nothing", false),
        ("/realtime/v1/changes?table=marker", false),
        ("/realtime/v1/websocket", false),
        ("/socket/websocket", false),
        ("/", true),
        ("/realtime/v10/x", true),
        ("/rest/v1/realtime/v1/changes", true),
        ("/livez/more", true),
    ] {
        let answer = get(stage.relay.address, path, "").await;
        assert_eq!(answer.body == "behind", of_behind, "{path}: {answer:?}");
    }
    let mut client = Client::connect(&stage.relay, &token("anon", None, json!({}))).await;
    client.subscribe("realtime:a", json!([{"event": "*", "schema": "public", "table": "marker"}])).await;
    stage.run("insert into marker default values").await;
    assert_eq!(client.change().await["table"], "marker");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absolute_address_leads_to_no_other_server() {
    let mut behind = Behind::start().await;
    let mut other = Behind::start().await;
    let stage = before(behind.address).await;
    let mut client = TcpStream::connect(stage.relay.address).await.unwrap();
    let said =
        format!("GET http://{0}/a?b HTTP/1.1\r\nhost: {0}\r\nconnection: close\r\n\r\n", other.address);
    client.write_all(said.as_bytes()).await.unwrap();
    let (head, mut stream) = behind.next().await;
    assert!(head.starts_with("GET /base/a?b HTTP/1.1\r\n"), "{head}");
    stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    let said = format!("CONNECT {} HTTP/1.1\r\nhost: x\r\n\r\n", other.address);
    let mut client = TcpStream::connect(stage.relay.address).await.unwrap();
    client.write_all(said.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    client.read_exact(&mut status).await.unwrap();
    assert!(status.starts_with(b"HTTP/1.1 4"), "{status:?}");
    assert!(other.requests.try_recv().is_err());
}

/// More than all the memory that the relay may use for clients.
const LARGE: usize = 24 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn bodies_larger_than_the_relays_memory_stream_both_ways() {
    let mut behind = Behind::start().await;
    let url = format!("http://{}", behind.address);
    let stage = Stage::with("", |settings, _| {
        settings.upstream = Some(url);
        settings.total_outbox_bytes = Some(1 << 20);
    })
    .await;
    for coding in [format!("content-length: {LARGE}\r\n"), String::from("transfer-encoding: chunked\r\n")] {
        let (mut reading, mut writing) = TcpStream::connect(stage.relay.address).await.unwrap().into_split();
        let is_chunked = coding.starts_with('t');
        let head =
            format!("PUT /storage/v1/object HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n{coding}\r\n");
        writing.write_all(head.as_bytes()).await.unwrap();
        let (head, mut stream) = behind.next().await;
        assert!(head.starts_with("PUT /storage/v1/object "), "{head}");
        let sending = tokio::spawn(async move {
            let piece = vec![b'x'; 1 << 20];
            for _ in 0..LARGE / piece.len() {
                if is_chunked {
                    writing.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await.unwrap();
                }
                writing.write_all(&piece).await.unwrap();
                if is_chunked {
                    writing.write_all(b"\r\n").await.unwrap();
                }
            }
            if is_chunked {
                writing.write_all(b"0\r\n\r\n").await.unwrap();
            }
            writing
        });
        // The server sends back what it gets, as it comes.
        let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n{coding}\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        let (mut of_server, mut to_client) = stream.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut of_server, &mut to_client).await });
        let (mut count, mut buffer) = (0, vec![0; 1 << 16]);
        while count < LARGE {
            let read =
                timeout(PATIENCE, reading.read(&mut buffer)).await.expect("the stream stopped").unwrap();
            assert!(read > 0, "it ended after {count}");
            count += buffer[..read].iter().filter(|byte| **byte == b'x').count();
        }
        sending.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_sends_arrives_before_its_answer_ends() {
    let mut behind = Behind::start().await;
    let stage = before(behind.address).await;
    let mut client = TcpStream::connect(stage.relay.address).await.unwrap();
    client.write_all(b"GET /functions/v1/stream HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (_, mut stream) = behind.next().await;
    stream
        .write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await
        .unwrap();
    let mut seen = String::new();
    for n in 0..3 {
        stream.write_all(format!("5\r\nevt{n}\n\r\n").as_bytes()).await.unwrap();
        while !seen.contains(&format!("evt{n}\n")) {
            let mut buffer = [0; 1024];
            let read = timeout(PATIENCE, client.read(&mut buffer)).await.expect("no event came").unwrap();
            seen += std::str::from_utf8(&buffer[..read]).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_not_whole_at_the_client() {
    for head in ["content-length: 100", "transfer-encoding: chunked"] {
        let mut behind = Behind::start().await;
        let stage = before(behind.address).await;
        let mut client = TcpStream::connect(stage.relay.address).await.unwrap();
        client.write_all(b"GET /file HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let (_, mut stream) = behind.next().await;
        stream
            .write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n5\r\nhello\r\n").as_bytes())
            .await
            .unwrap();
        drop(stream);
        let mut answer = Vec::new();
        let _ = timeout(PATIENCE, client.read_to_end(&mut answer)).await.expect("it stays open");
        let answer = String::from_utf8(answer).unwrap();
        assert!(!answer.ends_with("0\r\n\r\n") && answer.len() < 400, "{head}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgraded_connection_is_passed_on_until_either_side_ends_it() {
    let mut behind = Behind::start().await;
    let url = format!("http://{}", behind.address);
    let stage = Stage::with("", |settings, _| {
        settings.upstream = Some(url);
        settings.write_timeout_ms = Some(500);
    })
    .await;
    for ends in ["client", "server", "relay"] {
        let mut client = TcpStream::connect(stage.relay.address).await.unwrap();
        let said = b"GET /other/socket HTTP/1.1\r\nhost: x\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\
                     sec-websocket-key: abc\r\n\r\nearly";
        client.write_all(said).await.unwrap();
        let (head, mut server) = behind.next().await;
        let head = lines(&head);
        for kept in ["upgrade: websocket", "connection: upgrade", "sec-websocket-key: abc"] {
            assert!(head.iter().any(|line| line == kept), "no {kept} in {head:?}");
        }
        let accepted = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: xyz\r\n\r\nhello";
        server.write_all(accepted).await.unwrap();
        let mut answer = String::new();
        while !answer.ends_with("hello") {
            let mut buffer = [0; 1024];
            let read = timeout(PATIENCE, client.read(&mut buffer)).await.expect("no answer came").unwrap();
            assert!(read > 0, "{answer}");
            answer += std::str::from_utf8(&buffer[..read]).unwrap();
        }
        assert!(
            answer.starts_with("HTTP/1.1 101 ") && answer.contains("sec-websocket-accept: xyz\r\n"),
            "{answer}"
        );
        let mut early = [0; 5];
        server.read_exact(&mut early).await.unwrap();
        assert_eq!(&early, b"early");
        // More than the relay counts for one message of a client.
        let piece = vec![b'y'; 1 << 20];
        for _ in 0..8 {
            let mut read = vec![0; piece.len()];
            let (written, heard) = tokio::join!(client.write_all(&piece), server.read_exact(&mut read));
            assert!(written.is_ok() && heard.is_ok() && read == piece);
            let (written, heard) = tokio::join!(server.write_all(&piece), client.read_exact(&mut read));
            assert!(written.is_ok() && heard.is_ok() && read == piece);
        }
        let mut rest = Vec::new();
        match ends {
            "client" => {
                drop(client);
                timeout(PATIENCE, server.read_to_end(&mut rest))
                    .await
                    .expect("the server's side stays open")
                    .unwrap();
            }
            "server" => {
                drop(server);
                timeout(PATIENCE, client.read_to_end(&mut rest))
                    .await
                    .expect("the client's side stays open")
                    .unwrap();
            }
            _ => {
                assert_eq!(stage.relay.figure("relay_sessions_open"), 1);
                return stage.relay.stop().await;
            }
        }
        eventually("its slot is free", || async {
            (stage.relay.figure("relay_sessions_open") == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_is_told_and_the_relay_goes_on() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let stage = before(address).await;
    let answer = get(stage.relay.address, "/rest/v1/todos", "").await;
    let told = answer.body["error"].as_str().unwrap_or_default();
    assert!(
        answer.status == 502 && told.contains("--upstream") && !told.contains(&address.to_string()),
        "{answer:?}"
    );
    assert!(answer.head.contains("access-control-allow-origin: *"), "{answer:?}");
    assert_eq!(stage.relay.figure("relay_upstream_failures_total"), 1);
    // One that closes without an answer.
    let listener = TcpListener::bind(address).await.unwrap();
    let asked = tokio::spawn(async move { get(stage.relay.address, "/rest/v1/todos", "").await });
    let (stream, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    drop(stream);
    drop(listener);
    assert_eq!(asked.await.unwrap().status, 502);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_by_https_is_believed_by_its_certificate() {
    let database = Database::new().await;
    let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/tls/authority.pem");
    let behind = Issuer::start_tls(Behaviour::Text(String::from("[1]"))).await;
    let upstream = format!("https://localhost:{}", behind.address.port());
    for (trusted, status) in [(Some(authority), 200), (None, 502)] {
        let arguments =
            ["serve", "--listen", "127.0.0.1:0", "--database-url", &database.url, "--jwt-secret", SECRET];
        let mut program = program::relay(&arguments);
        program.args(["--upstream", &upstream]).envs(trusted.map(|path| ("SSL_CERT_FILE", path)));
        let mut program = program.spawn().unwrap();
        let mut log = BufReader::new(program.stderr.take().unwrap()).lines();
        let listening = line_with(&mut log, "listening").await;
        let (_, address) = listening.rsplit_once("http://").unwrap();
        let digits = |text: &str| {
            text.chars().take_while(|one| one.is_ascii_digit() || ".:".contains(*one)).collect::<String>()
        };
        let answer = get(digits(address).parse().unwrap(), "/rest/v1/todos", "").await;
        assert_eq!(answer.status, status, "{answer:?}");
        if trusted.is_none() {
            line_with(&mut log, "invalid peer certificate: UnknownIssuer").await;
        }
        program.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_circle_of_relays_is_found() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let database = Stage::new("").await;
    let relay = Relay::with(&database.database.url, |settings| {
        settings.listen = Some(address.to_string());
        settings.upstream = Some(format!("http://{address}"));
    })
    .await;
    let answer = get(address, "/rest/v1/todos", "").await;
    assert_eq!(answer.status, 508, "{answer:?}");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_went_away_frees_the_server() {
    let mut behind = Behind::start().await;
    let url = format!("http://{}", behind.address);
    let stage = Stage::with("", |settings, _| {
        settings.upstream = Some(url);
        settings.write_timeout_ms = Some(100);
    })
    .await;
    for begun in ["", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"] {
        let mut client = TcpStream::connect(stage.relay.address).await.unwrap();
        client.write_all(b"GET /functions/v1/long HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let (_, mut stream) = behind.next().await;
        stream.write_all(begun.as_bytes()).await.unwrap();
        drop(client);
        let mut rest = Vec::new();
        let ended = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "{begun:?}: the relay still waits for the server");
    }
}

#[test]
fn an_address_that_is_none_is_refused_with_what_is_expected() {
    for (url, told) in [
        ("project.example", "http:// or https://"),
        ("ftp://project.example", "http:// or https://"),
        ("https://", ""),
        ("https://user:secret@project.example", "name or password"),
        ("https://project.example/?a=b", "query"),
    ] {
        let settings = relay::settings::Settings {
            database_url: Some(String::from("postgres://x/")),
            jwt_secret: Some("s".repeat(32)),
            upstream: Some(url.to_owned()),
            ..Default::default()
        };
        let mistakes = settings.resolve().err().unwrap_or_else(|| panic!("{url} is accepted")).to_string();
        assert!(mistakes.contains("--upstream") && mistakes.contains(told), "{url}: {mistakes}");
        assert!(!mistakes.contains("secret"), "{mistakes}");
    }
}
