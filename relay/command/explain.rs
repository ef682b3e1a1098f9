//! `relay explain`: why a user receives the rows of a table, or does not.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::{Map, Value};

use crate::auth::token::TokenError;
use crate::auth::verifier::{self, TokenSettings, Verifier};
use crate::command::token::{bearer, usable};
use crate::feed::explain::explainer::{ExplainRequest, ExplainTarget, Explainer};
use crate::feed::explain::explanation::{Explanation, PolicyPart, RowPart, one_line};
use crate::feed::subscribe::RequestError;
use crate::model::identity::claims::Claims;
use crate::model::policy::visibility::Identity;
use crate::postgres::catalog::CatalogCache;
use crate::postgres::connect::pool::Server;
use crate::postgres::filter_compiler::FilterCompiler;
use crate::postgres::install;

type ExplainFailure = Box<dyn std::error::Error + Send + Sync>;

/// The table and the user to explain.
#[derive(Args)]
pub struct ExplainOptions {
    /// The table, as in SQL
    table: String,
    /// For the bearer of this token; its signature is checked only with --jwt-secret
    #[arg(long, env = "RELAY_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<String>,
    /// The secret with which `relay serve` verifies tokens
    #[arg(long, env = "RELAY_JWT_SECRET", hide_env_values = true, value_name = "SECRET")]
    jwt_secret: Option<String>,
    /// Without a token: for a user with this role
    #[arg(long, default_value = "authenticated", conflicts_with = "token")]
    role: String,
    /// … and this id, which auth.uid() returns
    #[arg(long, value_name = "UUID", conflicts_with = "token")]
    sub: Option<String>,
    /// … and more claims, as a JSON object
    #[arg(long, value_name = "JSON", conflicts_with = "token")]
    claims: Option<String>,
    /// With this filter, e.g. list_id=eq.7
    #[arg(long, value_name = "FILTER")]
    filter: Option<String>,
    /// Whether the user sees the row with this key: a value, or a JSON object of columns
    #[arg(long, value_name = "VALUE")]
    key: Option<String>,
    /// Whether the user sees this row: a JSON object of all columns; it need not be in the table
    #[arg(long, value_name = "JSON", conflicts_with = "key")]
    row: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Statement timeout.
const LIMIT: Duration = Duration::from_secs(10);

/// Prints the explanation. Returns whether the user would receive rows.
///
/// # Errors
/// When an option is invalid, or a query fails.
pub async fn run(options: &ExplainOptions, server: &Server, judge: &Server) -> Result<bool, ExplainFailure> {
    install::check(&server.connect().await?).await?;
    let login = judge.login().map(str::to_owned);
    let filters = FilterCompiler::new(server.pool(1, LIMIT)?, login.clone());
    let catalog = Arc::new(CatalogCache::new(server.pool(2, LIMIT)?, login));
    let identity = Identity::new(claims(options)?);
    let is_without_user =
        identity.claims().sub().is_none() && !matches!(&*options.role, "anon" | "service_role");
    let request = ExplainRequest {
        table: options.table.clone(),
        token_refused: token_refused(options, &identity)?,
        identity,
        filter: options.filter.clone(),
        bound: None,
        row: target(options)?,
    };
    let explainer = Explainer::new(server.clone(), judge.clone(), catalog, filters, LIMIT);
    let explanation = match explainer.explain(&[request]).await {
        Ok(mut explanations) => explanations.remove(0),
        Err(RequestError::Refused(why)) => return Err(why.to_string().into()),
        Err(RequestError::Failed(error)) => return Err(error.into()),
    };
    let mut out = std::io::stdout().lock();
    match options.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&explanation)?)?,
        false => write!(out, "{}", as_text(&explanation, is_without_user))?,
    }
    Ok(explanation.would_receive)
}

fn claims(options: &ExplainOptions) -> Result<Claims, ExplainFailure> {
    if let Some(token) = &options.token {
        return Ok(bearer(token)?);
    }
    let more = options.claims.as_deref().unwrap_or("{}");
    let mut claims: Map<String, Value> =
        serde_json::from_str(more).map_err(|error| format!("--claims is not a JSON object: {error}"))?;
    claims.insert(String::from("role"), Value::from(options.role.clone()));
    if let Some(sub) = &options.sub {
        claims.insert(String::from("sub"), Value::from(sub.clone()));
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    claims.entry("exp").or_insert_with(|| Value::from(now + 3600));
    Ok(usable(&Value::Object(claims).to_string())?)
}

/// Returns why a relay refuses the token. Its signature is checked when the secret is given and it is signed by one.
fn token_refused(options: &ExplainOptions, identity: &Identity) -> Result<Option<String>, ExplainFailure> {
    let now = verifier::now();
    if let Some(ago) = now.checked_sub(identity.claims().expires_at()) {
        let text = format!("the token expired {ago} seconds ago: relay token --sub UUID makes another one");
        return Ok(Some(text));
    }
    let (Some(token), Some(secret)) = (&options.token, &options.jwt_secret) else { return Ok(None) };
    let secrets = vec![secret.clone()];
    let verifier = match Verifier::new(&TokenSettings { secrets, ..TokenSettings::default() }) {
        Ok(verifier) => verifier,
        Err(error) => {
            let note = format!(
                "note: the signature of the token is not checked: --jwt-secret (RELAY_JWT_SECRET): {error}"
            );
            writeln!(std::io::stderr(), "{note}")?;
            return Ok(None);
        }
    };
    Ok(match verifier.verify(token, now) {
        // Without a fitting secret, a key of the relay may have signed it.
        Ok(_) | Err(TokenError::Signer) => None,
        Err(error) => Some(error.advised_text()),
    })
}

fn target(options: &ExplainOptions) -> Result<Option<ExplainTarget>, ExplainFailure> {
    if let Some(row) = &options.row {
        let columns: Map<String, Value> =
            serde_json::from_str(row).map_err(|error| format!("--row is not a JSON object: {error}"))?;
        return Ok(Some(ExplainTarget::Image(Value::Object(columns).to_string())));
    }
    Ok(options.key.clone().map(ExplainTarget::Key))
}

/// Formats the explanation for a terminal: the verdict, then the reasons. `is_without_user`: the claims name none, which is easily
/// forgotten.
fn as_text(of: &Explanation, is_without_user: bool) -> String {
    let user = if is_without_user { " without a user: name one by --sub UUID or --token" } else { "" };
    let mut lines = vec![of.first_line(), format!("{} for the role {}{user}", of.table, of.role)];
    let mut reasons: Vec<String> = of.blockers.iter().map(|blocker| format!("blocked: {blocker}")).collect();
    if !of.hidden_columns.is_empty() {
        reasons.push(format!("columns that the role may not read: {}", of.hidden_columns.join(", ")));
    }
    if let Some(kind) = of.way {
        describe_way(of, kind, &mut reasons);
    }
    if let Some(filter) = &of.filter {
        reasons.push(match &filter.refused {
            None => format!("the filter {} is accepted", filter.text),
            Some(why) => format!("the filter {} is refused: {why}", filter.text),
        });
    }
    if let Some(row) = &of.row {
        describe_row(row, &mut reasons);
    }
    lines.extend(reasons.into_iter().map(|reason| format!("  {reason}")));
    lines.join("\n") + "\n"
}

/// Adds how rows are decided: the strategy, what rules out a cheaper one, the index, and the policies.
fn describe_way(of: &Explanation, kind: &str, lines: &mut Vec<String>) {
    let cost = match kind {
        "compiled" => ", without a query to PostgreSQL",
        "inverted" => ", by one query a page for the subscribers who may see its rows",
        _ => ", by one query a page for each distinct set of the claims that are read",
    };
    lines.push(format!("decided: {kind}{cost}"));
    for obstacle in &of.obstacles {
        lines.push(format!("  because of: {}", obstacle.part));
        lines.push(format!("  where {}", obstacle.why));
    }
    lines.push(match &of.claims_read {
        None => String::from("claims read: any"),
        Some(claims) if claims.is_empty() => String::from("claims read: none"),
        Some(claims) => format!("claims read: {}", claims.join(", ")),
    });
    lines.push(match &of.index {
        None => String::from("index: none, each change of the table is evaluated"),
        Some(keys) if keys.is_empty() => String::from("index: no row can be seen with these claims"),
        Some(keys) => format!("index: {}", keys.join("; or ")),
    });
    lines.extend(of.questions.iter().map(|question| format!("query to PostgreSQL: {question}")));
    lines.extend(of.policies.iter().map(|policy| {
        let PolicyPart { kind, name, way, .. } = policy;
        let says = policy.says.map_or_else(String::new, |says| format!(", of this row: {says}"));
        format!("{kind} policy {name} ({way}{says}): {}", one_line(&policy.condition))
    }));
}

fn describe_row(row: &RowPart, lines: &mut Vec<String>) {
    lines.push(match (row.found, row.allowed, row.by.as_slice()) {
        (false, ..) => String::from("there is no such row"),
        (_, true, []) => String::from("the row is seen: no policy applies"),
        (_, true, by) => format!("the row is seen, by {}", by.join(", ")),
        (_, false, []) => String::from("the row is hidden: no permissive policy lets it through"),
        (_, false, by) => format!("the row is hidden by {}", by.join(", ")),
    });
    if let Some(matches) = row.matches {
        lines.push(format!("it {} the filter", if matches { "matches" } else { "does not match" }));
    }
}
