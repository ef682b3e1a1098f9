//! The Autobahn test suite, the field's own judge of WebSocket servers, where `make autobahn` has put it.

#![allow(clippy::print_stdout, reason = "the counts are part of what is shown")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio_tungstenite::accept_async_with_config;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Text that is not UTF-8 is refused, but only once its frame is whole.
const LATE: [&str; 2] = ["6.4.3", "6.4.4"];

/// The suite asks for messages to come back, which the relay has no use for: this stands for it, with its settings and
/// its answers to errors.
async fn echo(stream: TcpStream) {
    let mut config = WebSocketConfig::default();
    config.read_buffer_size = 1024;
    config.write_buffer_size = 0;
    config.max_message_size = Some(5_000_000);
    config.max_frame_size = Some(5_000_000);
    let Ok(mut socket) = accept_async_with_config(stream, Some(config)).await else { return };
    let code = loop {
        match socket.next().await {
            Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                if socket.send(message).await.is_err() {
                    return;
                }
            }
            Some(Ok(Message::Close(_))) | None => {
                let _ = socket.flush().await;
                return;
            }
            Some(Ok(_)) => {
                let _ = socket.flush().await;
            }
            Some(Err(Error::Capacity(_))) => break 1009,
            Some(Err(Error::Utf8(_))) => break 1007,
            Some(Err(Error::Protocol(_))) => break 1002,
            Some(Err(_)) => return,
        }
    };
    let _ = socket.close(Some(CloseFrame { code: code.into(), reason: "".into() })).await;
    while socket.next().await.is_some_and(|frame| frame.is_ok()) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn the_suite_finds_no_fault() {
    let Ok(python) = std::env::var("RELAY_TEST_AUTOBAHN") else { return };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    });
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/autobahn");
    let reports: PathBuf = folder.join("reports");
    let _ = std::fs::remove_dir_all(&reports);
    let settings = json!({
        "outdir": reports,
        "servers": [{"agent": "relay", "url": format!("ws://{address}")}],
        "cases": ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*"],
        // Messages of 8 and 16 MiB, which are over our limit.
        "exclude-cases": ["9.1.5", "9.1.6", "9.2.5", "9.2.6"],
        "exclude-agent-cases": {},
    });
    std::fs::write(folder.join("settings.json"), settings.to_string()).unwrap();
    // A path alone would not do: some of the packages are parts of one name.
    let program = "import site; site.addsitedir('python'); from autobahntestsuite.wstest import run; run()";
    let run = Command::new(python)
        .args(["-c", program, "-m", "fuzzingclient", "-s"])
        .arg(folder.join("settings.json"))
        .current_dir(&folder)
        .output();
    let output = run.await.unwrap();
    let index = std::fs::read_to_string(reports.join("index.json"))
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let cases: Value = serde_json::from_str(&index).unwrap();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut faults = Vec::new();
    for (case, found) in cases["relay"].as_object().unwrap() {
        for part in ["behavior", "behaviorClose"] {
            let found = found[part].as_str().unwrap();
            *counts.entry(format!("{part} {found}")).or_default() += 1;
            let is_late = found == "NON-STRICT" && LATE.contains(&case.as_str());
            if !["OK", "INFORMATIONAL"].contains(&found) && !is_late {
                faults.push(format!("{case}: {part} {found}"));
            }
        }
    }
    println!("{counts:?}");
    assert!(cases["relay"].as_object().unwrap().len() > 240, "the suite did not run: {counts:?}");
    assert!(faults.is_empty(), "{faults:#?}");
}
