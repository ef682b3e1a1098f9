//! The command line.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use futures_util::FutureExt;
use relay::command::{compare, doctor, explain, secret_files, tail, token};
use relay::config::NO_DATABASE;
use relay::postgres::connect::pool::{DATABASE, Error, JUDGE, Server};
use relay::postgres::install;
use relay::server::{self, Listeners};
use relay::settings::Settings;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;
use tracing_subscriber::EnvFilter;

/// Unlike the system's allocator, mimalloc returns memory when many frames are dropped at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A Postgres change-feed relay: delivers each row change to the users who may see it by the table's own policies.
///
/// First steps with a database and a table of your own:
///
///   export DATABASE_URL=postgres://postgres@127.0.0.1:5432/app
///   export RELAY_JWT_SECRET=$(openssl rand -hex 32)
///   relay serve --install        installs schema `relay`, then serves; run the rest in another terminal
///   relay watch public.todos     publishes the changes of the table
///   relay tail todos             prints them, as service_role: grant select on todos to service_role
///   relay token --sub UUID       makes a token for a client, which sees what the table's policies allow
///   relay doctor                 if no changes arrive: what is wrong, and what to do
///
/// A setting that is a secret may also be in a file that its variable with _FILE appended names: RELAY_JWT_SECRET_FILE.
#[derive(Parser)]
#[command(version, verbatim_doc_comment, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
    /// Write logs as JSON, a line each
    #[arg(long, global = true, env = "RELAY_LOG_JSON")]
    log_json: bool,
}

const TOKEN: &str = "\
Examples:
  relay token --sub 11111111-1111-4111-8111-111111111111
  relay token --sub 11111111-1111-4111-8111-111111111111 --claims '{\"app_metadata\":{\"role\":\"admin\"}}' --ttl 7d";
const TAIL: &str = "\
Examples:
  relay tail todos --filter list_id=eq.7
  relay tail todos --token \"$(relay token --sub 11111111-1111-4111-8111-111111111111)\"";
const EXPLAIN: &str = "\
Examples:
  relay explain todos --sub 11111111-1111-4111-8111-111111111111
  relay explain todos --token \"$TOKEN\" --key 7";
const COMPARE: &str = "\
Examples:
  relay compare https://PROJECT.supabase.co --apikey \"$ANON_KEY\" --token \"$TOKEN\" --table todos --seconds 600
  relay compare http://127.0.0.1:4001 --token \"$TOKEN\" --table todos --table crm.deal";

#[derive(Subcommand)]
enum CliCommand {
    /// Install or update the database side (schema `relay`); safe to repeat
    Install(DatabaseOptions),
    /// Serve subscribers; requires a database and a secret or keys, all other settings have a default
    Serve(Box<Settings>),
    /// Publish the changes of a table, a partitioned table or a materialized view
    Watch {
        /// Its name, with the schema if it is not on the search path
        table: String,
        /// Also notify subscribers of rows that become invisible to them
        #[arg(long)]
        leave_events: bool,
        /// Columns, separated by commas: an UPDATE of nothing else is not logged
        #[arg(long, value_delimiter = ',')]
        ignore: Vec<String>,
        #[command(flatten)]
        database: DatabaseOptions,
    },
    /// Stop publishing a table; leaves no trace on it
    Unwatch {
        /// Its name, with the schema if it is not on the search path
        table: String,
        #[command(flatten)]
        database: DatabaseOptions,
    },
    /// Make a token for tests
    #[command(after_help = TOKEN)]
    Token(token::TokenOptions),
    /// Print the changes of a table as they happen
    #[command(after_help = TAIL)]
    Tail(tail::TailOptions),
    /// Subscribe at the relay and at another server, and print what differs; exit code 1 if anything does
    #[command(after_help = COMPARE)]
    Compare(compare::CompareOptions),
    /// Explain why a user receives the rows of a table or does not, and how that is decided; exit code 1 if not
    #[command(after_help = EXPLAIN)]
    Explain {
        #[command(flatten)]
        options: explain::ExplainOptions,
        #[command(flatten)]
        servers: JudgeOptions,
    },
    /// Check the database and print remedies: a `note` works with a caveat, a `FAULT` does not and gives exit code 1
    Doctor(JudgeOptions),
}

#[derive(Args)]
struct DatabaseOptions {
    /// The database, e.g. postgres://postgres@127.0.0.1:5432/app
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
    /// Certificate authorities for the database's TLS, as PEM [default: the system's]
    #[arg(long, env = "RELAY_DATABASE_CA", value_name = "FILE")]
    database_ca: Option<String>,
}

impl DatabaseOptions {
    fn server(&self) -> Result<Server, Error> {
        let url = database_url(self.database_url.clone());
        let url = url.ok_or_else(|| Error::Unfit(String::from(NO_DATABASE)))?;
        let server = Server::named(DATABASE, &url, "relay", self.database_ca.as_deref())?;
        for note in server.notes() {
            say(&format!("note: {note}"));
        }
        Ok(server)
    }

    /// Connects, after a check that no pooler in transaction mode is in between.
    async fn connect(&self) -> Result<Client, Error> {
        let server = self.server()?;
        server.check_sessions().await?;
        server.connect().await
    }
}

#[derive(Args)]
struct JudgeOptions {
    #[command(flatten)]
    database: DatabaseOptions,
    /// The login that evaluates policies, if `serve` has one of its own
    #[arg(long, env = "RELAY_JUDGE_URL", hide_env_values = true, value_name = "URL")]
    judge_url: Option<String>,
}

impl JudgeOptions {
    /// Returns the server, and the one that evaluates policies: by default the same.
    fn servers(&self) -> Result<(Server, Server), Error> {
        let server = self.database.server()?;
        let judge = |url: &String| Server::named(JUDGE, url, "relay", self.database.database_ca.as_deref());
        let judge = self.judge_url.as_ref().map_or_else(|| Ok(server.clone()), judge)?;
        Ok((server, judge))
    }
}

/// Returns the database URL; without one, an empty URL if libpq's variables name a database.
fn database_url(named: Option<String>) -> Option<String> {
    let has = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_in_environment = || ["PGHOST", "PGHOSTADDR", "PGDATABASE"].into_iter().any(has);
    named.or_else(|| is_in_environment().then(|| String::from("postgres://")))
}

type CliFailure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = match command_line() {
        Ok(cli) => cli,
        Err(mistake) => {
            say(&format!("relay: {mistake}"));
            return ExitCode::FAILURE;
        }
    };
    let (command, json) = match cli.command {
        CliCommand::Serve(settings) => match settings.with_file() {
            Ok(settings) => {
                (CliCommand::Serve(Box::new(settings.clone())), cli.log_json || settings.log_json)
            }
            Err(mistakes) => {
                say(&format!("relay: {mistakes}"));
                return ExitCode::FAILURE;
            }
        },
        command => (command, cli.log_json),
    };
    log(json);
    match run(command).await {
        Ok(code) => code,
        Err(error) => {
            say(&format!("relay: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Parses the command line. Ends the process if it cannot be parsed, or only asks for help.
fn command_line() -> Result<Cli, String> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let command =
        secret_files::with_secret_files(Cli::command(), &arguments[1..], |name| std::env::var_os(name))?;
    Ok(Cli::from_arg_matches(&command.get_matches_from(arguments)).unwrap_or_else(|error| error.exit()))
}

async fn run(command: CliCommand) -> Result<ExitCode, CliFailure> {
    match command {
        CliCommand::Install(database) => {
            let mut client = database.connect().await?;
            let applied = install::install(&mut client).await?;
            let version = env!("CARGO_PKG_VERSION");
            say(&match applied.iter().filter(|file| !file.starts_with('9')).count() {
                0 => format!("schema relay is up to date (version {version})"),
                count => format!("schema relay is now of version {version} ({count} files applied)"),
            });
        }
        CliCommand::Serve(settings) => Box::pin(serve(*settings)).await?,
        CliCommand::Watch { table, leave_events, ignore, database } => {
            watch(&table, leave_events, &ignore, &database).await?;
        }
        CliCommand::Unwatch { table, database } => unwatch(&table, &database).await?,
        CliCommand::Token(options) => token::run(&options)?,
        CliCommand::Tail(options) => tail::run(options).await?,
        CliCommand::Compare(options) => {
            if !compare::run(options).await? {
                return Ok(ExitCode::FAILURE);
            }
        }
        CliCommand::Doctor(options) => {
            let (server, judge) = options.servers()?;
            return Ok(doctor::run(&server, &judge).await);
        }
        CliCommand::Explain { options, servers } => {
            let (server, judge) = servers.servers()?;
            server.check_sessions().await?;
            judge.check_sessions().await?;
            if !explain::run(&options, &server, &judge).await? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn watch(
    table: &str,
    leave_events: bool,
    ignore: &[String],
    database: &DatabaseOptions,
) -> Result<(), CliFailure> {
    let client = database.connect().await?;
    install::check(&client).await?;
    let watch = "select relay.watch($1::text::regclass, $2, $3)";
    client.execute(watch, &[&table, &leave_events, &ignore]).await.map_err(refused)?;
    say(&format!("{table} is watched{}", if leave_events { ", with leave events" } else { "" }));
    let notes = client.query_one("select relay.notes($1::text::regclass)", &[&table]).await?;
    for note in notes.get::<_, Vec<String>>(0) {
        say(&format!("note: {note}"));
    }
    Ok(())
}

async fn unwatch(table: &str, database: &DatabaseOptions) -> Result<(), CliFailure> {
    let client = database.connect().await?;
    let watched = "select exists (select from relay.watch_list where relation = $1::text::regclass)";
    if !client.query_one(watched, &[&table]).await.map_err(named)?.get::<_, bool>(0) {
        say(&format!("{table} was not watched"));
        return Ok(());
    }
    client.execute("select relay.unwatch($1::text::regclass)", &[&table]).await.map_err(refused)?;
    say(&match client.query_one(watched, &[&table]).await.map_err(named)?.get(0) {
        true => format!(
            "{table} stays watched, because it is in a publication or schema that is watched: select * from relay.collected"
        ),
        false => format!("{table} is not watched any more"),
    });
    Ok(())
}

/// Listens on the address of the setting `flag`.
async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, CliFailure> {
    let bound = TcpListener::bind(address).await;
    Ok(bound.map_err(|error| format!("{address}: {error}; give another address by {flag}"))?)
}

async fn serve(mut settings: Settings) -> Result<(), CliFailure> {
    settings.database_url = database_url(settings.database_url);
    let config = settings.resolve()?;
    for skipped in config.verifier.skipped_keys() {
        tracing::warn!("key of the JWK set not used: {skipped}");
    }
    if let Some(upstream) = &config.upstream {
        tracing::info!(upstream = upstream.url(), "requests for other paths go to --upstream");
    }
    let clients = bind(config.listen, "--listen").await?;
    let address = clients.local_addr()?;
    let admin = match config.admin_listen {
        Some(address) => Some(bind(address, "--admin-listen").await?),
        None => None,
    };
    let admin_address = admin.as_ref().and_then(|admin| admin.local_addr().ok());
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut signalled = async move || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let (stop, stopped) = oneshot::channel();
    // Aborted when the relay has stopped.
    let _signals = AbortOnDropHandle::new(tokio::spawn(async move {
        signalled().await;
        let _ = stop.send(());
        // A second signal exits at once.
        signalled().await;
        std::process::exit(130);
    }));
    let started = |_| {
        if let Some(address) = admin_address {
            tracing::info!(%address, "metrics at http://{address}/metrics, the inspector at http://{address}/inspector");
        }
        tracing::info!(%address, "listening: point supabase-js at http://{address}");
    };
    server::serve(config, Listeners { clients, admin }, stopped.map(drop), started).await?;
    Ok(())
}

fn named(error: tokio_postgres::Error) -> Error {
    error.into()
}

/// Adds to a missing-right error which login has that right.
fn refused(error: tokio_postgres::Error) -> Error {
    let error = named(error);
    match error.code() {
        Some("42501") => Error::Unfit(format!(
            "{error}. Watching a table requires the login that installed the schema relay, if it also owns the table, or a superuser: \
             give its URL by --database-url"
        )),
        _ => error,
    }
}

fn log(json: bool) {
    let filter = EnvFilter::try_from_env("RELAY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if json {
        builder.json().init();
    } else {
        builder.init();
    }
}

fn say(text: &str) {
    use std::io::Write;
    // A closed pipe is not a failure.
    let _ = writeln!(std::io::stderr(), "{text}");
}
