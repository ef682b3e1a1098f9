//! The parameters of a connection string, in both forms of libpq: `postgres://…?…` and `host=… dbname=…`.

/// The end of an error message about a string that cannot be parsed.
pub(super) const EXPECTED: &str = "postgres://user:password@host:port/database is expected";

/// Names and values, in order; the last value of a name counts.
pub(super) struct AddressParameters(pub(super) Vec<(String, String)>);

impl AddressParameters {
    /// Parses either form.
    ///
    /// # Errors
    /// The problem, without any value.
    pub fn read(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err(format!("it is empty: {EXPECTED}"));
        }
        match text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://")) {
            Some(rest) => Self::from_url(rest),
            None if text.contains("://") => Err(format!("it is of another kind: {EXPECTED}")),
            None => Self::from_keywords(text),
        }
    }

    /// `user:password@host:port,host:port/dbname?name=value&…`
    fn from_url(rest: &str) -> Result<Self, String> {
        let mut parameters = Self(Vec::new());
        let (authority, after) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, query) = after.split_once('?').unwrap_or((after, ""));
        let (login, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (login, hosts),
            None => ("", authority),
        };
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (login, None),
        };
        parameters.add("user", user)?;
        parameters.add("password", password.unwrap_or_default())?;
        let (mut names, mut ports) = (Vec::new(), Vec::new());
        for host in hosts.split(',').filter(|host| !host.is_empty()) {
            // An IPv6 address is in brackets and contains colons.
            let end = host.find(']').map_or(0, |bracket| bracket + 1);
            let (name, port) = match host[end..].split_once(':') {
                Some((name, port)) => (&host[..end + name.len()], port),
                None => (host, ""),
            };
            if !port.bytes().all(|byte| byte.is_ascii_digit()) {
                let why =
                    "a port is not a number. In a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25";
                return Err(format!("{why}: {EXPECTED}"));
            }
            names.push(name.trim_matches(['[', ']']));
            ports.push(port);
        }
        parameters.add("host", &names.join(","))?;
        if ports.iter().any(|port| !port.is_empty()) {
            parameters.add("port", &ports.join(","))?;
        }
        parameters.add("dbname", path.strip_prefix('/').unwrap_or_default())?;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            parameters.add(&decoded(name)?, value)?;
        }
        Ok(parameters)
    }

    /// Adds a percent-encoded value, unless it is empty.
    fn add(&mut self, name: &str, value: &str) -> Result<(), String> {
        if !value.is_empty() {
            self.0.push((name.to_owned(), decoded(value)?));
        }
        Ok(())
    }

    /// `name = value name='a value'`
    fn from_keywords(text: &str) -> Result<Self, String> {
        let mut parameters = Self(Vec::new());
        let mut rest = text;
        while !rest.is_empty() {
            let Some((name, after)) = rest.split_once('=') else {
                return Err(format!("it cannot be read: {EXPECTED}, or host=… dbname=… user=…"));
            };
            let (value, after) = quoted_value(after.trim_start())?;
            let name = name.trim();
            if name.is_empty() || name.contains(char::is_whitespace) {
                return Err(format!("it cannot be read: {EXPECTED}, or host=… dbname=… user=…"));
            }
            if !value.is_empty() {
                parameters.0.push((name.to_owned(), value));
            }
            rest = after.trim_start();
        }
        Ok(parameters)
    }

    /// Returns the last value of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(one, _)| one == name).map(|(_, value)| value.as_str())
    }

    /// Overrides the value of a name.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((name.to_owned(), value.into()));
    }
}

/// Splits off a value, which ends at the next space or is in quotes. Returns it and the rest of the text.
fn quoted_value(text: &str) -> Result<(String, &str), String> {
    let (quoted, mut rest) = match text.strip_prefix('\'') {
        Some(rest) => (true, rest.char_indices()),
        None => (false, text.char_indices()),
    };
    let all = rest.as_str();
    let mut value = String::new();
    while let Some((at, letter)) = rest.next() {
        match letter {
            '\\' => value.extend(rest.next().map(|(_, letter)| letter)),
            '\'' if quoted => return Ok((value, &all[at + 1..])),
            letter if !quoted && letter.is_whitespace() => return Ok((value, &all[at..])),
            letter => value.push(letter),
        }
    }
    if quoted { Err(String::from("a quote in it is not closed")) } else { Ok((value, "")) }
}

fn decoded(text: &str) -> Result<String, String> {
    let broken = || String::from("it has an invalid percent-encoding: write % itself as %25");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) else { return Err(broken()) };
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).map_err(|_| broken())
}
