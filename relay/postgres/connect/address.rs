//! The meaning of a database URL: address, login and verification of the server. What the URL leaves open comes from `PGHOST`,
//! `PGUSER` and the other variables of libpq.

use std::path::Path;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::SslMode;

use crate::postgres::connect::parameters::{AddressParameters, EXPECTED};
use crate::tls::{Trust, Verification};

/// Directories of PostgreSQL's Unix sockets: Debian's, and PostgreSQL's default.
const SOCKETS: [&str; 2] = ["/var/run/postgresql", "/tmp"];
/// Timeout of a connection attempt, unless the URL sets one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Parameters that libpq takes from the environment if the URL lacks them.
const ENVIRONMENT: [(&str, &str); 14] = [
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("dbname", "PGDATABASE"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("options", "PGOPTIONS"),
    ("application_name", "PGAPPNAME"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
];

/// Parameters that tokio-postgres reads as libpq does.
const PASSED: [&str; 15] = [
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "options",
    "application_name",
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "channel_binding",
    "load_balance_hosts",
    "sslnegotiation",
];

/// Parameters for encryption and verification; the last is Prisma's.
const SECURITY: [&str; 5] = ["sslmode", "sslrootcert", "sslcert", "sslkey", "sslaccept"];

/// Parameters of libpq without effect on the relay.
const WITHOUT_EFFECT: [&str; 7] = [
    "client_encoding",
    "fallback_application_name",
    "gssencmode",
    "gsslib",
    "krbsrvname",
    "sslcompression",
    "sslsni",
];

/// Parameters of other programs (Prisma, Rails, JDBC, pgx, SQLAlchemy, node-postgres, Doctrine, Supabase's pages) that share
/// the URL.
const OF_OTHERS: [&str; 41] = [
    "adapter",
    "ApplicationName",
    "advisory_locks",
    "charset",
    "checkout_timeout",
    "command_timeout",
    "connection_limit",
    "currentSchema",
    "default_query_exec_mode",
    "encoding",
    "idle_timeout",
    "loginTimeout",
    "max",
    "max_lifetime",
    "min_messages",
    "pgbouncer",
    "pool",
    "pool_max_conn_idle_time",
    "pool_max_conn_lifetime",
    "pool_max_conns",
    "pool_min_conns",
    "pool_size",
    "pool_timeout",
    "prepareThreshold",
    "prepare",
    "prepared_statement_cache_size",
    "prepared_statements",
    "reaping_frequency",
    "reWriteBatchedInserts",
    "schema",
    "schema_search_path",
    "search_path",
    "serverVersion",
    "single_use_connections",
    "socketTimeout",
    "socket_timeout",
    "statement_cache_capacity",
    "statement_cache_size",
    "supa",
    "tcpKeepAlive",
    "uselibpqcompat",
];

/// A parsed database URL.
#[derive(Debug, Clone)]
pub struct Address {
    /// How to connect; the further ones are tried if the server requires or refuses encryption.
    pub attempts: Vec<Config>,
    /// How the server is verified.
    pub trust: Trust,
    /// Notes for the user about the URL, without secrets.
    pub notes: Vec<String>,
}

impl Address {
    /// Parses a URL. `variable` reads the environment; `authority` is a file of certificates, used if the URL names none.
    ///
    /// # Errors
    /// The problem and its remedy, without any value of the URL.
    pub fn parse(
        text: &str,
        authority: Option<&str>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let mut parameters = AddressParameters::read(text)?;
        parameters.add_defaults(variable);
        let notes = parameters.take_supported()?;
        let (modes, trust) = parameters.security(authority)?;
        let config = parameters.config()?;
        let attempts = modes.into_iter().map(|mode| config.clone().ssl_mode(mode).clone()).collect();
        Ok(Self { attempts, trust, notes })
    }
}

impl AddressParameters {
    /// Fills in what the URL leaves open, as libpq does.
    fn add_defaults(&mut self, variable: impl Fn(&str) -> Option<String>) {
        let names_host = self.get("host").is_some() || self.get("hostaddr").is_some();
        for (name, key) in ENVIRONMENT {
            let is_open = self.get(name).is_none() && !(names_host && matches!(name, "host" | "hostaddr"));
            if let Some(value) = variable(key).filter(|value| is_open && !value.is_empty()) {
                self.set(name, value);
            }
        }
        if self.get("user").is_none()
            && let Ok(user) = whoami::username()
        {
            self.set("user", user);
        }
        match (self.get("host"), self.get("hostaddr")) {
            (None, None) => {
                let port = self.get("port").unwrap_or("5432");
                let has_socket = |folder: &&str| Path::new(folder).join(format!(".s.PGSQL.{port}")).exists();
                let folder = SOCKETS.into_iter().find(has_socket).unwrap_or(SOCKETS[0]);
                self.set("host", folder);
            }
            // TLS needs a name for the server.
            (None, Some(addresses)) => {
                let addresses = addresses.to_owned();
                self.set("host", addresses);
            }
            (Some(_), _) => {}
        }
    }

    /// Removes parameters of other programs, with a note for each, and translates those of libpq; refuses unknown ones.
    fn take_supported(&mut self) -> Result<Vec<String>, String> {
        let mut notes = Vec::new();
        for (name, value) in std::mem::take(&mut self.0) {
            match name.as_str() {
                "ssl" if value == "true" => self.set("sslmode", "require"),
                "ssl" => {}
                name if SECURITY.contains(&name) => self.set(name, value),
                "keepalives_count" => self.set("keepalives_retries", value),
                // In milliseconds for libpq, in seconds for tokio-postgres.
                "tcp_user_timeout" => {
                    let time: u64 = value.parse().map_err(|_| wrong(&name, "milliseconds"))?;
                    self.set(&name, time.div_ceil(1000).to_string());
                }
                "target_session_attrs" => match value.as_str() {
                    "any" => self.set(&name, value),
                    "read-write" | "primary" => self.set(&name, "read-write"),
                    _ => return Err(wrong(&name, "read-write (the relay needs the primary)")),
                },
                "gssencmode" if value == "require" => {
                    return Err(wrong(&name, "disable (the relay does not support GSSAPI)"));
                }
                name if WITHOUT_EFFECT.contains(&name) => {}
                name if PASSED.contains(&name) => self.set(name, value),
                name if OF_OTHERS.contains(&name) => {
                    notes.push(format!("the parameter {name} is of another program and is ignored"));
                }
                _ => {
                    return Err(format!(
                        "it has the parameter {name}, which the relay does not know: remove it"
                    ));
                }
            }
        }
        Ok(notes)
    }

    /// Returns the SSL modes, in the order in which they are tried, and how the server is verified.
    fn security(&mut self, authority: Option<&str>) -> Result<(Vec<SslMode>, Trust), String> {
        let (mode, named) = (self.get("sslmode"), self.get("sslrootcert"));
        let of_system = named == Some("system");
        if of_system && mode.is_some_and(|mode| mode != "verify-full") {
            return Err(wrong("sslmode", "verify-full beside sslrootcert=system"));
        }
        let is_strict = of_system || self.get("sslaccept") == Some("strict");
        let mode = match mode {
            Some(mode) if !is_strict || mode == "disable" => mode,
            _ if is_strict => "verify-full",
            _ => "prefer",
        };
        let (modes, verification) = match mode {
            "disable" => (vec![SslMode::Disable], Verification::None),
            "allow" => (vec![SslMode::Disable, SslMode::Require], Verification::None),
            "prefer" => (vec![SslMode::Prefer, SslMode::Disable], Verification::None),
            "require" => (vec![SslMode::Require], Verification::None),
            "verify-ca" => (vec![SslMode::Require], Verification::Authority),
            "verify-full" => (vec![SslMode::Require], Verification::Full),
            _ => return Err(wrong("sslmode", "disable, allow, prefer, require, verify-ca or verify-full")),
        };
        // With a file of authorities, libpq verifies the authority, too; the relay's own setting also verifies the name.
        let verification = match (verification, named, authority) {
            (Verification::None, Some(_), _) => Verification::Authority,
            (Verification::None, None, Some(_)) => Verification::Full,
            (verification, ..) => verification,
        };
        let identity = match (self.get("sslcert"), self.get("sslkey")) {
            (Some(certificate), Some(key)) => Some((certificate.to_owned(), key.to_owned())),
            (None, None) => None,
            _ => return Err(String::from("sslcert and sslkey belong together: give both or none")),
        };
        let file = named.or(authority).filter(|_| !of_system).map(str::to_owned);
        let trust = Trust { verification, authority: file, identity };
        let is_socket =
            self.get("host").is_some_and(|host| host.split(',').all(|host| host.starts_with('/')));
        self.0.retain(|(name, _)| !SECURITY.contains(&name.as_str()));
        Ok(match modes {
            // PostgreSQL has no TLS on Unix sockets, and libpq does not try it there.
            _ if is_socket => (vec![SslMode::Disable], trust),
            // No second attempt without TLS if the server is to be verified.
            modes if modes[0] == SslMode::Prefer && verification > Verification::None => {
                (vec![SslMode::Prefer], trust)
            }
            modes => (modes, trust),
        })
    }

    fn config(&self) -> Result<Config, String> {
        let mut text = String::new();
        for (at, (name, value)) in self.0.iter().enumerate() {
            // Only the last of a name, because the parser would append repeated hosts and ports to each other.
            if self.0[at + 1..].iter().all(|(later, _)| later != name) {
                let value = value.replace('\\', "\\\\").replace('\'', "\\'");
                text += &format!("{name}='{value}' ");
            }
        }
        let mut config: Config = text.parse().map_err(|error: tokio_postgres::Error| {
            let why =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            format!("{why}: {EXPECTED}")
        })?;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        // Short keepalives, because a LISTEN connection only waits: it would not notice a dead peer for hours.
        if self.get("keepalives_idle").is_none() {
            config.keepalives_idle(Duration::from_secs(15));
        }
        if self.get("keepalives_interval").is_none() {
            config.keepalives_interval(Duration::from_secs(5));
        }
        if self.get("keepalives_retries").is_none() {
            config.keepalives_retries(3);
        }
        if self.get("tcp_user_timeout").is_none() {
            config.tcp_user_timeout(Duration::from_secs(30));
        }
        Ok(config)
    }
}

fn wrong(name: &str, expected: &str) -> String {
    format!("its {name} is not understood: it should be {expected}")
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::Host;

    use super::*;

    fn parse(text: &str) -> Result<Address, String> {
        Address::parse(text, None, |_| None)
    }

    fn config(text: &str) -> Config {
        parse(text).unwrap_or_else(|why| panic!("{text}: {why}")).attempts.remove(0)
    }

    #[test]
    fn unix_sockets_are_accepted_in_every_form_of_libpq() {
        for text in [
            "postgres:///app?host=/run/pg&user=me",
            "postgresql://me@%2Frun%2Fpg/app",
            "postgres://me@%2frun%2fpg:5432/app?sslmode=require",
            "postgres://me@/app?host=%2Frun%2Fpg",
            "host=/run/pg dbname=app user=me",
            "host = '/run/pg'  user='me' dbname = app sslmode=verify-full",
        ] {
            let address = parse(text).unwrap();
            assert_eq!(address.attempts.len(), 1, "{text}");
            let config = &address.attempts[0];
            assert_eq!(config.get_hosts(), [Host::Unix("/run/pg".into())], "{text}");
            assert_eq!((config.get_dbname(), config.get_user()), (Some("app"), Some("me")), "{text}");
            assert_eq!(config.get_ssl_mode(), SslMode::Disable, "{text}");
        }
        assert!(matches!(config("postgres:///app").get_hosts(), [Host::Unix(_)]));
    }

    #[test]
    fn parameters_missing_in_the_url_come_from_the_variables_of_libpq() {
        let variable = |name: &str| {
            let value = match name {
                "PGHOST" => "db.example",
                "PGPORT" => "6000",
                "PGUSER" => "me",
                "PGPASSWORD" => "it's secret",
                "PGSSLMODE" => "require",
                "PGDATABASE" => "app",
                _ => "",
            };
            Some(value.to_owned())
        };
        let all = Address::parse("postgres://", None, variable).unwrap().attempts.remove(0);
        assert_eq!(all.get_hosts(), [Host::Tcp("db.example".into())]);
        assert_eq!((all.get_ports(), all.get_dbname()), (&[6000][..], Some("app")));
        assert_eq!((all.get_user(), all.get_password()), (Some("me"), Some(&b"it's secret"[..])));
        assert_eq!(all.get_ssl_mode(), SslMode::Require);
        let some = Address::parse("postgres://you@here:1/x?sslmode=disable", None, variable).unwrap();
        assert_eq!((some.attempts[0].get_user(), some.attempts[0].get_ports()), (Some("you"), &[1][..]));
        assert_eq!(some.attempts[0].get_ssl_mode(), SslMode::Disable);
    }

    #[test]
    fn each_sslmode_has_the_meaning_of_libpq() {
        use SslMode::{Disable, Prefer, Require};
        use Verification::{Authority, Full, None};
        for (query, modes, verification) in [
            ("", vec![Prefer, Disable], None),
            ("sslmode=disable", vec![Disable], None),
            ("sslmode=allow", vec![Disable, Require], None),
            ("sslmode=prefer", vec![Prefer, Disable], None),
            ("sslmode=require", vec![Require], None),
            ("ssl=true", vec![Require], None),
            ("sslmode=require&sslrootcert=ca.pem", vec![Require], Authority),
            ("sslrootcert=ca.pem", vec![Prefer], Authority),
            ("sslmode=verify-ca", vec![Require], Authority),
            ("sslmode=verify-full&sslrootcert=ca.pem", vec![Require], Full),
            ("sslrootcert=system", vec![Require], Full),
            ("sslaccept=strict&sslmode=require", vec![Require], Full),
        ] {
            let address = parse(&format!("postgres://me@here/app?{query}")).unwrap();
            let got: Vec<_> = address.attempts.iter().map(Config::get_ssl_mode).collect();
            assert_eq!((got, address.trust.verification), (modes, verification), "{query}");
            let file = query.contains("ca.pem").then_some("ca.pem");
            assert_eq!(address.trust.authority.as_deref(), file, "{query}");
        }
        let ours = Address::parse("postgres://me@here/app", Some("our.pem"), |_| Option::None).unwrap();
        assert_eq!((ours.trust.verification, ours.attempts.len()), (Full, 1));
    }

    #[test]
    fn parameters_of_other_programs_are_ignored_with_a_note() {
        for (query, noted) in [
            ("schema=public&pgbouncer=true&connection_limit=1", 3),
            ("pool=5&prepared_statements=false", 2),
            ("currentSchema=x", 1),
            ("application_name=x&options=-c%20a%3Db&connect_timeout=3&channel_binding=prefer", 0),
            ("target_session_attrs=primary&client_encoding=UTF8&gssencmode=disable&keepalives_count=2", 0),
        ] {
            let address = parse(&format!("postgres://me@here/app?{query}")).unwrap();
            assert_eq!(address.notes.len(), noted, "{query}: {:?}", address.notes);
        }
        let config = config("postgres://me@here/app?application_name=x&options=-c%20a%3Db&connect_timeout=3");
        assert_eq!((config.get_application_name(), config.get_options()), (Some("x"), Some("-c a=b")));
        assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(3)));
    }

    #[test]
    fn errors_name_the_parameter_and_contain_no_value() {
        for (text, named) in [
            ("", "empty"),
            ("mysql://me@here/app", "another kind"),
            ("postgres://me@here/app?sslmode=maybe-hidden", "sslmode"),
            ("postgres://me@here/app?sslcrl=hidden", "sslcrl, which the relay does not know: remove it"),
            ("postgres://me@here/app?require_auth=hidden", "require_auth"),
            ("postgres://me@here/app?target_session_attrs=standby", "read-write"),
            ("postgres://me@here/app?connect_timeout=hidden", "connect_timeout"),
            ("postgres://me:hid/den@here:5432/app", "%2F"),
            ("postgres://me:hid%den@here/app", "%25"),
            ("postgres://me@here/app?sslmode=require&sslrootcert=system", "verify-full"),
            ("postgres://me@here/app?sslcert=hidden", "sslkey"),
            ("here hidden", "cannot be read"),
            ("host=here password='hidden", "quote"),
        ] {
            let why = parse(text).err().unwrap_or_else(|| panic!("{text} is taken"));
            assert!(why.contains(named) && !why.contains("hid"), "{text}: {why}");
        }
    }

    #[test]
    fn passwords_and_hosts_are_read_as_they_are_written() {
        let read = config("postgres://m%40e:p@ss%2F%3A'\\@[::1]:6000,other,third:7000/a%20b");
        assert_eq!(read.get_user(), Some("m@e"));
        assert_eq!(read.get_password(), Some(&b"p@ss/:'\\"[..]));
        let hosts = ["::1", "other", "third"].map(|host| Host::Tcp(host.to_owned()));
        assert_eq!((read.get_hosts(), read.get_ports()), (&hosts[..], &[6000, 5432, 7000][..]));
        assert_eq!(read.get_dbname(), Some("a b"));
        assert_eq!(
            config("postgres://here/app?options=-c%20a%3Db@c").get_hosts(),
            [Host::Tcp("here".into())]
        );
        assert_eq!(config("hostaddr=127.0.0.1 user=me").get_hosts(), [Host::Tcp("127.0.0.1".into())]);
    }
}
