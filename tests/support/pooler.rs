//! PgBouncer in front of PostgreSQL.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tokio_postgres::NoTls;

use super::eventually;

/// It ends when it is dropped.
pub struct Pooler {
    /// The database's URL, through it.
    pub url: String,
    child: Child,
    folder: PathBuf,
}

impl Pooler {
    /// Starts one on a free port; `mode` is what a client keeps a session of PostgreSQL for.
    pub async fn start(url: &str, mode: &str) -> Self {
        let (server, database) = url.rsplit_once('/').unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = std::env::temp_dir().join(format!("relay-pooler-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let settings = folder.join("pgbouncer.ini");
        let server_port = server.rsplit_once(':').unwrap().1;
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={server_port} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\n"
        );
        std::fs::write(&settings, text).unwrap();
        let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/pgbouncer/usr");
        let program = unpacked.join("sbin/pgbouncer");
        let libraries = unpacked.join(format!("lib/{}-linux-gnu", std::env::consts::ARCH));
        let mut command = match program.exists() {
            true => Command::new(program),
            false => Command::new("pgbouncer"),
        };
        // It refuses to run as root.
        if Command::new("id").arg("-u").output().unwrap().stdout == b"0\n" {
            command.args(["-u", "nobody"]);
        }
        let child = command
            .arg(&settings)
            .env("LD_LIBRARY_PATH", libraries)
            .stderr(Stdio::null())
            .spawn()
            .expect("pgbouncer, which `make setup` fetches");
        let pooler = Self { url: format!("postgres://postgres@127.0.0.1:{port}/{database}"), child, folder };
        eventually("the pooler answers", || async {
            tokio_postgres::connect(&pooler.url, NoTls).await.is_ok().then_some(())
        })
        .await;
        pooler
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
