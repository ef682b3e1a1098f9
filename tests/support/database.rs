//! A database of its own, cloned from a template in which the relay is installed.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::{OnceCell, mpsc};
use tokio_postgres::{AsyncMessage, Client, NoTls};

/// The login of a relay: it may read the changelog.
pub const READER: &str = "relay_test_reader";
/// The login that evaluates policies: it may act as the roles of subscribers.
pub const JUDGE: &str = "relay_test_judge";

static TEMPLATE: OnceCell<()> = OnceCell::const_new();
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Dropped databases are not removed: the cluster is thrown away as a whole.
pub struct Database {
    /// Its connection string, as the cluster's superuser.
    pub url: String,
    /// A connection for the test's own statements.
    pub client: Client,
}

impl Database {
    /// Empty but for the relay's schema.
    pub async fn new() -> Self {
        TEMPLATE.get_or_init(make_template).await;
        Self::create(&format!(" template {}", template())).await
    }

    /// Empty altogether.
    pub async fn bare() -> Self {
        Self::create("").await
    }

    /// The same in another encoding.
    pub async fn encoded(encoding: &str) -> Self {
        Self::create(&format!(" template template0 encoding '{encoding}' lc_collate 'C' lc_ctype 'C'")).await
    }

    async fn create(template: &str) -> Self {
        let admin = connect(&cluster_url()).await;
        let name = format!("test_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        admin.batch_execute(&format!("create database {name}{template}")).await.unwrap();
        let url = with_database(&cluster_url(), &name);
        let client = connect(&url).await;
        Self { url, client }
    }

    /// Runs statements.
    pub async fn run(&self, sql: &str) {
        if let Err(error) = self.client.batch_execute(sql).await {
            panic!("{sql}\n{error}: {:?}", error.as_db_error().map(ToString::to_string));
        }
    }

    /// Lets the relay act as the roles of a test, which begin with the name of its database.
    pub async fn let_judge(&self) {
        let grant = format!(
            "do $$ declare one name; begin
               for one in select rolname from pg_roles
                          where starts_with(rolname, current_database() || '_') and not rolcanlogin loop
                 execute format('grant %I to {JUDGE}', one);
               end loop;
             end $$"
        );
        self.run(&grant).await;
    }

    /// One value as text.
    pub async fn value(&self, sql: &str) -> String {
        let rows = self.client.simple_query(sql).await.unwrap();
        for row in rows {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = row {
                return row.get(0).unwrap_or("").to_owned();
            }
        }
        panic!("no row: {sql}");
    }

    /// Another connection, and each warning that the server sends over it.
    pub async fn warned(&self) -> (Client, mpsc::UnboundedReceiver<String>) {
        self.heard("WARNING").await
    }

    /// Another connection, and each message of this severity that the server sends over it.
    pub async fn heard(&self, severity: &'static str) -> (Client, mpsc::UnboundedReceiver<String>) {
        let (client, mut connection) = tokio_postgres::connect(&self.url, NoTls).await.unwrap();
        let (sender, warnings) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notice(notice) = message
                    && notice.severity() == severity
                {
                    let _ = sender.send(notice.message().to_owned());
                }
            }
        });
        (client, warnings)
    }

    /// Another connection.
    pub async fn connect(&self) -> Client {
        connect(&self.url).await
    }
}

/// The logins of relays in a cluster where the relay is installed, as the README has them.
pub async fn make_logins(client: &Client) {
    let logins = format!(
        "create role {READER} login in role relay_reader;
         create role {JUDGE} login noinherit in role anon, authenticated, service_role"
    );
    // Another test may have made them: they belong to the whole cluster.
    let _ = client.batch_execute(&logins).await;
}

/// A connection to any URL.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The cluster that `make test` started.
pub fn cluster_url() -> String {
    std::env::var("RELAY_TEST_DATABASE_URL").expect(
        "RELAY_TEST_DATABASE_URL is not set: run the tests by `make test`, or give a throwaway cluster's URL",
    )
}

/// The same server, another database.
pub fn with_database(url: &str, name: &str) -> String {
    let (server, _) = url.rsplit_once('/').unwrap();
    format!("{server}/{name}")
}

/// The same database, as another role.
pub fn with_login(url: &str, login: &str) -> String {
    url.replacen("postgres@", &format!("{login}@"), 1)
}

fn template() -> String {
    format!("relay_template_{}", std::process::id())
}

async fn make_template() {
    let admin = connect(&cluster_url()).await;
    admin.batch_execute(&format!("create database {}", template())).await.unwrap();
    let mut client = connect(&with_database(&cluster_url(), &template())).await;
    relay::postgres::install::install(&mut client).await.unwrap();
    make_logins(&client).await;
    drop(client);
    // A database can be a template only while no session is connected to it.
    super::eventually("the template is free", || async {
        let busy = "select count(*) from pg_stat_activity where datname = $1";
        let count: i64 = admin.query_one(busy, &[&template()]).await.unwrap().get(0);
        (count == 0).then_some(())
    })
    .await;
}
