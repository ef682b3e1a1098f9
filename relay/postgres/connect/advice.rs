//! Remedies for connections that PostgreSQL refuses.

use std::error::Error;

use tokio_postgres::Config;
use tokio_postgres::config::Host;
use tokio_postgres::error::DbError;

/// Returns the address of a server as text.
pub fn place(config: &Config) -> String {
    let ports = config.get_ports();
    let port = |at: usize| ports.get(at).or_else(|| ports.first()).copied().unwrap_or(5432);
    let hosts = config.get_hosts().iter().enumerate().map(|(at, host)| match host {
        Host::Tcp(name) if name.contains(':') => format!("[{name}]:{}", port(at)),
        Host::Tcp(name) => format!("{name}:{}", port(at)),
        Host::Unix(folder) => format!("{}/.s.PGSQL.{}", folder.display(), port(at)),
    });
    hosts.collect::<Vec<_>>().join(", ")
}

/// Returns the remedy for a permanent refusal; `None` if a retry may help. `setting` names the setting with the URL.
pub fn cure(error: &tokio_postgres::Error, config: &Config, setting: &str) -> Option<String> {
    match error.as_db_error() {
        Some(refusal) => cure_of_refusal(refusal, config, setting),
        None => cure_of_connection(&chain(error), config, setting),
    }
}

/// Returns the remedy when PostgreSQL itself refuses the login.
fn cure_of_refusal(refusal: &DbError, config: &Config, setting: &str) -> Option<String> {
    let user = config.get_user().unwrap_or_default();
    let text = refusal.message();
    match refusal.code().code() {
        "28P01" => Some(format!(
            "the password in {setting} (or PGPASSWORD) is not that of the role {user}. In a URL, write / ? # @ : % of a password \
             as %2F %3F %23 %40 %3A %25; `alter role {user} password '…'` sets another"
        )),
        "28000" if text.contains("does not exist") => Some(format!(
            "give another user in {setting}, or create this one: {}",
            tool("createuser", config, user)
        )),
        "28000" if text.contains("Peer authentication") || text.contains("Ident authentication") => {
            Some(format!(
                "on this socket PostgreSQL requires an operating system user of the same name: `sudo -u {user} relay …`, or give an address with \
             a password in {setting}: {}",
                sample(config)
            ))
        }
        "28000" if text.contains("no encryption") || text.contains("SSL off") => Some(format!(
            "this server requires TLS, or has no line for this address in its pg_hba.conf: sslmode=require in {setting} enables TLS"
        )),
        "28000" if text.contains("pg_hba.conf") => Some(format!(
            "the server's pg_hba.conf needs a line for the user, database and address of {setting}"
        )),
        "3D000" => {
            let database = config.get_dbname().unwrap_or(user);
            Some(format!(
                "give another database in {setting}, or create this one: {}",
                tool("createdb", config, database)
            ))
        }
        code if code.starts_with("28") => Some(format!("check the user and password in {setting}")),
        _ => None,
    }
}

/// Returns the remedy for an error before PostgreSQL answered the login. `why` is its text with all causes.
fn cure_of_connection(why: &str, config: &Config, setting: &str) -> Option<String> {
    if why.contains("password missing") {
        return Some(format!(
            "PostgreSQL asks for a password and {setting} has none: {}, or PGPASSWORD",
            sample(config)
        ));
    }
    if why.contains("does not support TLS") {
        return Some(format!(
            "{setting} requires TLS by its sslmode, and this server has none: sslmode=disable, or `ssl = on` at the server"
        ));
    }
    if why.contains("channel binding") {
        return Some(format!(
            "{setting} requires channel_binding, which needs TLS and scram-sha-256: sslmode=require, or remove channel_binding"
        ));
    }
    if why.contains("NotValidForName") || why.contains("not valid for name") {
        return Some(format!(
            "the server's certificate is for other names: use one of those in {setting}, or sslmode=verify-ca, which does not check \
             the name"
        ));
    }
    if why.contains("UnknownIssuer") || why.contains("CaUsedAsEndEntity") {
        return Some(format!(
            "no trusted authority has signed the server's certificate: give the authority's certificate by sslrootcert=FILE in \
             {setting}, or by --database-ca FILE"
        ));
    }
    if why.contains("invalid peer certificate") {
        return Some(String::from("the server's certificate has to be replaced"));
    }
    (why.contains("authentication error") || why.contains("invalid configuration"))
        .then(|| format!("check the parameters of {setting}"))
}

/// Returns the remedy for a login that may not read the schema `relay`.
pub fn not_reader(login: &str) -> String {
    format!("this login is not a member of relay_reader: grant relay_reader to {login}")
}

/// Whether the server may accept the login with the other choice of encryption.
pub fn wants_other_encryption(error: &tokio_postgres::Error) -> bool {
    match error.as_db_error() {
        Some(refusal) => refusal.code().code() == "28000" && refusal.message().contains("pg_hba.conf"),
        None => error.to_string() == "error performing TLS handshake",
    }
}

/// Returns an error with its causes.
pub fn chain(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let why = error.to_string();
        // Some errors include their cause in their own text.
        if !text.contains(&why) {
            text += &format!(": {why}");
        }
        source = error.source();
    }
    text
}

/// Returns a sample URL with a password.
fn sample(config: &Config) -> String {
    let user = config.get_user().unwrap_or("user");
    let database = config.get_dbname().unwrap_or(user);
    match config.get_hosts().first() {
        Some(Host::Tcp(_)) => format!("postgres://{user}:PASSWORD@{}/{database}", place(config)),
        _ => format!("postgres://{user}:PASSWORD@127.0.0.1:5432/{database}"),
    }
}

/// Returns the command line of a PostgreSQL tool for the same server.
fn tool(name: &str, config: &Config, last: &str) -> String {
    let mut command = name.to_owned();
    match config.get_hosts().first() {
        Some(Host::Tcp(host)) => command += &format!(" -h {host}"),
        Some(Host::Unix(folder)) => command += &format!(" -h {}", folder.display()),
        None => {}
    }
    if let Some(port) = config.get_ports().first() {
        command += &format!(" -p {port}");
    }
    if let Some(user) = config.get_user().filter(|_| name != "createuser") {
        command += &format!(" -U {user}");
    }
    format!("{command} {last}")
}
