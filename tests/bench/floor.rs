//! What the machine can do at all: LISTEN, one frame encoded once, one shared buffer, a task per connection that writes
//! whatever it has not written yet in one system call; or, instead of LISTEN, each line of a client that asked for `/send`. One thread; no policy, no protocol, no memory of anything.

use std::cell::RefCell;
use std::io::ErrorKind;
use std::rc::Rc;

use futures_util::future::poll_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_postgres::{AsyncMessage, NoTls};

/// The channel on which rows come, whole.
pub const CHANNEL: &str = "bench_floor";

/// Every frame so far, one after the other. It is never cut: a run is short.
type Log = Rc<RefCell<Vec<u8>>>;

/// Serves until the process is killed; prints the address.
pub fn serve(database_url: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        let log = Log::default();
        let (grow, grown) = watch::channel(0);
        let grow = Rc::new(grow);
        let (client, mut connection) = tokio_postgres::connect(database_url, NoTls).await.unwrap();
        let (frames, growing) = (Rc::clone(&log), Rc::clone(&grow));
        tokio::task::spawn_local(async move {
            while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notification(row) = message.unwrap() {
                    append(&mut frames.borrow_mut(), row.payload());
                    let _ = growing.send(frames.borrow().len());
                }
            }
        });
        client.batch_execute(&format!("listen {CHANNEL}")).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::task::spawn_local(client_task(stream, Rc::clone(&log), Rc::clone(&grow), grown.clone()));
        }
    });
}

async fn client_task(
    mut stream: TcpStream,
    log: Log,
    grow: Rc<watch::Sender<usize>>,
    mut grown: watch::Receiver<usize>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let mut written = *grown.borrow_and_update();
    let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    if stream.write_all(answer).await.is_err() {
        return;
    }
    if head.starts_with(b"GET /send ") {
        return sender_task(stream, &log, &grow).await;
    }
    while grown.changed().await.is_ok() {
        let end = *grown.borrow_and_update();
        while written < end {
            let wrote = stream.try_write(&log.borrow()[written..]);
            match wrote {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if stream.writable().await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }
}

/// Sends each line to all clients.
async fn sender_task(mut stream: TcpStream, log: &Log, grow: &watch::Sender<usize>) {
    let mut lines = Vec::new();
    while stream.read_buf(&mut lines).await.unwrap_or(0) > 0 {
        while let Some(end) = lines.iter().position(|byte| *byte == b'\n') {
            append_broadcast(&mut log.borrow_mut(), &String::from_utf8_lossy(&lines[..end]));
            lines.drain(..=end);
        }
        let _ = grow.send(log.borrow().len());
    }
}

/// A frame of the relay's shape and size around the row.
fn append(log: &mut Vec<u8>, row: &str) {
    let text = format!(
        r#"[null,null,"realtime:bench","postgres_changes",{{"ids":[134217727],"data":{{"schema":"public","table":"bench_fanout","commit_timestamp":"2026-01-01T00:00:00.000Z","type":"INSERT","columns":[{{"name":"id","type":"int8"}},{{"name":"device","type":"text"}},{{"name":"body","type":"text"}}],"record":{row},"errors":null}}}}]"#
    );
    append_frame(log, &text);
}

/// The same for a broadcast.
fn append_broadcast(log: &mut Vec<u8>, content: &str) {
    let text = format!(
        r#"[null,null,"realtime:bench","broadcast",{{"type":"broadcast","event":"row","payload":{{"record":{content}}}}}]"#
    );
    append_frame(log, &text);
}

fn append_frame(log: &mut Vec<u8>, text: &str) {
    log.extend([0x81, 126]);
    log.extend((text.len() as u16).to_be_bytes());
    log.extend(text.as_bytes());
}
