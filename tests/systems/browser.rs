//! The page of examples/systems in a real browser. What happens to it: tests/clients/systems.mjs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::timeout;

use super::loading::FILES;
use super::{ANA, BEN, CHLOE, EDDA, admin, bearer, file, user};
use crate::support::program::clients_of_postgresql;
use crate::support::stage::Stage;
use crate::support::{PATIENCE, eventually};

/// What examples/systems/run.sh puts into a folder to be served.
fn fill(folder: &Path, stage: &Stage) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_dir(root.join("examples/systems/page")).unwrap().map(|entry| entry.unwrap().path());
    let client = root.join("tests/clients/node_modules/@supabase/supabase-js/dist/umd/supabase.js");
    for path in page.chain([root.join("examples/demo/page/style.css"), client]) {
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let person = |name: &str, id: &str, claims: serde_json::Value| json!({"id": id, "name": name, "role": "", "token": bearer(&claims), "admin": id == EDDA});
    let people = [
        person("Ana", ANA, user(ANA)),
        person("Ben", BEN, user(BEN)),
        person("Chloe", CHLOE, user(CHLOE)),
        person("Edda", EDDA, admin()),
    ];
    let key = bearer(&json!({"role": "anon"}));
    let config = json!({"url": stage.relay.url(), "key": key, "people": people});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

async fn play(scenario: &str) {
    let stage = Stage::new(&FILES.map(file).join("\n")).await;
    let Some(programs) = clients_of_postgresql(&stage.database).await else { return };
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(&stage.name);
    fs::create_dir_all(&folder).unwrap();
    fill(&folder, &stage);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let _server = Command::new("node")
        .arg(root.join("examples/systems/serve.mjs"))
        .args([folder.as_os_str(), address.port().to_string().as_ref()])
        .env("DATABASE_URL", &stage.database.url)
        .env("PSQL", programs.join("psql"))
        .kill_on_drop(true)
        .spawn()
        .expect("`make setup` installs Node.js");
    eventually("the page is served", || async { TcpStream::connect(address).await.ok() }).await;
    let script = Command::new("node")
        .args([root.join("tests/clients/systems.mjs").as_os_str(), scenario.as_ref()])
        .env("PAGE_URL", format!("http://{address}/"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let done = timeout(PATIENCE * 2, script).await.expect("the script ends").unwrap();
    let said = String::from_utf8([done.stdout, done.stderr].concat()).unwrap();
    assert!(done.status.success(), "{scenario}: {said}");
    fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_an_agent_that_is_switched_off_at_once_and_after_a_reload() {
    play("shows_an_agent_that_is_switched_off_at_once_and_after_a_reload").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_people_until_the_conversation_with_them_ends() {
    play("shows_people_until_the_conversation_with_them_ends").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shows_metrics_and_alerts_to_the_admin_alone() {
    play("shows_metrics_and_alerts_to_the_admin_alone").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_in_two_windows_until_one_is_removed() {
    play("chats_in_two_windows_until_one_is_removed").await;
}
